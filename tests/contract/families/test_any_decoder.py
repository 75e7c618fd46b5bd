"""Every kind of causal language model that transformers has: built, trained, saved, opened by stock classes, sampled.

Tiny random weights; what a type can do is read off the generated table, and is tried here.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from recipes.data.tokenizers import TrainTokenizer
from recipes.models.decoder import AnyDecoder
from recipes.models.type_table import TypeRecord, type_records
from recipes.stages.lora import Lora
from recipes.stages.optim import AdamW
from recipes.stages.sharding import Shard
from tests.tiers import tiered
from trainers.data.tokenizer import Tokenization, train_tokenizer
from trainers.engine.build import build_engine, parameter_group
from trainers.inference.generation import generate, sampling_settings
from trainers.models.families import build_language_model
from trainers.models.folders import file_tensors, probe, verify_folder, write_model
from trainers.models.load import load_model
from trainers.models.lora import add_adapter
from trainers.models.merged_adapters import base_tensors, merged_tensors
from trainers.models.protocol import TokenizerFacts
from trainers.models.tiny import tiny_keys
from trainers.models.token_losses import TokenLosses

TYPES = (
    "llama", "mistral", "ministral", "qwen2", "qwen3", "qwen3_moe", "gemma2", "gemma3_text", "phi3", "olmo2", "granite",
    "smollm3", "gpt2", "gpt_neox", "opt", "falcon", "stablelm", "cohere", "mixtral", "deepseek_v3", "glm4", "mamba",
)  # fmt: skip
QUICK = ("mistral", "qwen3_moe", "gemma2", "opt", "cohere", "deepseek_v3", "mamba")
"""Those whose table entries differ most from each other's."""
TEXTS = ["the cat sat on the mat and looked at the moon", "two cats and one dog ran home", "it rained all day long"] * 4
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def tokenization() -> Tokenization:
    """A tokenizer for all types."""
    return train_tokenizer(TrainTokenizer(train="bpe", vocab_size=300), TEXTS)


def small(model_type: str, tokenization: Tokenization) -> Any:
    """A tiny model of a type, as a recipe builds it."""
    import transformers

    keys = tiny_keys(transformers.CONFIG_MAPPING[model_type])
    known = {name: value for name, value in keys.items() if name in type_records()[model_type].keys}
    if model_type not in ("llama", "qwen3", "gpt2"):  # which have classes of their own
        known = AnyDecoder.model_validate({"family": "decoder", "type": model_type, **known}).config_keys()
    facts = TokenizerFacts(tokenization.vocab_size, tokenization.eos_id, tokenization.pad_id, tokenization.bos_id)
    model: Any = build_language_model({"family": "decoder", "type": model_type, **known}, facts, seed=0, device=CPU)
    with torch.no_grad():  # wide enough that a wrong mask shows
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(0.2 / parameter.std().clamp(min=1e-6))
    return model


def rows_of(tokenization: Tokenization) -> list[Tensor]:
    return [torch.tensor(tokenization.encode(text)) for text in TEXTS[:3]]


