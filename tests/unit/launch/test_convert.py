"""`trainwright convert`: what it writes and prints, and that what it writes is checked."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.unit.launch.test_json_forms import documented, keys_of

CONFIG = """\
base_model: ./model
datasets:
  - {path: rows.jsonl, type: chat_template}
sequence_len: 64
micro_batch_size: 2
num_epochs: 1
learning_rate: 0.001
wandb_project: mine
"""
ROW = {"messages": [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}]}


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text(f"{json.dumps(ROW)}\n")
    (tmp_path / "config.yml").write_text(CONFIG)
    return tmp_path / "config.yml"


def test_a_recipe_is_written_and_what_is_missing_said(call: Any, config: Path, tmp_path: Path) -> None:
    (tmp_path / "recipes").mkdir()
    code, out, err = call("convert", "config.yml", "-o", "recipes/mine.yaml", "--gpus", "4")
    assert (code, out) == (0, "")
    assert err.startswith("axolotl (by base_model, num_epochs, sequence_len): ")
    assert "  wandb_project: every run writes its own metrics" in err
    assert "still needed: recipes/mine.yaml:" in err
    assert "[missing-folder]" in err
    written = (tmp_path / "recipes" / "mine.yaml").read_text()
    assert "init_from: ../model" in written
    assert "files: [../rows.jsonl]" in written
    assert "global_batch: 8  # micro-batch 2 x accumulation 1 x 4 GPUs" in written
    assert "#     wandb_project: every run" in written
    code, _, err = call("check", "recipes/mine.yaml")
    assert code == 2
    assert err.count("[missing-folder]") == 1
    assert "1 problem" in err


def test_without_a_file_to_write_the_recipe_is_printed(call: Any, config: Path) -> None:
    code, out, _ = call("convert", "config.yml")
    assert code == 0
    assert out.startswith("# Converted from config.yml (axolotl)")
    assert "files: [./rows.jsonl]" in out


def test_data_that_is_there_is_read(call: Any, config: Path, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"text": 3}\n')
    code, _, err = call("convert", "config.yml")
    assert code == 2
    assert "stages.sft.data" in err
    assert "[wrong-cell-type]" in err


def test_a_refused_key_leaves_no_recipe(call: Any, config: Path, tmp_path: Path) -> None:
    config.write_text(CONFIG + "qat: {weight_dtype: int4}\n")
    code, out, err = call("convert", "config.yml", "-o", "mine.yaml")
    assert (code, out, (tmp_path / "mine.yaml").exists()) == (2, "", False)
    assert "config.yml:9: qat: quantisation is not trained for (found {weight_dtype: int4}) [not-convertible]" in err
    assert "--without KEY" in err
    code, _, err = call("convert", "config.yml", "-o", "mine.yaml", "--without", "qat")
    assert code == 0
    assert "# What became" in (tmp_path / "mine.yaml").read_text()
    assert "#   left out as asked:\n#     qat: {weight_dtype: int4}\n" in (tmp_path / "mine.yaml").read_text()


def test_json(call: Any, config: Path) -> None:
    code, out, _ = call("convert", "config.yml", "--json")
    found = json.loads(out)
    assert (code, found["systems"], found["problems"]) == (0, ["axolotl"], [])
    assert {"key": "learning_rate", "outcome": "carried", "target": "train.optimizer.lr", "reason": ""} in found["keys"]
    assert found["recipe"].startswith("# Converted")
    assert keys_of(found) == documented()["convert"]
    assert len(found["missing"]) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("nowhere.yml",), "nowhere.yml: cannot be read: No such file or directory [recipe-not-readable]"),
        (("config.yml", "--from", "axolot"), "--from axolot: no such system; did you mean axolotl?"),
        (("config.yml", "--without", "nothing"), "--without nothing: no such key"),
        (("config.yml", "config.yml"), "config.yml and config.yml are whole configurations"),
        (("other.yml",), "its keys (colour) are of none of"),
        (("config.yml", "-o", "no/where.yaml"), "-o: there is no folder no"),
        (("config.yml", "--folder", "nowhere"), "--folder: there is no folder nowhere"),
    ],
)
def test_what_cannot_be_converted(call: Any, config: Path, arguments: tuple[str, ...], message: str) -> None:
    (config.parent / "ds.json").write_text('{"zero_optimization": {"stage": 2}}')
    (config.parent / "other.yml").write_text("colour: red\n")
    code, _, err = call("convert", *arguments)
    assert code == 2
    assert message in err
