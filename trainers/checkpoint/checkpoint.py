"""Training state in the store: every rank writes the slices that it owns, rank 0 commits the manifest.

A save copies the state into a host buffer and returns; a thread writes and commits while training runs on. At most one
save is under way. Its error is raised at the next step, and `flush` waits for it: before the stage's end, and before a
preempted rank leaves. The first save of an attempt is waited for and tried out before it is committed: what is read
back is put into the engine, which must not change by a bit. Every later save must hold the same items.
"""

import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from recipes.errors import StageError
from trainers.checkpoint.background import BackgroundTask, HeldPiece, HostBuffer
from trainers.checkpoint.exactness import describe_exactness, differences
from trainers.checkpoint.find_state import check_state, find_state
from trainers.checkpoint.loop_state import LoopState, SourceState
from trainers.engine.protocol import StatefulEngine, StateGroup
from trainers.runtime import distributed
from trainers.store.manifest import Layout, StateManifest, TensorEntry, merge_entries
from trainers.store.state import DTYPES, TensorReader, write_tensors
from trainers.store.store import Store

log = logging.getLogger("trainwright.checkpoint")

SOURCE_GROUP = "source"
EXACTNESS, CHANGES = "exactness", "changes"

Items = dict[tuple[str, str], tuple[list[int], str]]
"""Shape and dtype of each tensor of a state, by group and name."""


@dataclass(frozen=True)
class _SourceTensor:
    name: str
    values: Tensor
    group: str = SOURCE_GROUP
    start: int = 0

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.values.shape)


