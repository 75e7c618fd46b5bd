"""Algorithms against exact answers: one response token and known rewards, so that each optimum has a formula."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rlhf.algorithms.kl import k2_penalty
from tests.tiers import tiered

Build = Callable[..., Any]
DEVIATION = 0.5
"""Of the score statistics of a tiny PPO."""
TABLE = torch.randn(24, generator=torch.Generator().manual_seed(4)).double()
"""Normalised score of each token."""


class Rewarding(nn.Module):
    """A "backbone" that knows the token after a prompt of one token, and its reward."""

    @property
    def base_model(self) -> nn.Module:
        """Itself."""
        return self

    def forward(self, input_ids: Tensor, **_: Any) -> Any:
        """Hidden states of width 16 that all hold the reward."""
        states = DEVIATION * TABLE[input_ids[:, 1]].float()
        return SimpleNamespace(last_hidden_state=states[:, None, None].expand(-1, input_ids.shape[1], 16))


def learnt(tiny_ppo: Build, iterations: int = 30, **settings: Any) -> tuple[Tensor, Tensor]:
    """The policy's probabilities after training on one prompt, averaged over the last third, and the reference's."""
    settings = {"epochs": 4, **({"critic": {"clip": None}} if settings.get("name", "ppo") == "ppo" else {}), **settings}
    ppo = tiny_ppo(
        **{"lora": False, **settings}, prompts=128, prompt_rows=1, micro_batch=128, max_new_tokens=1,
        missing_eos_penalty=0.0, entropy_coef=0.0, iterations=iterations, mini_batches=1,
    )  # fmt: skip
    ppo.models.networks["judge"] = Rewarding()
    ppo.models.sharing -= {"judge"}  # it reads rows as they are
    nn.init.constant_(ppo.models.score_head.weight, 1 / 16)
    prompt = torch.from_numpy(ppo.source.experience.policy.sources.prompts.dataset.cut("prompt_ids", 0)).long()[None]

    @torch.no_grad()
    def probabilities(role: Any) -> Tensor:
        with ppo.models.playing(role) as network:
            return network(input_ids=prompt).logits[0, -1].double().softmax(0)

    reference, per_iteration, found = probabilities("reference"), ppo.source.steps_per_iteration, []
    for iteration in range(iterations):
        ppo.run(iteration * per_iteration, (iteration + 1) * per_iteration)
        found.append(probabilities("actor"))
    return torch.stack(found[-(iterations // 3) :]).mean(0), reference


def kl(p: Tensor, q: Tensor) -> float:
    """In nats."""
    return float((p * (p / q).log()).sum())


def tilted(reference: Tensor, coefficient: float) -> Tensor:
    """The optimum of E[reward] - coefficient KL(policy || reference)."""
    return torch.softmax(reference.log() + TABLE / coefficient, 0)


@pytest.mark.parametrize("place", ["reward", "loss"])
def test_either_place_of_the_penalty_leads_to_the_tilted_reference(tiny_ppo: Build, place: Any) -> None:
    policy, reference = learnt(tiny_ppo, kl_coef=0.5, kl_in=place)
    wanted = tilted(reference, 0.5)
    assert kl(wanted, reference) > 0.5
    assert kl(policy, wanted) < 0.05
    assert kl(policy, reference) == pytest.approx(kl(wanted, reference), rel=0.2)


CELLS: dict[str, dict[str, Any]] = {
    "rloo": {"kl_in": "loss"},
    "rloo-reward": {"name": "rloo", "kl_in": "reward"},
    "grpo": {"scale": "none", "iterations": 45},
    "dr_grpo": {"name": "grpo", "scale": "none", "aggregation": "constant", "iterations": 45},
    "cispo": {"scale": "none"},
    "gspo": {"scale": "none", "epochs": 1, "iterations": 100},  # so that its narrow clip never acts
    "reinforce_plus_plus": {"kl_in": "reward"},
    "reinforce_plus_plus-loss": {"name": "reinforce_plus_plus", "kl_in": "loss"},
}


@pytest.mark.parametrize("cell", tiered(CELLS, ["rloo", "grpo", "reinforce_plus_plus"]))
def test_every_algorithm_comes_to_the_tilted_reference(tiny_ppo: Build, cell: str) -> None:
    policy, reference = learnt(tiny_ppo, **{"name": cell, "kl_coef": 0.5, **CELLS[cell]})
    wanted = tilted(reference, 0.5)
    assert kl(policy, wanted) < 0.05
    assert kl(policy, reference) == pytest.approx(kl(wanted, reference), rel=0.2)


def test_scaled_advantages_let_the_policy_collapse_where_the_same_penalty_holds_it_unscaled(tiny_ppo: Build) -> None:
    """GRPO as published weighs nats against the deviation of the scores, which vanishes as the policy concentrates."""
    policy, reference = learnt(tiny_ppo, name="grpo", kl_coef=0.5, iterations=60)
    assert float(tilted(reference, 0.5).max()) < 0.5
    assert float(policy.max()) > 0.9


def test_the_gradient_of_k3_leads_elsewhere(tiny_ppo: Build) -> None:
    """To the optimum of E[reward] - coefficient KL(reference || policy): coefficient reference / (c - reward)."""
    policy, reference = learnt(tiny_ppo, name="grpo", scale="none", kl_estimator="k3", kl_coef=0.5)
    low, high = float(TABLE.max()), float(TABLE.max()) + 10
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if float((0.5 * reference / (middle - TABLE)).sum()) > 1 else (low, middle)
    wanted = 0.5 * reference / (high - TABLE)
    assert kl(policy, wanted) < 0.05
    assert kl(wanted, tilted(reference, 0.5)) > 0.1


def test_the_penalty_s_gradient_is_that_of_the_kl_even_for_samples_of_an_earlier_policy() -> None:
    generator = torch.Generator().manual_seed(0)
    old, reference = (torch.randn(12, generator=generator, dtype=torch.float64).log_softmax(0) for _ in range(2))
    logits = torch.randn(12, generator=generator, dtype=torch.float64, requires_grad=True)
    policy = logits.log_softmax(0)
    (exact,) = torch.autograd.grad((policy.exp() * (policy - reference)).sum(), logits, retain_graph=True)
    expected = (old.exp() * k2_penalty(policy, old, reference)).sum()  # over all samples at once
    (found,) = torch.autograd.grad(expected, logits)
    torch.testing.assert_close(found, exact)
    assert float(expected.detach()) == pytest.approx(kl(policy.exp().detach(), reference.exp()))
