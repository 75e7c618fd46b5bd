"""axolotl's configurations, converted."""

import json
from pathlib import Path

import pytest
from pydantic import TypeAdapter

from recipes.convert.rules import Outcome
from recipes.data.text import Source
from tests.unit.recipes.conversions import AXOLOTL, Convert, refused_of, stage_of


def test_axolotl(converted: Convert) -> None:
    found = converted(AXOLOTL, workers=2)
    assert refused_of(found) == {}
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


def test_a_deepspeed_file_that_is_named_is_read(converted: Convert, tmp_path: Path) -> None:
    held = {
        "bf16": {"enabled": "auto"},
        "train_micro_batch_size_per_gpu": "auto",
        "zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}, "overlap_comm": True},
    }
    (tmp_path / "ds.json").write_text(json.dumps(held))
    found = converted(AXOLOTL + "deepspeed: ds.json\n")
    assert refused_of(found) == {}
    assert {"zero": 2, "offload": "cpu"}.items() <= stage_of(found)["shard"].items()
    found = converted(AXOLOTL + "deepspeed: elsewhere/zero3.json\n")
    assert stage_of(found)["shard"]["zero"] == 3
    assert "its name says ZeRO 3" in {line.key: line.reason for line in found.draft.of(Outcome.CHANGED)}["deepspeed"]
    (tmp_path / "ds.json").write_text("{")
    assert "not valid JSON" in refused_of(converted(AXOLOTL + "deepspeed: ds.json\n"))["deepspeed"]


def test_documents_are_pretraining_unless_adapters_are_trained(converted: Convert) -> None:
    text = AXOLOTL.replace("type: chat_template\n    field_messages: turns", "type: completion\n    field: body")
    assert stage_of(converted(text))["loss_on"] == "all"
    whole = text.replace("adapter: qlora\n", "")
    stage = stage_of(converted(whole))
    assert (stage["kind"], "lora" in stage, "template" in stage) == ("pretrain", False, False)
    assert stage["data"]["columns"] == {"text": "body"}


def test_several_data_sets_of_axolotl_and_what_is_left_out_of_them(converted: Convert) -> None:
    more = "datasets:\n  - {path: acme/tales, type: completion, field: body}\n"
    found = converted(AXOLOTL.replace("datasets:\n", more) + "min_sample_len: 16\ndataset_exact_deduplication: true\n")
    assert refused_of(found) == {}
    data = TypeAdapter(Source).validate_python(stage_of(found)["data"])
    assert [source.path for source in data.mix] == ["acme/tales", "acme/chats"]
    assert [source.hold_out for source in data.mix] == [0.02, 0.02]
    assert [item.by for item in data.filter] == ["length", "duplicate"]
    assert data.filter[0].least == 16


def test_keys_of_adapters_have_no_effect_without_one(converted: Convert) -> None:
    found = converted(AXOLOTL.replace("adapter: qlora\n", ""))
    assert "lora" not in stage_of(found)
    reasons = {line.key: line.reason for line in found.draft.of(Outcome.NO_EFFECT)}
    assert "lora_r" in reasons


@pytest.mark.parametrize(("written", "precision"), [("auto", "auto"), ("true", "bf16"), ("false", "fp32")])
def test_precision(converted: Convert, written: str, precision: str) -> None:
    stage = stage_of(converted(AXOLOTL.replace("bf16: auto", f"bf16: {written}\nfp16: false")))
    assert stage["shard"]["precision"] == precision


def test_a_home_folder_is_written_whole(converted: Convert) -> None:
    found = converted(AXOLOTL.replace("acme/tiny-llama", "~/models/tiny"))
    assert stage_of(found)["init_from"] == str(Path.home() / "models" / "tiny")


def test_preferences_of_axolotl(converted: Convert) -> None:
    text = AXOLOTL.replace("type: chat_template\n", "type: chat_template.default\n") + "rl: dpo\nrl_beta: 0.2\n"
    found = converted(text)
    assert refused_of(found) == {}
    stage = stage_of(found)
    assert (stage["kind"], stage["loss"]) == ("preference", {"name": "dpo", "beta": 0.2})
    assert stage["data"]["columns"] == {
        "prompt": "turns", "chosen": "chosen.content", "rejected": "rejected.content",
    }  # fmt: skip
    assert "packing" not in stage["train"]
    assert "sample_packing" in {line.key for line in found.draft.of(Outcome.NO_EFFECT)}
    orpo = converted(text.replace("rl: dpo\nrl_beta: 0.2", "rl: orpo\norpo_alpha: 0.3"))
    assert stage_of(orpo)["loss"] == {"name": "orpo", "odds_weight": 0.3}
    assert refused_of(converted(text.replace("rl: dpo", "rl: ebft"))).keys() == {"rl"}
    assert refused_of(converted(text.replace("chat_template.default", "chatml.own"))).keys() == {"datasets.0"}


def test_judged_answers_of_axolotl(converted: Convert) -> None:
    text = AXOLOTL.replace("type: chat_template", "type: llama3.intel")
    found = converted(text + "rl: kto\nrl_beta: 0.5\nkto_desirable_weight: 0.2\n")
    assert refused_of(found) == {}
    stage = stage_of(found)
    assert (stage["kind"], stage["loss"]) == ("preference", {"name": "kto", "desirable_weight": 0.2, "beta": 0.5})
    assert stage["data"]["columns"] == {"prompt": "question"}
    assert refused_of(converted(text.replace("intel", "own") + "rl: kto\n")).keys() == {"datasets.0"}


def test_what_adapters_say_is_carried(converted: Convert) -> None:
    lines = (
        "lora_modules_to_save: [embed_tokens, lm_head]\nlora_target_parameters: [mlp.experts.down_proj]\n"
        "lora_target_modules: '.*layers.[0-3].(q|v)_proj'\n"
    )
    stage = stage_of(converted(AXOLOTL.replace("lora_target_linear: true\n", "") + lines))
    assert stage["lora"] == {
        "r": 64,
        "alpha": 16,
        "modules_to_save": ["embed_tokens", "lm_head"],
        "target_parameters": ["mlp.experts.down_proj"],
        "target_modules": ".*layers.[0-3].(q|v)_proj",
    }


def test_frozen_parameters_new_tokens_and_weights_drawn_again(converted: Convert) -> None:
    whole = AXOLOTL.replace("adapter: qlora\n", "")
    stage = stage_of(converted(whole + "unfrozen_parameters: [^lm_head.weight, model.layers.4]\ntokens: ['<a>']\n"))
    assert (stage["trainable"], stage["new_tokens"]) == (["^lm_head.weight", "model.layers.4"], ["<a>"])
    text = whole.replace("type: chat_template\n    field_messages: turns", "type: completion\n    field: body")
    assert stage_of(converted(text + "reinit_weights: true\n"))["reset_weights"] is True
    packed = whole + "max_packed_sequence_len: "
    length = stage_of(converted(whole))["train"]["sequence_length"]
    assert stage_of(converted(f"{packed}{length}\n"))["train"]["packing"] is True
    assert stage_of(converted(f"{packed}{length}\n".replace("sample_packing: true\n", "")))["train"]["packing"] is True
    assert refused_of(converted(f"{packed}{length + 1}\n")).keys() == {"max_packed_sequence_len"}


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
    assert refused_of(found) == {}
    assert stage_of(found)["lora"].get("init") == init
