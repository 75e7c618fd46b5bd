"""Runs the small stages of every family, by ranks of their own or in this process, and reads what they reported."""

import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from trainers.runtime.distributed import Ranks
from trainers.store.store import Store

sys.path.insert(0, str(Path(__file__).parents[2]))
from family_stages import CROSSINGS, KIT, STAGES, TUNED
from stage_worker import Case, run_case

sys.path.pop(0)

WORKER = Path(__file__).parents[2] / "stage_worker.py"
LIMIT = 1e-5
"""Largest difference of two curves that should be equal, and of the outputs of two equal models."""
TWENTY = {"train": {"steps": 20, "global_batch": 8, "optimizer": {"lr": 1e-3}, "grid": 0, "evaluation_rows": 16}}
PLAIN = {"engine": "plain", "precision": "fp32"}
TWO_WORKERS = {"engine": "deepspeed", "zero": 1}


def _zero(family: str, zero: int) -> int:
    """A GAN's networks run through each other: `check` refuses ZeRO 3, so its highest stage is 2."""
    return min(zero, 2) if family == "gan" else zero


def _case(family: str, run: str, shard: dict[str, Any], changes: Any = None, **more: Any) -> dict[str, Any]:
    inputs = {"init_from": "small-llava"} if family == "vision_language" else {}
    spec, inputs = CROSSINGS[family] if family in CROSSINGS else (STAGES[family], inputs)
    spec = spec | {"shard": shard} | (changes or {})
    return {"run": run, "stage": family, "spec": spec, "inputs": inputs, **more}


def _cases(zero_stages: tuple[int, ...]) -> list[dict[str, Any]]:
    cases: list[dict[str, Any]] = []
    for family in KIT:
        cases.append(_case(family, "straight", TWO_WORKERS, is_kept=True))
        cases.append(_case(family, "stopped", TWO_WORKERS, stop_at=2))
        cases.append(_case(family, "stopped", TWO_WORKERS))
        cases += [
            _case(family, f"zero{zero}", {"engine": "deepspeed", "zero": _zero(family, zero)}) for zero in zero_stages
        ]
    for name in TUNED:
        cases += [_tuned(name, "straight", TWO_WORKERS, is_kept=True), _tuned(name, "stopped", TWO_WORKERS, stop_at=3)]
        cases += [_tuned(name, "stopped", TWO_WORKERS)]
        cases += [_tuned(name, f"zero{zero}", {"engine": "deepspeed", "zero": zero}) for zero in zero_stages]
    return [*cases, _case("gan", "twenty", {"engine": "deepspeed", "zero": 2}, TWENTY)]


def _tuned(name: str, run: str, shard: dict[str, Any], **more: Any) -> dict[str, Any]:
    """A reward-tuned diffusion of the families' own stages."""
    spec, inputs = TUNED[name]
    return {"run": run, "stage": name, "spec": spec | {"shard": shard}, "inputs": inputs, **more}


def run_families(run_ranks: Any, folder: Path, zero_stages: tuple[int, ...]) -> Path:
    """Run every family on two workers, under these ZeRO stages too, and with the plain engine on one; gives FOLDER."""
    (folder / "text.txt").write_text("\n\n".join(f"The number {n} comes before {n + 1}." for n in range(120)))
    rows = [
        (f"The number {n} comes before {n + 1}.", "" if n % 6 == 0 else "early" if n < 60 else "late")
        for n in range(120)
    ]
    (folder / "labelled.csv").write_text("text,label\n" + "".join(f"{text},{label}\n" for text, label in rows))
    _write_images(folder)
    cache = {"TRAINWRIGHT_CACHE": str(folder / "cache")}
    run_ranks(WORKER, [folder, json.dumps(_cases(zero_stages))], folder / "two", 2, **cache)
    plain = [_case(family, "plain", PLAIN) for family in KIT] + [_case("gan", "twenty-plain", PLAIN, TWENTY)]
    plain += [_tuned(name, "plain", PLAIN) for name in TUNED]
    run_ranks(WORKER, [folder, json.dumps(plain)], folder / "one", 1, **cache)
    return folder


def _write_images(folder: Path) -> None:
    """Write questions about images, some without one, and commit a model whose last layer of vision is not read."""
    from PIL import Image

    from trainers.models.imports import import_folder
    from trainers.models.small_llava import write_small_llava

    rows = []
    for number in range(48):
        shade = np.full((6, 6), 5 * number, dtype=np.uint8)
        Image.fromarray(shade).save(folder / f"{number}.png")
        images = [] if number % 6 == 0 else [f"{number}.png"] * (1 + number % 2)
        rows.append(
            {"images": images, "prompt": f"Number {number} is ", "completion": "dark" if number < 24 else "light"}
        )
    (folder / "images.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_small_llava(folder / "llava", ["Number 0 is dark or light."], image_size=8, width=32, feature_layer=-2)
    import_folder(Store.open(str(folder / "store")), folder / "llava", name="small-llava")


def result(folder: Path, run: str, family: str) -> dict[str, Any]:
    """Read what rank 0 reported."""
    found: dict[str, Any] = json.loads((folder / f"{run}-{family}.json").read_text())
    return found


def difference(found: dict[str, float], wanted: dict[str, float]) -> float:
    """Return the largest relative difference of two curves over the same steps."""
    assert found.keys() == wanted.keys()
    differences = [abs(found[step] - wanted[step]) / max(abs(wanted[step]), 1e-3) for step in wanted]
    assert all(map(math.isfinite, differences)), differences  # max() passes over a nan
    return max(differences)


def run_here(folder: Path, family: str, source: dict[str, Any]) -> None:
    """Run a family's stage in this process on another source."""
    run_case_here(folder, _case(family, "here", PLAIN, {"data": source}))


def run_case_here(folder: Path, case: dict[str, Any]) -> None:
    """Run a case in this process, by the plain engine."""
    run_case(folder, Ranks(0, 1, 0, torch.device("cpu")), Case(**case))
