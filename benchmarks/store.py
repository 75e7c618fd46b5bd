"""Saving and loading training state: ours beside DeepSpeed, torch DCP, torch.save, safetensors and a raw write.

    python benchmarks/store.py [--folder DIR] [--parameters 50_000_000] [--ranks 2] [--rounds 15] [--steps 0]

Each side saves the same AdamW state (fp32 parameters and two moments) of a model sharded over the ranks. `stall` is how
long training stands still, `total` until everything is written, with us until the commit is durable. The slowest rank
counts; medians over the rounds; sides take turns. Our save ends later, beside training: every rank has hashed what lies
in the store, and the oldest state is dropped. With `--steps N` also N steps of a decoder of that size at sequence 256
and batch 8 are timed, with and without a save on the way.
"""

import argparse
import hashlib
import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

LAYERS, SEQUENCE, BATCH = 8, 256, 8
SIDES = {
    "raw": "write + fsync",
    "ours": "commit: hashed, fsynced, all ranks or none",
    "dcp": "torch DCP, synchronous",
    "dcp-async": "torch DCP, asynchronous",
    "torch": "torch.save, not synced",
    "safetensors": "save_file, not synced",
    "deepspeed": "DeepSpeed save_checkpoint, ZeRO-1, not synced",
}


def synced_write(path: Path, tensors: list[Any]) -> None:
    """The floor: the bytes of the state, written and synced."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
    for tensor in tensors:
        view = memoryview(tensor.numpy()).cast("B")
        while view:
            view = view[os.write(descriptor, view[: 8 << 20]) :]
    os.fsync(descriptor)
    os.close(descriptor)
    folder = os.open(path.parent, os.O_RDONLY)
    os.fsync(folder)
    os.close(folder)


class Bench:
    """One rank's state and the ways to save it."""

    def __init__(self, folder: Path, num_parameters: int) -> None:
        import torch
        from torch import nn

        from recipes.stages.optim import AdamW
        from trainers.checkpoint.checkpoint import StoreCheckpoint, versions
        from trainers.engine.build import parameter_group
        from trainers.engine.deepspeed import DeepSpeedEngine
        from trainers.engine.plain import PlainEngine
        from trainers.runtime import distributed
        from trainers.store.manifest import Layout, StateManifest
        from trainers.store.open import open_files
        from trainers.store.store import Store

        self.folder, self.rank, self.ranks = folder, distributed.rank(), distributed.world_size()
        side = int((num_parameters / LAYERS) ** 0.5)
        torch.manual_seed(0)
        cpu = torch.device("cpu")

        def build() -> nn.Module:
            return nn.Sequential(*(nn.Linear(side, side) for _ in range(LAYERS)))

        module = build()
        self.num_parameters = sum(parameter.numel() for parameter in module.parameters())
        adamw = AdamW(lr=1e-4)
        self.engine = PlainEngine(module, [parameter_group("model", module, adamw)], clip=1.0, device=cpu)
        self.own = {f"{piece.group}:{piece.name}": piece.values for piece in self.engine.state_out()}
        sharded = build()
        groups = [parameter_group("model", sharded, adamw)]
        self.sharded: Any = DeepSpeedEngine(
            sharded, groups, zero=1, precision="fp32", offload="none", clip=1.0, device=cpu
        )
        self.committed_at = 0.0
        bench = self

        class TimedStore(Store):
            """Tells when a state was committed."""

            def commit_state(self, manifest: StateManifest, lease: int) -> int:
                number = super().commit_state(manifest, lease)
                bench.committed_at = time.perf_counter()
                return number

        self.store = TimedStore(open_files(str(folder / "store")))
        lease = self.store.take_lease("run", "base") if self.rank == 0 else None
        lease = int(distributed.broadcast_json(lease))
        layout = Layout(workers=self.ranks, micro_batch=1, accumulation=1)
        self.checkpoint = StoreCheckpoint(self.store, "run", "base", "f" * 64, lease, layout, versions())
        self.step = 0
        self.whole: list[float] = []
        """Seconds of each of our saves to its very end, which all ranks reach together."""
        self.ours()  # the first save of a run is waited for and tried out

    def ours(self) -> tuple[float, float]:
        """A save as training does it; stall, and seconds until rank 0 has committed."""
        from trainers.checkpoint.loop_state import LoopState, SourceState

        self.step += 1
        began = time.perf_counter()
        self.checkpoint.save(self.engine, LoopState(steps_done=self.step), SourceState())
        stall = time.perf_counter() - began
        self.checkpoint.flush()
        self.whole.append(time.perf_counter() - began)
        return stall, self.committed_at - began if self.rank == 0 else stall

    def save(self, side: str, target: Path) -> tuple[float, float] | None:
        """Save once; returns stall and total where the call's own time is not both."""
        import torch

        own = target.with_name(f"{target.name}-{self.rank}")
        match side:
            case "raw":
                synced_write(own, list(self.own.values()))
            case "ours":
                return self.ours()
            case "dcp":
                import torch.distributed.checkpoint as dcp

                dcp.save({f"{self.rank}/{name}": value for name, value in self.own.items()}, checkpoint_id=target)
            case "dcp-async":
                import torch.distributed.checkpoint as dcp

                began = time.perf_counter()
                state = {f"{self.rank}/{name}": value for name, value in self.own.items()}
                future: Any = dcp.async_save(state, checkpoint_id=target)
                stall = time.perf_counter() - began
                future.result()
                return stall, time.perf_counter() - began
            case "torch":
                torch.save(self.own, own)
            case "safetensors":
                from safetensors.torch import save_file

                save_file(self.own, own)
            case "deepspeed":
                self.sharded._engine.save_checkpoint(str(target))
        return None

    def timed(self, action: Callable[[], tuple[float, float] | None]) -> tuple[float, float]:
        """Stall and total of the slowest rank."""
        from trainers.runtime import distributed

        distributed.barrier()
        began = time.perf_counter()
        own = action()
        whole = time.perf_counter() - began
        found = distributed.gather_json(own or (whole, whole))
        return max(stall for stall, _ in found), max(total for _, total in found)

    def load(self) -> None:
        """Read the newest state into the engine, from a store that this process has not looked into."""
        from dataclasses import replace

        from trainers.store.store import Store

        assert replace(self.checkpoint, store=Store.open(self.store.uri)).restore(self.engine) is not None

    def read_and_hash(self) -> None:
        """The floor of loading: every byte of the state read and hashed once by each rank that needs it."""
        state = self.store.latest_state("run", "base", hashed=False)
        assert state is not None
        for entry in state.objects():
            digest = hashlib.sha256()
            with (self.folder / "store" / "objects" / entry.sha256[:2] / entry.sha256[2:]).open("rb") as file:
                while chunk := file.read(1 << 20):
                    digest.update(chunk)
            assert digest.hexdigest() == entry.sha256

    def stored_bytes(self) -> int:
        """Size of one state, its manifest included."""
        from trainers.store.manifest import manifest_bytes

        state = self.store.latest_state("run", "base", hashed=False)
        assert state is not None
        return sum(entry.bytes for entry in state.objects()) + len(manifest_bytes(state))


