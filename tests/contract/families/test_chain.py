"""A VAE, a diffusion in its latents and a classifier through the store; then metrics, commands and scores on them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from launch.runs.stage_entry import compute
from launch.sampling.images import draw_grid, interpolate, reconstruct, score
from launch.sampling.text import sample_texts
from recipes.errors import RequestError
from recipes.loading.load import parse_recipe
from recipes.planning.settle import Hardware, settle_shards
from tests.observers import Quiet
from trainers.data.layouts.images import Images
from trainers.data.materialise import DataRequest, materialise
from trainers.models.images.build import open_family
from trainers.runtime.distributed import Ranks
from trainers.store.export import export
from trainers.store.manifest import ArtifactManifest, files_digest
from trainers.store.store import Store
from trainers.training.context import StageContext, verify_checks

DIGITS: dict[str, Any] = {"source": "digits", "hold_out": 0.5, "limit": 120}
TRAIN: dict[str, Any] = {"steps": 4, "global_batch": 8, "optimizer": {"lr": 1e-3}, "evaluation_rows": 16, "grid": 0}
SHARD: dict[str, Any] = {"engine": "plain", "precision": "fp32"}


def stage(architecture: dict[str, Any], **more: Any) -> dict[str, Any]:
    """Give a small stage on the digits."""
    return {"kind": "pretrain", "architecture": architecture, "data": DIGITS, "train": TRAIN, "shard": SHARD, **more}


DDPM = {"family": "ddpm", "block_out_channels": [8, 8], "layers_per_block": 1, "norm_num_groups": 4, "timesteps": 20}
STAGES: dict[str, Any] = {
    "judge": stage({"family": "classifier", "width": 4, "features": 4}),
    "flat": stage({"family": "vae", "type": "mlp", "width": 16, "latent": 4}),
    "vae": stage(
        {"family": "vae", "type": "autoencoder_kl", "width": 8, "depth": 2, "latent": 2, "likelihood": "gaussian"}
    ),
    "latent": stage({**DDPM, "prediction": "v", "sampling_steps": 4}, autoencoder="vae"),
    "tuned": {
        "kind": "rl",
        "actor": "latent",
        "reward": {"rule": "ink"},
        "rollout": {"images_per_iteration": 8},
        "algorithm": {"name": "ddpo", "iterations": 2, "optimizer": {"lr": 1e-2}, "normalise": "all", "grid": 0},
        "shard": SHARD,
    },
    "pixel": stage({**DDPM, "sampler": "ddpm", "sampling_steps": 20}),
    "eval": {
        "kind": "evaluate",
        "of": ["flat", "latent"],
        "suites": ["images"],
        "features": "judge",
        "images": DIGITS,
        "num_images": 24,
        "gates": [{"metric": "latent.coverage", "min": 0.0}, {"metric": "flat.fid", "max": 0.0}],
        "shard": SHARD,
    },
}


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> tuple[Store, dict[str, ArtifactManifest]]:
    """Every stage of the chain, verified and committed."""
    folder = tmp_path_factory.mktemp("chain")
    uri = str(folder / "store")
    store = Store.open(uri)
    recipe = settle_shards(parse_recipe({"name": "chain", "stages": STAGES}), Hardware(), 1, lambda _: {}).recipe
    made: dict[str, ArtifactManifest] = {}
    for number, (name, spec) in enumerate(recipe.stages.items()):
        inputs = {
            "latent": {"autoencoder": "vae"},
            "tuned": {"actor": "latent"},
            "eval": {"of.0": "flat", "of.1": "latent", "features": "judge"},
        }.get(name, {})
        given = {path: made[source] for path, source in inputs.items()}
        lease = store.take_lease("run", name)
        ranks = Ranks(0, 1, 0, torch.device("cpu"))
        context = StageContext(store, "run", name, f"{number:064x}", lease, 0, folder, given, {}, Quiet(), ranks)
        candidate: Any = compute(spec, context)
        assert verify_checks(store, candidate.files, list(candidate.checks), given, uri).difference < 1e-5
        made[name] = ArtifactManifest(
            fingerprint=f"{number:064x}",
            digest=files_digest(candidate.files),
            kind=candidate.kind,
            stage=name,
            files=dict(candidate.files),
            metrics=dict(candidate.metrics),
            gate={"passed": not candidate.gate_reasons, "reasons": list(candidate.gate_reasons)},  # type: ignore[arg-type]
        )
        store.put_artifact(made[name])
        store.name_artifact(name, made[name].fingerprint)
    return store, made


Chain = tuple[Store, dict[str, ArtifactManifest]]


def test_a_latent_diffusion_carries_its_autoencoder(chain: Chain, tmp_path: Path) -> None:
    store, made = chain
    files = made["latent"].files
    assert files["model/vae/diffusion_pytorch_model.safetensors"] == made["vae"].files[
        "model/diffusion_pytorch_model.safetensors"
    ]  # fmt: skip
    folder = export(store, made["latent"], tmp_path / "latent")
    from diffusers import AutoencoderKL

    stock = AutoencoderKL.from_pretrained(folder / "vae", local_files_only=True)
    opened: Any = open_family(folder)
    assert stock.config.scaling_factor == pytest.approx(opened.codec.scale)
    assert opened.codec.shape == (2, 4, 4)
    images = opened.sample([1, 2])
    np.testing.assert_allclose(opened.sample([2])[0], images[1], atol=1e-5)
    latents = torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    theirs = ((stock.decode(latents / stock.config.scaling_factor).sample + 1) / 2).clamp(0, 1)
    np.testing.assert_allclose(opened.codec.decode(latents), theirs.detach(), atol=1e-5)


def test_a_latent_diffusion_is_tuned_in_its_latents(chain: Chain) -> None:
    """An action is a step in the latents; the reward reads the images that the frozen autoencoder makes of them."""
    from safetensors.torch import load_file

    store, made = chain
    start, tuned = made["latent"], made["tuned"]
    for name in ("diffusion_pytorch_model.safetensors", "config.json"):
        assert tuned.files[f"model/vae/{name}"] == start.files[f"model/vae/{name}"]
    unet = "model/unet/diffusion_pytorch_model.safetensors"
    assert tuned.files[unet] != start.files[unet]
    first: Any = tuned.metrics["start"]
    last: Any = tuned.metrics["end"]
    assert first["kl"] == pytest.approx(0, abs=1e-9)
    assert last["kl"] > 0
    assert first["vendi"] > 1
    opened: Any = open_family(store.folder(tuned, "model"))
    assert (opened.settings.sampler, opened.codec.shape) == ("ddpm", (2, 4, 4))
    images = opened.sample([1, 2])
    assert images.shape == (2, 1, 8, 8)
    untuned: Any = open_family(store.folder(start, "model"))
    before = load_file(store.folder(start, "model/unet") / "diffusion_pytorch_model.safetensors")
    assert untuned.codec.scale == opened.codec.scale
    assert {name for name, tensor in opened.net.named_parameters() if not torch.equal(tensor, before[name])}


def test_scaled_latents_have_unit_variance(chain: Chain) -> None:
    store, made = chain
    opened: Any = open_family(store.folder(made["latent"], "model"))

    spec = parse_recipe({"name": "chain", "stages": STAGES}).stages["latent"]
    dataset = materialise(DataRequest(spec.data, Path(), Images(), 0), store)  # type: ignore[union-attr]
    images = torch.from_numpy(dataset.images_NCHW.astype(np.float32) / 255)
    assert float(opened.codec.encode(images, torch.arange(len(images))).std()) == pytest.approx(1, abs=0.05)


def test_an_unconditional_diffusion_is_diffusers_pipeline(chain: Chain, tmp_path: Path) -> None:
    store, made = chain
    from diffusers import DDPMPipeline

    folder = export(store, made["pixel"], tmp_path / "pixel")
    pipeline = DDPMPipeline.from_pretrained(folder, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    seed = torch.Generator().manual_seed(0)
    drawn = pipeline(batch_size=2, generator=seed, num_inference_steps=3, output_type="np").images
    assert drawn.shape == (2, 8, 8, 1)


def test_the_report_has_every_metric_and_answers_the_gates(chain: Chain) -> None:
    _, made = chain
    from recipes.stages.evaluate import Evaluate

    spec = parse_recipe({"name": "chain", "stages": STAGES}).stages["eval"]
    assert isinstance(spec, Evaluate)
    unasked = {f"{label}.class_accuracy" for label in ("flat", "latent")}
    assert set(made["eval"].metrics) == spec.metrics() - unasked
    assert made["eval"].metrics["images"] == 24
    assert made["eval"].metrics["flat.fid_real"] == made["eval"].metrics["latent.fid_real"]
    (reason,) = made["eval"].gate.reasons
    assert reason.startswith("flat.fid is ")
    samples = json.loads(chain[0].objects.get_bytes(made["eval"].files["samples.json"].sha256))
    assert [line["model"] for line in samples] == ["flat", "latent"]


def test_the_commands_draw_and_score(chain: Chain, tmp_path: Path) -> None:
    store = chain[0].uri
    images = np.stack([np.zeros((8, 8)), np.tile([0.0, 1.0], (8, 4)), np.full((8, 8), 0.3)])
    np.savez(tmp_path / "a.npz", images=images)
    from PIL import Image

    grid = draw_grid("store://flat", tmp_path / "grid.png", store=store, num_samples=9)
    assert grid["images"] == 9
    with Image.open(tmp_path / "grid.png") as opened:
        assert opened.size == (76, 76)
    again = tmp_path / "again.png"
    draw_grid("store://flat", again, store=store, num_samples=9)
    assert again.read_bytes() == (tmp_path / "grid.png").read_bytes()
    assert reconstruct("store://flat", "digits", tmp_path / "r.png", store=store, count=8)["images"] == 8
    (tmp_path / "images").mkdir()
    for number in range(2):
        Image.fromarray((images[number] * 255).astype(np.uint8)).save(tmp_path / "images" / f"{number}.png")
    ends = [str(tmp_path / "images" / f"{number}.png") for number in range(2)]
    assert interpolate("store://flat", ends[0], ends[1], tmp_path / "i.png", store=store)["images"] == 10
    ranked = score("store://flat", str(tmp_path / "a.npz"), store=store)
    assert ranked == score("store://flat", str(tmp_path / "a.npz"), store=store)
    assert [row["elbo"] for row in ranked] == sorted(row["elbo"] for row in ranked)
    by_folder = {row["image"]: row["elbo"] for row in score("store://flat", str(tmp_path / "images"), store=store)}
    assert set(by_folder) == {"0.png", "1.png"}
    judged = score("store://judge", str(tmp_path / "a.npz"), store=store)
    assert {row["label"] for row in judged} <= set("0123456789")


def test_requests_that_make_no_sense_are_refused(chain: Chain, tmp_path: Path) -> None:
    store = chain[0].uri
    grid = tmp_path / "grid.png"
    with pytest.raises(RequestError, match="image classifier"):
        draw_grid("store://judge", grid, store=store)
    with pytest.raises(RequestError, match="is not class-conditional"):
        draw_grid("store://flat", grid, store=store, label="3")
    with pytest.raises(RequestError, match="single image"):
        score("store://pixel", "digits", store=store)
    with pytest.raises(RequestError, match=r"diffusion model; .*autoencoder"):
        reconstruct("store://pixel", "digits", grid, store=store)
    with pytest.raises(RequestError, match="kind report"):
        draw_grid("store://eval", grid, store=store)
    for name in ("flat", "latent", "tuned"):
        with pytest.raises(RequestError, match="draws: add --grid FILE"):
            sample_texts(f"store://{name}", ["three"], store=store)
    (tmp_path / "bad.png").write_bytes(b"\x89PNG and no more")
    with pytest.raises(RequestError, match=r"bad\.png"):
        score("store://flat", str(tmp_path / "bad.png"), store=store)
    assert not grid.exists()
