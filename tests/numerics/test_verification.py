"""Verification accepts every right model of a grid of sizes and precisions, and refuses wrong ones in every cell."""

import itertools
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from recipes.errors import VerificationError
from recipes.stages.lora import Lora
from tests.tiers import tiered
from trainers.models.decoder import build_decoder
from trainers.models.folders import probe, verify_folder, write_adapter, write_model
from trainers.models.lora import active_adapters, adapter_layers, adapter_tensors, add_adapter, is_adapter_key
from trainers.models.merged_adapters import base_tensors, folded_adapter, merged_tensors
from trainers.models.protocol import TokenizerFacts
from trainers.models.verification import DRAWS, Probe, output_bound

VOCAB = 512
CPU = torch.device("cpu")
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}
GRID = list(
    itertools.product(
        ((width, depth) for width in (64, 256, 512, 1024) for depth in (2, 8, 32)), PRECISIONS, (True, False)
    )
)
DEFAULT = [((64, 2), "fp32", True), ((64, 2), "bf16", False), ((64, 8), "bf16", True), ((256, 2), "fp32", False)]
"""Every value and every pair of them but of the largest sizes."""


@dataclass(frozen=True)
class Written:
    """A live model's folders and what was probed of it."""

    base: Path
    adapter: Path
    merged: Path
    alone: Probe
    adapted: Probe
    folded: Probe


def build(width: int, depth: int, tied: bool, dtype: torch.dtype) -> Any:
    """A llama whose logits spread over several units, as a trained model's do."""
    architecture = {
        "type": "llama", "hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": depth,
        "num_attention_heads": width // 32, "num_key_value_heads": max(1, width // 64), "tie_word_embeddings": tied,
        "initializer_range": 1.5 / width**0.5,
    }  # fmt: skip
    model: Any = build_decoder(architecture, TokenizerFacts(VOCAB, 0, 1), seed=3, device=CPU)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model


def write(folder: Path, width: int, depth: int, tied: bool, precision: str) -> Written:
    """Write the base, and an adapter on it alone and merged; probe the live model in each of the three forms."""
    dtype = PRECISIONS[precision]
    model = build(width, depth, tied, dtype)
    base, adapter, merged = (folder / name for name in ("base", "adapter", "merged"))
    write_model(base, "language_model", model.config, dict(model.named_parameters()).items(), {}, dtype=dtype)
    alone = probe(model, "language_model", model.named_parameters())
    peft_config = add_adapter(model, Lora(r=8), seed=9)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.data = parameter.data.to(dtype)
            if is_adapter_key(name):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.02)
    tensors: dict[str, Tensor] = dict(model.named_parameters())
    own = adapter_tensors(tensors)
    write_adapter(adapter, peft_config, own.items(), base_digest="b" * 64, dtype=dtype)
    whole = merged_tensors(model, tensors)
    write_model(merged, "language_model", model.config, whole.items(), {}, dtype=dtype)
    layers = adapter_layers(model)
    with active_adapters(model, ["default"], layers):
        adapted = probe(model, "language_model", [*base_tensors(tensors).items(), *own.items()])
    with folded_adapter(model, ["default"], layers, whole):
        folded = probe(model, "language_model", base_tensors(dict(model.named_parameters())).items())
    return Written(base, adapter, merged, alone, adapted, folded)


def change_one_weight(folder: Path, name: str = "model.safetensors") -> None:
    """Move one weight by one per cent."""
    tensors = load_file(folder / name)
    flat = next(tensors[key] for key in sorted(tensors) if "down_proj" in key).view(-1)
    place = int(flat.abs().argmax())
    flat[place] = flat[place] * 1.01
    save_file(tensors, folder / name, metadata={"format": "pt"})


