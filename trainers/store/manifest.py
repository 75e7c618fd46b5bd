"""Manifests: what a committed artifact, training state, data set or iteration of rollouts consists of (format 1).

See docs/store.md.
"""

import hashlib
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, JsonValue, ValidationError, model_validator

from recipes.artifact_kinds import ArtifactKind
from recipes.errors import CapacityError, StoreDamaged
from recipes.models.families import ARTIFACT_KINDS

FORMAT = 1
"""The format that this version writes; others are refused by number."""


class StoreFormat(CapacityError):  # noqa: N818
    """A later version wrote this. It is no damage: it is never passed over, set aside, replaced or collected."""


def check_format(record: Mapping[str, Any], what: str) -> None:
    """Raise StoreFormat for a record of a later format, StoreDamaged for one that no version has written."""
    found = record.get("format")
    if type(found) is not int or found < FORMAT:
        raise StoreDamaged(f"{what} is of format {found!r}; this version reads format {FORMAT}")
    if found > FORMAT:
        raise StoreFormat(f"{what} is of format {found}; this version reads format {FORMAT}: take the later version")


def canonical_json(value: Any) -> bytes:
    """Serialise to the one byte string that equal values share; refuses NaN and infinities."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def sha256_hex(data: bytes) -> str:
    """Return the SHA-256 of some bytes as 64 hex digits."""
    return hashlib.sha256(data).hexdigest()


def _check_logical(name: str) -> str:
    parts = name.split("/")
    if not name or len(name) > 512 or any(part in ("", ".", "..") for part in parts):
        raise ValueError(f"{name!r} is not a relative file name")
    if re.search(r"[\x00-\x1f\x7f\\:]", name):
        raise ValueError(f"{name!r} has characters that are not portable in a file name")
    return name


def _check_kind(kind: ArtifactKind) -> ArtifactKind:
    if kind not in ARTIFACT_KINDS:
        raise ValueError(f"{kind!r} is not one of {', '.join(sorted(ARTIFACT_KINDS))}")
    return kind


Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
LogicalName = Annotated[str, AfterValidator(_check_logical)]
RunId = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$")]
StageName = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_-]{0,62}$")]


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, defer_build=True)


class FileEntry(_Record):
    """One immutable object: its hash and its size."""

    sha256: Sha256
    bytes: int = Field(ge=0)


Files = dict[LogicalName, FileEntry]


class Parent(_Record):
    """An input that an artifact was made from; `part` where a reference named one."""

    fingerprint: Sha256
    digest: Sha256
    part: str | None = None


class Gate(_Record):
    """Whether later stages may build on the artifact, and why not."""

    passed: bool = True
    reasons: list[str] = []


class Outcome(_Record):
    """How the stage ended; anything but these two is no artifact."""

    state: Literal["completed", "stopped_by"] = "completed"
    rule: str | None = None
    steps_done: int = Field(0, ge=0)
    steps_planned: int = Field(0, ge=0)

    @model_validator(mode="after")
    def _success_is_whole(self) -> "Outcome":
        if self.state == "completed" and (self.rule is not None or self.steps_done != self.steps_planned):
            raise ValueError(f"completed means every step: {self.steps_done} of {self.steps_planned}, rule {self.rule}")
        if self.state == "stopped_by" and not self.rule:
            raise ValueError("stopped_by needs the rule")
        return self


class Verification(_Record):
    """How the files were checked before the commit."""

    how: str
    max_logit_difference: float | None = None
    """Of the files' outputs from the live model's, over their root mean square; both forwarded in fp32."""
    merge_lost: float | None = Field(default=None, exclude_if=lambda value: value is None)
    """Norm of what rounding took from the merged adapter, over the norm of its update."""
    merge_unchanged: float | None = Field(default=None, exclude_if=lambda value: value is None)
    """Share of the adapted weights that the update did not move in the merged files."""

    @property
    def text(self) -> str:
        """The record as people read it."""
        said = [self.how]
        if self.max_logit_difference is not None:
            said.append(f"largest output difference {self.max_logit_difference:.2g} of the outputs' size")
        if self.merge_lost is not None and self.merge_unchanged is not None:
            said.append(f"merging rounded away {self.merge_lost:.2g} of the adapter's update")
            said.append(f"{self.merge_unchanged:.1%} of its weights did not move")
        return ", ".join(said)


def files_digest(files: Mapping[str, FileEntry]) -> str:
    """Return the digest of a set of files: the hash over logical name -> sha256."""
    return sha256_hex(canonical_json({name: entry.sha256 for name, entry in files.items()}))


class ArtifactManifest(_Record):
    """A committed, typed, immutable output of a stage."""

    format: Literal[1] = 1
    type: Literal["artifact"] = "artifact"
    fingerprint: Sha256
    digest: Sha256
    kind: Annotated[ArtifactKind, AfterValidator(_check_kind)]
    stage: str
    files: Files
    parents: dict[str, Parent] = {}
    data: dict[str, str] = {}
    contract: str | None = None
    base: Sha256 | None = None
    stack: list[Sha256] = Field(default=[], exclude_if=lambda value: not value)
    """What an adapter was trained on, where that was a whole model with adapters on it that nobody merged: the digests
    of the artifacts that these are of, the whole model's first and `base` last."""
    quantized: Literal["nf4", "int8"] | None = Field(default=None, exclude_if=lambda value: value is None)
    """Into which bits the whole model below the adapter was rounded while the adapter learned."""
    architecture: dict[str, JsonValue] | None = None
    versions: dict[str, str] = {}
    metrics: dict[str, JsonValue] = {}
    gate: Gate = Gate()
    outcome: Outcome = Outcome()
    verification: Verification | None = None
    exactness: str | None = None
    changes: list[JsonValue] = []
    source: str | None = None

    @model_validator(mode="after")
    def _digest_is_of_files(self) -> "ArtifactManifest":
        if self.digest != files_digest(self.files):
            raise ValueError("digest is not that of the files")
        return self

    @property
    def bytes(self) -> int:
        """Size of all files."""
        return sum(entry.bytes for entry in self.files.values())

    @property
    def lies_on(self) -> tuple[str, ...]:
        """Digests of what the adapter was trained on, the whole model's first; empty without an adapter."""
        return tuple(self.stack) or (() if self.base is None else (self.base,))


