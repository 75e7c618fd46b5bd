"""Low-rank adapters of a recipe."""

import re
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Annotated, Literal

from pydantic import Field

from recipes.errors import FieldFinding, at
from recipes.fields import Strict, added_meaning, meaning
from recipes.models.base import Linear
from recipes.nearest import nearest
from recipes.problem_codes import Code

ALL_LINEAR = "all-linear"
CLASSIFIER_HEAD = "classifier"
NEW_HEADS = ("score", CLASSIFIER_HEAD)
"""Names of the heads that a stage makes; they are counted with its model."""
NF4_BLOCK = 64
"""Values of one scale in 4 bits."""
QUANTISED_BYTES = {"nf4": 0.5 + 4 / NF4_BLOCK, "int8": 1.0}
"""Bytes of a value of a quantised base, by method; a row's scale in 8 bits is not counted."""


@dataclass(frozen=True, slots=True)
class ModuleNames:
    """Names of the modules of a model, or of a type of models, that its adapters can be about."""

    owner: str
    """As messages name the model."""
    linears: Collection[str]
    embedding: str | None = None
    head: str | None = None
    """The module that predicts tokens; None: the model has none."""
    own_heads: Collection[str] = ()
    """Heads that are new in this stage and learn whole in any case."""
    is_tied: bool = False
    """Whether head and embedding are one tensor."""
    is_shared: bool = False
    """Whether an encoder and a decoder share that tensor too."""

    @property
    def ends(self) -> tuple[str, ...]:
        """The embedding and the head, as far as there are any."""
        return tuple(name for name in (self.embedding, self.head) if name is not None)


