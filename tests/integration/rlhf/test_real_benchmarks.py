"""SmolLM2 and random weights of its shape on public benchmarks, where `../shared/data` beside the repository, or the
folder $TRAINWRIGHT_DATA, holds them: real weights know something, random ones nothing.
"""

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from launch.runs.suites import suites_of
from recipes.stages.evaluate import Evaluate
from tests.observers import Quiet
from trainers.evaluation.evaluate_stage import run_evaluate
from trainers.models.imports import import_folder
from trainers.runtime.distributed import Ranks
from trainers.store.store import Store
from trainers.training.context import StageContext

DATA = Path(os.environ.get("TRAINWRIGHT_DATA") or Path(__file__).resolve().parents[4] / "shared" / "data") / "general"
NAMES = ("arc_easy", "piqa", "boolq", "openbook_qa", "winogrande")
ROWS = 200
pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(not (DATA / "arc_easy.jsonl.gz").is_file(), reason="no general/arc_easy.jsonl.gz in the data"),
]


def measured(folder: Path, model: Path, **keys: Any) -> dict[str, float]:
    """Every benchmark's figures of a model."""
    store = Store.open(str(folder / "store"))
    ending = {"arc_easy": "\nAnswer:", "piqa": "\nAnswer:", "boolq": "\nAnswer:"}
    benchmarks = {
        name: {
            "suite": "multiple_choice", "layout": "query", "ending": ending.get(name, ""),
            "data": {"source": "jsonl", "files": [str(DATA / f"{name}.jsonl.gz")], "limit": ROWS},
        }
        for name in NAMES
    }  # fmt: skip
    shard = {"engine": "plain", "precision": "bf16"}
    spec = Evaluate.model_validate(
        {"kind": "evaluate", "of": ["m"], "suites": [], "benchmarks": benchmarks, "shard": shard}
    )
    context = StageContext(
        store, "run", "e", "f" * 64, 1, 0, folder, {"of.0": import_folder(store, model)}, {}, Quiet(),
        Ranks(0, 1, 0, torch.device("cpu")),
    )  # fmt: skip
    candidate = run_evaluate(spec, context, suites_of(spec))
    assert candidate is not None
    found = {name.removeprefix("m."): float(value) for name, value in candidate.metrics.items()}
    for name in NAMES:
        print(
            name,
            {
                metric: round(found[f"{name}.{metric}"], 3)
                for metric in ("acc", "acc_low", "acc_high", "acc_norm", "acc_norm_low", "acc_norm_high", "chance")
            },
        )
    return found


def test_random_weights_guess(smollm2: Path, tmp_path: Path) -> None:
    model = tmp_path / "random"
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(smollm2)).to(torch.bfloat16).save_pretrained(model)
    for file in smollm2.iterdir():
        if file.suffix != ".safetensors" and file.name != "config.json":
            shutil.copy(file, model)
    found = measured(tmp_path, model)
    for name in NAMES:
        chance, shortest = found[f"{name}.chance"], found[f"{name}.shortest"]
        assert found[f"{name}.acc_norm_low"] <= chance <= found[f"{name}.acc_norm_high"], name
        # A long text has many tokens that each cost ln(vocabulary): raw likelihood takes the shortest choice.
        assert any(found[f"{name}.acc_low"] <= guess <= found[f"{name}.acc_high"] for guess in (chance, shortest)), name


def test_smollm2_knows_something(smollm2: Path, tmp_path: Path) -> None:
    """Not more than chance on BoolQ without examples: 0.48 of 200 rows (0.41 to 0.55) with these 4-bit weights."""
    found = measured(tmp_path, smollm2)
    for name in ("arc_easy", "piqa"):
        assert found[f"{name}.acc_low"] > found[f"{name}.chance"], name