Dtype = Literal["F64", "F32", "BF16", "F16", "I64", "I32", "I16", "I8", "U8", "BOOL"]
"""safetensors' names of the types that a training state may have."""
Sides = list[Annotated[int, Field(ge=0)]]


class Slice(_Record):
    """A piece of a tensor: tensor `key` of a safetensors object.

    `start` and `shape` have the tensor's rank (a box), or rank 1 (a range of the flattened tensor, row-major).
    """

    start: Sides
    shape: Sides
    object: FileEntry
    key: str


class TensorEntry(_Record):
    """A logical tensor and the pieces that it is stored in; dtype by safetensors' name (F32, BF16, ...)."""

    name: str
    shape: Sides
    dtype: Dtype
    slices: list[Slice]


def _missing_part(entry: TensorEntry) -> str | None:
    """Say what the slices of a tensor leave out or give twice; None when each element is there once."""
    size = math.prod(entry.shape)
    rank = len(entry.shape)
    covered = sum(math.prod(piece.shape) for piece in entry.slices)
    if covered != size:
        return f"{covered} of {size} elements"
    if len({len(piece.start) for piece in entry.slices}) > 1:
        return "slices of two kinds"
    position = 0
    is_flat = all(len(piece.start) == 1 for piece in entry.slices)
    for piece in sorted(entry.slices, key=lambda item: item.start) if is_flat else ():
        if piece.start[0] != position:
            return f"element {min(position, piece.start[0])}"
        position += piece.shape[0]
    for piece in entry.slices:
        if len(piece.start) != len(piece.shape) or len(piece.start) not in (1, rank):
            return f"a slice of rank {len(piece.start)} in a tensor of rank {rank}"
        limits = entry.shape if len(piece.start) == rank else [size]
        if any(at < 0 or at + n > limit for at, n, limit in zip(piece.start, piece.shape, limits, strict=True)):
            return f"a slice at {piece.start} of shape {piece.shape} in a tensor of shape {entry.shape}"
    if not is_flat:
        boxes = [piece for piece in entry.slices if math.prod(piece.shape)]
        for index, one in enumerate(boxes):
            if any(_boxes_meet(one, other) for other in boxes[:index]):
                return "overlapping slices"
    return None


def _boxes_meet(one: Slice, other: Slice) -> bool:
    sides = zip(one.start, one.shape, other.start, other.shape, strict=True)
    return all(a < b + b_size and b < a + a_size for a, a_size, b, b_size in sides)


