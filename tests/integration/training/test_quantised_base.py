"""QLoRA: adapters that learn on a base in few bits, verified and opened again by stock classes."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import nn
from transformers import AutoModelForCausalLM

from recipes.errors import Preempted
from recipes.stages.finetune import Finetune
from tests.integration.rlhf.workshop import CPU, WORDS, Listener, Workshop, jsonl, open_workshop, sizes_of
from trainers.models.decoder import build_decoder
from trainers.models.folders import write_model
from trainers.models.protocol import TokenizerFacts
from trainers.models.quantised import QuantisedLinear, decoded_once
from trainers.models.stack import load_exact, load_stack
from trainers.runtime.low_bits import NF4, Int8, Nf4
from trainers.store.adapters import weights_of
from trainers.store.export import export
from trainers.store.manifest import ArtifactManifest, files_digest
from trainers.tasks.language_model import run_language_model

GPT2 = {"type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}
UP = "model.layers.0.mlp.up_proj"
TOKENS = torch.randint(5, 300, (2, 24), generator=torch.Generator().manual_seed(0))


class Stopping(Listener):
    """Asks for a stop after the second step."""

    def stop_requested(self) -> bool:
        return any(progress.get("step", 0) >= 2 for _, progress in self.phases)


def tune_spec(start: str, method: str | None, precision: str = "bf16", **lora: Any) -> Finetune:
    train = {
        "steps": 4, "global_batch": 8, "sequence_length": 64, "optimizer": {"lr": 1e-2}, "evaluation_rows": 4,
        "save_every": 2,
    }  # fmt: skip
    return Finetune.model_validate(
        {
            "kind": "finetune",
            "init_from": start,
            "lora": {"r": 4, "alpha": 8, "quantize": method, **lora},
            "data": {"source": "jsonl", "files": ["answers.jsonl"], "hold_out": 0.2},
            "train": train,
            "shard": {"engine": "plain", "precision": precision},
        }
    )


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    made = open_workshop(tmp_path_factory.mktemp("quantised"), width=32)
    pairs = [{"prompt": f"What is {a}?", "completion": f"{a} {b}."} for a in WORDS for b in WORDS]
    jsonl(made.folder / "answers.jsonl", pairs)
    facts = TokenizerFacts(made.tokenization.vocab_size, made.tokenization.eos_id, made.tokenization.pad_id)
    own = {"base": {"type": "llama", "max_position_embeddings": 128, **sizes_of(32)}, "gpt2": GPT2}
    for name, keys in own.items():
        model: Any = build_decoder(keys, facts, seed=1, device=CPU)
        given = (model.config, model.named_parameters(), made.tokenization.files())
        write_model(made.folder / name / "model", "language_model", *given, dtype=torch.bfloat16)
        entries = made.store.objects.put_folder(made.folder / name)
        digest = files_digest(entries)
        manifest = ArtifactManifest(fingerprint=digest, digest=digest, kind="model", stage=name, files=entries)
        made.made[name] = made.store.put_artifact(manifest).manifest
    return made


def tuned(
    workshop: Workshop, name: str, start: str, method: str | None, precision: str = "bf16", **lora: Any
) -> ArtifactManifest:
    """Train, verify and commit, once."""
    if name not in workshop.made:
        given = {"init_from": start}
        candidate = run_language_model(tune_spec(start, method, precision, **lora), workshop.context(name, given))
        workshop.keep(name, candidate, given)
    return workshop.made[name]


def test_each_value_becomes_the_nearest_level_of_its_block() -> None:
    weight = torch.randn(6, 50, generator=torch.Generator().manual_seed(0))
    decoded = Nf4.decode(*Nf4.encode(weight), (6, 50))
    values, found = weight.flatten().tolist(), decoded.flatten().tolist()
    for start in range(0, 300, 64):
        block = values[start : start + 64]
        largest = max(map(abs, block))
        nearest = [min(NF4, key=lambda level: abs(level - value / largest)) * largest for value in block]
        assert found[start : start + 64] == pytest.approx(nearest, rel=1e-6)
    rows = Int8.decode(*Int8.encode(weight), (6, 50))
    assert bool(((rows - weight).abs() <= weight.abs().amax(dim=1, keepdim=True) / 127 / 2 * 1.001).all())


def test_bits_are_those_of_bitsandbytes() -> None:
    functional = pytest.importorskip("bitsandbytes.functional", reason="bitsandbytes is not installed")
    weight = torch.randn(96, 128, generator=torch.Generator().manual_seed(1))
    codes, state = functional.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    mine, scales = Nf4.encode(weight)
    assert torch.equal(codes.flatten(), mine)
    assert torch.equal(state.absmax, scales)
    assert torch.equal(functional.dequantize_4bit(codes, state), Nf4.decode(mine, scales, (96, 128)))


def test_weights_that_are_decoded_once_are_the_same_and_are_let_go() -> None:
    torch.manual_seed(0)
    model, given = nn.Sequential(QuantisedLinear(nn.Linear(24, 10), "nf4", torch.bfloat16)), torch.randn(3, 24)
    (layer,) = model
    assert isinstance(layer, QuantisedLinear)
    wanted = model(given)
    with decoded_once(model):
        kept = layer.whole
        assert torch.equal(model(given), wanted)
    assert kept is not None
    assert layer.whole is None


@pytest.mark.parametrize("method", ["nf4", "int8"])
def test_the_gradient_is_that_of_the_decoded_weight(method: Any) -> None:
    torch.manual_seed(0)
    layer = QuantisedLinear(nn.Linear(24, 10), method, torch.float32)
    given = torch.randn(3, 5, 24, requires_grad=True)
    same = given.detach().clone().requires_grad_()
    layer(given).square().sum().backward()
    (nn.functional.linear(same, layer.weight) + layer.bias).square().sum().backward()
    assert given.grad is not None
    torch.testing.assert_close(given.grad, same.grad)


@pytest.mark.parametrize(
    ("start", "name", "method", "precision"),
    [
        ("base", UP, "nf4", "bf16"),
        pytest.param("base", UP, "int8", "fp32", marks=pytest.mark.long),
        ("gpt2", "transformer.h.0.attn.c_attn", "nf4", "bf16"),
        pytest.param("gpt2", "transformer.h.0.attn.c_attn", "int8", "fp32", marks=pytest.mark.long),
    ],
)
def test_the_merged_model_is_the_rounded_base_with_the_adapter(
    workshop: Workshop, start: str, name: str, method: str, precision: str, tmp_path: Path
) -> None:
    made = tuned(workshop, f"{start}-{method}-{precision}", start, method, precision)
    assert made.quantized == method
    base = workshop.store.folder(workshop.made[start], "model")
    adapter = workshop.store.folder(made, "adapter")
    stock: Any = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), adapter)
    merged: Any = AutoModelForCausalLM.from_pretrained(workshop.store.folder(made, "model"), dtype=torch.float32)
    layer = stock.base_model.model.get_submodule(name)
    codec = {"nf4": Nf4, "int8": Int8}[method]
    weight = layer.base_layer.weight.detach()
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[precision]
    weight_OI = weight.T.contiguous() if start == "gpt2" else weight
    decoded = codec.decode(*codec.encode(weight_OI), (weight_OI.shape[0], weight_OI.shape[1])).to(dtype).float()
    rounded = decoded.T if start == "gpt2" else decoded
    wanted = rounded + layer.get_delta_weight("default").detach()
    torch.testing.assert_close(merged.get_submodule(name).weight, wanted.to(dtype).float(), rtol=1e-6, atol=1e-7)
    assert not torch.equal(rounded, weight)
    folder = export(workshop.store, made, tmp_path / "out")
    exported: Any = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
    assert torch.equal(exported.get_submodule(name).weight, rounded)


def test_a_later_stage_learns_on_the_same_rounded_base(workshop: Workshop) -> None:
    tuned(workshop, "base-nf4-bf16", "base", "nf4")
    second = tuned(workshop, "second", "base-nf4-bf16", "nf4", target_modules=["q_proj"])
    third = tuned(workshop, "third", "second", None)
    assert (len(second.stack), len(third.stack), third.quantized) == (2, 3, "nf4")
    weights = weights_of(workshop.store, third)
    whole: Any = load_exact(weights, "language_model", device=CPU)
    with torch.no_grad():
        files: Any = AutoModelForCausalLM.from_pretrained(workshop.store.folder(third, "model"), dtype=torch.float32)
        found, rounded = (model.eval()(TOKENS).logits for model in (whole, files))
    assert float((found - rounded).abs().max()) < 0.02 * float(found.std())


@pytest.mark.long
def test_a_stage_on_other_bits_starts_from_the_merged_model(workshop: Workshop) -> None:
    tuned(workshop, "base-nf4-bf16", "base", "nf4")
    other = tuned(workshop, "other", "base-nf4-bf16", "int8")
    assert (list(other.stack), other.quantized) == ([], "int8")


def test_the_base_takes_a_third_of_its_bytes(workshop: Workshop) -> None:
    weights = weights_of(workshop.store, tuned(workshop, "base-nf4-bf16", "base", "nf4"))
    held: Any = load_stack(weights, "language_model", device=CPU, held_in=torch.bfloat16)
    layer = held.model.layers[0].mlp.up_proj.base_layer
    assert isinstance(layer, QuantisedLinear)
    bytes_held = sum(buffer.nbytes for buffer in layer.buffers())
    assert bytes_held == layer.in_features * layer.out_features * (0.5 + 4 / 64)
    assert not any("base_layer.weight" in name for name, _ in held.named_parameters())


@pytest.mark.long
def test_a_stopped_stage_continues_to_the_same_files(workshop: Workshop) -> None:
    straight = tuned(workshop, "base-nf4-bf16", "base", "nf4")
    given = {"init_from": "base"}
    context = workshop.context("halted", given)
    object.__setattr__(context, "observer", Stopping())
    with pytest.raises(Preempted):
        run_language_model(tune_spec("base", "nf4"), context)
    candidate = run_language_model(tune_spec("base", "nf4"), workshop.context("halted", given))
    assert candidate is not None
    assert files_digest(dict(candidate.files)) == straight.digest
