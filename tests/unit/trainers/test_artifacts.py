"""Model folders: the same bytes for the same weights, opened by stock classes, refused when anything is off."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from recipes.errors import RequestError, StageError, VerificationError
from recipes.stages.lora import Lora
from trainers.models.decoder import build_decoder
from trainers.models.folders import probe as probe_weights
from trainers.models.folders import verify_folder, write_adapter, write_model
from trainers.models.load import load_model
from trainers.models.lora import active_adapters, adapter_layers, adapter_tensors, add_adapter, is_adapter_key
from trainers.models.merged_adapters import base_tensors, folded_adapter, merged_tensors
from trainers.models.protocol import TokenizerFacts
from trainers.models.verification import Probe

CPU = torch.device("cpu")
VOCAB = 60
SMALL = {
    "llama": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4},
    "qwen3": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
}


def build(kind: str = "llama") -> torch.nn.Module:
    return build_decoder({"type": kind, **SMALL[kind]}, TokenizerFacts(VOCAB, 0, 1), seed=3, device=CPU)


def probe(model: torch.nn.Module, kind: str) -> Probe:
    return probe_weights(model, kind, model.named_parameters())


def write(model: torch.nn.Module, folder: Path, kind: str = "language_model", **changes: object) -> Path:
    tensors = changes.pop("tensors", None) or dict(model.named_parameters())
    write_model(folder, kind, model.config, tensors.items(), {}, dtype=torch.float32, **changes)
    return folder


@pytest.mark.parametrize("kind", list(SMALL))
def test_stock_classes_give_the_live_models_outputs(kind: str, tmp_path: Path) -> None:
    model = build(kind)
    folder = write(model, tmp_path / "model")
    found = Probe.from_bytes(probe(model, "language_model").to_bytes())
    assert verify_folder(folder, "language_model", found)[0] < 1e-6
    scorer = load_model(folder, "score_model", device=CPU, new_head_seed=5)
    scores = write(scorer, tmp_path / "scores", "score_model")
    assert verify_folder(scores, "score_model", probe(scorer, "score_model"))[0] < 1e-6
    critic = load_model(scores, "value_model", device=CPU, new_head_seed=6)
    values = write(critic, tmp_path / "values", "value_model")
    assert verify_folder(values, "value_model", probe(critic, "value_model"))[0] < 1e-6


def test_files_are_the_same_bytes_and_name_no_version_or_place(tmp_path: Path) -> None:
    first, second = write(build(), tmp_path / "a"), write(build(), tmp_path / "b")
    for path in sorted(first.iterdir()):
        assert path.read_bytes() == (second / path.name).read_bytes()
    text = (first / "config.json").read_text()
    assert "transformers_version" not in text
    assert str(tmp_path) not in text


def test_shards_hold_the_same_model(tmp_path: Path) -> None:
    model = build()
    folder = write(model, tmp_path / "model", max_shard_bytes=10_000)
    assert len(list(folder.glob("model-*.safetensors"))) > 3
    assert verify_folder(folder, "language_model", probe(model, "language_model"))[0] < 1e-6


def test_other_weights_are_seen(tmp_path: Path) -> None:
    model = build()
    folder = write(model, tmp_path / "model")
    expected = probe(model, "language_model")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"] += 0.01
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(VerificationError, match=r"1 of \d+ tensors differ \(model\.layers\.1\.mlp\.up_proj\.weight\)"):
        verify_folder(folder, "language_model", expected)


@pytest.mark.parametrize("damage", ["missing", "extra", "shape", "nan"])
def test_a_folder_that_is_not_exact_is_refused(damage: str, tmp_path: Path) -> None:
    folder = write(build(), tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    if damage == "missing":
        del tensors[name]
    elif damage == "extra":
        tensors["model.layers.7.mlp.up_proj.weight"] = torch.zeros(3)
    elif damage == "shape":
        tensors[name] = torch.zeros(3, 3)
    else:
        tensors[name][0, 0] = float("nan")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises((StageError, RuntimeError)):
        load_model(folder, "language_model", device=CPU)


def test_only_the_head_may_be_new(tmp_path: Path) -> None:
    folder = write(build(), tmp_path / "model")
    with pytest.raises(StageError, match=r"score\.weight"):
        load_model(folder, "score_model", device=CPU)
    one = load_model(folder, "score_model", device=CPU, new_head_seed=5)
    two = load_model(folder, "score_model", device=CPU, new_head_seed=5)
    other = load_model(folder, "score_model", device=CPU, new_head_seed=6)
    assert torch.equal(one.score.weight, two.score.weight)
    assert not torch.equal(one.score.weight, other.score.weight)


@pytest.mark.parametrize("kind", list(SMALL))
@pytest.mark.parametrize("dora", [False, True])
def test_adapter_and_merged_model_give_the_live_outputs(kind: str, dora: bool, tmp_path: Path) -> None:
    model = build(kind)
    base = write(model, tmp_path / "base")
    config = add_adapter(model, Lora(r=4, dora=dora, rank_stabilised=dora), seed=9)
    with torch.no_grad():
        generator = torch.Generator().manual_seed(1)
        for name, parameter in model.named_parameters():
            assert parameter.requires_grad == is_adapter_key(name)
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    tensors = dict(model.named_parameters())
    layers = adapter_layers(model)
    live = {**base_tensors(tensors), **adapter_tensors(tensors)}
    expected = probe_weights(model, "language_model", live.items())
    whole = merged_tensors(model, tensors)
    with folded_adapter(model, ["default"], layers, whole):
        folded = probe_weights(model, "language_model", base_tensors(dict(model.named_parameters())).items())
    adapter = tmp_path / "adapter"
    write_adapter(adapter, config, adapter_tensors(tensors).items(), base_digest="b" * 64, dtype=torch.float32)
    assert json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"] == "b" * 64
    merged = write(model, tmp_path / "merged", tensors=whole)
    difference, loss = verify_folder(base, "language_model", expected, adapter=adapter, merged=merged)
    assert difference < 1e-6
    assert loss is not None
    assert loss.lost < 1e-4
    assert verify_folder(merged, "language_model", folded)[0] < 1e-6
    with pytest.raises(VerificationError, match="tensors differ"):
        verify_folder(base, "language_model", folded)
    with active_adapters(model, []):
        alone = probe_weights(model, "language_model", base_tensors(tensors).items())
    assert verify_folder(base, "language_model", alone)[0] < 1e-6


def test_several_adapters_train_side_by_side_and_switch_without_touching_gradients() -> None:
    model = build()
    add_adapter(model, Lora(r=2), seed=1, name="actor")
    add_adapter(model, Lora(r=2), seed=2, name="critic")
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {name for name, _ in model.named_parameters() if is_adapter_key(name, "actor")} <= trainable
    assert {name for name, _ in model.named_parameters() if is_adapter_key(name, "critic")} <= trainable
    assert all("lora_" in name for name in trainable)
    ids = torch.tensor([[3, 4, 5]])
    with active_adapters(model, ["actor"]):
        actor = model(input_ids=ids).logits
    with active_adapters(model, ["critic"]):
        critic = model(input_ids=ids).logits
    (actor.sum() + critic.sum()).backward()
    now = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert now == trainable
    for adapter in ("actor", "critic"):
        grads = [p.grad for n, p in model.named_parameters() if is_adapter_key(n, adapter) and "lora_B" in n]
        assert all(grad is not None and float(grad.abs().sum()) > 0 for grad in grads)


def test_an_unknown_target_module_is_named() -> None:
    with pytest.raises(RequestError, match=r"lora\.target_modules\.1: "):
        add_adapter(build(), Lora(target_modules=["q_proj", "qkv_proj"]), seed=0)
