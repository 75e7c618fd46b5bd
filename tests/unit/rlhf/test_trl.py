"""Losses, gradients and advantages of algorithms against what TRL's own functions give, as `trl_numbers.json` has it.

Conventions that differ are in docs/rlhf.md; a long test asks the TRL that is installed for the numbers again.
"""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter
from torch import Tensor, nn

from recipes.stages.algorithms import TextAlgorithm
from rlhf.algorithm import Algorithm, algorithm_of
from rlhf.algorithms.advantages import Rewarded
from rlhf.experience import RlBatch
from rlhf.objective import RlObjective

NUMBERS = json.loads(Path(__file__).with_name("trl_numbers.json").read_text())
GIVEN = {
    name: torch.tensor(table, dtype=None if name == "mask" else torch.float64)
    for name, table in NUMBERS["batch"].items()
}
GROUPS = torch.arange(len(GIVEN["rewards"])) // 4
LENGTH = 7
SETTINGS: dict[str, dict[str, Any]] = {
    "grpo": {"name": "grpo", "kl_estimator": "k3", "kl_coef": 0.3},
    "grpo without a penalty": {"name": "grpo"},
    "dapo": {"name": "grpo", "aggregation": "tokens", "clip_high": 0.28},
    "dual clip": {"name": "grpo", "aggregation": "tokens", "dual_clip": 1.5},
    "dr_grpo": {"name": "grpo", "aggregation": "constant"},
    "gspo": {"name": "gspo", "clip_low": 0.03, "clip_high": 0.04},
    "cispo": {"name": "cispo", "max_ratio": 1.2},
    "rloo": {"name": "rloo"},
}
"""Settings under which the losses of `write_trl_numbers.py` are ours."""


def algorithm(**settings: Any) -> Algorithm:
    written = {"iterations": 1, "optimizer": {"lr": 1e-3}, **settings}
    return algorithm_of(TypeAdapter(TextAlgorithm).validate_python(written), LENGTH)


def loss_and_gradient(settings: dict[str, Any], parts: list[list[int]]) -> tuple[float, Tensor]:
    """Of one optimiser step whose samples lie in these micro-batches, by the stage's own objective."""
    chosen, mask = algorithm(**settings), GIVEN["mask"]
    weights = chosen.aggregation(mask)
    scale = weights.scale(range(len(mask)), float(mask.sum()))
    logprobs = GIVEN["logprobs"].clone().requires_grad_()
    advantages = torch.tensor(NUMBERS["advantages"]["grpo group"], dtype=torch.float64)
    policy: Any = SimpleNamespace(learn=lambda _, batch: {"logprobs_BA": logprobs[batch.samples]})
    objective, total = RlObjective(policy, chosen, 1e-7), torch.zeros(())
    for rows in parts:
        batch: RlBatch[Any] = RlBatch(
            rows, mask[rows], weights.actions_NA[rows] * scale, GIVEN["old"][rows], GIVEN["reference"][rows], None,
            (advantages[:, None] * mask)[rows], None, kl_coef=settings.get("kl_coef", 0.0), actor_learns=True,
            is_untouched=False,
        )  # fmt: skip
        total = total + objective.loss(nn.Identity(), batch).loss_sum.double() / float(mask.sum())
    (gradient,) = torch.autograd.grad(total, logprobs)
    return float(total.detach()), gradient


@pytest.mark.parametrize("parts", [[[*range(12)]], [[0, 7, 3], [1, 2, 4, 5, 6], [8, 11], [9, 10]]])
@pytest.mark.parametrize("name", SETTINGS)
def test_loss_and_gradient_are_trl_s_however_a_step_is_divided(name: str, parts: list[list[int]]) -> None:
    loss, gradient = loss_and_gradient(SETTINGS[name], parts)
    wanted = NUMBERS["losses"][name]
    torch.testing.assert_close(gradient, torch.tensor(wanted["gradient"], dtype=torch.float64), rtol=1e-5, atol=1e-8)
    constant = 0.0
    if name == "cispo":  # of log ratio, where TRL takes log policy
        mask, advantages = GIVEN["mask"], torch.tensor(NUMBERS["advantages"]["grpo group"], dtype=torch.float64)
        held = (GIVEN["logprobs"] - GIVEN["old"]).exp().clamp(max=1.2)
        constant = float(((advantages[:, None] * held * GIVEN["old"])[mask]).sum() / mask.sum())
    assert loss == pytest.approx(wanted["loss"] + constant, rel=1e-5, abs=1e-7)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        *((f"grpo {scale}", {"name": "grpo", "scale": scale}) for scale in ("group", "batch", "none")),
        ("rloo", {"name": "rloo"}),
        ("rloo with a penalty", {"name": "rloo", "kl_in": "reward", "kl_coef": 0.4}),
    ],
)
def test_advantages_are_trl_s(name: str, settings: dict[str, Any]) -> None:
    mask = GIVEN["mask"]
    kl = torch.where(mask, GIVEN["old"] - GIVEN["reference"], 0.0)
    ended = torch.ones(len(mask), dtype=torch.bool)
    given = Rewarded(GIVEN["rewards"], kl, settings.get("kl_coef", 0.0), mask, None, GROUPS, ended)
    found = algorithm(**settings).credit(given)
    wanted = torch.tensor(NUMBERS["advantages"][name], dtype=torch.float64)
    torch.testing.assert_close(found.advantages_NA, torch.where(mask, wanted[:, None], 0.0))
    assert found.returns_NA is None


@pytest.mark.long
def test_trl_still_gives_the_numbers_that_are_written_down() -> None:
    pytest.importorskip("trl", reason="TRL is not installed")
    import sys

    sys.path.insert(0, str(Path(__file__).parent))
    from write_trl_numbers import found

    sys.path.pop(0)
    now = found()
    if now["trl"] != NUMBERS["trl"]:
        pytest.skip(f"the numbers are TRL {NUMBERS['trl']}'s; installed is {now['trl']}")
    assert now == NUMBERS
