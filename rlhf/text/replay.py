"""An iteration's samples once more, from what the store keeps of them: every reward, and the draws where it can.

The recorded run's ranks are played one after the other in this process, in their own micro-batches, so that on the same
kind of machine the sums are those of the run, bit for bit.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch

from recipes.errors import RequestError
from recipes.stages.rl import RlText
from recipes.stages.rollout_engines import LocalEngine
from rlhf.iterations import dealt_rows
from rlhf.policy import Learner
from rlhf.text.rewards import TextReward
from rlhf.text.samples import Sample, unpack
from rlhf.text.sampling import TextPolicy
from rlhf.text.stage import TextModels, TextRl
from trainers.checkpoint.checkpoint import conditions, read_engine
from trainers.engine.build import build_engine
from trainers.engine.protocol import Engine
from trainers.runtime.distributed import Ranks
from trainers.runtime.precision import unit_roundoff
from trainers.store.manifest import RolloutsManifest
from trainers.store.state import TensorReader
from trainers.training.context import StageContext


@dataclass(frozen=True)
class Compared:
    """What came out again, of one field of all samples."""

    differing: int = 0
    """Samples in which it is not equal to the bit."""
    largest: float | None = None
    """Of numbers: the largest difference."""


@dataclass(frozen=True)
class Replay:
    """What recomputing an iteration gave."""

    iteration: int
    samples: int
    rewards: Mapping[str, Compared]
    """By term."""
    drawn: Mapping[str, Compared]
    """By field of the samples; empty where they could not be drawn again."""
    not_drawn: str = ""
    """Why not."""
    conditions: Mapping[str, tuple[str, str]] | None = None
    """Conditions that bits depend on and that differ from the run's: then and now."""

    @property
    def is_equal(self) -> bool:
        """Whether everything that was recomputed is what was kept."""
        return not any(found.differing for found in (*self.rewards.values(), *self.drawn.values()))


def replay(spec: RlText, context: StageContext, iteration: int) -> Replay:
    """Recompute an iteration of a stage that a run has kept; raises RequestError where its samples are not there."""
    kept = context.store.find_rollouts(context.run, context.stage, iteration)
    if kept is None:
        there = context.store.list_rollouts(context.run, context.stage)
        known = f"those of {there[0]} to {there[-1]} are" if there else "none is (rollout.keep)"
        raise RequestError(f"{context.run}/{context.stage}: the samples of iteration {iteration} are not kept; {known}")
    samples = unpack(context.store.objects.get_bytes(kept.files["samples.safetensors"].sha256))
    with _threads(str(kept.values["threads"])):
        rollout = spec.rollout.changed(engine=LocalEngine())
        task = TextRl(spec.changed(probe="off", rollout=rollout), context)
        models = task.build(task.open_data())
        device, precision = context.ranks.device, spec.shard.precision
        shard = spec.shard.changed(engine="plain")
        engine = build_engine(models.module, models.groups, shard, clip=1.0, device=device)
        policies = [
            replace(models, context=replace(context, ranks=Ranks(rank, kept.layout.workers, 0, device))).policy(
                Learner(
                    engine,
                    kept.layout.micro_batch,
                    unit_roundoff(precision, device),
                    Ranks(rank, kept.layout.workers, 0, device),
                    context.seed,
                    context.observer,
                )
            )
            for rank in range(kept.layout.workers)
        ]
        rewards = _rewards_again(models, policies, engine, kept, samples)
        is_local = isinstance(spec.rollout.engine, LocalEngine)
        reason = (
            _take_weights(context, kept, engine) if is_local else "another engine than the training ranks drew them"
        )
        drawn = {} if reason else _drawn_again(policies, kept, samples)
        now = conditions(engine)
    other = {
        name: (str(kept.values[name]), now[name]) for name in ("device", "threads") if kept.values[name] != now[name]
    }
    return Replay(iteration, len(samples), rewards, drawn, reason, other)


@torch.no_grad()
def _rewards_again(
    models: TextModels,
    policies: Sequence[TextPolicy],
    engine: Engine,
    kept: RolloutsManifest,
    samples: Sequence[Sample],
) -> dict[str, Compared]:
    """Every term's values, a reward model's in the micro-batches that it was asked in.

    What an environment gave belongs to the draws: it is compared there, turn by turn.
    """
    reward, spec = models.reward, models.spec
    read = reward.read_texts([sample.text for sample in samples], [sample.row for sample in samples])
    scores: list[torch.Tensor] = []
    if reward.judges:
        batch = policies[0].collated(samples).samples
        scores_N = torch.zeros(len(samples), device=engine.device)
        dealt = dealt_rows(models.context.seed, kept.iteration, 0, len(samples), spec.algorithm.mini_batches)
        for rows in (share for own in policies for part in dealt for share in own.shares(batch, part)):
            found = engine.module(batch.rows(rows), ("reward",), "none", policies[0].most_actions)
            scores_N[torch.as_tensor(rows)] = found["scores_B"]
        scores.append(scores_N)
    judged = replace(reward, weights={name: reward.weights[name] for name in spec.rewards})
    again = {name: values_N.tolist() for name, values_N in judged.by_term(read, *scores, device=engine.device).items()}
    return {
        name: _compared([(sample.rewards[name], value) for sample, value in zip(samples, values, strict=True)])
        for name, values in again.items()
    }


def _take_weights(context: StageContext, kept: RolloutsManifest, engine: Engine) -> str:
    """Put the policy that drew the samples into the engine; says why it cannot be, or nothing."""
    if kept.step == 0:
        return ""
    state = context.store.states(context.run, context.stage).at_step(kept.step)
    if state is None or state.fingerprint != kept.fingerprint:
        return f"the training state after {kept.step} steps is not kept"
    with TensorReader(context.store, state) as reader:
        read_engine(reader, state, engine)
    return ""


def _drawn_again(
    policies: Sequence[TextPolicy], kept: RolloutsManifest, samples: Sequence[Sample]
) -> dict[str, Compared]:
    """All fields but the rewards of samples that every rank draws once more."""
    again: list[Sample] = []
    for policy in policies:
        asking_nobody = TextReward({}, records=policy.reward.records, decode=policy.reward.decode)
        policy = replace(policy, reward=asking_nobody)
        policy.sync(kept.iteration)
        again += policy.sample(kept.iteration, lambda share: None).records
    counts = {name: 0 for name in vars(samples[0]) if name != "rewards"}
    for one, other in zip(samples, again, strict=True):
        for name in one.differences(replace(other, rewards=one.rewards)):
            counts[name] += 1
    return {name: Compared(count) for name, count in counts.items()}


def _compared(pairs: Sequence[tuple[float, float]]) -> Compared:
    return Compared(sum(one != other for one, other in pairs), max(abs(one - other) for one, other in pairs))


@contextmanager
def _threads(number: str) -> Iterator[None]:
    """Compute on as many threads as the run did: sums depend on it."""
    before = torch.get_num_threads()
    torch.set_num_threads(int(number))
    try:
        yield
    finally:
        torch.set_num_threads(before)