@dataclass
class StoreCheckpoint:
    """State of one stage of one run; the last `keep` states stay."""

    store: Store
    run: str
    stage: str
    fingerprint: str
    lease: int
    layout: Layout
    versions: Mapping[str, str]
    keep: int = 2
    accepts: Sequence[str] = ()
    """Earlier fingerprints of this stage from whose states it may resume: settings were changed by request."""
    replaced: Sequence[str] = ()
    """Earlier fingerprints of this stage whose states are of no use: an input has changed."""
    changes: Sequence[Mapping[str, Any]] = ()
    """Those settings: field, before, after."""
    search: Callable[[], StateManifest | None] | None = None
    """Gives the state to resume from, the same one on every rank; None: the store is searched. Collective."""
    _task: BackgroundTask = field(default_factory=BackgroundTask, init=False, repr=False)
    _buffer: HostBuffer = field(default_factory=HostBuffer, init=False, repr=False)
    _differing: list[str] = field(default_factory=list, init=False, repr=False)
    _changed: list[dict[str, Any]] = field(default_factory=list, init=False, repr=False)
    _tried: Items | None = field(default=None, init=False, repr=False)
    """What the engine gave and took at the save that was tried out; None: there was none yet."""

    @property
    def exactness(self) -> str:
        """The exactness class of the stage so far, with what made it so."""
        return describe_exactness(self._differing, self._changed)

    @property
    def made_changes(self) -> list[dict[str, Any]]:
        """Settings that were changed by request on the way, and after how many steps."""
        return list(self._changed)

    @property
    def is_saving(self) -> bool:
        """Whether a save is under way on this rank."""
        return self._task.is_running

    def save(self, engine: StatefulEngine, loop: LoopState, source: SourceState) -> None:
        """Copy the state and start to write it; waits for an earlier save first. Collective."""
        self._task.wait()
        pieces: list[Any] = list(engine.state_out())
        if distributed.rank() == 0:
            pieces += [_SourceTensor(name, tensor) for name, tensor in source.tensors.items()]
        held = self._buffer.copy(pieces)
        values = {
            "loop": asdict(loop),
            "source": source.values,
            "steps_applied": engine.steps_applied,
            EXACTNESS: self._differing,
            CHANGES: self._changed,
        }
        manifest = StateManifest(
            run=self.run,
            stage=self.stage,
            fingerprint=self.fingerprint,
            step=loop.steps_done,
            lease=self.lease,
            values=json.loads(json.dumps(values)),
            versions={**self.versions, **conditions(engine)},
            layout=self.layout,
        )
        exchange = distributed.side_exchange()
        of_source: Items = {
            (SOURCE_GROUP, name): (list(tensor.shape), DTYPES[tensor.dtype]) for name, tensor in source.tensors.items()
        }
        if self._tried is None:
            parts = self._write(manifest, held, exchange)
            self._tried = self._try_out(_merged(manifest, parts), engine, source)
            self._publish(manifest, parts, {**self._tried, **of_source}, exchange)
        else:
            wanted = {**self._tried, **of_source}
            self._task.start(lambda: self._publish(manifest, self._write(manifest, held, exchange), wanted, exchange))

    def check(self) -> None:
        """Raise the error of a save that has failed; never waits."""
        self._task.check()

    def flush(self) -> None:
        """Wait until what was saved is committed and read back; raises its error."""
        self._task.wait()

    def restore(self, engine: StatefulEngine) -> tuple[LoopState, SourceState] | None:
        """Load the newest state that verifies, the same one on every rank."""
        manifest = self._find() if self.search is None else self.search()
        if manifest is None:
            return None
        with TensorReader(self.store, manifest) as reader:
            read_engine(reader, manifest, engine)
            tensors = {name: reader.read(SOURCE_GROUP, name).clone() for name in reader.names(SOURCE_GROUP)}
        loop = LoopState(**_value(manifest, "loop"))
        self._note_resume(manifest, engine)
        if manifest.fingerprint != self.fingerprint:
            # What was finished, or stopped by a rule, under other settings may go on under these.
            loop = LoopState(**{**asdict(loop), "rule": None})
        return loop, SourceState(_value(manifest, "source"), tensors)

    def _find(self) -> StateManifest | None:
        return find_state(self.store, self.run, self.stage, self.fingerprint, self.accepts, self.replaced)

    def _note_resume(self, manifest: StateManifest, engine: StatefulEngine) -> None:
        """Take over what differed at earlier resumes, and find what differs at this one."""
        before = {**manifest.versions, **_layout_conditions(manifest.layout)}
        present = {**self.versions, **conditions(engine), **_layout_conditions(self.layout)}
        self._differing = list(manifest.values.get(EXACTNESS) or [])  # type: ignore[arg-type]
        self._changed = list(manifest.values.get(CHANGES) or [])  # type: ignore[arg-type]
        for line in differences(before, present):
            if line not in self._differing:
                self._differing.append(line)
        if manifest.fingerprint != self.fingerprint:
            known = {(change["field"], json.dumps(change["after"])) for change in self._changed}
            for change in self.changes:
                if (change["field"], json.dumps(change["after"])) not in known:
                    self._changed.append({**change, "step": manifest.step})
        if distributed.rank() == 0:
            print(f"{self.stage}: resuming at step {manifest.step}, {self.exactness}", flush=True)

    def _write(
        self, manifest: StateManifest, held: Sequence[HeldPiece], exchange: distributed.Exchange
    ) -> list[dict[str, Any]]:
        """Write this rank's pieces; returns what each rank has written. Collective.

        Every rank hears of every other's failure: none waits for a rank that gave up.
        """
        failure: Exception | None = None
        written: dict[str, list[TensorEntry]] = {}
        place: dict[str, Any] = {"run": self.run, "stage": self.stage, "lease": self.lease, "step": manifest.step}
        try:
            written = write_tensors(self.store, held, **place)
        except Exception as error:  # told to the other ranks, then raised
            failure = error
        tensors = {group: [item.model_dump(mode="json") for item in items] for group, items in written.items()}
        parts = exchange({"error": _told(failure), "tensors": tensors})
        _raise_any(failure, [part["error"] for part in parts])
        return [part["tensors"] for part in parts]

    def _publish(
        self, manifest: StateManifest, parts: Sequence[dict[str, Any]], wanted: Items, exchange: distributed.Exchange
    ) -> None:
        """Commit what all ranks have written, if nothing is missing; then read it back, and drop what it makes too old.

        The commit comes first: from then on a resume can use it. Every rank hears how each of these went.
        """

        whole = _merged(manifest, parts)

        def commit() -> None:
            _demand_items(whole, wanted)
            self.store.commit_state(whole, self.lease)

        def drop_older() -> None:
            self.store.keep_states(self.run, self.stage, self.keep, read_back=whole)

        is_first = distributed.rank() == 0
        _together(exchange, commit if is_first else None)
        _together(exchange, lambda: self._read_back(parts[distributed.rank()]))
        _together(exchange, drop_older if is_first else None)

    def _read_back(self, part: Mapping[str, Any]) -> None:
        """Hash what this rank has written: only then may an older state be dropped. An object store has done so."""
        if self.store.objects.is_remote:
            return
        objects = {piece.object for entries in _entries(part).values() for entry in entries for piece in entry.slices}
        for entry in sorted(objects, key=lambda entry: entry.sha256):
            self.store.objects.check(entry)

    def _try_out(self, manifest: StateManifest, engine: StatefulEngine, source: SourceState) -> Items:
        """Put a state that was written into the engine: nothing may change. Returns its items. Collective."""
        check_state(self.store, manifest)
        wrong = []
        before = _hashes(engine)
        with TensorReader(self.store, manifest) as reader:
            read_engine(reader, manifest, engine)
            for name, tensor in source.tensors.items() if distributed.rank() == 0 else ():
                if not torch.equal(reader.read(SOURCE_GROUP, name), tensor.detach().cpu()):
                    wrong.append(f"{SOURCE_GROUP}:{name}")
        after = _hashes(engine)
        wrong += [name for name in before if after.get(name) != before[name]]
        if _value(manifest, "source") != source.values:
            wrong.append("values of the source")
        found = sorted({name for part in distributed.gather_json(wrong) for name in part})
        if found:
            raise StageError(
                f"{self.stage}: a resume would not be exact: read back of what step {manifest.step} would save, "
                f"{len(found)} items differ from those in training: {_some(found)}"
            )
        return {item: kind for item, kind in _items(manifest).items() if item[0] != SOURCE_GROUP}


