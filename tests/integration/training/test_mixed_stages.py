"""Whole stages on mixtures of sources: what is drawn and measured of each, and the same bytes after a stop."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.integration.training.test_language_stage import STAGES, TRAIN, result
from tests.ranks import run_ranks
from tests.stages import Case, run_cases

pytestmark = pytest.mark.long

SIDES = {"hold_out": 0.2, "source": "jsonl"}
WEIGHED = [{**SIDES, "files": ["chat.jsonl"], "weight": 2}, {**SIDES, "files": ["more.jsonl"], "weight": 1}]
MIXED: dict[str, dict[str, Any]] = {
    "base": {
        **STAGES["base"],
        "data": {
            "mix": [
                {**STAGES["base"]["data"], "weight": 3, "alias": "numbers"},
                {"source": "text", "files": ["words.txt"], "documents": "paragraph", "hold_out": 0.2, "weight": 1},
            ],
            "weigh": "tokens",
        },
    },
    "chat": {
        **STAGES["chat"],
        "data": {"mix": [{**SIDES, "files": ["chat.jsonl"]}, {**SIDES, "files": ["more.jsonl"]}]},
        "train": {**TRAIN, "sequence_length": 64},
    },
    "liked": {
        "kind": "preference",
        "init_from": "base",
        "loss": {"name": "dpo"},
        "data": {"mix": WEIGHED},
        "train": {**TRAIN, "sequence_length": 64, "evaluation_rows": 32},
        "min_accuracy": 0,
    },
    "judge": {
        "kind": "reward",
        "init_from": "base",
        "data": {"mix": WEIGHED},
        "train": {**TRAIN, "sequence_length": 64, "evaluation_rows": 32},
        "min_accuracy": 0,
    },
}
NAMES = {"base": ("numbers", "words"), **dict.fromkeys(("chat", "liked", "judge"), ("chat", "more"))}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which every stage ran straight, and again with a preemption."""
    folder = tmp_path_factory.mktemp("mixed")
    lines = [f"The number {n} comes before {n + 1}.\nAnd {n} is {'even' if n % 2 == 0 else 'odd'}." for n in range(120)]
    (folder / "text.txt").write_text("\n\n".join(lines))
    (folder / "words.txt").write_text("\n\n".join(f"Word {n} is as long as word {n} of {n}." for n in range(40)))
    for name, count in (("chat", 60), ("more", 25)):
        rows = [
            {"prompt": f"{name}: what comes after {n}?", "completion": f"After {n} comes {n + 1}."}
            for n in range(count)
        ]
        rows = [{**row, "chosen": row["completion"], "rejected": f"It is {n}."} for n, row in enumerate(rows)]
        (folder / f"{name}.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    cases = []
    for stage, spec in MIXED.items():
        inputs = {} if stage == "base" else {"init_from": "base"}
        cases.append(Case("straight", stage, spec, inputs, is_kept=stage == "base"))
        cases += [Case("stopped", stage, spec, inputs, stop_at=2), Case("stopped", stage, spec, inputs)]
    run_ranks(folder, 2, run_cases, folder, cases)
    return folder


@pytest.mark.parametrize("stage", MIXED)
def test_a_stopped_stage_draws_what_a_straight_one_does(finished: Path, stage: str) -> None:
    straight, resumed = result(finished, f"straight-{stage}"), result(finished, f"stopped-{stage}")
    assert resumed["steps"] == [4, 5, 6]
    assert resumed["digest"] == straight["digest"]
    assert resumed["metrics"] == straight["metrics"]


@pytest.mark.parametrize("stage", MIXED)
def test_what_was_drawn_and_lost_is_told_of_each_source(finished: Path, stage: str) -> None:
    metrics = result(finished, f"straight-{stage}")["metrics"]
    first, second = (metrics["drawn"][name] for name in NAMES[stage])
    assert first["rows"] + second["rows"] == metrics["samples"] == 48
    sizes = [metrics["data"]["sources"][name]["sequences"] for name in NAMES[stage]]
    assert [first["epochs"], second["epochs"]] == [first["rows"] / sizes[0], second["rows"] / sizes[1]]
    if stage in ("liked", "judge"):
        assert (first["rows"], second["rows"]) == (32, 16)
    for name in NAMES[stage]:
        assert metrics["evaluation"][f"loss/{name}"] > 0
