"""Mixtures and filters as a recipe's user meets them: what `check`, `data` and `plan` say of each source."""

import json
from pathlib import Path
from typing import Any

import pytest

from launch.checks.data_view import view_data
from launch.checks.preflight import check
from launch.checks.source_counts import source_counts
from launch.inputs.data_check import load_checked
from recipes.data.tokenizers import TrainTokenizer
from recipes.planning.fingerprint import ParentId, stage_meaning
from recipes.problem_codes import Code
from trainers.data.tokenizer import train_tokenizer

ROWS = [{"prompt": f"What is {number}?", "completion": f"It is {number}."} for number in range(30)]
OTHERS = [{"prompt": f"Say it {number} times.", "completion": "It " * number} for number in range(10)]
TRAIN = {"steps": 1, "global_batch": 2, "sequence_length": 48, "optimizer": {"lr": 1e-3}}
MIX: dict[str, Any] = {
    "mix": [
        {"source": "jsonl", "files": ["rows.jsonl"], "weight": 3, "hold_out": 0.2},
        {
            "source": "jsonl",
            "files": ["others.jsonl"],
            "weight": 1,
            "filter": [{"by": "length", "least": 4, "of": "answer"}],
        },
    ]
}


@pytest.fixture
def write(tmp_path: Path) -> Any:
    """Write a recipe whose fine-tuning reads this data."""
    (tmp_path / "tokenizer").mkdir()
    for name, content in train_tokenizer(TrainTokenizer(train="bpe", vocab_size=300), ["What is one?"]).files().items():
        (tmp_path / "tokenizer" / name).write_bytes(content)
    (tmp_path / "text.txt").write_text("One and two.\n")
    for name, rows in (("rows", ROWS), ("others", OTHERS)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    base = {
        "kind": "pretrain",
        "architecture": {"family": "decoder", "type": "llama", "max_position_embeddings": 64, **sizes},
        "tokenizer": {"from": "./tokenizer"},
        "data": {"source": "text", "files": ["text.txt"]},
        "train": TRAIN,
    }

    def write(data: dict[str, Any], name: str = "recipe.yaml", **keys: Any) -> Path:
        stages = {"base": base, "sft": {"kind": "finetune", "init_from": "base", "data": data, "train": TRAIN}}
        (tmp_path / name).write_text(json.dumps({"name": "mixed", "stages": stages, **keys}))
        return tmp_path / name

    return write


def test_check_shows_a_row_of_each_source_and_names_the_bad_one(write: Any, tmp_path: Path) -> None:
    found = check(write(MIX))
    assert found.exit_code == 0, found.problems
    shown = {row.field: row for row in found.rows if row.stage == "sft"}
    assert list(shown) == ["data.mix.0", "data.mix.1"]
    assert shown["data.mix.1"].filtered == {"length": 2}
    (tmp_path / "others.jsonl").write_text('{"prompt": "a"}\n')
    (problem,) = check(write(MIX)).problems
    assert problem.field == "stages.sft.data.mix.1.files.0"
    assert "others.jsonl" in problem.found
    assert problem.message.startswith("others: ")


def test_data_shows_each_source_and_what_its_filters_leave_out(write: Any) -> None:
    views = [view for view in view_data(write(MIX)) if view.stage == "sft"]
    assert [view.field for view in views] == ["data.mix.0", "data.mix.1"]
    assert views[1].report["filtered"] == {"length": 2}
    assert list(views[1].lost["length"]) == ["others.jsonl:1", "others.jsonl:2"]


def test_a_plan_counts_each_source(write: Any) -> None:
    counts = {count.field: count for count in source_counts(load_checked(write(MIX)), None)}
    assert counts["sft.data.mix.1"].rows == len(OTHERS) - 2
    assert counts["sft.data.mix.0"].name == "rows"
    assert 0 < counts["sft.data.mix.0"].rows < len(ROWS)  # some are held out
    assert all(count.tokens and count.is_whole for count in counts.values())


@pytest.mark.parametrize("key", ["alias", "weight"])
def test_keys_of_a_mixture_have_no_effect_outside_of_one(write: Any, key: str) -> None:
    found = check(write({"source": "jsonl", "files": ["rows.jsonl"], key: 2 if key == "weight" else "a"}))
    assert [(problem.code, problem.field) for problem in found.problems] == [(Code.NO_EFFECT, f"stages.sft.data.{key}")]


def test_a_mixture_laid_over_a_source_replaces_it(write: Any, tmp_path: Path) -> None:
    write({"source": "jsonl", "files": ["rows.jsonl"], "columns": {"prompt": "prompt"}}, "base.yaml")
    over = {"extends": "base.yaml", "stages": {"sft": {"data": MIX}}}
    (tmp_path / "over.yaml").write_text(json.dumps(over))
    assert len(load_checked(tmp_path / "over.yaml").recipe.stages["sft"].sources()[0].source.members()) == 2


def test_places_and_names_of_files_are_no_meaning(write: Any) -> None:
    recipe = load_checked(write(MIX)).recipe
    stage = recipe.stages["sft"]
    mixed = stage.sources()[0].source

    def meaning(**changes: Any) -> dict[str, Any]:
        data = mixed.changed(mix=[mixed.mix[0].changed(**changes), mixed.mix[1]])
        changed = recipe.changed(stages={**recipe.stages, "sft": stage.changed(data=data)})
        return stage_meaning("sft", changed, {"init_from": ParentId("f", "d")}, {"data": "content"})

    assert meaning(files=["elsewhere.jsonl"], alias="other") == meaning()
    assert meaning(weight=4) != meaning()
