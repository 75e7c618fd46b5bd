"""Captions through the store into images: a text encoder, a diffusion that reads it, adapters on it, the commands."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from launch.runs.stage_entry import compute
from launch.sampling.images import draw_grid
from recipes.errors import RequestError
from recipes.loading.load import parse_recipe
from recipes.planning.settle import Hardware, settle_shards
from tests.observers import Quiet
from trainers.models.images.build import open_family
from trainers.runtime.distributed import Ranks
from trainers.store.export import export
from trainers.store.manifest import ArtifactManifest, files_digest
from trainers.store.store import Store
from trainers.training.context import StageContext, verify_checks

DIGITS: dict[str, Any] = {"source": "digits", "hold_out": 0.5, "limit": 120}
TRAIN: dict[str, Any] = {"steps": 4, "global_batch": 8, "optimizer": {"lr": 1e-2}, "evaluation_rows": 16}
SHARD: dict[str, Any] = {"engine": "plain", "precision": "fp32"}
WORDS = "a thin thick narrow wide zero one two three four five six seven eight nine leaning left right an"
IMAGES: dict[str, Any] = {"kind": "pretrain", "data": DIGITS, "train": {**TRAIN, "grid": 0}, "shard": SHARD}
DDPM = {
    "family": "ddpm",
    "block_out_channels": [8, 8],
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "timesteps": 20,
    "attention_levels": [1],
    "sampling_steps": 4,
    "guidance": 3.0,
}
STAGES: dict[str, tuple[dict[str, Any], dict[str, str]]] = {
    "words": (
        {
            "kind": "pretrain",
            "architecture": {
                "family": "encoder",
                "type": "bert",
                "hidden_size": 16,
                "intermediate_size": 32,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "max_position_embeddings": 24,
            },
            "tokenizer": {"train": "bpe", "vocab_size": 300, "cls_token": "<|cls|>", "mask_token": "<|mask|>"},
            "data": {"source": "text", "files": ["words.txt"], "documents": "paragraph", "hold_out": 0.2},
            "train": {**TRAIN, "sequence_length": 24},
            "shard": SHARD,
        },
        {},
    ),
    "speech": (
        {
            "kind": "pretrain",
            "architecture": {"family": "decoder", "type": "gpt2", "n_embd": 16, "n_layer": 1, "n_head": 2},
            "tokenizer": {"train": "bpe", "vocab_size": 300},
            "data": {"source": "text", "files": ["words.txt"], "documents": "paragraph"},
            "train": {**TRAIN, "sequence_length": 24},
            "shard": SHARD,
        },
        {},
    ),
    "vae": (
        {**IMAGES, "architecture": {"family": "vae", "type": "autoencoder_kl", "width": 8, "depth": 2, "latent": 2}},
        {},
    ),
    "judge": ({**IMAGES, "architecture": {"family": "classifier", "width": 4, "features": 4}}, {}),
    "drawing": ({**IMAGES, "architecture": DDPM, "text_encoder": "words"}, {"text_encoder": "words"}),
    "latent": (
        {**IMAGES, "architecture": DDPM, "text_encoder": "speech", "autoencoder": "vae"},
        {"text_encoder": "speech", "autoencoder": "vae"},
    ),
    "tuned": (
        {
            "kind": "finetune",
            "family": "ddpm",
            "init_from": "drawing",
            "lora": {"r": 2},
            "data": DIGITS,
            "train": {**TRAIN, "grid": 0},
            "shard": SHARD,
        },
        {"init_from": "drawing"},
    ),
    "whole": (
        {
            "kind": "finetune",
            "family": "ddpm",
            "init_from": "drawing",
            "data": DIGITS,
            "train": {**TRAIN, "grid": 0},
            "shard": SHARD,
        },
        {"init_from": "drawing"},
    ),
    "eval": (
        {
            "kind": "evaluate",
            "of": ["drawing"],
            "suites": ["images"],
            "features": "judge",
            "images": DIGITS,
            "num_images": 16,
            "num_draws": 2,
            "shard": SHARD,
        },
        {"of.0": "drawing", "features": "judge"},
    ),
}
PROMPTS = ["a thick seven", "a thin narrow three leaning left"]
Made = tuple[Store, dict[str, ArtifactManifest], Path]


def run(store: Store, folder: Path, name: str, spec: dict[str, Any], given: dict[str, ArtifactManifest]) -> Any:
    """Run a stage in this process; returns its candidate."""
    recipe = parse_recipe({"name": "small", "stages": {name: spec}})
    stage = settle_shards(recipe, Hardware(), 1, lambda _: {}).recipe.stages[name]
    context = StageContext(
        store,
        "run",
        name,
        hashlib.sha256(name.encode()).hexdigest(),
        store.take_lease("run", name),
        0,
        folder,
        given,
        {},
        Quiet(),
        Ranks(0, 1, 0, torch.device("cpu")),
    )
    return compute(stage, context)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Every stage, verified and committed."""
    folder = tmp_path_factory.mktemp("captions")
    (folder / "words.txt").write_text("\n\n".join(f"{WORDS} {number}" for number in range(40)))
    store = Store.open(str(folder / "store"))
    found: dict[str, ArtifactManifest] = {}
    for name, (spec, inputs) in STAGES.items():
        given = {path: found[source] for path, source in inputs.items()}
        candidate = run(store, folder, name, spec, given)
        assert verify_checks(store, candidate.files, list(candidate.checks), given, store.uri).difference < 1e-5
        found[name] = ArtifactManifest(
            fingerprint=hashlib.sha256(name.encode()).hexdigest(),
            digest=files_digest(candidate.files),
            kind=candidate.kind,
            stage=name,
            files=dict(candidate.files),
            metrics=dict(candidate.metrics),
            base=candidate.base,
        )
        store.put_artifact(found[name])
        store.name_artifact(name, found[name].fingerprint)
    return store, found, folder