def batch_of(rows: list[Tensor], record: TypeRecord) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Ids, segments, positions and targets: packed where the type can, else a row each."""
    if record.packing is None:
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        segments = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
        positions = torch.arange(ids.shape[1])[None] * segments
    else:
        padding = torch.zeros(3, dtype=torch.long)
        ids = torch.cat([*rows, padding])[None]
        segments = torch.cat([*(torch.full_like(row, i + 1) for i, row in enumerate(rows)), padding])[None]
        positions = torch.cat([*(torch.arange(len(row)) for row in rows), padding])[None]
    return ids, segments, positions, (segments > 0) & (positions > 0)


def stock_loss(model: Any, rows: list[Tensor], attention: str) -> float:
    """The summed loss of rows by the stock class alone, each by itself."""
    before = model.config._attn_implementation
    model.set_attn_implementation(attention)
    with torch.no_grad():
        losses = [
            torch.nn.functional.cross_entropy(
                model(input_ids=row[None], use_cache=False).logits[0, :-1], row[1:], reduction="sum"
            )
            for row in rows
        ]
    model.set_attn_implementation(before)
    return float(torch.stack(losses).sum())


@pytest.mark.parametrize("model_type", tiered(TYPES, QUICK))
def test_a_type_trains_saves_opens_and_writes(model_type: str, tokenization: Tokenization, tmp_path: Path) -> None:
    import transformers

    record, rows = type_records()[model_type], rows_of(tokenization)
    model = small(model_type, tokenization)
    losses, batch = TokenLosses(model), batch_of(rows, record)
    loss = losses(*batch)
    assert loss.item() == pytest.approx(stock_loss(model.eval(), rows, "eager"), rel=2e-4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    loss.backward()
    optimizer.step()
    assert losses(*batch).item() < loss.item()

    folder = tmp_path / "whole"
    live = probe(model, "language_model", model.named_parameters())
    files = tokenization.files()
    write_model(
        folder,
        "language_model",
        model.config,
        file_tensors(model, dict(model.named_parameters())).items(),
        files,
        dtype=torch.float32,
    )
    verify_folder(folder, "language_model", live)
    model.eval()
    ids = rows[0][None]
    stock = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation=record.attention).eval()
    with torch.no_grad():
        torch.testing.assert_close(stock(input_ids=ids).logits, model(input_ids=ids).logits, rtol=2e-4, atol=2e-4)
    check_sampling(stock, folder, rows, tokenization)
    if "adapters" not in record.lacks:
        check_adapter(folder, batch, tokenization, tmp_path / "merged")


def check_sampling(stock: Any, folder: Path, rows: list[Tensor], tokenization: Tokenization) -> None:
    """The local sampler writes what transformers' own `generate` writes, in a batch of prompts of other lengths."""
    ours: Any = load_model(folder, "language_model", device=CPU).eval()
    width = max(map(len, rows))
    ids = torch.stack([torch.nn.functional.pad(row, (width - len(row), 0)) for row in rows])
    mask = torch.stack([torch.arange(width) >= width - len(row) for row in rows])
    found = generate(ours, ids, mask, sampling_settings(tokenization, 8), None)
    for place, row in enumerate(rows):
        wanted = stock.generate(
            row[None], attention_mask=torch.ones_like(row)[None], max_new_tokens=8, do_sample=False,
            pad_token_id=tokenization.pad_id, eos_token_id=tokenization.eos_id,
        )[0, len(row) :]  # fmt: skip
        written = found.tokens_BR[place][found.response_mask_BR[place]]
        assert written.tolist() == wanted.tolist()


def check_adapter(folder: Path, batch: Any, tokenization: Tokenization, target: Path) -> None:
    """An adapter learns alone, and the merged model is right."""
    model: Any = load_model(folder, "language_model", device=CPU)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    add_adapter(model, Lora(r=2), seed=1)
    losses = TokenLosses(model)
    loss = losses(*batch)
    loss.backward()
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    torch.optim.AdamW(learning, lr=1e-2).step()
    assert losses(*batch).item() < loss.item()
    named = dict(model.named_parameters())
    kept = base_tensors(named)
    assert all(torch.equal(kept[name], tensor) for name, tensor in before.items())
    merged = merged_tensors(model, named)
    write_model(
        target,
        "language_model",
        model.config,
        file_tensors(model, merged).items(),
        tokenization.files(),
        dtype=torch.float32,
    )
    whole = TokenLosses(load_model(target, "language_model", device=CPU))
    assert whole(*batch).item() == pytest.approx(losses(*batch).item(), rel=1e-4)


@pytest.mark.parametrize("model_type", ["gemma2", "mamba"])
def test_a_bf16_model_s_files_are_the_live_model(model_type: str, tokenization: Tokenization, tmp_path: Path) -> None:
    """Of gemma2 the embeddings' scale is a buffer that files do not hold; mamba adds up its states in fp32."""
    model, rows = small(model_type, tokenization), rows_of(tokenization)
    losses = TokenLosses(model)
    group = parameter_group("model", losses, AdamW(lr=1e-3))
    shard = Shard(engine="plain", zero=0, precision="bf16")
    build_engine(losses, [group], shard, clip=1.0, device=CPU)
    losses(*batch_of(rows, type_records()[model_type])).backward()
    live = probe(model, "language_model", model.named_parameters())
    tensors = file_tensors(model, dict(model.named_parameters())).items()
    write_model(tmp_path, "language_model", model.config, tensors, tokenization.files(), dtype=torch.bfloat16)
    verify_folder(tmp_path, "language_model", live)
