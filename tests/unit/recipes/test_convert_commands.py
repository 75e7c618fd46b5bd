"""Command lines of OpenRLHF and verl, and verl's YAML, converted."""

from pathlib import Path
from typing import Any

import pytest

from recipes.convert.engine import Conversion, convert
from recipes.convert.registry import recognise
from recipes.convert.rules import Outcome
from recipes.convert.source_text import read_source
from recipes.errors import RecipeError
from recipes.loading.load import parse_recipe
from recipes.problem_codes import Code

OPENRLHF = """\
#!/bin/bash
# trains with --train.batch_size 1
set -x
MODEL=acme/tiny
read -r -d '' training_commands <<EOF
openrlhf.cli.train_sft \\
   --data.dataset ${DATA:-rows.jsonl} \\
   --data.input_key question \\
   --data.output_key answer \\
   --train.batch_size 64 \\
   --train.micro_batch_size=2 \\
   --model.model_name_or_path $MODEL \\
   --ckpt.save_steps -1 \\
   --adam.betas 0.9 0.98 \\
   --ds.lora.rank 8 \\
   --ds.packing_samples
EOF
deepspeed --module $training_commands
"""
VERL = """\
torchrun -m verl.trainer.fsdp_sft_trainer \\
    data.train_files=rows.parquet \\
    data.prompt_key=extra \\
    "data.prompt_dict_keys=['question']" \\
    data.response_key=answer \\
    model.partial_pretrain=acme/tiny \\
    +model.lora_rank=4 \\
    trainer.n_gpus_per_node=4 trainer.nnodes=2 \\
    trainer.total_training_steps=200 $@
"""


def _convert(tmp_path: Path, text: str, name: str = "train.sh") -> Conversion:
    (tmp_path / name).write_text(text)
    source = read_source(tmp_path / name, tmp_path)
    return convert([(source, recognise(source.value, name)[0])], tmp_path)


def _stage(conversion: Conversion) -> Any:
    assert {line.key: line.reason for line in conversion.refused} == {}
    (stage,) = conversion.recipe["stages"].values()
    return stage


def test_a_script_of_openrlhf(tmp_path: Path) -> None:
    found = _convert(tmp_path, OPENRLHF)
    stage = _stage(found)
    assert stage["data"] == {
        "source": "jsonl",
        "files": ["./rows.jsonl"],
        "columns": {"prompt": "User: {question}\nAssistant: ", "completion": "answer"},
    }
    assert stage["template"] == "none"
    assert (stage["train"]["global_batch"], stage["shard"]["micro_batch"]) == (64, 2)
    assert stage["train"]["optimizer"] == {"lr": 5e-6, "betas": [0.9, 0.98]}
    assert stage["train"]["schedule"] == {"name": "cosine", "warmup_ratio": 0.03, "min_ratio": 0.1}
    assert (stage["init_from"], stage["lora"], stage["train"]["epochs"]) == ("hf://acme/tiny@main", {"r": 8}, 2)


def test_openrlhf_with_the_old_arguments(tmp_path: Path) -> None:
    found = _convert(
        tmp_path,
        "python -m openrlhf.cli.train_dpo --pretrain acme/tiny --dataset pairs.jsonl --train_batch_size 8 "
        "--micro_train_batch_size 1 --learning_rate 5e-7 --beta 0.2 --ipo --bf16 --apply_chat_template --max_len 256",
    )
    stage = _stage(found)
    assert (stage["kind"], stage["loss"], stage["template"]) == ("preference", {"name": "ipo", "beta": 0.2}, "chat")
    assert stage["train"] == {
        "epochs": 1, "global_batch": 8, "sequence_length": 256, "optimizer": {"lr": 5e-7, "betas": [0.9, 0.95]},
        "schedule": {"name": "cosine", "warmup_ratio": 0.03, "min_ratio": 0.1},
    }  # fmt: skip


def test_overrides_of_verl(tmp_path: Path) -> None:
    found = _convert(tmp_path, VERL)
    stage = _stage(found)
    assert stage["data"] == {
        "source": "parquet",
        "files": ["./rows.parquet"],
        "columns": {"prompt": "extra.question", "completion": "answer"},
    }
    assert (found.recipe["cluster"], stage["lora"]) == ({"workers": 8}, {"r": 4})
    assert (stage["train"]["steps"], stage["train"]["schedule"]["warmup_steps"]) == (200, 20)


