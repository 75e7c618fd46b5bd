"""Copying: a policy that starts with random weights learns to answer with the last token of its prompt."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest

from rlhf.text.rewards import TextReward

Build = Callable[..., Any]


class Copied:
    """The share of a response's tokens that are the last one of its prompt; tokens are spelt as letters."""

    name = "copied"

    def values(self, texts: Sequence[str], records: Sequence[Mapping[str, Any]]) -> list[float]:
        return [text.count(record["last"]) / len(text) for text, record in zip(texts, records, strict=True)]


def spelt(tokens: Sequence[int]) -> str:
    return "".join(chr(ord("a") + token) for token in tokens)


@pytest.mark.long
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_copying_is_learnt(tiny_ppo: Build, seed: int) -> None:
    prompts = tiny_ppo().source.experience.policy.sources.prompts.dataset
    records = [{"id": str(row), "last": spelt(prompts.cut("prompt_ids", row)[-1:].tolist())} for row in range(40)]
    tiny = tiny_ppo(
        name="grpo", seed=seed, lora=False, prompts=20, samples=16, max_new_tokens=2, micro_batch=320, iterations=200,
        epochs=2, mini_batches=1, kl_coef=0.0, entropy_coef=0.03, missing_eos_penalty=0.0,
        reward=TextReward({"copied": 1.0}, (), [Copied()], records, spelt),
    )  # fmt: skip
    tiny.run()
    scores = [heard["score_mean"] for _, heard in tiny.listener.heard]
    assert scores[0] < 0.15
    assert statistics.mean(scores[-20:]) > 0.9
