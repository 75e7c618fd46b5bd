"""DDPO (Black et al. 2023): PPO's policy gradient over denoising steps; its objective, and how experience is estimated.

B images, N images of all ranks, A denoising steps that are actions, C channels, H and W pixels.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from recipes.stages.ddpo import Ddpo
from rlhf.algorithms.denoising import grouped_advantages
from rlhf.algorithms.losses import policy_loss
from rlhf.experience import gather_rows, join_tables
from rlhf.images.conditions import Asked, ImagePrompts
from rlhf.images.policy import ImageModelOutputs, ImageModels, Trajectories
from rlhf.images.rewards import ImageScorer
from rlhf.invariants import WeightsVersion, density_scales, require_ratio_one, require_reference, require_version
from rlhf.iterations import Estimate, Update, iteration_place
from rlhf.monitors import report_images
from trainers.engine.protocol import Engine
from trainers.objectives.protocol import ObjectiveOutput
from trainers.runtime.observer import Observer, Watch, agreed, partly, raise_if_stopping, watching
from trainers.runtime.randomness import stream_seed

DRAWING_BATCH = 256
"""Images that one rank draws side by side."""


@dataclass(frozen=True)
class Drawn:
    """Trajectories, the images they end in, and the policy that drew them."""

    trajectories: Trajectories
    images_BCHW: Tensor
    version: WeightsVersion


class ImageRollouts(Protocol):
    """Draws from the policy; which process does so is its own affair."""

    def sync(self, iteration: int) -> WeightsVersion:
        """Take over the learner's weights and say which they are; collective."""

    def draw(self, seeds: Sequence[int], asked: Asked, sample_ids: Sequence[int], watch: Watch | None = None) -> Drawn:
        """Draw this rank's images, one for each seed; collective."""


class ColocatedImages:
    """Draws on the training ranks from the engine's own parameters: nothing is sent, and no weights are compared."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._iteration = -1

    def sync(self, iteration: int) -> WeightsVersion:
        """Remember the iteration; the weights are in place."""
        self._iteration = iteration
        return WeightsVersion(iteration, self._engine.steps_applied)

    def draw(self, seeds: Sequence[int], asked: Asked, sample_ids: Sequence[int], watch: Watch | None = None) -> Drawn:
        """Draw with every parameter in place."""
        asked = asked.to(self._engine.device)
        ids_B = torch.tensor(list(sample_ids), device=self._engine.device)
        parts = []
        with self._engine.gathered() as module:
            assert isinstance(module, ImageModels)
            for start in range(0, len(seeds), DRAWING_BATCH):
                rows = slice(start, start + DRAWING_BATCH)
                some = asked.rows(rows)
                part = None if watch is None else partly(watch, start, len(some.labels_B), len(seeds))
                parts.append(module.draw(seeds[rows], some.labels_B, some.captions, part))
        states, images = (torch.cat([part[place] for part in parts]) for place in range(2))
        version = WeightsVersion(self._iteration, self._engine.steps_applied)
        return Drawn(Trajectories(states, asked.labels_B, ids_B, asked.captions), images, version)


@dataclass(frozen=True)
class DdpoBatch:
    """A micro-batch of experience: images with all of their actions."""

    trajectories: Trajectories
    old_logprobs_BA: Tensor
    advantages_B: Tensor
    kl_coef: float
    """Weight of the KL term in the loss; 0 where the penalty is in the reward."""
    is_untouched: bool
    """True where the policy is still exactly the one that drew, so that every ratio is 1."""

    @property
    def sample_ids_B(self) -> Tensor:
        """Numbers of the images."""
        return self.trajectories.sample_ids_B

    def to(self, device: torch.device | str) -> "DdpoBatch":
        """The batch itself: experience is made where it is used."""
        return self


@dataclass(frozen=True)
class ImageExperience:
    """One iteration's images of all ranks, equal on every rank, in the order of their numbers."""

    trajectories: Trajectories
    old_logprobs_NA: Tensor
    """Of the policy that drew, by the training forward in the first update's micro-batches."""
    advantages_N: Tensor

    def batch(self, rows: Sequence[int], update: Update) -> DdpoBatch:
        """These images as a micro-batch."""
        index = torch.as_tensor(rows, device=self.advantages_N.device)
        return DdpoBatch(
            trajectories=self.trajectories.rows(rows),
            old_logprobs_BA=self.old_logprobs_NA[index],
            advantages_B=self.advantages_N[index],
            kl_coef=update.kl_coef,
            is_untouched=update.is_untouched,
        )