def test_yaml_of_verl_is_read_by_its_paths(tmp_path: Path) -> None:
    text = """\
data:
  train_files: [a.parquet, b.parquet]
  multiturn: {enable: true, messages_key: turns}
  truncation: middle
model: {partial_pretrain: acme/tiny}
trainer: {total_epochs: 2, logger: [console]}
"""
    found = _convert(tmp_path, text, "verl.yaml")
    (problem,) = map(found.draft.describe, found.refused)
    assert (problem.field, problem.line) == ("data.truncation", 4)
    stage = _stage(_convert(tmp_path, text.replace("middle", "right"), "verl.yaml"))
    assert stage["data"]["files"] == ["./a.parquet", "./b.parquet"]
    assert stage["data"]["columns"] == {"messages": "turns"}
    assert "trainer.logger" in {line.key for line in found.draft.of(Outcome.NO_EFFECT)}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("#!/bin/sh\necho nothing\n", "no command of OpenRLHF, verl or TRL"),
        (f"{OPENRLHF}python -m openrlhf.cli.train_rm --adam.lr 1\n", "2 training commands"),
    ],
)
def test_scripts_without_one_command(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message) as caught:
        _convert(tmp_path, text)
    assert caught.value.problems[0].code == Code.INVALID_FORMAT


@pytest.mark.parametrize(
    ("argument", "key", "reason"),
    [
        ("--train.bath_size 3", "train.bath_size", "did you mean train.batch_size?"),
        ("--data.max_len $LENGTH", "data.max_len", "holds a variable that the file does not set"),
        ("--optim muon", "optim", "another optimiser than AdamW"),
        ("--data.max_samples many", "data.max_samples", "must be a number"),
    ],
)
def test_arguments_that_are_refused(tmp_path: Path, argument: str, key: str, reason: str) -> None:
    found = _convert(
        tmp_path, OPENRLHF.replace("   --ds.packing_samples\n", f"   --ds.packing_samples \\\n   {argument}\n")
    )
    (problem,) = map(found.draft.describe, found.refused)
    assert (problem.field, problem.line) == (key, 17)
    assert reason in problem.message


def test_arguments_alone(tmp_path: Path) -> None:
    text = "--model.model_name_or_path acme/tiny --data.dataset a.jsonl --data.output_key b --train.batch_size 4"
    stage = _stage(_convert(tmp_path, text, "arguments.txt"))
    assert (stage["kind"], stage["train"]["global_batch"]) == ("finetune", 4)


def test_a_command_of_trl(tmp_path: Path) -> None:
    text = "trl dpo --model_name_or_path acme/tiny --dataset_name acme/pairs --beta 0.3 --use_peft && echo done"
    stage = _stage(_convert(tmp_path, f"accelerate launch -m x\n{text}\n"))
    assert (stage["kind"], stage["loss"], stage["lora"]["r"]) == ("preference", {"beta": 0.3}, 16)


OPENRLHF_PPO = """\
python3 -m openrlhf.cli.train_ppo_ray \\
   --actor.model_name_or_path acme/tiny --actor.num_gpus_per_node 2 \\
   --reward.model_name_or_path acme/judge \\
   --data.prompt_dataset prompts.jsonl --data.input_key question --data.apply_chat_template \\
   --data.max_samples 640 --train.num_episodes 2 \\
   --rollout.batch_size 64 --rollout.n_samples_per_prompt 4 --rollout.max_new_tokens 100 --data.max_len 300 \\
   --train.batch_size 128 --actor.adam.lr 5e-7 --algo.kl.init_coef 0.02 \\
"""
VERL_GRPO = """\
python3 -m verl.trainer.main_ppo \\
    algorithm.adv_estimator=grpo \\
    data.train_files=prompts.parquet data.train_batch_size=32 data.max_prompt_length=64 data.max_response_length=128 \\
    data.truncation=right \\
    actor_rollout_ref.model.path=acme/tiny \\
    actor_rollout_ref.actor.ppo_mini_batch_size=16 actor_rollout_ref.rollout.n=8 \\
    actor_rollout_ref.actor.use_kl_loss=True actor_rollout_ref.actor.kl_loss_coef=0.01 \\
    actor_rollout_ref.actor.kl_loss_type=low_var_kl actor_rollout_ref.actor.clip_ratio_high=0.28 \\
    actor_rollout_ref.rollout.name=vllm trainer.total_training_steps=50 trainer.n_gpus_per_node=4 $@
"""