def merge_entries(parts: Iterable[Mapping[str, Sequence[TensorEntry]]]) -> dict[str, list[TensorEntry]]:
    """Join what several writers wrote of the same tensors, in the order of first mention."""
    merged: dict[str, dict[str, TensorEntry]] = {}
    for part in parts:
        for group, entries in part.items():
            known = merged.setdefault(group, {})
            for entry in entries:
                same = known.get(entry.name)
                if same is None:
                    known[entry.name] = entry
                    continue
                if (same.shape, same.dtype) != (entry.shape, entry.dtype):
                    raise ValueError(
                        f"{group}:{entry.name} is {same.dtype} {same.shape} and {entry.dtype} {entry.shape}"
                    )
                slices = sorted([*same.slices, *entry.slices], key=lambda piece: piece.start)
                known[entry.name] = same.model_copy(update={"slices": slices})
    return {group: list(entries.values()) for group, entries in merged.items()}


class Layout(_Record):
    """How the work was laid out when the state was saved; equal layouts resume to equal bits."""

    workers: int = Field(ge=1)
    micro_batch: int = Field(ge=1)
    accumulation: int = Field(ge=1)


class StateManifest(_Record):
    """Resumable training state of one stage of one run after `step` steps."""

    format: Literal[1] = 1
    type: Literal["state"] = "state"
    run: RunId
    stage: StageName
    fingerprint: Sha256
    step: int = Field(ge=0)
    lease: int = Field(ge=1)
    tensors: dict[str, list[TensorEntry]] = {}
    values: dict[str, JsonValue] = {}
    versions: dict[str, str] = {}
    layout: Layout

    @model_validator(mode="after")
    def _every_element_once(self) -> "StateManifest":
        for group, entries in self.tensors.items():
            if len({entry.name for entry in entries}) != len(entries):
                raise ValueError(f"{group}: a tensor is listed twice")
            for entry in entries:
                wrong = _missing_part(entry)
                if wrong is not None:
                    raise ValueError(f"{group}:{entry.name} is not whole: {wrong}")
        return self

    def objects(self) -> Iterator[FileEntry]:
        """Every object that the state needs, each once."""
        seen: set[str] = set()
        for entries in self.tensors.values():
            for entry in entries:
                for piece in entry.slices:
                    if piece.object.sha256 not in seen:
                        seen.add(piece.object.sha256)
                        yield piece.object


class DatasetManifest(_Record):
    """A materialised data set; `digest` says what it is kept as."""

    format: Literal[1] = 1
    type: Literal["dataset"] = "dataset"
    digest: Sha256
    files: Files
    report: dict[str, JsonValue] = {}


class RolloutsManifest(_Record):
    """The samples of one iteration of a stage of a run; equal samples have equal files, whoever drew them."""

    format: Literal[1] = 1
    type: Literal["rollouts"] = "rollouts"
    run: RunId
    stage: StageName
    fingerprint: Sha256
    iteration: int = Field(ge=0)
    step: int = Field(ge=0)
    """Optimiser steps before them: a training state after so many steps holds the policy that drew them."""
    files: Files
    layout: Layout
    values: dict[str, JsonValue] = {}
    """How many samples, and what the bits of their log-probabilities depend on."""


Manifest = ArtifactManifest | StateManifest | DatasetManifest | RolloutsManifest

_MODELS: dict[str, type[ArtifactManifest | StateManifest | DatasetManifest | RolloutsManifest]] = {
    "artifact": ArtifactManifest,
    "state": StateManifest,
    "dataset": DatasetManifest,
    "rollouts": RolloutsManifest,
}


def manifest_bytes(manifest: Manifest) -> bytes:
    """Serialise a manifest as it is stored; its hash is its name."""
    return canonical_json(manifest.model_dump(mode="json"))


def read_manifest(data: bytes) -> Manifest:
    """Parse a stored manifest; raises StoreDamaged when it is none, StoreFormat when it is a later version's."""
    try:
        raw = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise StoreDamaged(f"not a manifest: {error}") from None
    if not isinstance(raw, dict) or not isinstance(raw.get("type"), str):
        raise StoreDamaged(f"not a manifest: type {raw.get('type') if isinstance(raw, dict) else type(raw).__name__!r}")
    check_format(raw, f"{raw['type'][:40]} manifest")
    if raw["type"] not in _MODELS:
        raise StoreDamaged(f"not a manifest: type {raw['type'][:40]!r}")
    try:
        return _MODELS[raw["type"]].model_validate(raw)
    except ValidationError as error:
        raise StoreDamaged(f"{raw['type']} manifest: {error}") from None


def objects_of(manifest: Manifest) -> Iterator[FileEntry]:
    """Every object that a manifest names."""
    if isinstance(manifest, StateManifest):
        yield from manifest.objects()
    else:
        yield from manifest.files.values()