def run_rank(folder: Path, choice: argparse.Namespace) -> None:
    """Measure on this rank; rank 0 prints."""
    from trainers.runtime import distributed

    distributed.join()
    bench = Bench(folder, choice.parameters)
    seconds: dict[str, list[tuple[float, float]]] = {side: [] for side in (*SIDES, "load", "read + sha256")}
    for turn in range(choice.rounds):
        for side in SIDES:
            target = folder / f"{side}-{turn}"
            seconds[side].append(bench.timed(lambda side=side, target=target: bench.save(side, target)))
            distributed.barrier()
            if distributed.rank() == 0:
                for path in folder.glob(f"{side}-{turn}*"):
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
        seconds["read + sha256"].append(bench.timed(bench.read_and_hash))
        seconds["load"].append(bench.timed(bench.load))
    if distributed.rank() == 0:
        report(bench, seconds)
    if choice.steps:
        steps_beside_saves(folder, choice)
    distributed.leave()


def report(bench: Bench, seconds: dict[str, list[tuple[float, float]]]) -> None:
    """Print a line for each side, and the ratios for which docs/reliability.md has aims."""
    stall = {side: statistics.median(pair[0] for pair in pairs) for side, pairs in seconds.items()}
    total = {side: statistics.median(pair[1] for pair in pairs) for side, pairs in seconds.items()}
    size = bench.num_parameters * 12
    print(f"{bench.num_parameters:,} parameters, AdamW state {size / 2**20:.0f} MiB, {bench.ranks} ranks")
    for side, what in SIDES.items():
        print(f"{side:12} stall {stall[side]:7.3f} s  total {total[side]:7.3f} s  {what}")
    print(
        f"{'':12} {'':15}  total {statistics.median(bench.whole[1:]):7.3f} s  ours, and read back, the oldest dropped"
    )
    for side in ("read + sha256", "load"):
        print(f"{side:12} {total[side]:7.3f} s")
    print(f"commit / raw write + fsync       {total['ours'] / total['raw']:.2f}")
    print(f"stall / stall of DCP async       {stall['ours'] / stall['dcp-async']:.2f}")
    print(f"speed of load / read + sha256    {total['read + sha256'] / total['load']:.2f}")
    print(f"bytes / (parameters x 12)        {bench.stored_bytes() / size:.4f}", flush=True)


