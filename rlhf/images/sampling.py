"""Images as what is sampled: drawn step by step on the training ranks, scored as a whole, learnt at every step.

B images, N images of all ranks, A denoising steps that are actions, C channels, H and W pixels.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rlhf.experience import RlBatch, gather_rows
from rlhf.images.conditions import Asked, ImagePrompts
from rlhf.images.policy import ImageModels, Trajectories
from rlhf.images.rewards import ImageScorer
from rlhf.monitors import ImageRolloutReport, report_images
from rlhf.policy import Learner, ScoredRollouts, Wanted
from trainers.data.mixture import Draw
from trainers.inference.rollouts import WeightsVersion
from trainers.runtime.observer import Watch, partly
from trainers.runtime.randomness import stream_seed

DRAWING_BATCH = 256
"""Images that one rank draws side by side."""


@dataclass(frozen=True)
class ImageRollouts:
    """Trajectories, the images they end in, and the policy that drew them."""

    samples: Trajectories
    images_BCHW: Tensor
    version: WeightsVersion
    groups_B: Tensor
    """Images of one class or caption share a number."""
    scores_B: Tensor | None = None
    """What rewards them; None until all ranks' images are together."""

    @property
    def ended_B(self) -> Tensor:
        """Every image is finished."""
        return torch.ones_like(self.groups_B, dtype=torch.bool)


@dataclass
class ImagePolicy:
    """Images of classes or captions, drawn from the engine's own parameters: nothing is sent to a sampler."""

    learner: Learner
    num_samples: int
    """Images of an iteration, of all ranks."""
    prompts: ImagePrompts
    score: ImageScorer
    show_samples: "Show | None" = None
    iteration: int = -1

    @property
    def is_always_asked(self) -> bool:
        """True: the report's KL is between two whole distributions."""
        return True

    def drawn(self, iterations: int) -> dict[str, Draw]:
        """Images have no mixtures."""
        return {}

    def sync(self, iteration: int) -> WeightsVersion:
        """Remember the iteration; the weights are in place."""
        self.iteration = iteration
        return WeightsVersion(iteration, self.learner.engine.steps_applied)

    def sample(self, iteration: int, watch: Watch) -> ImageRollouts:
        """This rank's images: their number alone says what is asked for and which noise."""
        share = self.num_samples // self.learner.ranks.world_size
        first = self.learner.ranks.rank * share
        sample_ids = [iteration * self.num_samples + number for number in range(first, first + share)]
        seeds = [stream_seed(self.learner.seed, "rollout", number) for number in sample_ids]
        asked = self.prompts.asked(iteration)
        return self.draw(seeds, asked.rows(slice(first, first + share)), sample_ids, watch)

    def draw(
        self, seeds: Sequence[int], asked: Asked, sample_ids: Sequence[int], watch: Watch | None = None
    ) -> ImageRollouts:
        """Draw an image for each seed, every parameter in place; collective."""
        engine = self.learner.engine
        asked = asked.to(engine.device)
        ids_B = torch.tensor(list(sample_ids), device=engine.device)
        parts = []
        with engine.gathered() as module:
            assert isinstance(module, ImageModels)
            for start in range(0, len(seeds), DRAWING_BATCH):
                rows = slice(start, start + DRAWING_BATCH)
                some = asked.rows(rows)
                part = None if watch is None else partly(watch, start, len(some.labels_B), len(seeds))
                parts.append(module.draw(seeds[rows], some.labels_B, some.captions, part))
        states, images = (torch.cat([part[place] for part in parts]) for place in range(2))
        version = WeightsVersion(self.iteration, engine.steps_applied)
        return ImageRollouts(
            Trajectories(states, asked.labels_B, ids_B, asked.captions), images, version, asked.groups_B
        )

    def gathered(self, rollouts: ImageRollouts) -> ImageRollouts:
        """Every rank's images, each scored where it was drawn; collective."""
        scores_B = self.score(rollouts.images_BCHW, rollouts.samples.labels_B)
        return ImageRollouts(
            rollouts.samples.gathered(),
            gather_rows(rollouts.images_BCHW),
            rollouts.version,
            gather_rows(rollouts.groups_B),
            gather_rows(scores_B),
        )

    def shares(self, samples: Trajectories, rows: Sequence[int]) -> list[Sequence[int]]:
        """The micro-batches of these rows on this rank."""
        ranks, size = self.learner.ranks, self.learner.micro_batch
        own = rows[ranks.rank :: ranks.world_size]
        return [own[start : start + size] for start in range(0, len(own), size)]

    def judge(self, module: nn.Module, samples: Trajectories, wanted: Wanted) -> Mapping[str, Tensor]:
        """The opinion of actor and reference on every action."""
        found: Mapping[str, Tensor] = module(samples, ("actor", "reference") if wanted.reference else ("actor",))
        return found

    def learn(self, module: nn.Module, batch: RlBatch[Trajectories]) -> Mapping[str, Tensor]:
        """The actor's opinion, with a KL term in the loss the reference's too."""
        found: Mapping[str, Tensor] = module(batch.samples, ("actor", "reference") if batch.kl_coef > 0 else ("actor",))
        return found

    def scores(self, rollouts: ImageRollouts, scored: ScoredRollouts) -> Tensor:
        """The rewards themselves."""
        assert rollouts.scores_B is not None
        return rollouts.scores_B

    def earlier_rewards(self, rollouts: ImageRollouts) -> None:
        """None: whole images are rewarded."""

    def sampled_logprobs(self, rollouts: ImageRollouts) -> None:
        """None: what is drawn from is what learns."""

    def report(self, rollouts: ImageRollouts, scored: ScoredRollouts, scores_N: Tensor) -> ImageRolloutReport:
        """The iteration in numbers."""
        assert scored.logprobs_NA is not None
        return report_images(
            scores_N, rollouts.images_BCHW, scored.logprobs_NA, scored.reference_logprobs_NA, scored.kl_NA
        )

    def importance(self, rollouts: ImageRollouts, scored: ScoredRollouts) -> None:
        """None: the learner draws."""

    def show(self, iteration: int, rollouts: ImageRollouts, scored: ScoredRollouts) -> None:
        """Draw images at fixed seeds for the run's report; collective."""
        if self.show_samples is not None:
            self.show_samples(iteration, self)

    def text_share(self, samples: Trajectories, rows: Sequence[int], step: int) -> None:
        """None: no text is mixed in."""


Show = Callable[[int, ImagePolicy], None]
"""Hears of an iteration and of what draws in it; collective."""
