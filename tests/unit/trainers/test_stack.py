"""A model opened with its adapters is the one that was written: LoRA on DoRA, every layout of weights."""

from pathlib import Path
from typing import Any

import pytest
import torch

from recipes.stages.lora import Lora
from trainers.models.families import build_language_model
from trainers.models.folders import write_adapter, write_model
from trainers.models.lora import activate, adapter_tensors, add_adapter, is_adapter_key, start_names
from trainers.models.protocol import TokenizerFacts
from trainers.models.stack import load_exact, load_stack
from trainers.store.adapters import Weights

CPU = torch.device("cpu")
DECODER = {"family": "decoder", "max_position_embeddings": 64}
TYPES: dict[str, dict[str, Any]] = {
    "llama": DECODER
    | {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4},
    "gpt2": {"family": "decoder", "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "t5": {
        "family": "encoder_decoder", "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4,
        "num_decoder_layers": 2,
    },
}  # fmt: skip
ADAPTERS = [Lora(r=2, alpha=6, dropout=0.5, dora=True), Lora(r=3, alpha=4, rank_stabilised=True, dropout=0.5)]


def write(folder: Path, kind: str) -> tuple[Any, Weights]:
    """A live model in bf16 with a LoRA on a DoRA adapter, and its folders."""
    task: Any = "seq2seq_model" if kind == "t5" else "language_model"
    facts = TokenizerFacts(60, 0, 1)
    model: Any = build_language_model({"type": kind, **TYPES[kind]}, facts, seed=3, device=CPU)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)
    write_model(folder / "base", task, model.config, model.named_parameters(), {}, dtype=torch.bfloat16)
    names, generator = start_names(len(ADAPTERS)), torch.Generator().manual_seed(1)
    for name, lora in zip(names, ADAPTERS, strict=True):
        config = add_adapter(model, lora, seed=9, name=name)
        for key, parameter in model.named_parameters():
            if is_adapter_key(key, name) and "magnitude" not in key:
                parameter.data = torch.randn(parameter.shape, generator=generator).to(torch.bfloat16) * 0.05
        own = adapter_tensors(dict(model.named_parameters()), name)
        write_adapter(folder / name, config, own.items(), base_digest="b" * 64, dtype=torch.bfloat16)
    activate(model, names)
    return model.eval(), Weights(folder / "base", ("a", *names), tuple(folder / name for name in names), "bfloat16")


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    ids = torch.arange(2, 26).view(2, 12)
    asked = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    found: torch.Tensor = model.eval()(input_ids=ids, use_cache=False, **asked).logits
    return found


@pytest.mark.parametrize("kind", list(TYPES))
def test_what_was_live_is_opened(kind: str, tmp_path: Path) -> None:
    live, weights = write(tmp_path, kind)
    task: Any = "seq2seq_model" if kind == "t5" else "language_model"
    opened = load_stack(weights, task, device=CPU, dtype=torch.bfloat16)
    assert torch.equal(logits(opened), logits(live))
    for parameter in live.parameters():
        parameter.data = parameter.data.float()
    wanted = logits(live)
    torch.testing.assert_close(logits(load_stack(weights, task, device=CPU)), wanted, rtol=0, atol=0)
    exact = load_exact(weights, task, device=CPU)
    torch.testing.assert_close(logits(exact), wanted, rtol=1e-4, atol=1e-5 * float(wanted.abs().max()))
    assert not any("lora_" in name for name, _ in exact.named_parameters())
    assert all(parameter.requires_grad for parameter in exact.parameters())
    assert not any(parameter.requires_grad for parameter in opened.parameters())
    assert (logits(load_exact(Weights(weights.folder, ("a",)), task, device=CPU)) - wanted).abs().max() > 1e-3