def test_the_artifact_holds_the_text_encoder_s_own_bytes(made: Made) -> None:
    _, found, _ = made
    files, words = found["drawing"].files, found["words"].files
    assert files["model/text_encoder/model.safetensors"] == words["model/model.safetensors"]
    assert files["model/text_encoder/config.json"] == words["model/config.json"]
    assert files["model/tokenizer/tokenizer.json"] == words["model/tokenizer.json"]
    assert found["drawing"].metrics["data"]["captions"] > 20


STOCK = """
import json, sys
import numpy as np, torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from transformers import AutoModel, AutoTokenizer
folder, prompt, noise, output = sys.argv[1:]
unet = UNet2DConditionModel.from_pretrained(folder + "/unet", local_files_only=True)
text = AutoModel.from_pretrained(folder + "/text_encoder", local_files_only=True)
tokenizer = AutoTokenizer.from_pretrained(folder + "/tokenizer", local_files_only=True)
scheduler = DDIMScheduler.from_pretrained(folder + "/scheduler", set_alpha_to_one=True)
batch = tokenizer([prompt, ""], padding=True, return_tensors="pt")
with torch.no_grad():
    mask = batch["attention_mask"]
    states = text(input_ids=batch["input_ids"], attention_mask=mask).last_hidden_state
    scheduler.set_timesteps(4)
    noisy = torch.from_numpy(np.load(noise))
    for step in scheduler.timesteps:
        given = {"encoder_hidden_states": states, "encoder_attention_mask": mask.bool()}
        aware, blind = unet(noisy.repeat(2, 1, 1, 1), step, **given).sample.chunk(2)
        noisy = scheduler.step(blind + 3.0 * (aware - blind), step, noisy).prev_sample
np.save(output, ((noisy + 1) / 2).clamp(0, 1).numpy())
"""


