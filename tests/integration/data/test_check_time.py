"""`check` answers in under two seconds of CPU time, whatever public file a recipe reads."""

import bz2
import csv
import gzip
import itertools
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import pytest

import launch

ROOT = Path(__file__).parents[3]
DATA = ROOT.parent / "shared" / "data"
LIMIT_S = 2.0
START_S = 1.0
"""Of these the start of the command; `test_the_command_as_a_whole` holds it to both."""
TRAIN = {"steps": 10, "global_batch": 8, "sequence_length": 64, "optimizer": {"lr": 1e-3}}
SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
BASE = {
    "kind": "pretrain",
    "architecture": {"family": "decoder", "type": "llama", **SIZES},
    "tokenizer": {"train": "bpe", "vocab_size": 1024},
    "data": {"source": "python-docs"},
    "train": TRAIN,
}
ENCODER = {
    **BASE,
    "architecture": {"family": "encoder", "type": "bert", **SIZES},
    "tokenizer": {**BASE["tokenizer"], "cls_token": "<|cls|>", "mask_token": "<|mask|>"},  # type: ignore[dict-item]
}
pytestmark = [
    pytest.mark.skipif(not DATA.is_dir(), reason="no folder ../shared/data beside the repository"),
    pytest.mark.long,
]


def opened(path: Path) -> IO[str]:
    """The text of a file, packed or not."""
    packed: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".bz2": bz2.open}
    found: IO[str] = packed.get(path.suffix, open)(path, "rt", encoding="utf-8", errors="replace")
    return found


def columns_of(path: Path, kind: str) -> list[str]:
    """Columns of the first row that hold text."""
    with opened(path) as file:
        if kind == "jsonl":
            row = json.loads(file.readline())
            return [key for key, value in row.items() if isinstance(value, str)]
        return next(csv.reader(file, delimiter="\t" if ".tsv" in path.name else ","))


def stages_of(path: Path) -> dict[str, Any]:
    """Stages that read a file, as somebody might who has it."""
    name, folder = str(path.relative_to(DATA)), path.relative_to(DATA).parts[0]
    kind = "jsonl" if ".json" in path.name else "csv" if any(end in path.name for end in (".csv", ".tsv")) else "text"
    rows: dict[str, Any] = {"source": kind, "files": [name], "hold_out": 0.1}
    if folder == "images":
        vae = {"family": "vae", "type": "mlp", "width": 32, "depth": 1, "latent": 2}
        source = {
            ".gz": {"source": "idx", "files": [name]},
            ".npz": {"source": "arrays", "files": [name], "images": "images"},
            ".zip": {"source": "image-folder", "path": name, "labels": "none", "size": 32, "channels": 1},
        }.get(path.suffix)
        train = {key: value for key, value in TRAIN.items() if key != "sequence_length"}
        if source is not None:
            return {"net": {"kind": "pretrain", "architecture": vae, "data": source, "train": train}}
    if folder == "pref":
        return {"base": BASE, "policy": {"kind": "preference", "init_from": "base", "data": rows, "train": TRAIN}}
    if folder == "sft":
        return {"base": BASE, "sft": {"kind": "finetune", "init_from": "base", "data": rows, "train": TRAIN}}
    if folder == "classification":
        rows |= {"columns": dict(zip(("text", "label"), columns_of(path, kind), strict=False))}
        return {"words": ENCODER, "classes": {"kind": "finetune", "init_from": "words", "data": rows, "train": TRAIN}}
    if kind != "text":
        rows |= {"columns": {"text": (columns_of(path, kind) or ["text"])[0]}}
    return {"base": {**BASE, "data": rows}}


FILES = sorted(
    path
    for path in (DATA.rglob("*") if DATA.is_dir() else ())
    if path.is_file() and "LICENSES" not in path.parts and path.name not in ("ATTRIBUTION.md", "SHA256SUMS", "LICENSE")
)


def recipe_of(path: Path, folder: Path) -> Path:
    """A recipe that reads a file where it lies."""
    written = folder / "my.yaml"
    written.write_text(json.dumps({"name": "mine", "stages": stages_of(path)}))
    for part in DATA.iterdir():
        if not (folder / part.name).exists():
            (folder / part.name).symlink_to(part)
    return written


@pytest.fixture(scope="module", autouse=True)
def imports(tmp_path_factory: pytest.TempPathFactory) -> None:
    """What the first check imports, `test_the_command_as_a_whole` counts."""
    launch.check(recipe_of(DATA / "sft" / "gsm8k_train.jsonl.gz", tmp_path_factory.mktemp("first")))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(DATA)))
def test_check_answers_soon(path: Path, tmp_path: Path) -> None:
    recipe = recipe_of(path, tmp_path)
    started = time.process_time()
    found = launch.check(recipe)
    taken = time.process_time() - started
    assert found.exit_code in (0, 2)
    assert all(problem.field.startswith("stages.") for problem in found.problems)
    print(f"{taken:.2f} s, {len(found.problems)} problems: {path.relative_to(DATA)}")
    assert taken < LIMIT_S - START_S


@pytest.mark.serial
@pytest.mark.parametrize("path", list(itertools.islice(sorted(FILES, key=lambda path: -path.stat().st_size), 3)))
def test_the_command_as_a_whole(path: Path, tmp_path: Path) -> None:
    recipe = recipe_of(path, tmp_path)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-m", "launch.cli", "check", str(recipe)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        check=False,
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode in (0, 2)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < LIMIT_S
