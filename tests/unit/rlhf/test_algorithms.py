"""Algorithms without a critic: what they learn, what a step's loss is the mean of, what filters leave out."""

import statistics
from collections.abc import Callable
from typing import Any

import pytest
import torch

from rlhf.algorithms.advantages import Rewarded, WhitenedReturns, group_relative, leave_one_out
from rlhf.algorithms.aggregation import constant_length, sequence_mean, token_mean
from rlhf.algorithms.filters import equal_groups, overlong
from rlhf.algorithms.losses import truncated_importance
from rlhf.algorithms.ratios import mean_log_ratios, product_log_ratios
from rlhf.experience import ExperienceMaker
from rlhf.policy import Wanted
from tests.tiers import tiered

Build = Callable[..., Any]
MASK = torch.tensor([[True, True, True, True], [True, True, False, False], [True, False, False, False]])
TASKS: dict[str, dict[str, Any]] = {
    "grpo": {},
    "dapo": {"name": "grpo", "aggregation": "tokens", "clip_high": 0.28, "drop_equal_groups": True},
    "dr_grpo": {"name": "grpo", "aggregation": "constant", "scale": "none"},
    "gspo": {"mini_batches": 1},  # its narrow clip lets a second step on the same policy move little
    "cispo": {},
    "rloo": {},
    "reinforce_plus_plus": {},
}


def rewarded(scores: list[float], groups: list[int], ended: list[bool] | None = None) -> Rewarded:
    """Samples of one action each, without a penalty."""
    count = len(scores)
    return Rewarded(
        torch.tensor(scores), torch.zeros(count, 1), 0.0, torch.ones(count, 1, dtype=torch.bool), None,
        torch.tensor(groups), torch.tensor(ended or [True] * count),
    )  # fmt: skip


def learnt(build: Build, name: str, **options: Any) -> tuple[list[float], Any]:
    """Mean scores of the iterations of a policy that is paid for the share of one token."""
    tiny = build(
        **{"name": name, "prompts": 8, "samples": 8, "micro_batch": 32, "iterations": 16, "wants_one_token": True,
           "kl_coef": 0.0, "missing_eos_penalty": 0.0, **TASKS[name], **options}
    )  # fmt: skip
    before = tiny.parameters()
    metrics = tiny.run()
    assert "critic" not in tiny.models.routes
    assert tiny.models.value_head is None
    assert not any("value" in name for seen in metrics for name in seen)
    changed = {name for name, tensor in tiny.parameters().items() if not torch.equal(before[name], tensor)}
    assert changed
    assert all(".actor." in name or "networks.policy." in name for name in changed)
    return [heard["score_mean"] for _, heard in tiny.listener.heard], tiny


CELLS = [(name, lora) for name in TASKS for lora in (True, False)]


@pytest.mark.parametrize(("name", "lora"), tiered(CELLS, [*((name, True) for name in TASKS), ("rloo", False)]))
def test_a_wanted_token_is_learnt(tiny_ppo: Build, name: str, lora: bool) -> None:
    scores, _ = learnt(tiny_ppo, name, lora=lora)
    most = statistics.mean(6 / (6 + prompt) for prompt in (1, 2, 3, 4))
    assert scores[0] < most / 4
    assert statistics.mean(scores[-3:]) > most / 2


@pytest.mark.parametrize("name", tiered(TASKS, ["grpo", "rloo"]))
def test_one_prompt_alone_is_learnt(tiny_ppo: Build, name: str) -> None:
    scores, _ = learnt(tiny_ppo, name, prompt_rows=1, prompts=1, samples=32)
    assert scores[0] < 6 / 7 / 4
    assert statistics.mean(scores[-3:]) > 6 / 7 / 2


@pytest.mark.parametrize("aggregation", ["tokens", "sequences", "constant"])
def test_micro_batches_do_not_change_the_gradient(tiny_ppo: Build, aggregation: str) -> None:
    options = {"name": "grpo", "samples": 4, "prompts": 2, "iterations": 1, "aggregation": aggregation, "kl_coef": 0.3}
    whole, parts = (tiny_ppo(micro_batch=size, drop_overlong=True, **options) for size in (4, 1))
    whole.run()
    parts.run()
    other = parts.parameters()
    for name, tensor in whole.parameters().items():
        torch.testing.assert_close(tensor, other[name], rtol=1e-3, atol=1e-5)


