"""Terms that ask what lies outside of the recipe: a reward model, a function, an installed package, an endpoint."""

from recipes.fields import meaning, placement
from recipes.stages.answers import Input
from recipes.stages.rewards.term import Term


class ModelTerm(Term):
    """A reward model's score, normalised by the mean and deviation that its stage stored, and clipped."""

    model: str = meaning(description="The reward model: a stage, or an address in the store.")
    clip: float = meaning(5.0, gt=0, le=1000, description="Normalised scores are clipped to plus or minus this.")

    def inputs(self, place: str) -> list[Input]:
        return [Input(f"{place}.model", self.model, ("reward_model",))]


class CodeTerm(Term):
    """A term whose values come from code that the recipe only names."""

    columns: list[str] = meaning(
        default_factory=list, description="Columns of the prompt's row that are handed over with each response."
    )
    version: int = meaning(
        1, ge=1, le=10**9, description="Raise it where what is named gives other values: its code is not fingerprinted."
    )

    @property
    def carried(self) -> tuple[str, ...]:
        return tuple(self.columns)


class PythonTerm(CodeTerm):
    """A function from texts and rows (a list of each) to as many numbers, called in the worker."""

    python: str = meaning(
        pattern=r"^[A-Za-z_][A-Za-z0-9_.]*:[A-Za-z_][A-Za-z0-9_]*$",
        description="module:function; the module is installed, or lies in the recipe's folder.",
    )


class EntryPointTerm(CodeTerm):
    """A function like that of `python`, which an installed package has under `trainwright.rewards`."""

    entry_point: str = meaning(min_length=1, description="Name of the entry point in the group trainwright.rewards.")


class Repeated(Term):
    """A term that asks an HTTP endpoint, which may be away for a while."""

    timeout_s: float = placement(30.0, gt=0, le=3600, description="Longest wait for an answer.")
    retries: int = placement(
        5, ge=0, le=100, description="How often a request is repeated that was not answered, or with status 429 or 5xx."
    )
    deadline_s: float = placement(
        120.0, gt=0, le=86400, description="Longest time for a request with all its repetitions."
    )


class UrlTerm(Repeated, CodeTerm):
    """An HTTP endpoint: it gets `{"responses": [...], "rows": [...]}` by POST and answers `{"rewards": [...]}`."""

    url: str = meaning(pattern=r"^https?://[^\s/]+\S*$", description="Its address.")
    batch: int = placement(64, ge=1, le=10**5, description="Most responses of a request.")
