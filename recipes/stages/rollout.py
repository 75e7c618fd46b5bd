"""How responses are sampled."""

from typing import Annotated, Literal, Self

from pydantic import Field

from recipes.fields import Strict, added_meaning, meaning, placement
from recipes.smoke_sizes import PROMPT_TOKENS, PROMPTS, RESPONSE_TOKENS
from recipes.stages.rollout_engines import LocalEngine, RolloutEngine

Kept = Annotated[int, Field(ge=1, le=10**9)]


class Sampling(Strict):
    """How responses are drawn; no truncation of the distribution, so that log-probabilities are exact."""

    max_new_tokens: int = meaning(64, ge=1, le=10**6, description="Longest response in tokens, the end token included.")
    max_prompt_tokens: int = meaning(
        128, ge=8, le=10**6, description="Longer prompts are dropped and counted; fewer than 8 hold no chat turn."
    )
    temperature: float = meaning(
        1.0, gt=0, le=10, description="Divides the logits; also in every log-probability of the update."
    )
    stop_tokens: list[str] = meaning(
        default_factory=list,
        description="Further tokens that end a response; each must be one token of the vocabulary.",
    )

    def shrunk(self) -> Self:
        """The smoke form."""
        return self.changed(
            max_new_tokens=min(self.max_new_tokens, RESPONSE_TOKENS),
            max_prompt_tokens=min(self.max_prompt_tokens, PROMPT_TOKENS),
        )


class Rollout(Sampling):
    """One iteration's experience."""

    prompts_per_iteration: int = meaning(64, ge=1, le=10**6, description="Prompts per iteration over all workers.")
    samples_per_prompt: int = meaning(1, ge=1, le=1024, description="Responses drawn for each prompt.")
    keep: Literal["all", "none"] | Kept = placement(
        "all",
        description="Iterations whose samples stay in the store, with all that was drawn and what each term of the "
        "reward gave: all, none, or so many of the newest. `trainwright store replay` recomputes them.",
    )
    engine: RolloutEngine = added_meaning(LocalEngine(), description="What answers the prompts.")

    def shrunk(self) -> Self:
        """The smoke form."""
        return (
            super()
            .shrunk()
            .changed(
                prompts_per_iteration=min(self.prompts_per_iteration, PROMPTS),
                samples_per_prompt=min(self.samples_per_prompt, 2),
            )
        )