def steps_beside_saves(folder: Path, choice: argparse.Namespace) -> None:
    """Time steps of a decoder of that size with a save after the first of every ten, and without."""
    import torch

    from recipes.stages.optim import AdamW
    from trainers.checkpoint.checkpoint import StoreCheckpoint, versions
    from trainers.checkpoint.loop_state import LoopState, SourceState
    from trainers.data.batches import TokenBatch
    from trainers.engine.build import parameter_group
    from trainers.engine.plain import PlainEngine
    from trainers.models.decoder import build_decoder
    from trainers.models.protocol import TokenizerFacts
    from trainers.models.token_losses import TokenLosses
    from trainers.objectives.language_model import LanguageModelObjective
    from trainers.runtime import distributed
    from trainers.store.manifest import Layout
    from trainers.store.store import Store

    width = {50_000_000: 640}.get(choice.parameters, 256)
    sizes = {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": 8, "num_attention_heads": 8}
    facts = TokenizerFacts(4096, 0, 1)
    decoder: Any = build_decoder({"type": "llama", "max_position_embeddings": SEQUENCE, **sizes}, facts, seed=0,
                                 device=torch.device("cpu"))  # fmt: skip
    module = TokenLosses(decoder)
    engine = PlainEngine(
        module, [parameter_group("model", module, AdamW(lr=1e-4))], clip=1.0, device=torch.device("cpu")
    )
    store = Store.open(str(folder / "steps"))
    lease = int(distributed.broadcast_json(store.take_lease("run", "base") if distributed.rank() == 0 else None))
    layout = Layout(workers=distributed.world_size(), micro_batch=1, accumulation=1)
    checkpoint = StoreCheckpoint(store, "run", "base", "f" * 64, lease, layout, versions())
    rows = BATCH // distributed.world_size()
    ids = torch.randint(0, 4096, (rows, SEQUENCE))
    ones = torch.ones_like(ids)
    positions = torch.arange(SEQUENCE).expand(rows, SEQUENCE).contiguous()
    batch = TokenBatch(ids, ones, positions, positions > 0, torch.arange(rows))
    objective = LanguageModelObjective()

    def step() -> None:
        engine.backward(objective.loss(engine.module, batch).loss_sum / 1000)
        engine.step({"model": 1e-4})

    checkpoint.save(engine, LoopState(steps_done=1), SourceState())
    plain, beside, stalls = [], [], []
    timer = Bench.timed
    for number in range(choice.steps):
        if number % 10 == 5:
            began = time.perf_counter()
            checkpoint.save(engine, LoopState(steps_done=number + 2), SourceState())
            stalls.append(max(distributed.gather_json(time.perf_counter() - began)))
        is_beside = any(distributed.gather_json(checkpoint.is_saving))
        _, seconds = timer(None, step)  # type: ignore[arg-type]
        (beside if is_beside else plain).append(seconds)
    checkpoint.flush()
    if distributed.rank() == 0:
        normal = statistics.median(plain[1:])
        count = sum(parameter.numel() for parameter in module.parameters())
        print(f"decoder of {count:,} parameters: step {normal:.2f} s, {len(beside)} steps beside a save", flush=True)
        if beside:
            print(f"step beside a save / normal      {statistics.median(beside) / normal:.3f}")
            for name, seconds in (("beside a save", beside), ("without", plain[1:])):
                print(f"steps {name:<26} {min(seconds):.2f} to {max(seconds):.2f} s")
        print(f"stall / 10 steps                 {statistics.median(stalls) / (10 * normal):.4f}", flush=True)


def main() -> None:
    """Start the ranks and wait for them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where to write; a temporary folder otherwise")
    parser.add_argument("--parameters", type=int, default=50_000_000)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--steps", type=int, default=0)
    choice = parser.parse_args()
    if "RANK" in os.environ:
        run_rank(choice.folder, choice)
        return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    if choice.folder is not None:
        choice.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=choice.folder) as folder:
        common = {"WORLD_SIZE": choice.ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": 1}
        environment = {**os.environ, **{name: str(value) for name, value in common.items()}, "DS_ACCELERATOR": "cpu"}
        command = [sys.executable, __file__, "--folder", folder, "--parameters", str(choice.parameters)]
        command += ["--rounds", str(choice.rounds), "--steps", str(choice.steps)]
        ranks = [
            subprocess.Popen(command, env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
            for rank in range(choice.ranks)
        ]
        codes = [rank.wait() for rank in ranks]
    if any(codes):
        raise SystemExit(json.dumps({"exit codes": codes}))


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    main()
