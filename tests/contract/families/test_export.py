"""An exported model of every family opens, in the libraries' own classes where they know it, and answers as before."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from trainers.data.image_processor import load_image_processor
from trainers.models.verification import Probe
from trainers.models.vision_language import sample_images
from trainers.runtime.precision import exact_matmul
from trainers.store.export import export
from trainers.store.store import Store

sys.path.insert(0, str(Path(__file__).parent))
import stock_outputs
from family_kit import LIMIT, result
from family_stages import CROSSINGS, IMAGES, KIT, artifact_kind

sys.path.pop(0)


def _stock_kind(name: str) -> str | None:
    """What the libraries open a model of the kit as; None for modules of this project."""
    kinds = {
        "encoder": "masked_model",
        "encoder_decoder": "seq2seq_model",
        "vision_language": "vision_language_model",
        "rnn": "rnn",
    }
    match artifact_kind(name):
        case "model":
            return kinds.get(name, "language_model")
        case "text_classifier" | "ddpm":
            return artifact_kind(name)
    return None


STOCK = [name for name in KIT if _stock_kind(name) is not None]


def _case_of_export(finished: Path, folder: Path, name: str) -> tuple[dict[str, str], np.ndarray]:
    """Export a model of the kit; returns what to ask of the stock classes, and what must come out."""
    from trainers.models.images.build import open_family

    store = Store.open(str(finished / "store"))
    manifest = store.resolve(name)
    exported = export(store, manifest, folder / name)
    assert (exported / "adapter_config.json").is_file() == ("lora" in CROSSINGS.get(name, ({},))[0])
    if _stock_kind(name) == "ddpm":
        opened: Any = open_family(store.folder(manifest, "model"))
        rng = np.random.default_rng(0)
        given = {"sample": rng.standard_normal((2, 1, 8, 8), dtype=np.float32), "timestep": np.array([3, 40])}
        if opened.is_captioned:
            given["encoder_hidden_states"] = rng.standard_normal((2, 5, 32), dtype=np.float32)
        else:
            given["class_labels"] = np.array([1, 10])
        with torch.no_grad():
            wanted = opened.net(**{key: torch.from_numpy(value) for key, value in given.items()}).sample.numpy()
    else:
        live = result(finished, "straight", name)["checks"][0]["probe"]
        probe = Probe.from_bytes(store.objects.get_bytes(live["sha256"]))
        given, wanted = _inputs(exported, name, probe), probe.outputs
    np.savez(folder / f"{name}.npz", **given)
    asked = {"folder": str(exported), "what": str(_stock_kind(name))}
    return {**asked, "given": str(folder / f"{name}.npz"), "output": str(folder / f"{name}.npy")}, wanted


def _inputs(folder: Path, name: str, probe: Probe) -> dict[str, np.ndarray]:
    """What the live model was run on before its candidate was written."""
    ids = np.array([probe.token_ids])
    if name == "rnn":
        return {"input_ids": ids}
    given = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    if name == "encoder_decoder":
        given["decoder_input_ids"] = ids
    if name == "vision_language":
        given |= {name: value.numpy() for name, value in sample_images(load_image_processor(folder)).items()}
    return given


def _demand_equal(name: str, output: str, wanted: np.ndarray) -> None:
    """Compare the outputs of stock classes with the live model's: all of them, or the logits of the last positions."""
    found = np.load(output)
    if _stock_kind(name) == "text_classifier":
        found = found.reshape(-1, 1)
    elif _stock_kind(name) != "ddpm":
        found = found[0, -len(wanted) :]
    assert found.shape == wanted.shape
    np.testing.assert_allclose(found, wanted, atol=LIMIT * max(1.0, float(np.abs(wanted).max())), rtol=0)


@pytest.mark.parametrize("family", STOCK)
def test_stock_classes_open_an_export_and_give_the_same_outputs(finished: Path, tmp_path: Path, family: str) -> None:
    asked, wanted = _case_of_export(finished, tmp_path, family)
    with exact_matmul():
        stock_outputs.answer(asked)
    _demand_equal(family, asked["output"], wanted)


@pytest.mark.long
def test_stock_classes_in_a_clean_process_give_the_same_outputs(finished: Path, tmp_path: Path) -> None:
    cases = {name: _case_of_export(finished, tmp_path, name) for name in STOCK}
    (tmp_path / "request.json").write_text(json.dumps([asked for asked, _ in cases.values()]))
    command = [sys.executable, "-I", stock_outputs.__file__, str(tmp_path / "request.json")]
    done = subprocess.run(command, cwd="/", capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for name, (asked, wanted) in cases.items():
        _demand_equal(name, asked["output"], wanted)


@pytest.mark.parametrize("family", IMAGES)
def test_an_exported_model_of_images_opens(finished: Path, tmp_path: Path, family: str) -> None:
    from trainers.models.images.build import open_family, verify_family

    store = Store.open(str(finished / "store"))
    folder = export(store, store.resolve(family), tmp_path / "model")
    opened = open_family(folder)
    assert opened.facts.shape == (1, 8, 8)
    assert opened.facts.classes == tuple("0123456789")
    live = result(finished, "straight", family)["checks"][0]["probe"]
    assert verify_family(folder, Probe.from_bytes(store.objects.get_bytes(live["sha256"])))[0] < LIMIT