class DdpoObjective:
    """Clipped surrogate over denoising steps with importance sampling (DDPO-IS), and the optional KL term."""

    def __init__(self, settings: Ddpo, roundoff: float) -> None:
        self._settings = settings
        self._roundoff = roundoff

    def weight(self, batch: DdpoBatch) -> float:
        """Actions: the loss is their mean over the whole optimiser step."""
        return float(batch.old_logprobs_BA.numel())

    def loss(self, module: nn.Module, batch: DdpoBatch) -> ObjectiveOutput:
        """One forward of the actor over all actions, with a KL term one of the reference too."""
        settings = self._settings
        has_penalty = batch.kl_coef > 0
        opinions = ImageModelOutputs(
            **module(batch.trajectories, ("actor", "reference") if has_penalty else ("actor",))
        )
        assert opinions.logprobs_BA is not None
        policy = policy_loss(
            opinions.logprobs_BA,
            batch.old_logprobs_BA,
            batch.advantages_B[:, None].expand_as(opinions.logprobs_BA),
            torch.ones_like(opinions.logprobs_BA, dtype=torch.bool),
            settings.clip_low,
            settings.clip_high,
            settings.dual_clip,
        )
        if batch.is_untouched:
            assert opinions.distances_BA is not None
            log_ratios_BA = opinions.logprobs_BA - batch.old_logprobs_BA
            require_ratio_one(log_ratios_BA, density_scales(opinions.distances_BA, self._roundoff), self._roundoff)
        loss = policy.loss
        if has_penalty:
            assert opinions.kl_BA is not None
            loss = loss + batch.kl_coef * opinions.kl_BA.sum()
        actions = self.weight(batch)
        return ObjectiveOutput(
            loss.float(),
            {
                "loss": (loss.detach(), actions),
                "policy_loss": (policy.loss.detach(), actions),
                "ratio": (policy.ratio, actions),
                "log_ratio": (policy.log_ratio, actions),
                "clip_fraction": (policy.clipped, actions),
                "old_kl": (policy.old_kl, actions),
            },
            {"log_ratio_max": policy.max_log_ratio},
        )


Show = Callable[[int, ImageRollouts], None]
"""Hears of an iteration and of what draws in it; collective."""


