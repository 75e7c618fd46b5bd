"""DDPO on the plain engine with a tiny network: invariants at the start, learning, stale policies, resume, limits."""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from recipes.errors import StageError
from recipes.stages.lora import Lora
from rlhf.images.conditions import Asked
from rlhf.images.sampling import ImagePolicy, ImageRollouts
from rlhf.iterations import gate_reasons
from rlhf.monitors import ImageRolloutReport
from trainers.runtime.observer import Watch

sys.path.insert(0, str(Path(__file__).parent))
from small_ddpo import build

sys.path.pop(0)


def asked_of(*labels: int) -> Asked:
    """Images of these classes."""
    return Asked(torch.tensor(labels), torch.tensor(labels))


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_at_the_start_every_ratio_is_one_and_kl_is_zero(guidance: float) -> None:
    ddpo = build(guidance=guidance, micro_batch=4)
    (first, *_) = ddpo.source.micro_batches(0)
    assert first.is_untouched
    output = ddpo.objective.loss(ddpo.engine.module, first)
    assert float(output.metrics["log_ratio"][0]) == 0
    assert ddpo.listener.heard[0]["kl"] == pytest.approx(0, abs=1e-9)
    assert ddpo.listener.heard[0]["kl_k1"] == pytest.approx(0, abs=1e-5)
    assert first.old_logprobs_BA.shape == (4, 3)  # the last of four denoising steps is no action


@pytest.mark.parametrize("lora", [None, Lora(r=4)])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("in_latents", [False, True])
def test_every_iteration_begins_with_ratios_of_exactly_one(in_latents: bool, precision: Any, lora: Any) -> None:
    ddpo = build(micro_batch=4, in_latents=in_latents, precision=precision, lora=lora, iterations=2)
    for iteration in range(2):
        for batch in ddpo.source.micro_batches(iteration * ddpo.source.steps_per_iteration):
            output = ddpo.objective.loss(ddpo.engine.module, batch)
            assert float(output.maxima["log_ratio_max"]) == 0
        ddpo.run(iteration * ddpo.source.steps_per_iteration, (iteration + 1) * ddpo.source.steps_per_iteration)


@torch.no_grad()
def test_far_out_of_range_a_reference_may_be_off_by_roundings_alone() -> None:
    ddpo = build(micro_batch=4, in_latents=True)
    reference = [p for name, p in ddpo.engine.module.named_parameters() if name.startswith("networks.reference.")]
    for parameter in reference:
        parameter.copy_(torch.nextafter(parameter, torch.full_like(parameter, torch.inf)))
    ddpo.source.experience.estimate(0, 0.0, [range(12)])
    trajectories = ddpo.source._begin(0).estimate.experience.samples
    said = ddpo.source.experience.judged(trajectories, [range(12)], {})
    assert (
        float((said.logprobs_BA - said.reference_logprobs_BA).abs().max()) > 1e-4
    )  # nats: an absolute bound fits no size of values
    for parameter in reference:
        parameter.mul_(1.001)
    with pytest.raises(StageError, match=r"its reference: .* up to"):
        ddpo.source.experience.estimate(0, 0.0, [range(12)])


def test_ink_is_learnt_and_the_exact_kl_agrees_with_what_was_drawn() -> None:
    ddpo = build(images=48, micro_batch=24, iterations=6, epochs=2)
    ddpo.run()
    reports = ddpo.listener.heard
    assert reports[-1]["score_mean"] > reports[0]["score_mean"] + reports[0]["score_std"]
    assert reports[-1]["kl"] > 1
    assert [report["kl_alarm"] for report in reports] == [0.0] * 7
    assert reports[-1]["kl_k1"] == pytest.approx(reports[-1]["kl"], rel=0.5)


def test_a_wrong_sign_fails_the_gate() -> None:
    ddpo = build(images=48, micro_batch=24, iterations=4, epochs=2)
    done = ddpo.run(sign=-1.0)
    (reason,) = gate_reasons(ddpo.source.start(), ddpo.source.report(done))
    assert reason.startswith("the mean score fell from")


class Stale(ImagePolicy):
    """Draws from the policy as it was at the start, and says so or not."""

    is_honest = True

    def drawn(self, iterations: int) -> dict[str, Any]:
        return {}

    def sync(self, iteration: int) -> Any:
        found = super().sync(iteration)
        if iteration == 0:
            with self.learner.engine.gathered() as module:
                self.old = {name: p.detach().clone() for name, p in module.named_parameters()}
            self.version = found
        return found

    def sample(self, iteration: int, watch: Watch) -> ImageRollouts:
        with self.learner.engine.gathered() as module, torch.no_grad():
            present = {name: p.detach().clone() for name, p in module.named_parameters()}
            for name, parameter in module.named_parameters():
                parameter.copy_(self.old[name])
            drawn = super().sample(iteration, watch)
            for name, parameter in module.named_parameters():
                parameter.copy_(present[name])
        return replace(drawn, version=self.version) if self.is_honest else drawn


def made_stale(ddpo: Any, is_honest: bool) -> None:
    ddpo.policy.__class__ = Stale
    ddpo.policy.is_honest = is_honest