def conditions(engine: StatefulEngine) -> dict[str, str]:
    """Return what, beside layout and libraries, the bits of a sum depend on."""
    device = engine.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else torch.backends.cpu.get_cpu_capability()
    return {
        "device": f"{device.type} {name}",
        "engine": engine.description,
        "threads": str(torch.get_num_threads()),
    }


def versions() -> dict[str, str]:
    """Return the versions of the libraries that numbers depend on."""
    from importlib.metadata import version

    return {name: version(name) for name in ("torch", "transformers", "diffusers", "deepspeed", "peft")} | {
        "cuda": str(torch.version.cuda or "none")
    }


def _layout_conditions(layout: Layout) -> dict[str, str]:
    return {name: str(value) for name, value in dict(layout).items()}


def read_engine(reader: TensorReader, manifest: StateManifest, engine: StatefulEngine) -> None:
    """Put the engine's part of a state that is open into an engine; collective."""

    def read(group: StateGroup, name: str, start: int, stop: int) -> Tensor:
        return reader.read_range(group, name, start, stop)

    engine.state_in(read, steps_applied=int(_value(manifest, "steps_applied")))


def _hashes(engine: StatefulEngine) -> dict[str, str]:
    """Return the hash of every piece of this rank's state and of every working parameter; collective."""

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for piece in engine.state_out():
            yield f"{piece.group}:{piece.name}", piece.values
        yield from engine.full_parameters()

    found = {
        name: hashlib.sha256(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data).hexdigest()
        for name, tensor in tensors()
        if tensor.numel()
    }
    return {**found, "steps applied": str(engine.steps_applied)}


def _items(manifest: StateManifest) -> Items:
    return {
        (group, entry.name): (entry.shape, entry.dtype)
        for group, entries in manifest.tensors.items()
        for entry in entries
    }


def _demand_items(manifest: StateManifest, wanted: Items) -> None:
    """Raise StageError for a state that lacks an item: it would be the newest one, and a resume could not load it."""
    found = _items(manifest)
    wrong = [f"{group}:{name}" for (group, name), kind in wanted.items() if found.get((group, name)) != kind]
    if wrong:
        raise StageError(
            f"{manifest.stage}: the state of step {manifest.step} was not saved: of what a resume reads, {len(wrong)} "
            f"items are missing or of another shape or type: {_some(wrong)}"
        )


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")


def _merged(manifest: StateManifest, parts: Sequence[Mapping[str, Any]]) -> StateManifest:
    """Return the manifest with the tensors that the ranks have written."""
    return StateManifest.model_validate({**dict(manifest), "tensors": merge_entries(_entries(part) for part in parts)})


def _told(failure: Exception | None) -> str | None:
    return None if failure is None else f"rank {distributed.rank()}: {failure}"


def _together(exchange: distributed.Exchange, action: Callable[[], None] | None) -> None:
    """Run an action on the ranks that have one; its failure is raised on every rank. Collective."""
    failure: Exception | None = None
    if action is not None:
        try:
            action()
        except Exception as error:  # told to the other ranks, then raised
            failure = error
    _raise_any(failure, exchange(_told(failure)))


def _raise_any(own: Exception | None, told: Sequence[str | None]) -> None:
    if own is not None:
        raise own
    others = [message for message in told if message is not None]
    if others:
        raise StageError(f"saving the state failed: {'; '.join(others)}")


def _entries(part: Mapping[str, Any]) -> dict[str, list[TensorEntry]]:
    return {group: [TensorEntry.model_validate(entry) for entry in entries] for group, entries in part.items()}


def _value(manifest: StateManifest, key: str) -> Any:
    return manifest.values[key]
