"""PPO of a real model in bf16, by adapters and of all weights: the first ratios are 1, the sampler's gap is kept."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from rlhf.task import run_rl
from rlhf.text.reward_stage import run_reward
from tests.integration.rlhf.workshop import WORDS, Workshop, jsonl, ppo_spec, reward_spec
from trainers.data.tokenizer import load_tokenization
from trainers.store.manifest import ArtifactManifest, files_digest
from trainers.store.store import Store

BF16 = {"engine": "plain", "precision": "bf16", "micro_batch": 4}
U = 2.0**-8


@pytest.fixture(scope="module")
def workshop(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    """SmolLM2 and a reward model that has seen eight pairs."""
    folder = tmp_path_factory.mktemp("smollm2")
    questions = [f"Write a sentence about how to {a} a {b}." for a in WORDS for b in WORDS[:2]]
    chats = [[{"role": "user", "content": question}] for question in questions]
    jsonl(folder / "prompts.jsonl", [{"prompt": chat} for chat in chats])
    answers = [{"prompt": chat, "chosen": "It is easy.", "rejected": "No no no."} for chat in chats]
    jsonl(folder / "pairs.jsonl", answers)
    store = Store.open(str(folder / "store"))
    shutil.copytree(smollm2, folder / "chat" / "model")
    files = store.objects.put_folder(folder / "chat")
    chat = ArtifactManifest(fingerprint="c" * 64, digest=files_digest(files), kind="model", stage="chat", files=files)
    made = Workshop(store, folder, load_tokenization(smollm2), {"chat": chat})
    spec = reward_spec(True)
    train = spec.train.model_copy(update={"steps": 2, "global_batch": 4})
    spec = spec.model_copy(update={"train": train, "shard": spec.shard.model_validate(BF16)})
    made.keep("judge", run_reward(spec, made.context("judge", {"init_from": "chat"})), {"init_from": "chat"})
    return made


@pytest.mark.long
@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
def test_smollm2_in_bf16_begins_every_iteration_with_ratios_of_exactly_one(workshop: Workshop, lora: bool) -> None:
    spec = ppo_spec(lora, epochs=1, optimizer={"lr": 1e-3 if lora else 1e-5})
    rollout = spec.rollout.model_copy(update={"max_prompt_tokens": 64, "max_new_tokens": 24})
    spec = spec.model_copy(update={"rollout": rollout, "shard": spec.shard.model_validate(BF16)})
    context = workshop.context(
        "policy-lora" if lora else "policy-full", {"actor": "chat", "rewards.judge.model": "judge"}
    )
    candidate = run_rl(spec, context)
    assert candidate is not None
    assert candidate.outcome["state"] == "completed"
    observer: Any = context.observer
    largest = {step: values["log_ratio_max"] for step, values in observer.heard if "log_ratio_max" in values}
    assert [step for step, value in largest.items() if value == 0] == [1, 3]
    assert max(largest.values()) > U  # the updates move the policy
    reports = [values for _, values in observer.heard if "sampler_gap" in values]
    assert reports[0]["kl"] == 0
    assert all(0 < report["sampler_gap"] < report["sampler_gap_max"] for report in reports)