def test_without_signal_nothing_is_learnt_and_the_share_is_told(tiny_ppo: Build) -> None:
    """A response of one token is a group of its own here: every group's scores are equal."""
    tiny = tiny_ppo(name="grpo", samples=1, iterations=2, drop_equal_groups=True, kl_coef=0.5)
    before = tiny.parameters()
    metrics = tiny.run()
    assert {heard["filtered/equal_groups"] for _, heard in tiny.listener.heard} == {1.0}
    assert all(seen["loss"] == 0 for seen in metrics)
    assert all(torch.equal(before[name], tensor) for name, tensor in tiny.parameters().items())


def test_responses_that_the_limit_cut_off_teach_nothing(tiny_ppo: Build) -> None:
    tiny = tiny_ppo(name="grpo", samples=4, iterations=1, drop_overlong=True, mini_batches=1, micro_batch=32)
    (batch,) = tiny.source.micro_batches(0)
    ended_B = batch.samples.ended_B
    assert 0 < int(ended_B.sum()) < len(ended_B)
    assert torch.equal((batch.weights_BA > 0).any(dim=1), ended_B)
    assert float(batch.weights_BA.sum()) == pytest.approx(batch.weight)
    (heard,) = [values for _, values in tiny.listener.heard]
    assert heard["filtered/overlong"] == pytest.approx(1 - float(ended_B.double().mean()))


def test_what_a_step_s_loss_is_the_mean_of() -> None:
    losses = torch.arange(12.0).reshape(3, 4)
    rows, tokens = [0, 1, 2], float(MASK.sum())
    wanted = {
        token_mean: (0 + 1 + 2 + 3 + 4 + 5 + 8) / 7,
        sequence_mean: (6 / 4 + 9 / 2 + 8) / 3,
        lambda mask: constant_length(mask, 10): (6 + 9 + 8) / 30,
    }
    for aggregation, mean in wanted.items():
        weights = aggregation(MASK)
        found = (losses * weights.actions_NA * weights.scale(rows, tokens)).sum() / tokens
        assert float(found) == pytest.approx(mean)
    left = sequence_mean(MASK).without(torch.tensor([False, True, False]))
    found = (losses * left.actions_NA * left.scale(rows, tokens)).sum() / tokens
    assert float(found) == pytest.approx((6 / 4 + 8) / 2)
    assert left.scale([1], 2.0) == 0.0


def test_group_relative_by_hand() -> None:
    rewards, groups = torch.tensor([1.0, 3.0, 5.0, 7.0, 2.0]), torch.tensor([4, 4, 9, 9, 5])
    deviation = 2**0.5  # of a sample of two that lie 2 apart
    assert group_relative(rewards, groups, "none").tolist() == [-1, 1, -1, 1, 0]
    wanted = [x / deviation for x in (-1, 1, -1, 1, 0)]
    assert group_relative(rewards, groups, "group", 0.0).tolist() == pytest.approx(wanted)
    assert float(group_relative(rewards, groups, "batch", 0.0)[0]) == pytest.approx(-1 / float(rewards.std()))


def test_leave_one_out_by_hand() -> None:
    found = leave_one_out(rewarded([1.0, 3.0, 8.0, 5.0], [0, 0, 0, 1]))
    assert found.advantages_NA[:, 0].tolist() == [1 - 5.5, 3 - 4.5, 8 - 2.0, 0]
    assert found.returns_NA is None


def test_whitened_returns_by_hand() -> None:
    """The score stands at the last token, k1 at each: returns 2 - 3 c, 2 - 2 c and, for the other one, -2 - c."""
    mask, kl = torch.tensor([[True, True], [True, False]]), torch.tensor([[1.0, 2.0], [1.0, 0.0]])
    given = Rewarded(torch.tensor([2.0, -2.0]), kl, 0.5, mask, None, torch.tensor([0, 0]), torch.tensor([True, True]))
    returns = torch.tensor([0.5, 1.0, -2.5], dtype=torch.float64)
    deviation = float(returns.std(correction=0))
    found = WhitenedReturns(gamma=1.0, by_group=False)(given)
    torch.testing.assert_close(found.advantages_NA[mask].double(), (returns - returns.mean()) / deviation)
    assert found.deviation == pytest.approx(deviation)
    shifted = Rewarded(given.scores_N + torch.tensor([7.0, 7.0]), kl, 0.5, mask, None, given.groups_N, given.ended_N)
    by_group = [WhitenedReturns(1.0, by_group=True)(each).advantages_NA for each in (given, shifted)]
    torch.testing.assert_close(*by_group)


