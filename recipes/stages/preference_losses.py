"""Losses of preference optimisation: each is the class of its settings, and a member of a closed union.

Formulas and papers are in `docs/rlhf.md`; the mathematics is in `rlhf/algorithms/preferences.py`.
"""

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from recipes.fields import Strict, meaning
from recipes.stages.answers import Role


class _Loss(Strict):
    """What every loss answers."""

    has_reference: ClassVar[bool] = True
    """Whether it compares the policy with its start."""
    role: ClassVar[Role] = "preferences"
    """What its rows are."""


class _LogRatios(_Loss):
    """Losses of a pair's margin: the chosen answer's log-ratio to the start, less the rejected one's."""

    beta: float = meaning(
        0.1, gt=0, le=100, description="Scale of log-ratios in rewards: a larger one holds the policy to its start."
    )
    length_normalised: bool = meaning(
        False,
        description="Take the mean of an answer's token log-ratios in place of their sum, so that length earns "
        "nothing; beta is then tens of times larger (5 in Lambert et al. 2024).",
    )


class Dpo(_LogRatios):
    """Direct preference optimisation (Rafailov et al. 2023, equation 7); with smoothing Mitchell's conservative DPO."""

    name: Literal["dpo"] = meaning("dpo", description="Logistic loss of the margin.")
    label_smoothing: float = meaning(
        0.0, ge=0, lt=0.5, description="Probability that a pair's labels are swapped: the target of the logistic loss."
    )


class Ipo(_LogRatios):
    """Identity preference optimisation (Azar et al. 2023, equation 17)."""

    name: Literal["ipo"] = meaning(description="Squared distance of the margin from 1 / (2 beta).")
    length_normalised: bool = meaning(
        True, description="Take the mean of an answer's token log-ratios, as the paper's results do; false: their sum."
    )


class Hinge(_LogRatios):
    """Hinge loss (Zhao et al. 2023; Liu et al. 2023, equation 10)."""

    name: Literal["hinge"] = meaning(description="How much the scaled margin falls short of 1.")


class Robust(_LogRatios):
    """Robust DPO (Chowdhury et al. 2024, equation 12): unbiased where labels are swapped at a known rate."""

    name: Literal["robust"] = meaning(description="Logistic loss, corrected for swapped labels.")
    label_smoothing: float = meaning(0.1, ge=0, lt=0.5, description="Share of pairs whose labels are swapped.")


class Orpo(_Loss):
    """Odds ratio preference optimisation (Hong et al. 2024, equation 6), without a reference."""

    has_reference: ClassVar[bool] = False
    name: Literal["orpo"] = meaning(description="The chosen answer's likelihood, and the odds of chosen over rejected.")
    odds_weight: float = meaning(0.1, gt=0, le=100, description="Weight of the odds ratio's loss (lambda).")


class Simpo(_Loss):
    """Simple preference optimisation (Meng et al. 2024, equation 6), without a reference."""

    has_reference: ClassVar[bool] = False
    name: Literal["simpo"] = meaning(description="Logistic loss of the difference of mean token log-probabilities.")
    beta: float = meaning(2.0, gt=0, le=100, description="Scale of mean log-probabilities in rewards.")
    gamma: float = meaning(0.5, ge=0, le=100, description="Margin that the chosen reward is to lead by.")


class Kto(_Loss):
    """Kahneman-Tversky optimisation (Ethayarajh et al. 2024, equations 7 and 8): of single answers with a verdict."""

    role: ClassVar[Role] = "judged"
    name: Literal["kto"] = meaning(description="Utility of an answer's reward against the mean KL, by its verdict.")
    beta: float = meaning(
        0.1, gt=0, le=100, description="Scale of log-ratios in rewards: a larger one holds the policy to its start."
    )
    desirable_weight: float = meaning(
        1.0, gt=0, le=1000, description="Weight of desirable answers; where one kind is rarer, a larger one balances."
    )
    undesirable_weight: float = meaning(1.0, gt=0, le=1000, description="Weight of undesirable answers.")


PreferenceLoss = Annotated[Dpo | Ipo | Hinge | Robust | Orpo | Simpo | Kto, Field(discriminator="name")]