def _load(conversion: Conversion) -> Any:
    """The stage as its class; raises where the recipe is wrong."""
    (stage,) = parse_recipe(conversion.recipe).stages.values()
    return stage


def test_ppo_of_openrlhf(tmp_path: Path) -> None:
    found = _convert(tmp_path, OPENRLHF_PPO)
    stage = _stage(found)
    assert (stage["kind"], stage["actor"], stage["template"]) == ("rl", "hf://acme/tiny@main", "chat")
    assert stage["rewards"] == {"reward": {"model": "hf://acme/judge@main"}}
    assert stage["prompts"]["columns"] == {"prompt": "question"}
    assert stage["rollout"] == {
        "prompts_per_iteration": 64, "samples_per_prompt": 4, "max_new_tokens": 100, "max_prompt_tokens": 200,
    }  # fmt: skip
    settings = stage["algorithm"]
    assert (settings["name"], settings["iterations"], settings["epochs"], settings["mini_batches"]) == ("ppo", 20, 1, 2)
    assert (settings["kl_coef"], settings["kl_in"], settings["critic"]) == (0.02, "reward", {"lr": 9e-6, "clip": 0.5})
    assert _load(found).algorithm.planned_steps == 40


@pytest.mark.parametrize(
    ("text", "added", "engine"),
    [
        (OPENRLHF_PPO, "", None),
        (OPENRLHF_PPO, "--vllm.num_engines 2 --vllm.enable_sleep --vllm.gpu_memory_utilization 0.6", {"name": "vllm"}),
        (OPENRLHF_PPO, "--vllm.num_engines 0", None),
        (VERL_GRPO, "actor_rollout_ref.rollout.max_num_seqs=64", {"name": "vllm", "max_responses": 64}),
        (VERL_GRPO, "algorithm.rollout_correction.rollout_is_threshold=3", {"name": "vllm", "max_importance": 3.0}),
        (
            VERL_GRPO.replace("name=vllm", "name=hf"),
            "actor_rollout_ref.rollout.max_num_seqs=64 algorithm.rollout_correction.rollout_is_threshold=3",
            None,
        ),
    ],
)
def test_an_engine_that_draws_the_answers_is_named(
    tmp_path: Path, text: str, added: str, engine: dict[str, Any] | None
) -> None:
    found = _convert(tmp_path, text.replace(" $@", "").rstrip().removesuffix("\\") + f" {added}\n")
    assert _stage(found)["rollout"].get("engine") == engine
    assert _load(found).rollout.engine.name == ("local" if engine is None else "vllm")


def test_reward_functions_are_named_and_adapted(tmp_path: Path) -> None:
    text = OPENRLHF_PPO.replace("--reward.model_name_or_path acme/judge", "--reward.remote_url /x/my-reward.py")
    found = _convert(tmp_path, text)
    stage = _stage(found)
    assert stage["rewards"] == {"reward": {"python": "my_reward:reward_func"}}
    assert stage["algorithm"]["critic"]["start"] == "actor"
    assert "reward.remote_url" in {line.key for line in found.draft.of(Outcome.CHANGED)}
    address = _convert(tmp_path, text.replace("/x/my-reward.py", "http://judge:5000/score"))
    assert _stage(address)["rewards"] == {"reward": {"url": "http://judge:5000/score"}}


@pytest.mark.parametrize(
    ("added", "expected"),
    [
        ("--algo.advantage.estimator group_norm", {"name": "grpo"}),
        ("--algo.advantage.estimator dr_grpo", {"name": "grpo", "scale": "none", "aggregation": "constant"}),
        ("--algo.advantage.estimator rloo", {"name": "rloo"}),
        ("--algo.advantage.estimator reinforce_baseline", {"name": "reinforce_plus_plus", "baseline": "group"}),
        ("--algo.advantage.estimator group_norm --actor.policy_loss_type gspo", {"name": "gspo"}),
        ("--actor.eps_clip 0.3 --actor.eps_clip_low_high 0.1 0.4", {"name": "ppo", "clip_low": 0.1, "clip_high": 0.4}),
        ("--actor.eps_clip 0.3", {"clip_low": 0.3, "clip_high": 0.3}),
        (
            "--algo.kl.target 6 --algo.kl.horizon 500",
            {"kl_controller": {"name": "adaptive", "target": 6, "horizon": 500}},
        ),
        ("--algo.kl.use_loss --algo.kl.estimator k3", {"kl_in": "loss", "kl_estimator": "k3"}),
    ],
)
def test_algorithms_of_openrlhf(tmp_path: Path, added: str, expected: dict[str, Any]) -> None:
    found = _convert(tmp_path, f"{OPENRLHF_PPO}   {added}\n")
    assert expected.items() <= _stage(found)["algorithm"].items()
    _load(found)


