"""What `check` costs: bytes read, files opened; whatever the size of the data."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import launch
from trainers.data.check_source import CHECKED_ROWS
from trainers.data.sources import csv_files

PROCESS = Path("/proc/self/io")
TRAIN = {"steps": 1, "global_batch": 1, "optimizer": {"lr": 1e-3}}
MODEL = {"family": "decoder", "type": "llama", "hidden_size": 32, "intermediate_size": 32,
         "num_hidden_layers": 1, "num_attention_heads": 2}  # fmt: skip
WORDS = "the quick brown fox jumps over the lazy dog"
ROWS = {
    "rows.jsonl": ({"source": "jsonl"}, json.dumps({"text": WORDS}) + "\n"),
    "array.json": ({"source": "jsonl"}, json.dumps({"text": WORDS}) + ",\n"),
    "rows.csv": ({"source": "csv", "header": ["text", "other"]}, f"{WORDS},a\n"),
    "rows.txt": ({"source": "text", "documents": "paragraph"}, f"{WORDS}\n\n"),
}
"""Files by their names: what reads them, and a row."""


@pytest.fixture
def check(tmp_path: Path) -> Callable[..., None]:
    """Check a recipe with one stage."""

    def checked(stage: dict[str, Any]) -> None:
        (tmp_path / "my.yaml").write_text(json.dumps({"name": "mine", "stages": {"base": stage}}))
        found = launch.check(tmp_path / "my.yaml")
        assert found.exit_code == 0, found.problems

    return checked


def bytes_read() -> int:
    """Bytes that this process has read by system calls."""
    return int(dict(line.split(": ") for line in PROCESS.read_text().splitlines())["rchar"])


@pytest.mark.skipif(not PROCESS.exists(), reason="the system does not count what a process reads")
def test_of_large_files_the_first_rows_are_read(check: Callable[..., None], tmp_path: Path) -> None:
    stage = {"kind": "pretrain", "architecture": MODEL, "tokenizer": {"train": "bpe", "vocab_size": 512}}
    train = {**TRAIN, "sequence_length": 64}
    read = {}
    for number, (name, (source, row)) in enumerate([("rows.jsonl", ROWS["rows.jsonl"]), *ROWS.items()]):
        text = row * (4 * 2**20 // len(row))
        (tmp_path / name).write_text(f"[{text.rstrip().rstrip(',')}]" if name.startswith("array") else text)
        before = bytes_read()
        check({**stage, "data": {**source, "files": [name]}, "train": train})
        if number:  # the first check reads what it imports
            read[name] = bytes_read() - before
    assert max(read.values()) < 2**20, read


def test_of_many_images_the_first_are_opened(
    check: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "images").mkdir()
    Image.new("L", (8, 8)).save(tmp_path / "images" / "0.png")
    names = [f"{number}.png" for number in random.Random(0).sample(range(1, 500), 400)]
    for name in names:
        (tmp_path / "images" / name).hardlink_to(tmp_path / "images" / "0.png")
    opened, read = [], Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: opened.append(path.name) or read(path))
    vae = {"family": "vae", "type": "mlp", "width": 32, "depth": 1, "latent": 2}
    data = {"source": "image-folder", "path": "images", "labels": "none"}
    check({"kind": "pretrain", "architecture": vae, "data": data, "train": TRAIN})
    assert set(opened) == set(sorted(["0.png", *names])[:CHECKED_ROWS])


def test_quotes_of_a_table_are_looked_for_once(
    check: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes, is_even = [], csv_files._is_even
    monkeypatch.setattr(csv_files, "_is_even", lambda *of: passes.append(of) or is_even(*of))
    (tmp_path / "rows.tsv").write_text("text\tother\n" + f'"{WORDS}," he said.\ta\n' * 200)
    model = {"architecture": MODEL, "tokenizer": {"train": "bpe", "vocab_size": 512}}
    data = {"source": "csv", "files": ["rows.tsv"]}
    check({"kind": "pretrain", **model, "data": data, "train": {**TRAIN, "sequence_length": 64}})
    assert len(passes) == 2  # with quotes, and without
