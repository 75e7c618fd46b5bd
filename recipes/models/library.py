"""Architectures of transformers without a class here: keys by the generated table of types."""

from collections.abc import Iterator, Mapping
from typing import Any, Literal, Self

from pydantic import ConfigDict, model_validator

from recipes.errors import FieldFinding, at
from recipes.fields import FieldsError
from recipes.models.base import LanguageArchitecture, Linear, Shape
from recipes.models.type_table import TypeRecord, type_records
from recipes.nearest import nearest
from recipes.problem_codes import Code
from recipes.smoke_sizes import HEADS, INTERMEDIATE, LAYERS, POSITIONS, WIDTH

FAR = 10**9
"""Largest whole number that a key may have."""
_WORDS = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "text", "list": "a list",
          "dict": "a mapping of keys to values", "null": "null"}  # fmt: skip


def type_names(family: str, *, without: tuple[str, ...] = ()) -> Any:
    """The types of a family that have no class here, as a choice of names."""
    names = [name for name, record in type_records().items() if record.family == family and name not in without]
    return Literal[tuple(sorted(names))]


class LibraryArchitecture(LanguageArchitecture):
    """Keys of a type's configuration in the pinned transformers, with its names and defaults."""

    model_config = ConfigDict(extra="allow")

    family: str
    type: str

    @property
    def record(self) -> TypeRecord:
        """The type in the table."""
        return type_records()[self.type]

    @model_validator(mode="after")
    def _known_keys(self) -> Self:
        keys = self.model_extra or {}
        findings = [*_key_findings(self.type, self.record, keys), *_missing(self.type, self.record, keys)]
        if not findings:
            findings = [*self._size_findings()]
        if findings:
            raise FieldsError(findings)
        return self

    def _size_findings(self) -> Iterator[FieldFinding]:
        """Heads that do not divide what they share; transformers says so only when it builds the model."""
        width, heads = self._size("width"), self._size("heads")
        if width and heads and not self._size("head_dim") and width % heads:
            yield self._undivided("heads", heads, "width", width)
        kv_heads = self._size("kv_heads")
        if heads and kv_heads and heads % kv_heads:
            yield self._undivided("kv_heads", kv_heads, "heads", heads)

    def _undivided(self, divisor: str, number: int, of: str, whole: int) -> FieldFinding:
        key, other = self.record.shape[divisor], self.record.shape[of]
        return at(key, number, Code.NOT_DIVISIBLE, f"{key} ({number}) must divide {other} ({whole})")

    def value(self, key: str) -> Any:
        """What the recipe says of a key, else transformers' default."""
        given = (self.model_extra or {}).get(key)
        return self.record.keys[key][1] if given is None else given

    def _positions(self) -> int | None:
        """The longest sequence; positions of some types are numbered from behind the pad token's, 1 at most here."""
        found = self._size("positions")
        return found - 2 if found is not None and self.record.first_position == "after_pad" else found

    def _size(self, what: str) -> int | None:
        key = self.record.shape.get(what)
        found = None if key is None else self.value(key)
        return found if type(found) is int else None

    @property
    def length_key(self) -> str:
        """The key of the longest sequence."""
        return self.record.shape.get("positions", self.positions_key)

    def shape(self) -> Shape:
        """The architecture's numbers under one name for every type; what a type does not have follows from the rest."""
        width, heads = self._size("width") or 1, self._size("heads") or 1
        return Shape(
            layers=(self._size("layers") or 1) + (self._size("decoder_layers") or 0),
            width=width,
            heads=heads,
            kv_heads=self._size("kv_heads") or heads,
            head_dim=self._size("head_dim") or max(width // heads, 1),
            intermediate=self._size("intermediate") or 4 * width,
            positions=self._positions(),
            tied=bool(self.value("tie_word_embeddings")) if "tie_word_embeddings" in self.record.keys else False,
        )

    def body_parameters(self, vocab_size: int) -> int:
        """Raise NotImplementedError: the number of parameters is counted on the model itself."""
        raise NotImplementedError(f"{self.type} is counted by building it, see KnownModel")

    def linears(self) -> list[Linear]:
        """Raise NotImplementedError: their sizes are read off the model itself."""
        raise NotImplementedError(f"{self.type} is counted by building it, see KnownModel")

    def config_keys(self) -> dict[str, Any]:
        """Keyword arguments of the type's configuration class; what the recipe leaves out is the library's default."""
        return dict(self.model_extra or {})

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> LanguageArchitecture | None:
        """None: sizes of a `config.json` are counted on the model itself."""
        return None

    @classmethod
    def num_layers_of(cls, config: Mapping[str, Any], stack: str) -> Any:
        """The number of layers of a stack by `config.json`; None where the type has several stacks."""
        record = type_records().get(str(config.get("model_type")))
        key = None if record is None or "decoder_layers" in record.shape else record.shape.get("layers")
        return None if key is None else config.get(key)

    def shrunk(self) -> Self:
        """The smoke form: whatever size the type has is made small; a pattern over layers goes with their number."""
        small = {
            "width": WIDTH, "layers": LAYERS, "decoder_layers": LAYERS, "intermediate": INTERMEDIATE,
            "positions": POSITIONS, "heads": HEADS, "kv_heads": HEADS // 2, "head_dim": WIDTH // HEADS,
        }  # fmt: skip
        sizes = {
            key: size
            for what, size in small.items()
            if (key := self.record.shape.get(what)) is not None
            and (what not in ("kv_heads", "head_dim") or self._size(what) is not None)
        }
        kept = {key: value for key, value in (self.model_extra or {}).items() if key != "layer_types"}
        return type(self)(family=self.family, type=self.type, **{**kept, **sizes})


def _key_findings(model_type: str, record: TypeRecord, keys: Mapping[str, Any]) -> Iterator[FieldFinding]:
    """Keys that the type's configuration does not have, and values of another kind than it takes."""
    for key, value in keys.items():
        if key not in record.keys:
            guess = nearest(key, list(record.keys))
            suggestion = f"did you mean {guess}?" if guess else "valid here: " + ", ".join(record.keys)
            yield at(key, value, Code.UNKNOWN_KEY, f"{model_type} has no such key", suggestion)
            continue
        kinds, default = record.keys[key]
        if not _fits(value, kinds):
            wanted = " or ".join(_WORDS[kind] for kind in kinds if kind in _WORDS)
            yield at(key, value, Code.WRONG_TYPE, f"must be {wanted}", f"transformers' default is {default!r}")
        elif type(value) is int and not -1 <= value <= FAR:
            yield at(key, value, Code.OUT_OF_RANGE, f"must be from 0 to {FAR}")
        elif key in record.shape.values() and type(value) is int and value < 1:
            yield at(key, value, Code.OUT_OF_RANGE, "must be at least 1")


def _missing(model_type: str, record: TypeRecord, keys: Mapping[str, Any]) -> Iterator[FieldFinding]:
    """Keys that have to be given."""
    for key in record.required:
        if keys.get(key) is None:
            yield at(key, "", Code.MISSING_KEY, f"{model_type} needs this key: transformers' default makes no model")


def _fits(value: Any, kinds: tuple[str, ...]) -> bool:
    if "any" in kinds:
        return True
    if value is None:
        return "null" in kinds
    if isinstance(value, bool):
        return "bool" in kinds
    if isinstance(value, int):
        return "int" in kinds or "float" in kinds
    return type(value).__name__ in kinds
