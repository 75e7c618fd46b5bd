"""Configurations of other systems, as people write them, converted; and what is wrong with one."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter

from recipes.convert.engine import Conversion, convert
from recipes.convert.registry import SYSTEMS, find_system, recognise
from recipes.convert.rules import Outcome
from recipes.convert.source_text import SourceFile, read_source
from recipes.convert.write import recipe_text
from recipes.data.text import Source
from recipes.errors import RecipeError, RequestError
from recipes.loading.yaml_text import parse_yaml
from recipes.problem_codes import Code

Convert = Callable[..., Conversion]

AXOLOTL = """\
base_model: acme/tiny-llama
revision_of_model: 0123abc
load_in_4bit: true
adapter: qlora
lora_r: 64
lora_alpha: 16
lora_target_linear: true
datasets:
  - path: acme/chats
    type: chat_template
    field_messages: turns
    split: train[:5%]
chat_template: chatml
val_set_size: 0.02
sequence_len: 1024
sample_packing: true
micro_batch_size: 4
gradient_accumulation_steps: 3
num_epochs: 2
optimizer: paged_adamw_8bit
learning_rate: 1e-4
lr_scheduler: cosine
warmup_ratio: 0.1
bf16: auto
gradient_checkpointing: true
wandb_project: mine
seed: 7
"""

LLAMA_FACTORY = """\
model_name_or_path: acme/tiny-qwen
stage: sft
do_train: true
finetuning_type: lora
lora_rank: 4
lora_target: q_proj,v_proj
dataset: bills, notes
template: qwen
cutoff_len: 512
max_samples: 200
output_dir: out
per_device_train_batch_size: 2
gradient_accumulation_steps: 4
learning_rate: 2.0e-4
max_steps: 100
lr_scheduler_type: cosine
warmup_ratio: 0.25
val_size: 0.1
"""
DATASET_INFO = {
    "bills": {"file_name": "bills.jsonl", "columns": {"prompt": "question", "response": "answer"}},
    "notes": {"file_name": "notes.jsonl", "columns": {"prompt": "question", "response": "answer"}},
    "talks": {"hf_hub_url": "acme/talks", "formatting": "sharegpt"},
    "films": {"file_name": "films.json", "formatting": "sharegpt", "columns": {"videos": "videos"}},
}


@pytest.fixture
def converted(tmp_path: Path) -> Convert:
    """Write a file and convert it to a recipe in the same folder."""

    def make(text: str, name: str = "config.yaml", system: str | None = None, **options: Any) -> Conversion:
        path = tmp_path / name
        path.write_text(text)
        source = read_source(path, tmp_path)
        known = recognise(source.value, name)[0] if system is None else find_system(system)
        return convert([(source, known)], tmp_path, **options)

    return make


@pytest.fixture
def factory_data(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "dataset_info.json").write_text(json.dumps(DATASET_INFO))


def _refused(conversion: Conversion) -> dict[str, str]:
    return {line.key: line.reason for line in conversion.refused}


def _stage(conversion: Conversion) -> dict[str, Any]:
    (stage,) = conversion.recipe["stages"].values()
    assert isinstance(stage, dict)
    return stage


def test_axolotl(converted: Convert) -> None:
    found = converted(AXOLOTL, workers=2)
    assert _refused(found) == {}
    assert found.recipe == {
        "name": "config",
        "seed": 7,
        "cluster": {"workers": 2},
        "stages": {
            "sft": {
                "kind": "finetune",
                "init_from": "hf://acme/tiny-llama@0123abc",
                "lora": {"r": 64, "alpha": 16, "target_modules": "all-linear", "quantize": "nf4"},
                "template": "chat",
                "data": {
                    "source": "datasets",
                    "path": "acme/chats",
                    "revision": "main",
                    "split": "train[:5%]",
                    "columns": {"messages": "turns"},
                    "hold_out": 0.02,
                },
                "train": {
                    "epochs": 2,
                    "global_batch": 24,
                    "sequence_length": 1024,
                    "packing": True,
                    "optimizer": {"name": "adamw", "lr": 1e-4},
                    "schedule": {"name": "cosine", "warmup_ratio": 0.1},
                },
                "shard": {"precision": "auto", "gradient_checkpointing": True, "micro_batch": 4},
            }
        },
    }
    changed = {line.key for line in found.draft.of(Outcome.CHANGED)}
    assert changed == {"optimizer", "chat_template"}
    assert found.draft.comments["train.global_batch"] == "micro-batch 4 x accumulation 3 x 2 GPUs"


@pytest.mark.usefixtures("factory_data")
def test_llama_factory_reads_its_data_sets(converted: Convert) -> None:
    found = converted(LLAMA_FACTORY)
    assert _refused(found) == {}
    stage = _stage(found)
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
    assert reason in _refused(found)["dataset"]


def test_llama_factory_without_its_list_of_data_sets(converted: Convert) -> None:
    found = converted(LLAMA_FACTORY)
    assert "--folder names the folder" in _refused(found)["dataset"]


def test_a_deepspeed_file_that_is_named_is_read(converted: Convert, tmp_path: Path) -> None:
    held = {
        "bf16": {"enabled": "auto"},
        "train_micro_batch_size_per_gpu": "auto",
        "zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}, "overlap_comm": True},
    }
    (tmp_path / "ds.json").write_text(json.dumps(held))
    found = converted(AXOLOTL + "deepspeed: ds.json\n")
    assert _refused(found) == {}
    assert {"zero": 2, "offload": "cpu"}.items() <= _stage(found)["shard"].items()
    found = converted(AXOLOTL + "deepspeed: elsewhere/zero3.json\n")
    assert _stage(found)["shard"]["zero"] == 3
    assert "its name says ZeRO 3" in {line.key: line.reason for line in found.draft.of(Outcome.CHANGED)}["deepspeed"]
    (tmp_path / "ds.json").write_text("{")
    assert "not valid JSON" in _refused(converted(AXOLOTL + "deepspeed: ds.json\n"))["deepspeed"]


def test_documents_are_pretraining_unless_adapters_are_trained(converted: Convert) -> None:
    text = AXOLOTL.replace("type: chat_template\n    field_messages: turns", "type: completion\n    field: body")
    assert _stage(converted(text))["loss_on"] == "all"
    whole = text.replace("adapter: qlora\n", "")
    stage = _stage(converted(whole))
    assert (stage["kind"], "lora" in stage, "template" in stage) == ("pretrain", False, False)
    assert stage["data"]["columns"] == {"text": "body"}


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
    assert _refused(found) == {}
    stage = _stage(found)
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
    assert _refused(converted(f"{LLAMA_FACTORY}mix_strategy: interleave_under\n{lines}\n")).keys() == {key}


def test_several_data_sets_of_axolotl_and_what_is_left_out_of_them(converted: Convert) -> None:
    more = "datasets:\n  - {path: acme/tales, type: completion, field: body}\n"
    found = converted(AXOLOTL.replace("datasets:\n", more) + "min_sample_len: 16\ndataset_exact_deduplication: true\n")
    assert _refused(found) == {}
    data = TypeAdapter(Source).validate_python(_stage(found)["data"])
    assert [source.path for source in data.mix] == ["acme/tales", "acme/chats"]
    assert [source.hold_out for source in data.mix] == [0.02, 0.02]
    assert [item.by for item in data.filter] == ["length", "duplicate"]
    assert data.filter[0].least == 16


def test_keys_of_adapters_have_no_effect_without_one(converted: Convert) -> None:
    found = converted(AXOLOTL.replace("adapter: qlora\n", ""))
    assert "lora" not in _stage(found)
    reasons = {line.key: line.reason for line in found.draft.of(Outcome.NO_EFFECT)}
    assert reasons["lora_r"] == "no adapter is trained"


@pytest.mark.parametrize(
    ("line", "key", "code", "reason"),
    [
        ("sample_pakcing: true", "sample_pakcing", Code.UNKNOWN_KEY, "did you mean sample_packing?"),
        ("max_grad_norm: yes please", "max_grad_norm", Code.WRONG_TYPE, "must be a number"),
        ("fp8: 3", "fp8", Code.WRONG_TYPE, "must be true or false"),
        ("loraplus_lr_ratio: 16", "loraplus_lr_ratio", Code.NOT_CONVERTIBLE, "one learning rate"),
        ("unfrozen_parameters: ['model.embed_tokens.weight[:320]']", "unfrozen_parameters", Code.NOT_CONVERTIBLE, ""),
        ("special_tokens: 3", "special_tokens", Code.WRONG_TYPE, "must be a mapping"),
        ("save_steps: $EVERY", "save_steps", Code.NOT_CONVERTIBLE, "variable that the file does not set"),
    ],
)
def test_what_is_wrong_is_named_with_its_line(converted: Convert, line: str, key: str, code: Code, reason: str) -> None:
    found = converted(AXOLOTL + line + "\n")
    problems = {problem.field: problem for problem in map(found.draft.describe, found.refused)}
    assert problems.keys() == {key}
    assert problems[key].code == code
    assert reason in problems[key].message
    assert problems[key].line == AXOLOTL.count("\n") + 1


@pytest.mark.parametrize(("written", "precision"), [("auto", "auto"), ("true", "bf16"), ("false", "fp32")])
def test_precision(converted: Convert, written: str, precision: str) -> None:
    stage = _stage(converted(AXOLOTL.replace("bf16: auto", f"bf16: {written}\nfp16: false")))
    assert stage["shard"]["precision"] == precision


def test_a_default_does_not_count_beside_the_key_that_replaces_it(converted: Convert) -> None:
    with_steps = AXOLOTL.replace("warmup_ratio: 0.1", "warmup_steps: 5")
    assert "warmup_ratio" not in recipe_text(converted(with_steps), "a.yml")
    assert "warmup_ratio: 0.03 (its default)" in recipe_text(
        converted(AXOLOTL.replace("warmup_ratio: 0.1\n", "")), "a.yml"
    )


def test_keys_that_say_different_things(converted: Convert) -> None:
    found = converted(AXOLOTL.replace("bf16: auto", "bf16: true\nfloat32: true"))
    assert _refused(found).keys() == {"float32"}
    assert "another key says 'bf16'" in _refused(found)["float32"]


@pytest.mark.parametrize(
    ("key", "named"),
    [("base_model", "model"), ("learning_rate", "learning rate"), ("datasets", "data")],
)
def test_what_is_missing_is_named(converted: Convert, key: str, named: str) -> None:
    kept = [line for line in AXOLOTL.splitlines() if not line.startswith(key)]
    if key == "datasets":
        kept = [line for line in kept if not line.startswith("  ")]
    assert _refused(converted("\n".join(kept))).keys() == {named}


def test_a_home_folder_is_written_whole(converted: Convert) -> None:
    found = converted(AXOLOTL.replace("acme/tiny-llama", "~/models/tiny"))
    assert _stage(found)["init_from"] == str(Path.home() / "models" / "tiny")


def test_a_key_is_left_out_on_request(converted: Convert) -> None:
    found = converted(AXOLOTL + "tokens: ['<mine>']\n", without=["tokens", "datasets"])
    assert [line.key for line in found.draft.of(Outcome.LEFT_OUT)] == ["tokens", "datasets"]
    with pytest.raises(RequestError, match="--without token: .* tokens"):
        converted(AXOLOTL + "tokens: ['<mine>']\n", without=["token"])


@pytest.mark.parametrize(
    ("text", "code", "line"),
    [
        ("", Code.INVALID_YAML, None),
        ("# nothing\n", Code.INVALID_YAML, None),
        ("base_model: a/b\n  x: [", Code.INVALID_YAML, 2),
        ("- base_model\n", Code.WRONG_TYPE, 1),
        (f"{AXOLOTL}---\nseed: 3\n", Code.INVALID_YAML, AXOLOTL.count("\n") + 2),
        (f"{AXOLOTL}seed: 3\n", Code.DUPLICATE_KEY, AXOLOTL.count("\n") + 1),
        ("base_model: !!python/name:os.system\n", Code.UNSUPPORTED_YAML, 1),
        ('{"base_model": "a/b", "base_model": "c/d"}', Code.DUPLICATE_KEY, None),
        ('{"base_model": ', Code.INVALID_YAML, 1),
        ("a: &a [*a]\n", Code.RECIPE_TOO_LARGE, 1),
    ],
)
def test_files_that_cannot_be_read(tmp_path: Path, text: str, code: Code, line: int | None) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError) as caught:
        read_source(path, tmp_path)
    (problem,) = caught.value.problems
    assert (problem.code, problem.line, problem.file) == (code, line, str(path))


def test_a_bomb_of_aliases_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    bomb = "a0: &a0 [x, x]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 12))
    path.write_text(bomb)
    with pytest.raises(RecipeError) as caught:
        read_source(path, tmp_path)
    assert caught.value.codes == (Code.RECIPE_TOO_LARGE,)


def test_anchors_and_merge_keys_are_resolved(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("base: &base {a: 1, b: 2}\nother: {<<: *base, b: 3}\nlisted: {<<: [{a: 5}, *base]}\n")
    assert read_source(path, tmp_path).value == {
        "base": {"a": 1, "b": 2}, "other": {"a": 1, "b": 3}, "listed": {"a": 5, "b": 2},
    }  # fmt: skip


def test_the_system_is_told_by_its_keys() -> None:
    assert recognise({"base_model": "a/b", "sequence_len": 8}, "f")[0].name == "axolotl"
    assert recognise({"stage": "sft"}, "f") == (SYSTEMS["llama-factory"], ["stage"])
    assert recognise({"zero_optimization": {}}, "f")[0].name == "deepspeed"
    with pytest.raises(RequestError, match=r"of several systems \(axolotl: base_model; LLaMA-Factory: stage"):
        recognise({"base_model": "a/b", "stage": "sft"}, "f")
    with pytest.raises(RequestError, match=r"keys \(color\) .* axolotl, llama-factory"):
        recognise({"color": "red"}, "f")
    with pytest.raises(RequestError, match="--from axolotl2: .* axolotl"):
        find_system("axolotl2")


VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 10**6), st.floats(), st.text(max_size=8),
    st.sampled_from(["auto", "lora", "cosine", "true", "1e-4", "a/b", "./a", "pt", "rm", "zero3", "\n#x", "$HOME"]),
    st.lists(st.one_of(st.text(max_size=5), st.dictionaries(st.sampled_from(["path", "type"]), st.text(max_size=5)))),
    st.dictionaries(st.text(min_size=1, max_size=5), st.integers(), max_size=2),
)  # fmt: skip


@pytest.mark.parametrize("name", list(SYSTEMS))
@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_no_key_vanishes_and_what_is_written_reads_back(name: str, data: st.DataObject) -> None:
    system = SYSTEMS[name]
    keys = sorted(key.replace("*", "x") for key in system.table)
    value = data.draw(st.dictionaries(st.sampled_from([*keys, "unheard_of"]), VALUES, max_size=8))
    found = convert([(SourceFile("c.yaml", value, Path("/nowhere")), system)], Path("/nowhere"))
    listed = [".".join(map(str, line.place)) + "." for line in found.draft.lines if not line.is_default]
    assert [key for key in value if not any(line.startswith(f"{key}.") for line in listed)] == []
    if not found.refused:
        assert parse_yaml(recipe_text(found, "c.yaml"), "r").value == found.recipe


def test_comments_stay_comments(converted: Convert) -> None:
    found = converted(
        AXOLOTL.replace("wandb_project: mine", 'wandb_project: "a\\nseed: 9"\noutput_dir: "x\\u2028y: 1"')
    )
    document = parse_yaml(recipe_text(found, "evil\nname: x.yaml"), "r")
    assert (document.value, document.problems) == (found.recipe, [])


TRL = """\
model_name_or_path: acme/tiny
dataset_name: rows.jsonl
use_peft: true
learning_rate: 2e-4
num_train_epochs: 1
per_device_train_batch_size: 4
packing: true
assistant_only_loss: true
report_to: none
"""
ACCELERATE = {
    "distributed_type": "DEEPSPEED",
    "mixed_precision": "bf16",
    "num_processes": 4,
    "deepspeed_config": {"zero_stage": 2, "gradient_accumulation_steps": 3, "offload_optimizer_device": "none"},
}


def _with_accelerate(tmp_path: Path, system: str = "trl", text: str = TRL, **options: Any) -> Conversion:
    (tmp_path / "trl.yaml").write_text(text)
    (tmp_path / "accelerate.json").write_text(json.dumps(ACCELERATE))
    sources = [read_source(tmp_path / name, tmp_path) for name in ("accelerate.json", "trl.yaml")]
    return convert([(sources[0], SYSTEMS["accelerate"]), (sources[1], SYSTEMS[system])], tmp_path, **options)


def test_trl_with_a_configuration_of_accelerate(tmp_path: Path) -> None:
    found = _with_accelerate(tmp_path)
    assert _refused(found) == {}
    stage = _stage(found)
    assert found.recipe["cluster"] == {"workers": 4}
    assert stage["train"]["global_batch"] == 4 * 3 * 4
    assert stage["data"] == {"source": "jsonl", "files": ["./rows.jsonl"]}
    assert stage["lora"] == {"r": 16, "alpha": 32, "dropout": 0.05}
    assert (stage["loss_on"], stage["train"]["packing"], stage["train"]["schedule"]) == (
        "responses", True, {"name": "linear"},
    )  # fmt: skip
    assert stage["shard"] == {"zero": 2, "precision": "bf16", "gradient_checkpointing": True, "micro_batch": 4}


def test_the_command_line_decides_about_gpus(tmp_path: Path) -> None:
    found = _with_accelerate(tmp_path, workers=2)
    assert (_refused(found), found.recipe["cluster"]) == ({}, {"workers": 2})


def test_what_trl_learns_by_default_is_said(tmp_path: Path) -> None:
    found = _with_accelerate(tmp_path, text=TRL.replace("assistant_only_loss: true\n", ""))
    (line,) = (line for line in found.draft.of(Outcome.CHANGED) if line.key == "assistant_only_loss")
    assert "TRL learns every token" in line.reason


def test_a_problem_names_the_file_that_it_is_in(tmp_path: Path) -> None:
    (tmp_path / "acc.yaml").write_text("distributed_type: NO\nmixed_precision: int4\n")
    (tmp_path / "trl.yaml").write_text(TRL)
    sources = [read_source(tmp_path / name, tmp_path) for name in ("trl.yaml", "acc.yaml")]
    found = convert([(sources[0], SYSTEMS["trl"]), (sources[1], SYSTEMS["accelerate"])], tmp_path)
    (problem,) = map(found.draft.describe, found.refused)
    assert (problem.file, problem.line, problem.field) == (str(tmp_path / "acc.yaml"), 2, "mixed_precision")


def test_two_whole_configurations_are_refused(tmp_path: Path) -> None:
    (tmp_path / "trl.yaml").write_text(TRL)
    source = read_source(tmp_path / "trl.yaml", tmp_path)
    with pytest.raises(RequestError, match=r"trl.yaml and .*trl.yaml"):
        convert([(source, SYSTEMS["trl"]), (source, SYSTEMS["axolotl"])], tmp_path)


def test_a_part_of_a_configuration_becomes_keys_of_a_stage(converted: Convert) -> None:
    held = {"zero_optimization": {"stage": 1}, "train_micro_batch_size_per_gpu": 2, "gradient_clipping": 0.5}
    found = converted(json.dumps(held), "ds.json")
    assert found.recipe == {
        "train": {"global_batch": 2, "gradient_clipping": 0.5}, "shard": {"zero": 1, "micro_batch": 2},
    }  # fmt: skip
    assert not found.is_whole


def test_preferences_of_axolotl(converted: Convert) -> None:
    text = AXOLOTL.replace("type: chat_template\n", "type: chat_template.default\n") + "rl: dpo\nrl_beta: 0.2\n"
    found = converted(text)
    assert _refused(found) == {}
    stage = _stage(found)
    assert (stage["kind"], stage["loss"]) == ("preference", {"name": "dpo", "beta": 0.2})
    assert stage["data"]["columns"] == {
        "prompt": "turns", "chosen": "chosen.content", "rejected": "rejected.content",
    }  # fmt: skip
    assert "packing" not in stage["train"]
    assert "sample_packing" in {line.key for line in found.draft.of(Outcome.NO_EFFECT)}
    orpo = converted(text.replace("rl: dpo\nrl_beta: 0.2", "rl: orpo\norpo_alpha: 0.3"))
    assert _stage(orpo)["loss"] == {"name": "orpo", "odds_weight": 0.3}
    assert _refused(converted(text.replace("rl: dpo", "rl: ebft"))).keys() == {"rl"}
    assert _refused(converted(text.replace("chat_template.default", "chatml.own"))).keys() == {"datasets.0"}


def test_judged_answers_of_axolotl(converted: Convert) -> None:
    text = AXOLOTL.replace("type: chat_template", "type: llama3.intel")
    found = converted(text + "rl: kto\nrl_beta: 0.5\nkto_desirable_weight: 0.2\n")
    assert _refused(found) == {}
    stage = _stage(found)
    assert (stage["kind"], stage["loss"]) == ("preference", {"name": "kto", "desirable_weight": 0.2, "beta": 0.5})
    assert stage["data"]["columns"] == {"prompt": "question"}
    assert _refused(converted(text.replace("intel", "own") + "rl: kto\n")).keys() == {"datasets.0"}


def test_judged_answers_of_llama_factory(converted: Convert, tmp_path: Path) -> None:
    columns = {"prompt": "question", "response": "answer", "kto_tag": "is_good"}
    info = {"judged": {"file_name": "judged.json", "columns": columns}}
    chats = {"file_name": "c.json", "formatting": "sharegpt", "columns": {"messages": "turns", "kto_tag": "is_good"}}
    info["chats"] = chats
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "dataset_info.json").write_text(json.dumps(info))
    text = LLAMA_FACTORY.replace("bills, notes", "judged").replace("sft", "kto") + "kto_rejected_weight: 2\n"
    found = converted(text)
    assert _refused(found) == {}
    stage = _stage(found)
    assert (stage["kind"], stage["loss"]) == ("preference", {"name": "kto", "undesirable_weight": 2.0})
    assert stage["data"]["columns"] == {"prompt": "question", "completion": "answer", "label": "is_good"}
    chats = _stage(converted(text.replace("dataset: judged", "dataset: chats")))
    assert chats["data"]["columns"] == {"messages": "turns", "label": "is_good"}


@pytest.mark.usefixtures("factory_data")
def test_preferences_of_llama_factory(converted: Convert, tmp_path: Path) -> None:
    info = {"pairs": {"file_name": "pairs.json", "formatting": "sharegpt", "ranking": True}}
    (tmp_path / "data" / "dataset_info.json").write_text(json.dumps(info))
    text = LLAMA_FACTORY.replace("bills, notes", "pairs").replace("val_size: 0.1\n", "").replace("sft", "dpo")
    found = converted(text + "pref_loss: simpo\npref_beta: 2.5\nsimpo_gamma: 1.0\n")
    assert _refused(found) == {}
    stage = _stage(found)
    assert stage["loss"] == {"name": "simpo", "beta": 2.5, "gamma": 1.0}
    assert stage["data"]["columns"] == {
        "prompt": "conversations", "chosen": "chosen.value", "rejected": "rejected.value",
    }  # fmt: skip
    assert stage["data"]["hold_out"] == 0.05
    assert "pref_loss" in _refused(converted(text + "pref_loss: kto_pair\n"))


@pytest.mark.parametrize(("command", "rate"), [("sft", 2e-5), ("reward", 1e-4), ("dpo", 1e-6), ("kto", 1e-6)])
def test_each_command_of_trl_has_its_learning_rate(converted: Convert, command: str, rate: float) -> None:
    text = TRL.replace("learning_rate: 2e-4\n", "").replace("assistant_only_loss: true\n", "")
    stage = _stage(converted(f"command: {command}\n{text}"))
    assert stage["train"]["optimizer"]["lr"] == rate


def test_preferences_of_trl(tmp_path: Path) -> None:
    text = TRL.replace("assistant_only_loss: true\n", "") + "loss_type: [ipo]\nbeta: 0.3\n"
    stage = _stage(_with_accelerate(tmp_path, text=text))
    assert (stage["kind"], stage["loss"]) == ("preference", {"name": "ipo", "beta": 0.3})
    judged = _stage(_with_accelerate(tmp_path, text=text.replace("[ipo]", "kto") + "desirable_weight: 2\n"))
    assert (judged["kind"], judged["loss"]) == ("preference", {"name": "kto", "beta": 0.3, "desirable_weight": 2.0})
    several = _with_accelerate(tmp_path, text=text.replace("[ipo]", "[ipo, sigmoid]"))
    assert _refused(several) == {"loss_type": "a preference stage has one loss"}


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


def test_newer_files_of_llama_factory(converted: Convert, tmp_path: Path) -> None:
    (tmp_path / "sets.yaml").write_text("a: {path: a.json, converter: alpaca}\nb: {path: b.json, converter: alpaca}\n")
    found = converted(LLAMA_FACTORY_V1)
    assert (found.systems[0].name, _refused(found)) == ("llama-factory-v1", {})
    stage = _stage(found)
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
    assert "--folder names the folder" in _refused(converted(LLAMA_FACTORY_V1))["train_dataset"]
    assert "optim_config.name" in _refused(converted(LLAMA_FACTORY_V1 + "optim_config: {name: muon}\n"))


@pytest.mark.usefixtures("factory_data")
@pytest.mark.parametrize(
    ("text", "added", "method"),
    [
        (LLAMA_FACTORY, "quantization_bit: 4\ndouble_quantization: true\n", "nf4"),
        (LLAMA_FACTORY, "quantization_bit: 8\n", "int8"),
        (LLAMA_FACTORY, "quantization_bit: 2\n", None),
        (AXOLOTL.replace("qlora", "lora").replace("load_in_4bit", "load_in_8bit"), "", "int8"),
        (AXOLOTL.replace("qlora", "lora").replace("load_in_4bit: true", "load_in_4bit: false"), "", None),
        (AXOLOTL.replace("load_in_4bit: true", ""), "", "nf4"),
    ],
)
def test_a_base_in_few_bits_is_carried(converted: Convert, text: str, added: str, method: str | None) -> None:
    found = converted(text + added)
    assert _refused(found) == {}
    assert _stage(found)["lora"].get("quantize") == method


def test_what_adapters_say_is_carried(converted: Convert) -> None:
    lines = (
        "lora_modules_to_save: [embed_tokens, lm_head]\nlora_target_parameters: [mlp.experts.down_proj]\n"
        "lora_target_modules: '.*layers.[0-3].(q|v)_proj'\n"
    )
    stage = _stage(converted(AXOLOTL.replace("lora_target_linear: true\n", "") + lines))
    assert stage["lora"] == {
        "r": 64,
        "alpha": 16,
        "modules_to_save": ["embed_tokens", "lm_head"],
        "target_parameters": ["mlp.experts.down_proj"],
        "target_modules": ".*layers.[0-3].(q|v)_proj",
    }


def test_frozen_parameters_new_tokens_and_weights_drawn_again(converted: Convert) -> None:
    whole = AXOLOTL.replace("adapter: qlora\n", "")
    stage = _stage(converted(whole + "unfrozen_parameters: [^lm_head.weight, model.layers.4]\ntokens: ['<a>']\n"))
    assert (stage["trainable"], stage["new_tokens"]) == (["^lm_head.weight", "model.layers.4"], ["<a>"])
    text = whole.replace("type: chat_template\n    field_messages: turns", "type: completion\n    field: body")
    assert _stage(converted(text + "reinit_weights: true\n"))["reset_weights"] is True
    packed = whole + "max_packed_sequence_len: "
    length = _stage(converted(whole))["train"]["sequence_length"]
    assert _stage(converted(f"{packed}{length}\n"))["train"]["packing"] is True
    assert _stage(converted(f"{packed}{length}\n".replace("sample_packing: true\n", "")))["train"]["packing"] is True
    assert _refused(converted(f"{packed}{length + 1}\n")).keys() == {"max_packed_sequence_len"}


@pytest.mark.parametrize(
    ("lines", "init"),
    [
        ("peft_init_lora_weights: olora", "olora"),
        ("peft_init_lora_weights: true", None),
        ("peft: {loftq_config: {loftq_bits: 4}}", None),
    ],
)
def test_starts_of_adapters(converted: Convert, lines: str, init: str | None) -> None:
    found = converted(AXOLOTL + lines + "\n")
    assert _refused(found) == {}
    assert _stage(found)["lora"].get("init") == init