def test_filters_by_hand() -> None:
    given = rewarded([1.0, 1.0, 1.0, 2.0, 5.0], [0, 0, 1, 1, 2], [True, False, True, True, True])
    assert equal_groups(given).tolist() == [True, True, False, False, True]
    assert overlong(given).tolist() == [False, True, False, False, False]


def test_ratios_of_whole_responses() -> None:
    logprobs, old = torch.tensor([[1.0, 2.0, 9.0]]), torch.tensor([[0.5, 1.0, -9.0]])
    mask = torch.tensor([[True, True, False]])
    assert mean_log_ratios(logprobs, old, mask).tolist() == [[0.75, 0.75, 0.0]]
    assert product_log_ratios(logprobs, old, mask).tolist() == [[1.5, 1.5, 0.0]]


@pytest.mark.parametrize(("ratio", "weight"), [(0.1, 0.1), (2.0, 2.0), (9.0, 5.0)])
@pytest.mark.parametrize("advantage", [1.5, -1.5])
def test_truncated_weights_leave_every_token_its_gradient(ratio: float, weight: float, advantage: float) -> None:
    log_ratio = torch.tensor([[ratio]]).log().requires_grad_()
    found = truncated_importance(log_ratio, torch.tensor([[advantage]]), max_ratio=5.0)
    (gradient,) = torch.autograd.grad(found.loss_BR.sum(), log_ratio)
    assert float(gradient) == pytest.approx(-advantage * weight, rel=1e-5)
    assert bool(found.is_clipped_BR) == (ratio > 5)


@pytest.mark.parametrize(
    ("settings", "unasked"),
    [
        ({"mini_batches": 1, "kl_coef": 0.0}, {"entropy", "sampler_gap", "kl"}),
        ({"mini_batches": 2, "kl_coef": 0.0}, {"entropy", "sampler_gap", "kl"}),
        ({"mini_batches": 2, "kl_coef": 0.1, "name": "rloo"}, {"entropy", "sampler_gap", "kl"}),
        ({"mini_batches": 1, "kl_coef": 0.1, "entropy_coef": 0.1, "epochs": 2}, set()),
        ({"mini_batches": 1, "kl_coef": 0.1, "kl_in": "reward"}, set()),
        ({"mini_batches": 1, "kl_coef": 0.0, "kl_limit": 100.0}, set()),
    ],
)
def test_models_without_a_say_before_the_update_are_asked_in_few_iterations_and_that_changes_nothing(
    tiny_ppo: Build, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], unasked: set[str]
) -> None:
    settings = {"name": "grpo", "samples": 4, "prompts": 2, "iterations": 6, **settings}
    sparing = tiny_ppo(**settings)
    steps = sparing.run()
    for name in ("entropy", "sampler_gap", "kl"):
        asked = [values["iteration"] for _, values in sparing.listener.heard if name in values]
        assert asked == ([0, 2, 3, 4, 6] if name in unasked else list(range(7))), name
    monkeypatch.setattr(ExperienceMaker, "_wanted", lambda self, iteration: Wanted())
    asking = tiny_ppo(**settings)
    for number, (found, wanted) in enumerate(zip(steps, asking.run(), strict=True)):
        assert {name: found[name] for name in wanted} == wanted
        heard = asking.listener.heard[number // (len(steps) // 6)][1]
        for name in found.keys() - wanted.keys() if settings["mini_batches"] == 1 else ():  # sums, and means
            count = 8 * (1 if name == "kl" else heard["length_mean"])
            assert found[name] == pytest.approx(heard[name] * count, rel=1e-6, abs=1e-9)
    for name, tensor in asking.parameters().items():
        assert torch.equal(tensor, sparing.parameters()[name]), name