@pytest.mark.parametrize("where", ["here", pytest.param("clean process", marks=pytest.mark.long)])
def test_stock_classes_draw_the_same_image(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    from trainers.models.images.ddpm import INITIAL
    from trainers.runtime.randomness import normals

    store, found, _ = made
    folder = export(store, found["drawing"], tmp_path / "drawing")
    np.save(tmp_path / "noise.npy", normals(torch.tensor([5]), INITIAL, (1, 8, 8), torch.empty(0)).numpy())
    arguments = [str(folder), PROMPTS[0], str(tmp_path / "noise.npy"), str(tmp_path / "drawn.npy")]
    if where == "here":
        monkeypatch.setattr(sys, "argv", ["", *arguments])
        exec(STOCK, {})
    else:
        subprocess.run([sys.executable, "-W", "ignore", "-c", STOCK, *arguments], check=True, cwd=tmp_path)
    opened: Any = open_family(folder)
    np.testing.assert_allclose(opened.sample([5], captions=PROMPTS[:1]), np.load(tmp_path / "drawn.npy"), atol=1e-5)


@pytest.mark.parametrize("name", ["drawing", "latent", "tuned"])
def test_an_image_depends_on_its_seed_and_caption_alone(made: Made, name: str) -> None:
    store, found, _ = made
    opened: Any = open_family(store.folder(found[name], "model"))
    long = "a thin narrow three leaning left"
    both = opened.sample([5, 6], captions=["a thick seven", long])
    np.testing.assert_allclose(opened.sample([6], captions=[long])[0], both[1], atol=1e-5)
    other = opened.sample([6], captions=["a thick seven"])[0]
    assert float((other - both[1]).abs().max()) > (1e-3 if name != "latent" else 3e-5)
    assert not np.allclose(opened.sample([7], captions=[long])[0], both[1], atol=1e-2)
    assert opened.sample([1, 2]).shape == (2, 1, 8, 8)


def test_an_adapter_moves_the_attention_alone_and_peft_opens_it(made: Made, tmp_path: Path) -> None:
    from diffusers import UNet2DConditionModel
    from peft import PeftModel
    from safetensors.torch import load_file

    store, found, _ = made
    assert found["tuned"].base == found["drawing"].digest
    before, after = (
        load_file(store.folder(found[name], "model/unet") / "diffusion_pytorch_model.safetensors")
        for name in ("drawing", "tuned")
    )
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved
    assert all(".to_" in name for name in moved)
    unet = UNet2DConditionModel.from_pretrained(store.folder(found["drawing"], "model/unet"), local_files_only=True)
    merged = PeftModel.from_pretrained(unet, store.folder(found["tuned"], "adapter")).merge_and_unload()
    for name, parameter in merged.named_parameters():
        torch.testing.assert_close(parameter, after[name], atol=1e-6, rtol=0)
    folder = export(store, found["tuned"], tmp_path / "adapter")
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == str(folder / "base")
    whole = load_file(store.folder(found["whole"], "model/unet") / "diffusion_pytorch_model.safetensors")
    assert all(not torch.equal(before[name], whole[name]) for name in before if name.endswith("conv1.weight"))


def test_the_report_says_how_often_the_digit_was_recognised(made: Made) -> None:
    metrics = made[1]["eval"].metrics
    assert 0 <= metrics["drawing.class_accuracy"] <= 1


def test_prompts_become_rows_of_a_grid(made: Made, tmp_path: Path) -> None:
    from PIL import Image

    store = made[0].uri
    options: dict[str, Any] = {"store": store, "num_samples": 8, "prompts": PROMPTS}
    draw_grid("store://drawing", tmp_path / "a.png", **options)
    draw_grid("store://drawing", tmp_path / "b.png", **options)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    with Image.open(tmp_path / "a.png") as opened:
        assert opened.size == (1 + 4 * 25, 1 + 2 * 25)
    draw_grid("store://drawing", tmp_path / "c.png", **{**options, "prompts": []})
    with pytest.raises(RequestError, match=r"prompt 'a{60}': .* \d+ tokens"):
        draw_grid("store://drawing", tmp_path / "d.png", **{**options, "prompts": ["a" * 99]})
    with pytest.raises(RequestError, match=r"4 images, 2 .*'c'.*--num-samples"):
        draw_grid("store://drawing", tmp_path / "d.png", store=store, num_samples=4, prompts=["a", "b", "c"])
    with pytest.raises(RequestError, match=r"captions; .*--prompt"):
        draw_grid("store://vae", tmp_path / "d.png", **options)


def _arrays(folder: Path, captions: list[str] | None, side: int = 8) -> dict[str, Any]:
    np.savez(folder / "a.npz", images=np.random.default_rng(0).random((12, side, side)))
    if captions is None:
        return {"source": "arrays", "files": ["a.npz"]}
    (folder / "a.csv").write_text("caption\n" + "".join(f"{caption}\n" for caption in captions))
    return {"source": "arrays", "files": ["a.npz"], "caption_files": ["a.csv"]}


@pytest.mark.parametrize(
    ("captions", "said"),
    [
        (None, "captions, which text_encoder reads"),
        (['""'] * 12, r"empty \(12 images\)"),
        (["a seven"] * 11, "a.csv has 11 captions, .*a.npz 12 images"),
        (["a seven"] * 4 + ["z" * 50] * 8, r"a.npz:4: .* 52 tokens; .* 24"),
    ],
)
@pytest.mark.parametrize("name", ["drawing", "tuned"])
def test_bad_captions_are_named(made: Made, tmp_path: Path, name: str, captions: list[str] | None, said: str) -> None:
    store, found, _ = made
    spec, inputs = STAGES[name]
    given = {path: found[source] for path, source in inputs.items()}
    with pytest.raises(RequestError, match=said):
        run(store, tmp_path, f"bad-{name}", {**spec, "data": _arrays(tmp_path, captions)}, given)


def test_images_of_another_form_are_refused_by_a_finetune(made: Made, tmp_path: Path) -> None:
    store, found, _ = made
    data = _arrays(tmp_path, ["a seven"] * 12, side=6)
    with pytest.raises(RequestError, match=r"6x6 with 1 channel .* 8x8 with 1 channel in drawing"):
        run(store, tmp_path, "bad-form", {**STAGES["tuned"][0], "data": data}, {"init_from": found["drawing"]})


POLICY: dict[str, Any] = {
    "kind": "rl",
    "actor": "drawing",
    "reward": {"classifier": "judge"},
    "prompts": DIGITS,
    "rollout": {"images_per_iteration": 8, "samples_per_prompt": 2},
    "algorithm": {"name": "ddpo", "iterations": 1, "optimizer": {"lr": 1e-3}, "grid": 0},
    "shard": SHARD,
}


LABELLED = {"reward": {"classifier": "judge", "label": "7"}}


@pytest.mark.parametrize(
    ("changes", "captions", "said"),
    [
        ({"prompts": None}, None, "prompts: .*captions"),
        (LABELLED, [], "prompts: .* no captions"),
        ({}, ["a seven"] * 12, "prompts.labels: "),
        (
            LABELLED,
            ["a seven"] * 4 + ["z" * 50] * 8,
            r"prompts: .*a.npz:4: .* 52 tokens; .* 24",
        ),
        (
            {"rollout": {"images_per_iteration": 8}},
            None,
            "samples_per_prompt: ",
        ),
        ({"rollout": {"classes": ["1"]}}, None, "rollout.classes: "),
    ],
)
def test_what_a_captioned_policy_cannot_be_asked_is_named(
    made: Made, tmp_path: Path, changes: dict[str, Any], captions: list[str] | None, said: str
) -> None:
    """What `check` cannot see where the actor comes from the store."""
    store, found, _ = made
    given = {"actor": found["drawing"], "reward.classifier": found["judge"]}
    source = {} if captions is None else {"prompts": _arrays(tmp_path, captions or None)}
    with pytest.raises(RequestError, match=said):
        run(store, tmp_path, "bad-policy", {**POLICY, **source, **changes}, given)
