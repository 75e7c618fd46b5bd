"""Saving beside training: nothing waits, nothing is lost, memory is flat, and a full disk pauses."""

import errno
import os
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from recipes.errors import CapacityError, StoreDamaged
from recipes.stages.optim import AdamW
from tests.unit.trainers import tiny_training as tiny
from trainers.checkpoint import checkpoint as checkpoint_module
from trainers.checkpoint.background import BACKGROUND_NICENESS, BackgroundTask, HostBuffer
from trainers.checkpoint.loop_state import LoopState, SourceState
from trainers.engine.build import parameter_group
from trainers.engine.plain import PlainEngine
from trainers.engine.protocol import StateSlice
from trainers.store import local_files
from trainers.store.inspection import verify
from trainers.store.manifest import StateManifest
from trainers.store.objects import object_path
from trainers.store.place import StoreFull
from trainers.store.store import Store

STEPS = 8


def test_training_goes_on_while_a_state_is_written_and_waits_at_the_next_save(
    uri: str, straight: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The writer of the second save ends only when training is two steps further; a third never runs beside it."""
    real = checkpoint_module.write_tensors
    ahead = threading.Event()
    running: list[int] = []
    most = [0]
    late: list[int] = []

    def slow(store: Store, pieces: Any, **place: Any) -> Any:
        running.append(place["step"])
        most[0] = max(most[0], len(running))
        if place["step"] == 4:
            assert ahead.wait(60), "training waited for the save"
            late.append(place["step"])
        written = real(store, pieces, **place)
        running.remove(place["step"])
        return written

    monkeypatch.setattr(checkpoint_module, "write_tensors", slow)
    ran = tiny.run(tiny.open_checkpoint(uri), save_every=2, on_step=lambda step: ahead.set() if step >= 5 else None)
    assert late == [4]
    assert most == [1]
    assert ran.digest == straight
    latest = Store.open(uri).latest_state("run", "base")
    assert latest is not None
    assert latest.step == STEPS


def test_an_error_of_a_save_is_raised_at_the_next_step(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real = checkpoint_module.write_tensors
    failed, further = threading.Event(), threading.Event()

    def fail(store: Store, pieces: Any, **place: Any) -> Any:
        if place["step"] < 4:
            return real(store, pieces, **place)
        assert further.wait(60)
        failed.set()
        raise CapacityError("the disk is gone")

    def wait(step: int) -> None:
        if step == 5:
            further.set()
            assert failed.wait(60)
            time.sleep(0.2)

    monkeypatch.setattr(checkpoint_module, "write_tensors", fail)
    steps: list[int] = []
    with pytest.raises(CapacityError, match="disk is gone"):
        tiny.run(tiny.open_checkpoint(uri), save_every=2, on_step=lambda step: (steps.append(step), wait(step))[0])
    assert steps[-1] == 5
    latest = Store.open(uri).latest_state("run", "base")
    assert latest is not None
    assert latest.step == 2, "the last good state stays"


def test_what_the_disk_did_not_keep_costs_no_older_state(
    uri: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Bytes that change between the write and the reading back end the stage; the state before is gone on from."""
    real = Store.commit_state

    def commit(store: Store, manifest: StateManifest, lease: int) -> int:
        number = real(store, manifest, lease)
        if manifest.step == 4:
            largest = max(manifest.objects(), key=lambda entry: entry.bytes)
            path = Path(uri) / object_path(largest.sha256)
            path.chmod(0o644)
            path.write_bytes(path.read_bytes()[:-1] + b"?")
        return number

    monkeypatch.setattr(Store, "commit_state", commit)
    with pytest.raises(StoreDamaged, match=r"objects/.* bytes of hash .*, expected "):
        tiny.run(tiny.open_checkpoint(uri, keep=1), save_every=2)
    latest = Store.open(uri).latest_state("run", "base")
    assert latest is not None
    assert latest.step == 2
    assert "(step 2)" in caplog.text


def test_the_last_save_is_waited_for(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real = checkpoint_module.write_tensors

    def slow(*arguments: Any, **place: Any) -> Any:
        time.sleep(0.3 if place["step"] > 3 else 0)
        return real(*arguments, **place)

    monkeypatch.setattr(checkpoint_module, "write_tensors", slow)
    for stop_at, step in ((4, 5), (None, STEPS)):
        tiny.run(tiny.open_checkpoint(uri), save_every=3, stop_at=stop_at)
        latest = Store.open(uri).latest_state("run", "base")
        assert latest is not None
        assert latest.step == step


def test_what_training_changes_meanwhile_is_not_in_the_state(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The copy is taken before `save` returns, of the engine and of the source."""
    release = threading.Event()
    real = checkpoint_module.write_tensors

    def slow(*arguments: Any, **place: Any) -> Any:
        if place["step"] == 2:
            assert release.wait(60)
        return real(*arguments, **place)

    checkpoint, engine = tiny.open_checkpoint(uri), tiny.make_engine()
    best = torch.zeros(3)
    checkpoint.save(engine, LoopState(steps_done=1), SourceState({"n": [1]}, {"best": best}))
    monkeypatch.setattr(checkpoint_module, "write_tensors", slow)
    wanted = {f"{p.group}:{p.name}": p.values.clone() for p in engine.state_out()}
    values = {"n": [2]}
    checkpoint.save(engine, LoopState(steps_done=2), SourceState(values, {"best": best}))
    with torch.no_grad():
        best.fill_(7)
        values["n"].append(9)
        for piece in engine.state_out():
            piece.values.fill_(3)
    release.set()
    checkpoint.flush()
    fresh = tiny.make_engine()
    restored = tiny.open_checkpoint(uri).restore(fresh)
    assert restored is not None
    assert restored[1].values == {"n": [2]}
    assert torch.equal(restored[1].tensors["best"], torch.zeros(3))
    for piece in fresh.state_out():
        assert torch.equal(piece.values, wanted[f"{piece.group}:{piece.name}"])


def test_memory_is_flat_over_200_saves(uri: str) -> None:
    checkpoint, engine = tiny.open_checkpoint(uri), tiny.make_engine()
    sizes: list[int] = []
    for step in range(1, 201):
        checkpoint.save(engine, LoopState(steps_done=step), SourceState())
        sizes.append(checkpoint._buffer.num_bytes)
        if step == 20:
            checkpoint.flush()
            before = resident_bytes()
    checkpoint.flush()
    assert len(set(sizes)) == 1
    assert resident_bytes() - before < 8 << 20
    assert threading.active_count() < 20
    assert len(Store.open(uri).files.names("refs/states/run/base")) == 3  # two states, one barrier


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_memory_is_flat_over_200_saves_of_a_state_that_would_show(uri: str, say: Callable[[str], None]) -> None:
    """Five million parameters: a buffer that is kept once more than needed is 60 MB, and one in each save 11 GB."""
    module = nn.Sequential(*(nn.Linear(1024, 1024) for _ in range(5)))
    state_bytes = 12 * sum(parameter.numel() for parameter in module.parameters())
    group = parameter_group("model", module, AdamW(lr=1e-3))
    engine = PlainEngine(module, [group], clip=1.0, device=torch.device("cpu"))
    checkpoint = tiny.open_checkpoint(uri)
    sizes: list[int] = []
    for step in range(1, 201):
        checkpoint.save(engine, LoopState(steps_done=step), SourceState())
        if step % 10 == 0:
            checkpoint.flush()
            sizes.append(resident_bytes())
    growth = max(sizes[2:]) - sizes[1]
    say(
        f"200 saves of {state_bytes / 1e6:.0f} MB: {growth / 1e6:.1f} MB more memory after any of the last 180, "
        f"{sizes[1] / 1e6:.0f} MB after the first 20"
    )
    assert checkpoint._buffer.num_bytes < 1.01 * state_bytes
    assert growth < state_bytes / 6


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(sys.platform != "linux", reason="threads have priorities of their own on Linux alone")
def test_the_writer_leaves_the_processor_to_training() -> None:
    found: list[int] = []
    mine = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
    task = BackgroundTask()
    task.start(lambda: found.append(os.getpriority(os.PRIO_PROCESS, threading.get_native_id())))
    task.wait()
    assert found == [max(mine, BACKGROUND_NICENESS)]
    assert os.getpriority(os.PRIO_PROCESS, threading.get_native_id()) == mine


def test_the_buffer_is_taken_once() -> None:
    buffer = HostBuffer()
    pieces = [StateSlice("param", "w", (5,), 0, torch.arange(5.0)), StateSlice("exp_avg", "w", (5,), 0, torch.ones(5))]
    held = buffer.copy(pieces)
    assert [piece.values.tolist() for piece in held] == [[0, 1, 2, 3, 4], [1] * 5]
    place = held[0].values.data_ptr()
    again = buffer.copy([replace(pieces[0], values=torch.zeros(5)), pieces[1]])
    assert again[0].values.data_ptr() == place
    assert held[0].values.tolist() == [0] * 5


# A full disk


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_pauses_training_until_there_is_room(
    uri: str, straight: str, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    said: list[str] = []
    checkpoint = tiny.open_checkpoint(uri)
    checkpoint.store.wait_for_room(60, said.append)
    refusals = [0]
    real = os.write

    def write(descriptor: int, data: Any) -> int:
        if 5 <= refusals[0] < 8 or (refusals[0] == 0 and len(Store.open(uri).files.names("refs/states/run/base")) == 3):
            refusals[0] = max(refusals[0], 5) + 1
            raise OSError(code, os.strerror(code))
        return real(descriptor, data)

    monkeypatch.setattr(local_files.os, "write", write)
    ran = tiny.run(checkpoint)
    assert refusals == [8]
    assert ran.digest == straight
    assert "needed" in said[0]
    assert f"store {uri}: cannot write" in said[0]
    assert "free" in said[0]
    assert "at most 60 s" in said[0]
    assert "room again" in said[-1]
    assert verify(Store.open(uri)).damage == []


def test_without_room_for_too_long_the_last_good_state_stays(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny.run(tiny.open_checkpoint(uri), stop_at=3)
    before = Store.open(uri).latest_state("run", "base")
    checkpoint = tiny.open_checkpoint(uri)
    checkpoint.store.wait_for_room(0.3, lambda text: None)

    def full(descriptor: int, data: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(local_files.os, "write", full)
        with pytest.raises(StoreFull, match=r"needed \d+ bytes, free \d+ bytes"):
            tiny.run(checkpoint)
    assert Store.open(uri).latest_state("run", "base") == before
    tiny.run(tiny.open_checkpoint(uri))
