"""Rows and images that no family can learn from are named, with what is wrong with them."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from recipes.errors import RequestError

sys.path.insert(0, str(Path(__file__).parent))
from family_kit import run_here
from family_stages import CLASSIFIED, IMAGES, LANGUAGE

sys.path.pop(0)


def _bad_data(folder: Path, what: str) -> tuple[dict[str, Any], str]:
    """Write images with a fault; returns the source and what the error must say."""
    rng = np.random.default_rng(0)
    images = rng.random((12, 8, 8))
    labels = np.arange(12) % 3
    source = {"source": "arrays", "files": ["bad.npz"], "labels": "labels"}
    if what == "no images":
        images, labels = images[:0], labels[:0]
    if what == "NaN":
        images[4, 2, 3] = np.nan
    if what == "out of range":
        images[5] *= 300
    if what == "channels":
        np.savez(folder / "bad.npz", images=rng.random((12, 8, 8, 2)), labels=labels)
        return source, r"bad.npz: image 0: an array of shape \(8, 8, 2\)"
    np.savez(folder / "bad.npz", images=images, labels=labels)
    said = {
        "no images": "source 'arrays' as images: no rows",
        "NaN": "bad.npz: image 4: 1 pixels are NaN",
        "out of range": r"bad.npz: image 5: pixels from .* expected \[0, 1\]",
    }
    return source, said[what]


@pytest.mark.parametrize("what", ["no images", "NaN", "out of range", "channels"])
@pytest.mark.parametrize("family", IMAGES)
def test_bad_images_are_named(tmp_path: Path, family: str, what: str) -> None:
    source, said = _bad_data(tmp_path, what)
    with pytest.raises(RequestError, match=said):
        run_here(tmp_path, family, source)


@pytest.mark.parametrize("family", ["classifier", "gan", "ddpm"])
@pytest.mark.parametrize(("labels", "said"), [("labels", "one label, '1', on every image"), (None, "no labels")])
def test_too_few_classes_are_refused(tmp_path: Path, family: str, labels: str | None, said: str) -> None:
    np.savez(tmp_path / "one.npz", images=np.zeros((8, 8, 8)), labels=np.ones(8, dtype=np.int64))
    with pytest.raises(RequestError, match=said):
        run_here(tmp_path, family, {"source": "arrays", "files": ["one.npz"], "labels": labels})


def _bad_text(folder: Path, name: str, what: str) -> tuple[dict[str, Any], str]:
    """Write rows with a fault for a stage that reads words; returns the source and what the error must say."""
    kind = "jsonl" if name in CLASSIFIED or name == "vision_language" else "text"
    row: dict[str, Any] = {"text": "A number.", "label": "odd"}
    if name == "vision_language":
        row = {"images": [], "prompt": "A number is ", "completion": "odd"}
    lines = [json.dumps(row) if kind == "jsonl" else row["text"]] * 8
    said = {
        "no words": "nothing to learn from in 1 rows .*: empty: bad.txt" if kind == "text" else "no rows",
        "not UTF-8": r"bad.txt:\d \(byte 0xff\) is not UTF-8 text",
        "a broken row": r"bad.txt:4: not JSON",
    }
    if what == "a broken row":
        lines[3] = lines[3][:-4]
    content = "" if what == "no words" else "\n".join(lines)
    (folder / "bad.txt").write_bytes(content.encode() + (b" \xff" if what == "not UTF-8" else b""))
    return {"source": kind, "files": ["bad.txt"]}, said[what]


BAD_TEXTS = [(name, what) for name in [*LANGUAGE, *CLASSIFIED] for what in ("no words", "not UTF-8")]
BAD_TEXTS += [(name, "a broken row") for name in ["vision_language", *CLASSIFIED]]


@pytest.mark.parametrize(("name", "what"), BAD_TEXTS)
def test_bad_texts_are_named(finished: Path, name: str, what: str) -> None:
    source, said = _bad_text(finished, name, what)
    with pytest.raises(RequestError, match=said):
        run_here(finished, name, source)


def test_texts_of_one_class_are_refused(finished: Path) -> None:
    (finished / "one.csv").write_text("text,label\n" + "A number.,odd\nA word.,odd\n" * 8)
    with pytest.raises(RequestError, match=r"classes; .* odd \("):
        run_here(finished, "classified", {"source": "csv", "files": ["one.csv"]})
