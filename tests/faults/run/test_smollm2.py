"""A real pretrained model through its shipped recipe, killed in every stage: resume, and the same bytes come out.

Each cell of precision, workers and ZeRO stage runs the chain in few steps twice, undisturbed and with a SIGKILL in each
stage: of the driver and of a worker in turn, after the stage has saved a state, where it saves any. Both exit with 0.
"""

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.faults.run.bed import Bed

pytestmark = [pytest.mark.serial, pytest.mark.long, pytest.mark.timeout(3000)]

RECIPE = Path(__file__).resolve().parents[3] / "recipes" / "llm" / "smollm2.yaml"
STAGES = ("sft", "reward", "policy", "eval")
STEPS, BATCH, LENGTH = 4, 4, 96
CELLS = [(precision, workers, zero) for precision in ("bf16", "fp32") for workers in (1, 2) for zero in (0, 1, 2, 3)]


@pytest.fixture
def make_recipe(tmp_path: Path, smollm2: Path) -> Callable[[str, int, int], Path]:
    """Writes the shipped recipe in few steps."""

    def make(precision: str, workers: int, zero: int) -> Path:
        recipe = yaml.safe_load(RECIPE.read_text())
        stages = recipe["stages"]
        for stage in stages.values():
            stage |= {"gate": "ignore", "shard": {"engine": "deepspeed", "zero": zero, "precision": precision}}
            for source in (stage.get(key) for key in ("data", "prompts", "text")):
                if source is not None:
                    source["files"] = [str(RECIPE.parent / file) for file in source["files"]]
        for name in ("sft", "reward"):
            short = {"steps": STEPS, "save_every": 2, "global_batch": BATCH, "sequence_length": LENGTH}
            stages[name]["train"] |= short | {"schedule": {"name": "cosine"}, "evaluation_rows": BATCH}
        stages["sft"]["init_from"] = str(smollm2)
        stages["reward"]["min_accuracy"] = 0
        stages["policy"]["rollout"] |= {"prompts_per_iteration": BATCH, "max_new_tokens": 8}
        stages["policy"]["algorithm"] |= {"iterations": 2, "save_every": 1}
        stages["eval"] |= {"of": ["sft", "policy"], "num_prompts": BATCH}
        stages["eval"]["sampling"]["max_new_tokens"] = 8
        recipe["cluster"] = {"workers": workers, "gpus_per_worker": 0}
        path = tmp_path / f"{precision}-{workers}-{zero}.yaml"
        path.write_text(yaml.safe_dump(recipe, sort_keys=False))
        return path

    return make


def has_state(bed: Bed, stage: str) -> bool:
    """Whether the stage has saved a state that a resume can start from."""
    return any((bed.store / "refs" / "states").glob(f"*/{stage}/*"))


def kill(bed: Bed, driver: Any, stage: str, victim: str) -> None:
    """End the driver or rank 0 once the stage has saved a state; of the evaluation, which saves none, once it works."""
    at_work = bed.works if stage == "eval" else lambda name: has_state(bed, name)
    bed.wait_for(lambda: at_work(stage), driver)
    assert not bed.committed(stage), f"{stage} was committed before the kill"
    pid = driver.pid if victim == "driver" else bed.wait_for(lambda: bed.workers(stage).get(0), driver)
    os.kill(pid, signal.SIGKILL)
    if victim == "driver":
        driver.wait(10)


@pytest.mark.parametrize(("precision", "workers", "zero"), CELLS)
def test_smollm2_killed_in_every_stage(
    make_bed: Callable[[], Bed],
    make_recipe: Callable[[str, int, int], Path],
    say: Callable[[str], None],
    precision: str,
    workers: int,
    zero: int,
) -> None:
    recipe = str(make_recipe(precision, workers, zero))
    undisturbed, bed = make_bed(), make_bed()
    undisturbed.finish("run", recipe)
    driver = bed.start("run", recipe)
    for number, stage in enumerate(STAGES):
        victim = ("driver", "worker")[number % 2]
        kill(bed, driver, stage, victim)
        say(f"{victim} killed in {stage}")
        if victim == "driver":
            bed.assert_nothing_left()
            driver = bed.start("resume", "last")
        else:
            bed.wait_for(lambda name=stage: bed.started(name, 2), driver)
    assert driver.wait(1500) == 0, bed.output()
    bed.assert_nothing_left()
    made = bed.digests()
    assert set(STAGES) <= made.keys()
    assert made == undisturbed.digests()