def test_only_algorithms_with_a_critic_start_one(tmp_path: Path) -> None:
    text = VERL_GRPO.replace("estimator=grpo", "estimator=reinforce_plus_plus")
    found = _convert(tmp_path, text.replace("use_kl_loss=True", "use_kl_loss=False"))
    assert "critic" not in _stage(found)["algorithm"]
    assert _load(found).algorithm.name == "reinforce_plus_plus"


def test_a_place_in_memory_may_be_a_variable(tmp_path: Path) -> None:
    text = VERL_GRPO.replace(" $@", " actor_rollout_ref.actor.megatron.param_offload=${OFFLOAD}")
    found = _convert(tmp_path, text)
    assert "offload" not in _stage(found).get("shard", {})
    on = _convert(tmp_path, text.replace("${OFFLOAD}", "True"))
    assert _stage(on)["shard"]["offload"] == "cpu"


def test_long_prompts_are_dropped_wherever_verl_cuts_them(tmp_path: Path) -> None:
    found = _convert(tmp_path, VERL_GRPO.replace("truncation=right", "truncation=left"))
    assert "data.truncation" in {line.key for line in found.draft.of(Outcome.CHANGED)}
    _load(found)


def test_grpo_of_verl(tmp_path: Path) -> None:
    found = _convert(tmp_path, VERL_GRPO)
    stage = _stage(found)
    assert stage["prompts"] == {"source": "parquet", "files": ["./prompts.parquet"]}
    settings = stage["algorithm"]
    assert {
        "name": "grpo", "iterations": 50, "epochs": 1, "mini_batches": 2, "kl_in": "loss", "kl_coef": 0.01,
        "kl_estimator": "k3", "clip_high": 0.28, "aggregation": "tokens", "dual_clip": 3.0,
    }.items() <= settings.items()  # fmt: skip
    assert "critic" not in settings
    assert stage["rewards"]["reward"]["python"] == "reward:compute_score"
    assert "reward" in {line.key for line in found.draft.of(Outcome.CHANGED)}
    _load(found)


@pytest.mark.parametrize(
    ("old", "new", "key"),
    [
        ("trainer.total_training_steps=50", "trainer.total_epochs=3", "iterations"),
        ("ppo_mini_batch_size=16", "ppo_mini_batch_size=12", "batch"),
        ("algorithm.adv_estimator=grpo", "algorithm.adv_estimator=remax", "algorithm.adv_estimator"),
        ("actor_rollout_ref.rollout.n=8", "actor_rollout_ref.rollout.top_p=0.9", "actor_rollout_ref.rollout.top_p"),
    ],
)
def test_what_of_verl_is_refused(tmp_path: Path, old: str, new: str, key: str) -> None:
    found = _convert(tmp_path, VERL_GRPO.replace(old, new))
    assert [line.key for line in found.refused] == [key]


def test_iterations_follow_from_rows(tmp_path: Path) -> None:
    (tmp_path / "train.sh").write_text(VERL_GRPO.replace("trainer.total_training_steps=50", "trainer.total_epochs=3"))
    source = read_source(tmp_path / "train.sh", tmp_path)
    found = convert([(source, recognise(source.value, "train.sh")[0])], tmp_path, rows=320)
    assert _stage(found)["algorithm"]["iterations"] == 30


def test_arguments_in_arrays_and_in_variables(tmp_path: Path) -> None:
    text = """\
SIZE=32
DATA_ARGS=(
   --data.dataset rows.jsonl  # its rows
   # --data.max_len 9
   --data.output_key answer --train.batch_size ${SIZE}
)
MODEL_ARGS="--model.model_name_or_path acme/tiny --data.max_len 64"
deepspeed --module openrlhf.cli.train_sft ${DATA_ARGS[@]} "${MODEL_ARGS}"
"""
    stage = _stage(_convert(tmp_path, text))
    assert (stage["train"]["global_batch"], stage["train"]["sequence_length"]) == (32, 64)
    assert (stage["init_from"], stage["data"]["files"]) == ("hf://acme/tiny@main", ["./rows.jsonl"])
