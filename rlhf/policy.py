"""The seam between what is sampled, a response or an image, and how a policy learns from it.

Shapes: B samples, N samples of all ranks, A actions: response tokens, or denoising steps.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, Self, TypeVar

import torch
from torch import Tensor, nn

from rlhf.algorithms.kl import k1
from rlhf.invariants import density_scales, token_scales
from rlhf.monitors import Report
from trainers.data.batches import TokenBatch
from trainers.data.mixture import Draw
from trainers.engine.protocol import Engine
from trainers.inference.rollouts import WeightsVersion
from trainers.runtime.distributed import Ranks
from trainers.runtime.observer import Observer, Watch


class Samples(Protocol):
    """What a policy made."""

    @property
    def sample_ids_B(self) -> Tensor:
        """What each sample is known by in messages: its prompt's row, or its number."""

    @property
    def action_mask_BA(self) -> Tensor:
        """True where the policy acted; as wide as the longest sample."""

    def rows(self, index: Sequence[int]) -> Self:
        """These samples, without what is padding in all of them."""


S = TypeVar("S", bound=Samples)
S_co = TypeVar("S_co", bound=Samples, covariant=True)


class Rollouts(Protocol[S_co]):
    """Samples as they were drawn, of one rank or of all."""

    @property
    def samples(self) -> S_co:
        """The samples."""

    @property
    def version(self) -> WeightsVersion:
        """Of the policy that drew them."""

    @property
    def groups_B(self) -> Tensor:
        """Number of each sample's prompt: samples of one prompt are compared with each other."""

    @property
    def ended_B(self) -> Tensor:
        """True where a sample came to its own end, and not to a limit."""


@dataclass(frozen=True)
class ModelOutputs:
    """What the models say of samples by the training forward; zero where the policy did not act.

    None: not asked, or the kind of sample has none.
    """

    logprobs_BA: Tensor | None = None
    """Of the policy at the sampling temperature."""
    reference_logprobs_BA: Tensor | None = None
    entropy_BA: Tensor | None = None
    values_BA: Tensor | None = None
    """Of the critic."""
    kl_BA: Tensor | None = None
    """Of policy against reference at each action, exactly."""
    distances_BA: Tensor | None = None
    """Norms of the actions' means in deviations, of which rounding takes its share."""
    scores_B: Tensor | None = None
    """As the reward model gave them."""
    text_loss: Tensor | None = None
    """The policy's summed loss on text that is mixed in."""


@dataclass(frozen=True)
class Wanted:
    """Who is asked about samples before the update, besides critic and reward model."""

    policy: bool = True
    reference: bool = True
    entropy: bool = True
    """Whether a policy that is asked says how sure it was."""


@dataclass(frozen=True)
class ScoredRollouts:
    """What the models say of an iteration's samples before the update; of all ranks."""

    logprobs_NA: Tensor | None
    """Of the policy that sampled, in the first update's micro-batches; None: it was not asked."""
    reference_logprobs_NA: Tensor | None
    """None: the reference was not asked."""
    kl_NA: Tensor
    """In nats: exactly where the models give that, else k1 of what was drawn; 0 where one of the two was not asked."""
    values_NA: Tensor | None
    entropy_NA: Tensor | None
    distances_NA: Tensor | None
    scores_N: Tensor | None
    later_logprobs_NA: Tensor | None = None
    """Where the policy was asked about the first epoch's later mini-batches alone: 0 in the first one."""

    @staticmethod
    def of(outputs: ModelOutputs, mask_NA: Tensor, wanted: Wanted) -> "ScoredRollouts":
        """Take what the models gave."""
        found, reference, kl_NA = outputs.logprobs_BA, outputs.reference_logprobs_BA, outputs.kl_BA
        logprobs, later = (found, None) if wanted.policy else (None, found)
        if kl_NA is None and logprobs is not None and reference is not None:
            kl_NA = k1(logprobs, reference)
        elif kl_NA is None:
            kl_NA = torch.zeros(mask_NA.shape, device=mask_NA.device)
        further = (outputs.values_BA, outputs.entropy_BA, outputs.distances_BA, outputs.scores_B)
        return ScoredRollouts(logprobs, reference, kl_NA, *further, later)


def rounding_scales(logprobs: Tensor, distances: Tensor | None, roundoff: float) -> Tensor:
    """What one relative rounding of the models' output changes log-probabilities of actions by, over `roundoff`."""
    return token_scales(logprobs) if distances is None else density_scales(distances, roundoff)


@dataclass(frozen=True)
class Learner:
    """Where a policy learns: its engine, how much of it runs at once, and who hears of it."""

    engine: Engine
    micro_batch: int
    roundoff: float
    """Of the precision that the engine computes in."""
    ranks: Ranks
    seed: int
    observer: Observer


@dataclass(frozen=True)
class TextShare:
    """A rank's share of the text whose loss is mixed into a step."""

    batch: TokenBatch
    scale: float
    """Weight of the loss sum: its coefficient, times the step's response tokens over its target tokens."""


class Policy(Protocol[S]):
    """What is sampled, what it is scored by, and what the models say of it; the algorithm does the rest."""

    @property
    def num_samples(self) -> int:
        """Samples of an iteration, of all ranks."""

    @property
    def is_always_asked(self) -> bool:
        """Whether what it says of its samples is needed before every update, whatever the algorithm needs."""

    def drawn(self, iterations: int) -> dict[str, Draw]:
        """Return how much was drawn of each source of a mixture of prompts."""

    def sync(self, iteration: int) -> WeightsVersion:
        """Have the sampler take over the learner's weights, and say which they are; collective."""

    def sample(self, iteration: int, watch: Watch) -> Rollouts[S]:
        """Draw this rank's samples; may raise Interrupted on this rank. Collective before and after."""

    def gathered(self, rollouts: Any) -> Rollouts[S]:
        """Every rank's samples in rank order; collective. All ranks hold equally many."""

    def shares(self, samples: S, rows: Sequence[int]) -> Sequence[Sequence[int]]:
        """The micro-batches of a mini-batch of these rows on this rank; equally many on every rank."""

    def judge(self, module: nn.Module, samples: S, wanted: Wanted) -> Mapping[str, Tensor]:
        """Fields of `ModelOutputs` before the update; collective under sharded engines."""

    def learn(self, module: nn.Module, batch: Any) -> Mapping[str, Tensor]:
        """Fields of `ModelOutputs` that the update of a micro-batch needs, with gradients."""

    def scores(self, rollouts: Any, scored: ScoredRollouts) -> Tensor:
        """Scores [N] as the policy learns them."""

    def earlier_rewards(self, rollouts: Any) -> Tensor | None:
        """[N, A]: the part of the scores that was given at actions before the last; None: there is none."""

    def sampled_logprobs(self, rollouts: Any) -> Tensor | None:
        """Log-probabilities [N, A] as the sampler saw them; None: it kept none."""

    def report(self, rollouts: Any, scored: ScoredRollouts, scores_N: Tensor) -> Report:
        """The iteration's rollouts in numbers."""

    def importance(self, rollouts: Any, scored: ScoredRollouts) -> Tensor | None:
        """What each action [N, A] counts that another program sampled; None: the learner did. May raise StageError."""

    def show(self, iteration: int, rollouts: Any, scored: ScoredRollouts) -> None:
        """Keep some of the samples for the run's report; collective."""

    def text_share(self, samples: S, rows: Sequence[int], step: int) -> TextShare | None:
        """What this rank's first micro-batch of a step brings of text; None: no text is mixed in."""
