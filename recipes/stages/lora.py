"""Low-rank adapters of a recipe."""

from collections.abc import Collection, Iterable, Iterator
from typing import Literal

from recipes.errors import FieldFinding, at
from recipes.fields import Strict, meaning
from recipes.models.base import Linear
from recipes.nearest import nearest
from recipes.problem_codes import Code


class Lora(Strict):
    """LoRA (Hu et al. 2021) by peft; DoRA (Liu et al. 2024) with `dora`."""

    r: int = meaning(8, ge=1, le=4096, description="Rank of the update.")
    alpha: int = meaning(16, ge=1, le=65536, description="Scale: the update is multiplied by alpha / r.")
    dropout: float = meaning(0.0, ge=0, lt=1, description="Dropout on the adapter's input; always off in RLHF.")
    target_modules: Literal["all-linear"] | list[str] = meaning(
        "all-linear", description="Names of the linear modules that get an adapter, or all-linear (the head excluded)."
    )
    dora: bool = meaning(False, description="Weight-decomposed adaptation.")
    rank_stabilised: bool = meaning(False, description="Scale by alpha / sqrt(r) (Kalajdzievski 2023).")

    def target_rules(self, modules: Collection[str], owner: str) -> Iterator[FieldFinding]:
        """Names that are none of the linear modules of `owner`, a model or a type of models."""
        for index, target in enumerate([] if self.target_modules == "all-linear" else self.target_modules):
            if target not in modules:
                guess = nearest(target, list(modules))
                suggestion = f"did you mean {guess}?" if guess else "linear modules: " + ", ".join(modules)
                message = f"{owner} has no linear module of this name"
                yield at(f"lora.target_modules.{index}", target, Code.UNKNOWN_MODULE, message, suggestion)

    def inner_values(self, linears: Iterable[Linear]) -> int:
        """Values between its two factors of one vector through all those modules, kept for the backward pass."""
        return sum(linear.count * self.r for linear in self.adapted(linears))

    def adapted(self, linears: Iterable[Linear]) -> Iterator[Linear]:
        """The linear modules that it is put on."""
        for linear in linears:
            if self.target_modules == "all-linear" or linear.name in self.target_modules:
                yield linear

    def num_parameters(self, linears: Iterable[Linear]) -> int:
        """Parameters of one adapter on those of a network's linear modules that it is put on."""
        return sum(
            linear.count * (self.r * (linear.inputs + linear.outputs) + (linear.outputs if self.dora else 0))
            for linear in self.adapted(linears)
        )