def test_images_of_a_stale_policy_stop_the_stage() -> None:
    ddpo = build()
    made_stale(ddpo, is_honest=True)
    with pytest.raises(StageError, match=r"after 0 steps, for iteration 0; .* step 2, iteration 1"):
        ddpo.run()


def test_a_stale_policy_that_hides_it_raises_the_alarm() -> None:
    ddpo = build(images=48, micro_batch=24, iterations=4, epochs=2)
    made_stale(ddpo, is_honest=False)
    ddpo.run()
    assert ddpo.listener.heard[0]["kl_alarm"] == 0
    assert ddpo.listener.heard[-1]["kl_alarm"] == 1
    assert ddpo.listener.heard[-1]["kl_k1"] < 0 < ddpo.listener.heard[-1]["kl"]


def test_a_ratio_off_one_before_the_first_update_stops_the_stage() -> None:
    ddpo = build()
    (batch, *_) = ddpo.source.micro_batches(0)
    with pytest.raises(StageError, match="disagree"):
        ddpo.objective.loss(ddpo.engine.module, replace(batch, old_logprobs_BA=batch.old_logprobs_BA - 0.01))
    with pytest.raises(StageError, match="disagree"):  # the log-density of images next to them
        ddpo.objective.loss(ddpo.engine.module, replace(batch, old_logprobs_BA=batch.old_logprobs_BA.flip(0)))


def test_continuing_between_iterations_gives_the_same_bits() -> None:
    options = {"kl_limit": 1000.0, "kl_coef": 0.1, "kl_controller": {"name": "adaptive", "target": 0.01, "horizon": 50}}
    straight, first, second = (build(**options) for _ in range(3))
    straight.run()
    border = 2 * first.source.steps_per_iteration
    first.run(last=border)
    slices = {(piece.group, piece.name): piece.values.clone().flatten() for piece in first.engine.state_out()}
    second.engine.state_in(
        lambda group, name, start, stop: slices[group, name][start:stop], steps_applied=first.engine.steps_applied
    )
    second.source.load_state(first.source.state())
    second.run(first=border)
    wanted, got = straight.parameters(), second.parameters()
    assert all(torch.equal(wanted[name], got[name]) for name in wanted)
    assert straight.source.state().values == second.source.state().values
    assert straight.listener.heard[-1] == second.listener.heard[-1]


def test_micro_batches_do_not_change_the_update() -> None:
    whole, parts = build(micro_batch=6, iterations=1), build(micro_batch=2, iterations=1)
    before = whole.parameters()
    whole.run()
    parts.run()
    other = parts.parameters()
    for name, tensor in whole.parameters().items():
        torch.testing.assert_close(tensor, other[name], rtol=1e-2, atol=2e-4)
    assert any(not torch.equal(before[name], other[name]) for name in other)
    assert all(torch.equal(before[name], other[name]) for name in other if name.startswith("networks.reference."))


def test_an_image_depends_on_its_seed_and_class_alone() -> None:
    rollouts = build().policy
    rollouts.sync(0)
    four = rollouts.draw([1, 2, 3, 4], asked_of(0, 1, 0, 1), [0, 1, 2, 3]).images_BCHW
    one = rollouts.draw([3], asked_of(0), [2]).images_BCHW
    torch.testing.assert_close(four[2], one[0], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(rollouts.draw([9], asked_of(0), [2]).images_BCHW[0], one[0], atol=1e-2)


@pytest.mark.parametrize("place", ["loss", "reward"])
def test_a_kl_penalty_pulls_towards_the_start(place: Any) -> None:
    options = {"images": 24, "micro_batch": 12, "iterations": 4, "epochs": 2, "kl_in": place}
    free, held = build(kl_coef=0.0, **options), build(kl_coef=5.0, **options)
    free.run()
    held.run()
    assert held.listener.heard[-1]["kl"] < 0.7 * free.listener.heard[-1]["kl"]


def test_the_kl_limit_ends_the_stage_and_the_best_policy_before_it_is_kept() -> None:
    ddpo = build(images=24, micro_batch=12, iterations=20, epochs=2, kl_limit=1.0)
    done = ddpo.run()
    assert done < ddpo.source.steps_planned
    reports = ddpo.listener.heard
    assert reports[-1]["kl"] > 1.0
    assert all(report["kl"] <= 1.0 for report in reports[:-1])
    iteration, best = ddpo.source.best()
    assert reports[iteration]["score_mean"] == max(report["score_mean"] for report in reports[:-1])
    ddpo.source.return_to_best()
    after = ddpo.parameters()
    assert all(torch.equal(after[name], tensor) for name, tensor in best.items())


def test_the_alarm_knows_how_far_an_estimate_may_be_off() -> None:
    report = ImageRolloutReport(score_mean=0.0, score_std=1.0, kl=2.0, kl_k1=2.9, vendi=1.0, images=100)
    assert not report.kl_alarm  # a deviation is sqrt(2 * 2 / 100) = 0.2
    assert replace(report, kl_k1=3.1).kl_alarm
    assert replace(report, kl_k1=-2.0).kl_alarm