class DdpoEstimator:
    """Images of classes or captions, rewarded as a whole, with one advantage for all of their actions."""

    def __init__(
        self,
        *,
        engine: Engine,
        rollouts: ImageRollouts,
        score: ImageScorer,
        settings: Ddpo,
        images: int,
        prompts: ImagePrompts,
        seed: int,
        rank: int,
        workers: int,
        micro_batch: int,
        roundoff: float,
        observer: Observer,
        show: Show | None = None,
    ) -> None:
        self._engine = engine
        self._rollouts = rollouts
        self._score = score
        self._settings = settings
        self._images = images
        self._prompts = prompts
        self._seed = seed
        self._rank = rank
        self._workers = workers
        self._micro_batch = micro_batch
        self._roundoff = roundoff
        self._observer = observer
        self._show = show

    @property
    def num_samples(self) -> int:
        """Images of an iteration."""
        return self._images

    def estimate(
        self, iteration: int, kl_coef: float, first_epoch: Sequence[Sequence[int]]
    ) -> Estimate[ImageExperience]:
        """Draw, score, penalise, estimate advantages: the upper half of the paper's algorithm box."""
        settings = self._settings
        version = self._rollouts.sync(iteration)
        asked = self._prompts.asked(iteration)
        place = iteration_place(settings, iteration)
        drawn = agreed(self._observer, lambda: self._drawn(iteration, asked, place))
        require_version(drawn.version, version)
        scores_B = self._score(drawn.images_BCHW, drawn.trajectories.labels_B)
        trajectories = drawn.trajectories.gathered()
        scores_N, images_NCHW = gather_rows(scores_B), gather_rows(drawn.images_BCHW)
        logprobs_NA, reference_logprobs_NA, kl_NA, distances_NA = self._judged(trajectories, first_epoch, place)
        report = report_images(scores_N, images_NCHW, logprobs_NA, reference_logprobs_NA, kl_NA)
        if iteration == 0:
            scales_NA = density_scales(distances_NA, self._roundoff)
            require_reference(logprobs_NA, reference_logprobs_NA, scales_NA, self._roundoff)
        if self._show is not None:
            self._show(iteration, self._rollouts)
        rewards_N = scores_N - kl_coef * kl_NA.sum(dim=1)
        groups_N = asked.groups_B if settings.normalise == "classes" else torch.zeros_like(asked.groups_B)
        advantages_N = grouped_advantages(rewards_N, groups_N.to(rewards_N.device), settings.advantage_clip)
        return Estimate(ImageExperience(trajectories, logprobs_NA, advantages_N), report)

    def micro_batches(self, experience: ImageExperience, rows: Sequence[int], update: Update) -> Sequence[DdpoBatch]:
        """This rank's share of the images."""
        return [experience.batch(share, update) for share in self._shares(rows)]

    def _shares(self, rows: Sequence[int]) -> list[Sequence[int]]:
        """The micro-batches of a mini-batch of these images on this rank."""
        own, size = rows[self._rank :: self._workers], self._micro_batch
        return [own[start : start + size] for start in range(0, len(own), size)]

    def _drawn(self, iteration: int, asked: Asked, place: Mapping[str, float]) -> Drawn:
        """This rank's images: their number alone says what is asked for and which noise.

        Raises Interrupted where it is asked to stop.
        """
        share = self._images // self._workers
        first = self._rank * share
        own = slice(first, first + share)
        sample_ids = [iteration * self._images + number for number in range(first, first + share)]
        seeds = [stream_seed(self._seed, "rollout", number) for number in sample_ids]
        watch = watching(self._observer, "rollout", self._images, **place)
        watch(0.0)
        return self._rollouts.draw(seeds, asked.rows(own), sample_ids, watch)

    @torch.no_grad()
    def _judged(
        self, trajectories: Trajectories, first_epoch: Sequence[Sequence[int]], place: Mapping[str, float]
    ) -> tuple[Tensor, ...]:
        """What actor and reference say of all ranks' actions by the training forward: [N, A] each, log-probabilities
        of both, KL, distances; an image is judged by the rank that first learns from it.
        """
        count, actions = len(trajectories.labels_B), trajectories.states_BSCHW.shape[1] - 1
        table = torch.zeros(4, count, actions, dtype=torch.float64, device=self._engine.device)
        shares = [share for mini_batch in first_epoch for share in self._shares(mini_batch)]
        for number, rows in enumerate(shares):
            self._observer.phase("judge", rows=number * count // len(shares), rows_planned=count, **place)
            raise_if_stopping(self._observer)
            opinions = ImageModelOutputs(**self._engine.module(trajectories.rows(rows), ("actor", "reference")))
            columns = (opinions.logprobs_BA, opinions.reference_logprobs_BA, opinions.kl_BA, opinions.distances_BA)
            for index, column in enumerate(columns):
                assert column is not None
                table[index, rows] = column
        (table,) = join_tables(table)
        return tuple(table)
