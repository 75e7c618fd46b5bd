"""LLaMA-Factory's configurations and lists of data sets, converted."""

import json
from pathlib import Path

import pytest
from pydantic import TypeAdapter

from recipes.convert.rules import Outcome
from recipes.data.text import Source
from tests.unit.recipes.conversions import LLAMA_FACTORY, Convert, refused_of, stage_of

LLAMA_FACTORY_V1 = """\
model: acme/tiny
model_class: llm
peft_config: {name: lora, r: 4, lora_alpha: 8, target_modules: all}
dist_config: {name: fsdp2, dcp_path: null}
train_dataset: sets.yaml
micro_batch_size: 2
cutoff_len: 64
max_steps: 30
"""


@pytest.mark.usefixtures("factory_data")
def test_llama_factory_reads_its_data_sets(converted: Convert) -> None:
    found = converted(LLAMA_FACTORY)
    assert refused_of(found) == {}
    stage = stage_of(found)
    assert stage["data"] == {
        "source": "jsonl",
        "files": [f"./data/{name}.jsonl" for name in ("bills", "notes")],
        "columns": {"prompt": "question", "completion": "answer"},
        "limit": 400,
        "hold_out": 0.1,
    }
    assert stage["train"]["schedule"] == {"name": "cosine", "warmup_steps": 25}
    assert (stage["train"]["steps"], stage["train"]["global_batch"]) == (100, 8)
    assert stage["lora"] == {"r": 4, "target_modules": ["q_proj", "v_proj"], "alpha": 8}
    assert stage["train"]["packing"] is False


@pytest.mark.usefixtures("factory_data")
@pytest.mark.parametrize(
    ("names", "reason"),
    [
        ("bils", "did you mean bills?"),
        ("films", "has videos, which no model here reads"),
        ("7", "dataset_info.json has no data set 7"),
    ],
)
def test_llama_factory_data_sets_that_are_refused(converted: Convert, names: str, reason: str) -> None:
    found = converted(LLAMA_FACTORY.replace("bills, notes", f"'{names}'"))
    assert reason in refused_of(found)["dataset"]


def test_llama_factory_without_its_list_of_data_sets(converted: Convert) -> None:
    found = converted(LLAMA_FACTORY)
    assert "--folder " in refused_of(found)["dataset"]


@pytest.mark.usefixtures("factory_data")
@pytest.mark.parametrize(
    ("lines", "weights", "until"),
    [
        ("", [None, None], None),
        ("mix_strategy: interleave_once\n", [None, None], None),
        ("mix_strategy: interleave_over\n", [1, 1], "all"),
        ("mix_strategy: interleave_under\ninterleave_probs: 0.7, 0.3\n", [0.7, 0.3], "first"),
    ],
)
def test_data_sets_of_several_layouts_become_a_mixture(
    converted: Convert, lines: str, weights: list[float | None], until: str | None
) -> None:
    evaluated = "eval_dataset: bills, talks\n" + lines
    found = converted(LLAMA_FACTORY.replace("bills, notes", "bills, talks").replace("val_size: 0.1\n", evaluated))
    assert refused_of(found) == {}
    stage = stage_of(found)
    data, evaluation = (TypeAdapter(Source).validate_python(stage[key]) for key in ("data", "evaluation"))
    assert [source.source for source in data.mix] == ["jsonl", "datasets"]
    assert [source.weight for source in data.mix] == weights
    assert stage["data"].get("until") == until
    assert not evaluation.has_weights


@pytest.mark.usefixtures("factory_data")
@pytest.mark.parametrize(
    ("lines", "key"),
    [("interleave_probs: '1'", "dataset"), ("interleave_probs: 1, 0", "interleave_probs")],
)
def test_shares_that_fit_no_mixture(converted: Convert, lines: str, key: str) -> None:
    assert refused_of(converted(f"{LLAMA_FACTORY}mix_strategy: interleave_under\n{lines}\n")).keys() == {key}


def test_judged_answers_of_llama_factory(converted: Convert, tmp_path: Path) -> None:
    columns = {"prompt": "question", "response": "answer", "kto_tag": "is_good"}
    info = {"judged": {"file_name": "judged.json", "columns": columns}}
    chats = {"file_name": "c.json", "formatting": "sharegpt", "columns": {"messages": "turns", "kto_tag": "is_good"}}
    info["chats"] = chats
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "dataset_info.json").write_text(json.dumps(info))
    text = LLAMA_FACTORY.replace("bills, notes", "judged").replace("sft", "kto") + "kto_rejected_weight: 2\n"
    found = converted(text)
    assert refused_of(found) == {}
    stage = stage_of(found)
    assert (stage["kind"], stage["loss"]) == ("preference", {"name": "kto", "undesirable_weight": 2.0})
    assert stage["data"]["columns"] == {"prompt": "question", "completion": "answer", "label": "is_good"}
    chats = stage_of(converted(text.replace("dataset: judged", "dataset: chats")))
    assert chats["data"]["columns"] == {"messages": "turns", "label": "is_good"}


@pytest.mark.usefixtures("factory_data")
def test_preferences_of_llama_factory(converted: Convert, tmp_path: Path) -> None:
    info = {"pairs": {"file_name": "pairs.json", "formatting": "sharegpt", "ranking": True}}
    (tmp_path / "data" / "dataset_info.json").write_text(json.dumps(info))
    text = LLAMA_FACTORY.replace("bills, notes", "pairs").replace("val_size: 0.1\n", "").replace("sft", "dpo")
    found = converted(text + "pref_loss: simpo\npref_beta: 2.5\nsimpo_gamma: 1.0\n")
    assert refused_of(found) == {}
    stage = stage_of(found)
    assert stage["loss"] == {"name": "simpo", "beta": 2.5, "gamma": 1.0}
    assert stage["data"]["columns"] == {
        "prompt": "conversations", "chosen": "chosen.value", "rejected": "rejected.value",
    }  # fmt: skip
    assert stage["data"]["hold_out"] == 0.05
    assert "pref_loss" in refused_of(converted(text + "pref_loss: kto_pair\n"))


def test_newer_files_of_llama_factory(converted: Convert, tmp_path: Path) -> None:
    (tmp_path / "sets.yaml").write_text("a: {path: a.json, converter: alpaca}\nb: {path: b.json, converter: alpaca}\n")
    found = converted(LLAMA_FACTORY_V1)
    assert (found.systems[0].name, refused_of(found)) == ("llama-factory-v1", {})
    stage = stage_of(found)
    assert stage["data"]["files"] == ["./a.json", "./b.json"]
    assert stage["data"]["columns"] == {"prompt": "{instruction}\n{input}", "completion": "output"}
    assert stage["lora"] == {"r": 4, "alpha": 8, "target_modules": "all-linear"}
    assert (stage["shard"]["zero"], stage["train"]["schedule"], stage["train"]["steps"]) == (
        3,
        {"name": "constant"},
        30,
    )
    (tmp_path / "sets.yaml").write_text("a: {path: a.json, size: 9}\n")
    reasons = {line.key: line.reason for line in converted(LLAMA_FACTORY_V1).draft.of(Outcome.CHANGED)}
    assert "whatever size says" in reasons["train_dataset.a"]
    (tmp_path / "sets.yaml").unlink()
    assert "--folder " in refused_of(converted(LLAMA_FACTORY_V1))["train_dataset"]
    assert "optim_config.name" in refused_of(converted(LLAMA_FACTORY_V1 + "optim_config: {name: muon}\n"))