class Lora(Strict):
    """LoRA (Hu et al. 2021) by peft; DoRA (Liu et al. 2024) with `dora`."""

    r: int = meaning(8, ge=1, le=4096, description="Rank of the update.")
    alpha: int = meaning(16, ge=1, le=65536, description="Scale: the update is multiplied by alpha / r.")
    dropout: float = meaning(0.0, ge=0, lt=1, description="Dropout on the adapter's input; always off in RLHF.")
    target_modules: str | list[str] = meaning(
        ALL_LINEAR,
        description="Names of the modules that get an adapter (the head and the embedding can be named too), a regular "
        "expression that their whole path matches, or all-linear (the head excluded).",
    )
    dora: bool = meaning(False, description="Weight-decomposed adaptation.")
    rank_stabilised: bool = meaning(False, description="Scale by alpha / sqrt(r) (Kalajdzievski 2023).")
    modules_to_save: list[str] = added_meaning(
        [],
        description="Names of modules that learn whole and are part of the adapter, for example lm_head and "
        "embed_tokens; of a tied pair both do.",
    )
    target_parameters: list[str] = added_meaning(
        [],
        description="Ends of the names of parameters that get an adapter, for experts that transformers keeps in one "
        "tensor: mlp.experts.gate_up_proj. The rank is that of each expert.",
    )
    rank_pattern: dict[str, Annotated[int, Field(ge=1, le=4096)]] = added_meaning(
        {}, description="Ranks of some modules, by a name or a regular expression of the end of their path."
    )
    alpha_pattern: dict[str, Annotated[int, Field(ge=1, le=65536)]] = added_meaning(
        {}, description="Values of alpha of some modules, likewise."
    )
    init: Literal["default", "pissa", "olora"] = added_meaning(
        "default",
        description="What the adapter starts from: nothing, or the base's main directions (PiSSA, Meng et al. 2024; "
        "OLoRA, Buyukakyildiz 2024); saved as a LoRA of twice the rank on the base as it was.",
    )
    init_iterations: int | None = added_meaning(
        None, ge=1, le=128, description="pissa: iterations of a randomised SVD; null: an exact one."
    )

    quantize: Literal["nf4", "int8"] | None = added_meaning(
        None,
        description="Keep the linear modules of the frozen base in 4 bits (nf4: QLoRA, Dettmers et al. 2023) or 8 "
        "(int8); the merged model is the base as these bits give it back, with the adapter.",
    )

    def target_rules(self, names: ModuleNames) -> Iterator[FieldFinding]:
        """Names that are none of the model's modules, and modules that cannot learn in the way that is named."""
        if isinstance(self.target_modules, str):
            yield from self._pattern_of_targets()
        else:
            yield from self._named_rules(names)
        for index, name in enumerate(self.modules_to_save):
            yield from self._saved_rules(f"lora.modules_to_save.{index}", name, names)
        yield from self._start_rules(names)
        yield from self._quantised_rules(names)
        if self.target_parameters and (self.dropout > 0 or self.dora):
            key = "dora" if self.dora else "dropout"
            message = "an adapter on a parameter takes neither dropout nor DoRA"
            yield at(f"lora.{key}", getattr(self, key), Code.CONFLICTING_KEYS, message, "remove the key")
        for key, patterns in (("rank_pattern", self.rank_pattern), ("alpha_pattern", self.alpha_pattern)):
            for pattern in patterns:
                yield from pattern_rules(f"lora.{key}.{pattern}", pattern)

    def _quantised_rules(self, names: ModuleNames) -> Iterator[FieldFinding]:
        if self.quantize is None:
            return
        frozen = [name for name in self.modules_to_save if module_name(name) in names.linears]
        if frozen or self.target_parameters:
            what = f"lora.modules_to_save: {frozen[0]}" if frozen else "lora.target_parameters"
            message = f"modules of the base are kept in few bits and do not learn; found {what}"
            yield at("lora.quantize", self.quantize, Code.CONFLICTING_KEYS, message, "remove one of them")

    def _start_rules(self, names: ModuleNames) -> Iterator[FieldFinding]:
        if self.init_iterations is not None and self.init != "pissa":
            message = "init_iterations has no effect without init: pissa"
            yield at("lora.init_iterations", self.init_iterations, Code.NO_EFFECT, message, "remove the key")
        if self.init == "default":
            return
        if self.dora or self.rank_stabilised or self.target_parameters:
            keys = [key for key in ("dora", "rank_stabilised", "target_parameters") if getattr(self, key)]
            message = f"the start is taken away by a LoRA of twice the rank, which {keys[0]} does not add up with"
            yield at("lora.init", self.init, Code.CONFLICTING_KEYS, message, "default")
        if isinstance(self.target_modules, list) and any(
            module_name(name) == names.embedding for name in self.target_modules
        ):
            message = "an embedding is no linear map"
            yield at("lora.init", self.init, Code.CONFLICTING_KEYS, message, "default, or no adapter on the embedding")

    def _pattern_of_targets(self) -> Iterator[FieldFinding]:
        place, pattern = "lora.target_modules", str(self.target_modules)
        if pattern != ALL_LINEAR and re.fullmatch(r"\w+", pattern):
            message = "is a regular expression that a whole path matches, and no path is a name alone"
            yield at(place, pattern, Code.INVALID_FORMAT, message, f"a list: [{pattern}]")
        yield from pattern_rules(place, pattern)

    def _named_rules(self, names: ModuleNames) -> Iterator[FieldFinding]:
        saved = {module_name(name) for name in self.modules_to_save}
        for index, target in enumerate(self.target_modules):
            place, name = f"lora.target_modules.{index}", module_name(target)
            if name in names.ends and names.is_tied:
                message = f"{' and '.join(names.ends)} of {names.owner} are one tensor, so that an update of one alone"
                advice = f"lora.modules_to_save: [{name}] trains the tensor whole"
                yield at(place, target, Code.CONFLICTING_KEYS, f"{message} cannot be merged into it", advice)
            elif name in names.ends and self.dora:
                message = "DoRA is for linear modules other than the head"
                yield at(place, target, Code.CONFLICTING_KEYS, message, "remove the name, or dora")
            elif name not in (*names.linears, *names.ends):
                yield _unknown(place, target, names.owner, [*names.linears, *names.ends])
            elif name in saved:
                message = "is in modules_to_save too, where it learns whole"
                yield at(place, target, Code.CONFLICTING_KEYS, message, "name it once")

    def _saved_rules(self, place: str, target: str, names: ModuleNames) -> Iterator[FieldFinding]:
        name, known = module_name(target), [*names.ends, *names.own_heads, *names.linears]
        if name not in known:
            yield _unknown(place, target, names.owner, known)
        elif name in names.ends and names.is_shared:
            message = f"encoder and decoder of {names.owner} share this tensor, which peft does not save as one"
            yield at(place, target, Code.NOT_APPLICABLE, message, "remove the name, or train without lora")

    def inner_values(self, linears: Iterable[Linear]) -> int:
        """Values that it keeps of one vector through all those modules for the backward pass: those between its two
        factors; with DoRA, whose magnitude scales them, also the outputs of base and adapter.
        """
        outputs = 2 if self.dora else 0
        return sum(
            linear.count * (self.rank_of(linear.name) + outputs * linear.outputs) for linear in self.adapted(linears)
        )

    def adapted(self, linears: Iterable[Linear]) -> Iterator[Linear]:
        """The linear modules that it is put on."""
        return (linear for linear in linears if self.takes(linear.name))

    def num_parameters(self, linears: Collection[Linear], end: Linear | None = None) -> int:
        """Parameters of one adapter on those of a network's linear modules that it is put on.

        `end` has the sizes of its embedding, which are those of its head: what is named and is no linear module is one.
        """
        ends = [] if end is None or isinstance(self.target_modules, str) else _others(self.target_modules, linears)
        put_on = list(self.adapted(linears))
        if end is not None:
            put_on += [replace(end, name=name) for name in ends]
        return sum(
            linear.count
            * (self.rank_of(linear.name) * (linear.inputs + linear.outputs) + (linear.outputs if self.dora else 0))
            for linear in put_on
        )

    def num_on_experts(self, experts: Iterable[Linear]) -> int:
        """Parameters of the adapters on parameters of a network's experts, each named by module and parameter."""
        return sum(
            expert.count * self.r * (expert.inputs + expert.outputs)
            for expert in experts
            if any(
                f".{name}".endswith(f".{expert.name}") or f".{expert.name}".endswith(f".{name}")
                for name in self.target_parameters
            )
        )

    def num_saved(self, linears: Collection[Linear], end: Linear, *, is_tied: bool) -> int:
        """Parameters of the modules that learn whole, biases left out; of a tied pair those of one."""
        saved = {module_name(name) for name in self.modules_to_save}
        ends = [name for name in _others(self.modules_to_save, linears) if name not in NEW_HEADS]
        modules = [linear for linear in linears if linear.name in saved] + [end] * min(len(ends), 1 if is_tied else 2)
        return sum(module.count * module.inputs * module.outputs for module in modules)

    def takes(self, name: str) -> bool:
        """Whether modules of this name get an adapter; by a pattern: whether they may, if it names any."""
        if name in {module_name(saved) for saved in self.modules_to_save}:
            return False
        if self.target_modules == ALL_LINEAR:
            return True
        if isinstance(self.target_modules, str):
            return _may_end(self.target_modules, name)
        return name in {module_name(target) for target in self.target_modules}

    def rank_of(self, name: str) -> int:
        """The largest rank of modules of this name."""
        found = [rank for pattern, rank in self.rank_pattern.items() if _may_end(pattern, name)]
        return max([self.r, *found])


