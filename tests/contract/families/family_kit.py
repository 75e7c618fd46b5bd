"""Runs the small stages of every family, by ranks of their own or in this process, and reads what they reported."""

import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.ranks import run_ranks
from tests.stages import Case, run_case, run_cases
from trainers.runtime.distributed import Ranks
from trainers.store.store import Store

sys.path.insert(0, str(Path(__file__).parent))
from family_stages import CROSSINGS, KIT, STAGES, TUNED

sys.path.pop(0)

LIMIT = 1e-5
"""Largest difference of two curves that should be equal, and of the outputs of two equal models."""
TWENTY = {"train": {"steps": 20, "global_batch": 8, "optimizer": {"lr": 1e-3}, "grid": 0, "evaluation_rows": 16}}
UNDER_ZERO_3 = ("decoder", "rnn", "vae", "gan", "adapted")
"""What runs under ZeRO 3 in the default tier, too; all others in the long one. Under ZeRO 3 a forward of a small U-Net
takes ten times as long, for what DeepSpeed does around each of its modules, so there is one of these."""
RESUMED = ("decoder", "rnn", "encoder", "gan", "ddpm", "classified-few", "tuned")
"""What is stopped and resumed in the default tier: whose state is more than a network's and its optimiser's, and two
plain networks. All others are in the long one."""
RESUMED_UNDER_ZERO_3 = ("decoder", "rnn")
"""Stopped one step before an evaluation, with weights so small that they stay whole; their losses use the head's."""
PLAIN = {"engine": "plain", "precision": "fp32"}


def _sharded(family: str, zero: int) -> dict[str, Any]:
    """A GAN's networks run through each other: `check` refuses ZeRO 3, so its highest stage is 2."""
    return {"engine": "deepspeed", "zero": min(zero, 2) if family == "gan" else zero}


def _case(family: str, run: str, shard: dict[str, Any], changes: dict[str, Any] | None = None, **more: Any) -> Case:
    """A stage of the kit, or a reward-tuned diffusion."""
    given = {"vision_language": {"init_from": "small-llava"}}.get(family, {})
    spec, inputs = {**CROSSINGS, **TUNED}[family] if family not in STAGES else (STAGES[family], given)
    return Case(run, family, spec | {"shard": shard} | (changes or {}), inputs, **more)


def _resumed(family: str) -> list[Case]:
    """A stage with a stop on the way."""
    shard, stop_at = _sharded(family, 1), 3 if family in TUNED else 2
    return [_case(family, "stopped", shard, stop_at=stop_at), _case(family, "stopped", shard)]


def _cases() -> list[Case]:
    """Every stage on two workers; some of them with a stop on the way, some under ZeRO 3."""
    cases = [_case(family, "straight", _sharded(family, 1), is_kept=True) for family in (*KIT, *TUNED)]
    cases += [case for family in RESUMED for case in _resumed(family)]
    cases += [_case(family, "zero3", _sharded(family, 3)) for family in UNDER_ZERO_3]
    for family in RESUMED_UNDER_ZERO_3:
        cases += [_case(family, "stopped-zero3", _sharded(family, 3), stop_at=stop_at) for stop_at in (2, 0)]
    return cases


def run_families(folder: Path) -> Path:
    """Run every family on two workers, and with the plain engine on one; gives FOLDER."""
    (folder / "text.txt").write_text("\n\n".join(f"The number {n} comes before {n + 1}." for n in range(120)))
    rows = [
        (f"The number {n} comes before {n + 1}.", "" if n % 6 == 0 else "early" if n < 60 else "late")
        for n in range(120)
    ]
    (folder / "labelled.csv").write_text("text,label\n" + "".join(f"{text},{label}\n" for text, label in rows))
    _write_images(folder)
    run_ranks(folder, 2, run_cases, folder, _cases())
    run_ranks(folder, 1, run_cases, folder, [_case(family, "plain", PLAIN) for family in (*KIT, *TUNED)])
    return folder


def run_every_stage(folder: Path) -> Path:
    """Run every family under the other ZeRO stages in the folder where they ran, stop and resume those that were not,
    and run a GAN for twenty steps."""
    cases = [_case(family, f"zero{zero}", _sharded(family, zero)) for family in (*KIT, *TUNED) for zero in (0, 2)]
    cases += [case for family in (*KIT, *TUNED) if family not in RESUMED for case in _resumed(family)]
    cases += [_case(family, "zero3", _sharded(family, 3)) for family in (*KIT, *TUNED) if family not in UNDER_ZERO_3]
    run_ranks(folder, 2, run_cases, folder, [*cases, _case("gan", "twenty", _sharded("gan", 2), TWENTY)])
    run_ranks(folder, 1, run_cases, folder, [_case("gan", "twenty-plain", PLAIN, TWENTY)])
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


def run_case_here(folder: Path, case: Case) -> None:
    """Run a case in this process, by the plain engine."""
    run_case(folder, Ranks(0, 1, 0, torch.device("cpu")), case)
