"""PPO on the plain engine: invariants at the start, learning, saving between iterations, stop rules."""

import statistics
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from recipes.errors import StageError
from recipes.stages.rewards.words import RealWords
from recipes.stages.sharding import Shard
from rlhf.invariants import require_version
from rlhf.rewards.terms import open_text_terms
from rlhf.text.rewards import TextReward

TinyPpo = Any
Build = Callable[..., TinyPpo]


@pytest.mark.parametrize("lora", [True, False])
@pytest.mark.parametrize("kind", ["llama", "qwen3", "gpt2"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_at_the_start_every_ratio_is_one_and_kl_is_zero(tiny_ppo: Build, lora: bool, kind: str, precision: Any) -> None:
    shard = Shard(engine="plain", precision=precision)
    ppo = tiny_ppo(lora=lora, kind=kind, temperature=0.7, micro_batch=3, shard=shard)
    (step,) = ppo.run(last=1)
    assert step["log_ratio"] == 0
    _, first = ppo.listener.heard[0]
    assert abs(first["kl"]) < 1e-6
    assert first["kl_k3"] < 1e-6


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_every_iteration_begins_with_ratios_of_exactly_one(tiny_ppo: Build, precision: Any) -> None:
    ppo = tiny_ppo(micro_batch=3, shard=Shard(engine="plain", precision=precision))
    done = ppo.run()
    per_iteration = ppo.source.steps_per_iteration
    assert [step["log_ratio"] == 0 for step in done] == [
        step % per_iteration == 0 for step in range(ppo.source.steps_planned)
    ]


def test_one_prompt_eight_times_an_iteration_is_answered_in_eight_ways(tiny_ppo: Build) -> None:
    ppo = tiny_ppo(prompts=8, prompt_rows=1)
    experience = ppo.source._begin(0).estimate.experience
    assert len(set(map(tuple, experience.samples.action_ids))) == 8


def test_without_learning_the_policy_stays_its_reference(tiny_ppo: Build) -> None:
    ppo = tiny_ppo(iterations=2)
    before = ppo.parameters()
    for step in range(ppo.source.steps_planned):
        for batch in ppo.source.micro_batches(step):
            output = ppo.objective.loss(ppo.engine.module, replace(batch, is_untouched=True))
            assert float(output.metrics["clip_fraction"][0]) == 0
    assert all(torch.equal(before[name], tensor) for name, tensor in ppo.parameters().items())


@pytest.mark.parametrize("lora", [True, False])
def test_a_wanted_token_is_learnt(tiny_ppo: Build, lora: bool) -> None:
    ppo = tiny_ppo(
        lora=lora, wants_one_token=True, prompts=32, micro_batch=16, iterations=20, kl_coef=0.0, missing_eos_penalty=0.0
    )
    ppo.run()
    scores = [heard["score_mean"] for _, heard in ppo.listener.heard]
    most = statistics.mean(6 / (6 + prompt) for prompt in (1, 2, 3, 4))  # the prompt's one to four tokens count too
    assert scores[0] < most / 4
    assert statistics.mean(scores[-5:]) > most / 2  # one iteration's 32 responses alone scatter by 0.05


def wants_a_word() -> TextReward:
    """The share of one token, by a rule on the text: token 7 reads as `h`."""
    term = open_text_terms({"word": RealWords(rule="real_words", words=["h"])}, Path(), [])[0]
    records = [{"id": str(row)} for row in range(40)]
    spelt = lambda tokens: " ".join(chr(ord("a") + token) for token in tokens)  # noqa: E731
    return TextReward({"word": 1.0}, (), [term], records, spelt)


def test_what_a_rule_rewards_is_learnt_without_a_reward_model(tiny_ppo: Build) -> None:
    ppo = tiny_ppo(
        reward=wants_a_word(), prompts=32, micro_batch=16, iterations=20, kl_coef=0.0, missing_eos_penalty=0.0
    )
    ppo.run()
    shares = [heard["reward/word"] for _, heard in ppo.listener.heard]
    assert shares == [heard["score_mean"] for _, heard in ppo.listener.heard]
    assert shares[0] < 0.15
    assert statistics.mean(shares[-5:]) > 0.5


def test_only_actor_critic_and_value_head_learn(tiny_ppo: Build) -> None:
    ppo = tiny_ppo(iterations=1)
    before = ppo.parameters()
    ppo.run()
    changed = {name for name, tensor in ppo.parameters().items() if not torch.equal(before[name], tensor)}
    assert changed
    assert all("lora_" in name or "value_head" in name for name in changed)
    assert any(".actor." in name for name in changed)
    assert any(".critic." in name for name in changed)


def test_while_the_critic_warms_up_the_actor_stays(tiny_ppo: Build) -> None:
    ppo = tiny_ppo(iterations=2, critic={"warmup": 1})
    before = ppo.parameters()
    ppo.run(last=ppo.source.steps_per_iteration)
    after = ppo.parameters()
    assert all(torch.equal(before[name], after[name]) for name in before if ".actor." in name)
    assert any(not torch.equal(before[name], after[name]) for name in before if ".critic." in name)


@pytest.mark.parametrize("reward", [None, wants_a_word()])
def test_continuing_between_iterations_gives_the_same_bits(tiny_ppo: Build, reward: TextReward | None) -> None:
    options: dict[str, Any] = {
        "reward": reward,
        "iterations": 3,
        "kl_limit": 50.0,
        "kl_controller": {"name": "adaptive", "target": 0.01, "horizon": 50},
    }
    straight = tiny_ppo(**options)
    straight.run()
    first, second = tiny_ppo(**options), tiny_ppo(**options)
    border = 2 * first.source.steps_per_iteration
    first.run(last=border)
    state = first.source.state()
    slices = {(piece.group, piece.name): piece.values.clone().flatten() for piece in first.engine.state_out()}
    second.engine.state_in(
        lambda group, name, start, stop: slices[group, name][start:stop], steps_applied=first.engine.steps_applied
    )
    second.source.load_state(state)
    second.run(first=border)
    wanted, got = straight.parameters(), second.parameters()
    assert all(torch.equal(wanted[name], got[name]) for name in wanted)
    assert straight.source.state().values == second.source.state().values
    assert straight.listener.heard[-1] == second.listener.heard[-1]


def test_micro_batches_do_not_change_the_gradient(tiny_ppo: Build) -> None:
    whole, parts = tiny_ppo(micro_batch=4, iterations=1), tiny_ppo(micro_batch=1, iterations=1)
    whole.run()
    parts.run()
    other = parts.parameters()
    for name, tensor in whole.parameters().items():
        torch.testing.assert_close(tensor, other[name], rtol=1e-3, atol=1e-5)


def test_the_kl_limit_ends_the_stage_and_the_best_policy_before_it_is_kept(tiny_ppo: Build) -> None:
    ppo = tiny_ppo(iterations=30, kl_coef=0.0, epochs=4, kl_limit=0.5)
    steps = len(ppo.run())
    assert steps < ppo.source.steps_planned
    reports = [heard for _, heard in ppo.listener.heard]
    assert reports[-1]["kl"] > 0.5
    assert all(report["kl"] <= 0.5 for report in reports[:-1])
    iteration, best = ppo.source.best()
    assert reports[iteration]["shaped_score_mean"] == max(report["shaped_score_mean"] for report in reports[:-1])
    assert set(best) == {name for name, p in ppo.models.named_parameters() if p.requires_grad}


def test_the_best_policy_is_the_best_by_the_score_that_is_optimised(tiny_ppo: Build) -> None:
    ppo = tiny_ppo(iterations=3, kl_limit=50.0)
    scripted, estimate = [(1.0, 0.5), (3.0, -1.0), (2.0, 0.75)], ppo.source.experience.estimate

    def rescored(iteration: int, kl_coef: float, first_epoch: Any) -> Any:
        found, (raw, shaped) = estimate(iteration, kl_coef, first_epoch), [*scripted, (0.0, 0.0)][iteration]
        return replace(found, report=replace(found.report, score_mean=raw, shaped_score_mean=shaped))

    ppo.source.experience.estimate = rescored
    ppo.run()
    assert ppo.source.best()[0] == 2  # the highest raw score is that of a policy which no longer ends its responses
    assert ppo.source.state().values["best_score"] == 0.75


def test_the_adaptive_coefficient_follows_the_measured_kl(tiny_ppo: Build) -> None:
    ppo = tiny_ppo(
        iterations=4, kl_coef=0.1, epochs=4, kl_controller={"name": "adaptive", "target": 1e-3, "horizon": 100}
    )
    ppo.run()
    coefficients = [heard["kl_coef"] for _, heard in ppo.listener.heard]
    assert coefficients[0] == 0.1
    assert coefficients[1] < 0.1  # KL 0 at the start is below the target
    assert coefficients[3] > coefficients[2]


def test_kl_in_the_loss_pulls_towards_the_reference(tiny_ppo: Build) -> None:
    options = {"iterations": 6, "epochs": 4, "kl_in": "loss"}
    free, held = tiny_ppo(kl_coef=0.0, **options), tiny_ppo(kl_coef=20.0, **options)
    free.run()
    held.run()
    assert held.listener.heard[-1][1]["kl_k3"] < 0.5 * free.listener.heard[-1][1]["kl_k3"]


def test_a_ratio_off_one_before_the_first_update_stops_the_stage(tiny_ppo: Build) -> None:
    ppo = tiny_ppo()
    (batch, *_) = ppo.source.micro_batches(0)
    wrong = replace(batch, old_logprobs_BA=batch.old_logprobs_BA - 0.01)
    with pytest.raises(StageError, match=r"disagree: .* 1\.00e-02"):
        ppo.objective.loss(ppo.engine.module, wrong)


def test_rollouts_of_other_weights_stop_the_stage(tiny_ppo: Build) -> None:
    ppo = tiny_ppo()
    rollouts = ppo.source.experience.policy
    before = rollouts.sync(0)
    ppo.run(last=1)
    after = rollouts.sync(0)
    with pytest.raises(StageError, match=r"after 0 steps, for iteration 0; .* step 1, iteration 0"):
        require_version(before, after)
    require_version(after, rollouts.sync(0))


def test_sampling_from_folded_weights_is_sampling_under_the_adapter(tiny_ppo: Build) -> None:
    ppo = tiny_ppo(iterations=1)
    ppo.run()
    before = ppo.parameters()
    tokens = torch.arange(2, 14).reshape(2, 6)
    with torch.no_grad():
        with ppo.models.playing("actor") as network:
            beside = network(input_ids=tokens).logits
        with ppo.models.sampling() as network:
            folded = network(input_ids=tokens).logits
        with ppo.models.playing("reference") as network:
            without = network(input_ids=tokens).logits
    torch.testing.assert_close(folded, beside, rtol=1e-4, atol=1e-5)
    assert float((folded - without).abs().max()) > 1e-3
    assert all(torch.equal(before[name], tensor) for name, tensor in ppo.parameters().items())
