"""What a rank of a stage really takes: its peak by phase, and the bytes of weights, gradients and optimiser.

A stage runs as in production: `launch.runs.stage_entry.run_stage` on every rank, each forked from a process that has
the imports. The peak is that of the resident size (VmHWM, which misses nothing between two looks), less what the
process shares with others (resident less proportional size, PSS). Parts are the storages of tensors at the second
update.
"""

import gc
import os
import pickle
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Record = dict[str, Any]
PARTS = ("weights", "gradients", "optimizer")


@dataclass
class Meter:
    """A `WorkerContext` whose beats measure the process."""

    rank: int
    world_size: int
    node: str = "127.0.0.1"
    peaks: dict[str, int] = field(default_factory=dict)
    """Largest resident size by phase."""
    shared: int = 0
    """Resident bytes that are other processes' too, at the largest resident size that a beat saw."""
    parts: dict[str, int] = field(default_factory=dict)
    updates: int = 0
    _phase: str = "start"
    _largest: int = 0

    @property
    def local_rank(self) -> int:
        """All ranks are on this machine."""
        return self.rank

    def beat(self, phase: str, **_: Any) -> None:
        """Note what the phase took that ends here."""
        if threading.current_thread() is threading.main_thread():
            self.note()
            self._phase = phase

    def stop_requested(self) -> bool:
        """Never."""
        return False

    def answers_stops(self, has_unsaved: Callable[[], bool] = lambda: True) -> AbstractContextManager[None]:
        """It is never stopped."""
        return nullcontext()

    def note(self) -> None:
        """Read the peak since the last note, and begin a new one."""
        status = _numbers("status")
        resident = status["VmRSS"]
        self.peaks[self._phase] = max(self.peaks.get(self._phase, 0), status["VmHWM"])
        if resident > self._largest:
            self._largest, self.shared = resident, resident - _numbers("smaps_rollup")["Pss"]
        Path("/proc/self/clear_refs").write_text("5")

    def update(self) -> None:
        """An engine is about to update: its gradients are there, its activations are not."""
        self.updates += 1
        if self.updates == 2:
            self.note()
            self.parts = live_parts()
            Path("/proc/self/clear_refs").write_text("5")

    def record(self) -> Record:
        """What was measured, in bytes."""
        self.note()
        import resource

        used = resource.getrusage(resource.RUSAGE_SELF)
        return {
            "peaks": {name: peak - self.shared for name, peak in self.peaks.items()},
            "parts": self.parts,
            "cpu_s": used.ru_utime + used.ru_stime,
        }


def be_rank(job: Mapping[str, Any], environment: Mapping[str, str], folder: Path) -> None:
    """Run a stage as this rank, and leave what it returned and what was measured in the folder."""
    os.environ.update(environment)
    rank = int(environment["RANK"])
    output = os.open(folder / f"rank{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    from launch.runs.stage_entry import run_stage

    Path("/proc/self/clear_refs").write_text("5")
    meter = Meter(rank, int(environment["WORLD_SIZE"]))
    meter.note()
    _watch_updates(meter)
    result = run_stage(dict(job), meter)
    (folder / f"rank{rank}.result").write_bytes(pickle.dumps((result, meter.record())))


def be_process(found: Path) -> None:
    """Leave there what this process takes before it holds a model."""
    from trainers.training.calibration import process_bytes_here

    found.write_text(str(process_bytes_here()))


def _watch_updates(meter: Meter) -> None:
    from trainers.engine.deepspeed import DeepSpeedEngine
    from trainers.engine.plain import PlainEngine

    def watched(step: Callable[..., Any]) -> Callable[..., Any]:
        def measured(self: Any, lrs: Mapping[str, float]) -> Any:
            meter.update()
            return step(self, lrs)

        return measured

    for engine in (PlainEngine, DeepSpeedEngine):
        engine.step = watched(engine.step)  # type: ignore[method-assign]


def live_parts() -> dict[str, int]:
    """Bytes of the tensors that the process holds: parameters, gradients, what is the optimiser's alone, and others."""
    import torch

    gc.unfreeze()  # the training loop has put what was there before it out of the collector's sight
    tensors, optimizers = [], []
    for item in gc.get_objects():
        kind = type(item)
        if issubclass(kind, torch.Tensor):
            tensors.append(item)
        elif issubclass(kind, torch.optim.Optimizer):
            optimizers.append(item)
    seen: set[int] = set()

    def taken(values: Iterator[torch.Tensor]) -> int:
        total = 0
        for value in values:
            if value.is_sparse or value.device.type == "meta":
                continue
            storage = value.untyped_storage()
            if storage.data_ptr() and storage.data_ptr() not in seen:
                seen.add(storage.data_ptr())
                total += storage.nbytes()
        return total

    parameters = [tensor for tensor in tensors if isinstance(tensor, torch.nn.Parameter)]
    found = {"weights": taken(_weights(parameters))}
    found["optimizer"] = taken(_states(optimizers))
    found["gradients"] = taken(_gradients(tensors, optimizers))
    found["others"] = taken(iter(tensors))
    return found


def _weights(parameters: list[Any]) -> Iterator[Any]:
    for parameter in parameters:
        yield parameter.data
        if getattr(parameter, "ds_tensor", None) is not None:
            yield parameter.ds_tensor


def _states(optimizers: list[Any]) -> Iterator[Any]:
    """Masters and moments; DeepSpeed's and ours hold an optimiser of torch's that has them."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            yield from (parameter.data for parameter in group["params"])
        for state in optimizer.state.values():
            yield from (value for value in state.values() if hasattr(value, "untyped_storage"))


def _gradients(tensors: list[Any], optimizers: list[Any]) -> Iterator[Any]:
    for optimizer in optimizers:
        yield from getattr(optimizer, "gradients", [])
    for sharded in zero_optimizers():
        for kept in ("averaged_gradients", "all_grad_tensors"):
            for group in getattr(sharded, kept, {}).values():
                yield from (gradient for gradient in group or [] if gradient is not None)
        if getattr(sharded, "grad_partitions_flat_buffer", None) is not None:
            yield sharded.grad_partitions_flat_buffer
    for tensor in tensors:
        if tensor.is_leaf and tensor.grad is not None:
            yield tensor.grad


def zero_optimizers() -> list[Any]:
    """DeepSpeed's sharded optimisers, which are none of torch's."""
    from deepspeed.runtime.base_optimizer import ZeROOptimizer

    return [item for item in gc.get_objects() if isinstance(item, ZeROOptimizer)]


def _numbers(name: str) -> dict[str, int]:
    """Bytes by key of a file of /proc/self."""
    text = Path(f"/proc/self/{name}").read_text()
    return {key: int(value) * 1024 for key, value in re.findall(r"^(\w+):\s+(\d+) kB", text, re.MULTILINE)}