def _may_end(pattern: str, name: str) -> bool:
    """Whether a pattern of paths may match one that ends in a name: the name is in it, or groups make it up."""
    if name in pattern:
        return True
    start, _, end = name.partition("_")
    return f"_{end}" in pattern and bool(re.search(rf"\b{re.escape(start)}\b", pattern)) if end else False


def _others(names: Iterable[str], linears: Collection[Linear]) -> list[str]:
    """Which of the names are no linear module's."""
    known = {linear.name for linear in linears}
    return sorted({module_name(name) for name in names} - known)


def module_name(path: str) -> str:
    """The end of a path that names a module; of an item of a list (`to_out.0`) the list's name is a part of it."""
    found = re.search(r"[^.]+(\.\d+)?$", path)
    return path if found is None else found.group()


def pattern_rules(place: str, pattern: str) -> Iterator[FieldFinding]:
    """What keeps a text from being a regular expression."""
    try:
        re.compile(pattern)
    except re.error as error:
        yield at(place, pattern, Code.INVALID_FORMAT, f"is not a regular expression: {error}")


def _unknown(place: str, target: str, owner: str, known: list[str]) -> FieldFinding:
    guess = nearest(module_name(target), known)
    suggestion = f"did you mean {guess}?" if guess else "its modules: " + ", ".join(known)
    return at(place, target, Code.UNKNOWN_MODULE, f"{owner} has no trainable module of this name", suggestion)