def swap_two_layers(folder: Path) -> None:
    """Exchange the first two layers."""
    tensors = load_file(folder / "model.safetensors")
    swapped = {"layers.0.": "layers.1.", "layers.1.": "layers.0."}
    renamed = {}
    for key, tensor in tensors.items():
        new = next((key.replace(old, other) for old, other in swapped.items() if old in key), key)
        renamed[new] = tensor
    save_file(renamed, folder / "model.safetensors", metadata={"format": "pt"})


def change_config(folder: Path, key: str, change: Callable[[Any], Any], file: str = "config.json") -> None:
    """Change what a configuration says, the weights untouched."""
    config = json.loads((folder / file).read_text())
    where = config["rope_parameters"] if key == "rope_theta" else config
    where[key] = change(where[key])
    (folder / file).write_text(json.dumps(config))


def accepts_and_refuses(folder: Path, width: int, depth: int, tied: bool, precision: str) -> None:
    """Every right form is accepted; then each is spoilt in turn and refused."""
    made = write(folder, width, depth, tied, precision)
    base, adapter, merged = made.base, made.adapter, made.merged
    assert verify_folder(base, "language_model", made.alone)[0] < 1e-4
    _, loss = verify_folder(base, "language_model", made.adapted, adapter=adapter, merged=merged)
    assert loss is not None
    assert (loss.lost < 1e-3) == (precision == "fp32")
    assert verify_folder(merged, "language_model", made.folded)[0] < 1e-4

    def refused(match: str, place: Path, expected: Probe, **options: Any) -> None:
        with pytest.raises(VerificationError, match=match):
            verify_folder(place, "language_model", expected, **options)

    kept = {path: path.read_bytes() for path in folder.rglob("*.*") if path.is_file()}

    def restore() -> None:
        for path, content in kept.items():
            path.write_bytes(content)

    for place, expected in ((base, made.alone), (merged, made.folded)):
        change_one_weight(place)
        refused("1 of .* tensors differ", place, expected)
        restore()
        swap_two_layers(place)
        refused("tensors differ", place, expected)
        restore()
        change_config(place, "rope_theta", lambda theta: theta * 1.5)
        refused("outputs of the files differ", place, expected)
        restore()
    change_one_weight(merged)
    refused("merged weights are not base", base, made.adapted, adapter=adapter, merged=merged)
    restore()
    change_config(adapter, "lora_alpha", lambda alpha: alpha * 1.01, "adapter_config.json")
    refused("outputs of the files differ", base, made.adapted, adapter=adapter)
    restore()
    stale = {name: tensor * 0.99 for name, tensor in load_file(adapter / "adapter_model.safetensors").items()}
    save_file(stale, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
    refused("tensors differ", base, made.adapted, adapter=adapter, merged=merged)


@pytest.mark.parametrize(("sizes", "precision", "tied"), tiered(GRID, DEFAULT))
def test_right_models_are_accepted_and_wrong_ones_refused(
    sizes: tuple[int, int], precision: str, tied: bool, tmp_path: Path
) -> None:
    accepts_and_refuses(tmp_path, *sizes, tied, precision)


def test_a_difference_takes_no_perturbation_more_than_explain_it() -> None:
    model = build(64, 2, tied=True, dtype=torch.float32)
    forwards = 0

    def forward() -> np.ndarray:
        nonlocal forwards
        forwards += 1
        logits: np.ndarray = model(torch.arange(32)[None]).logits[0].numpy()
        return logits

    with torch.no_grad():
        outputs = forward()
    taken, bounds = [], []
    whole = output_bound(model, forward, outputs)
    for enough in (0.0, whole / 1000, whole, 2 * whole):
        before = forwards
        bounds.append(output_bound(model, forward, outputs, enough=enough))
        taken.append(forwards - before)
    assert taken[0] == 0
    assert taken[-1] == DRAWS
    assert taken == sorted(taken)
    assert bounds[2] == bounds[3] == whole
    assert all(bound >= enough for bound, enough in zip(bounds, (0.0, whole / 1000, whole), strict=False))
