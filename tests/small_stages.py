"""A tiny chain of every kind of stage, run by ranks that die in a named phase: one forked process a rank.

Usage: python small_stages.py JOB RESULT; JOB is {"folder", "cases": [...]}, RESULT a list of outcomes. A case names a
stage, a run, the sizes of its worker groups one after the other, for each but the last where a rank dies, what differs
from STAGES (`stage_settings`, and `shards` of each group), and the name that the artifact gets.
"""

import json
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from stage_worker import run_stage

import rlhf.task
import rlhf.text.reward_stage  # noqa: F401
from trainers.checkpoint import checkpoint as checkpoint_module
from trainers.checkpoint.background import HostBuffer
from trainers.checkpoint.checkpoint import StoreCheckpoint
from trainers.runtime import distributed
from trainers.store.state import TensorReader
from trainers.training import loop

LOST_S = 240.0
SHARD = {"engine": "deepspeed", "zero": 2}
TRAIN: dict[str, Any] = {
    "steps": 6, "global_batch": 8, "sequence_length": 32, "optimizer": {"lr": 1e-2}, "save_every": 2,
    "evaluate_every": 3, "evaluation_rows": 4,
}  # fmt: skip
STAGES: dict[str, dict[str, Any]] = {
    "base": {
        "kind": "pretrain",
        "architecture": {
            "family": "decoder", "type": "llama", "hidden_size": 32, "intermediate_size": 64,
            "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 128,
        },
        "tokenizer": {"train": "bpe", "vocab_size": 320},
        "data": {"source": "text", "files": ["text.txt"], "documents": "paragraph", "hold_out": 0.2},
        "train": TRAIN,
        "shard": SHARD | {"micro_batch": 2},
    },
    "chat": {
        "kind": "finetune", "init_from": "base", "lora": {"r": 4, "dropout": 0.1},
        "data": {"source": "jsonl", "files": ["chat.jsonl"], "hold_out": 0.2}, "train": TRAIN, "shard": SHARD,
    },
    "judge": {
        "kind": "reward", "init_from": "chat", "lora": {"r": 4}, "min_accuracy": 0.0,
        "data": {"source": "jsonl", "files": ["pairs.jsonl"], "hold_out": 0.2},
        "train": TRAIN | {"sequence_length": 64}, "shard": SHARD,
    },
    "policy": {
        "kind": "ppo", "actor": "chat", "reward": "judge", "lora": {"r": 4},
        "prompts": {"source": "jsonl", "files": ["prompts.jsonl"]},
        "rollout": {"prompts_per_iteration": 8, "max_prompt_tokens": 48, "max_new_tokens": 8},
        "ppo": {"iterations": 3, "epochs": 2, "mini_batches": 2, "optimizer": {"lr": 1e-2}, "save_every": 1},
        "shard": SHARD,
    },
}  # fmt: skip
INPUTS = {
    "base": {},
    "chat": {"init_from": "base"},
    "judge": {"init_from": "chat"},
    "policy": {"actor": "chat", "reward": "judge"},
}


def die() -> None:
    """End this rank as the kernel's out-of-memory killer does."""
    os.kill(os.getpid(), signal.SIGKILL)


@dataclass(frozen=True)
class Death:
    """Where a rank dies: in a phase that the observer hears of, or in a named part of a step or of a save."""

    rank: int
    phase: str
    step: int


class Dying:
    """Anything, of which one method is the end: before it has done anything, or right after."""

    def __init__(self, target: Any, method: str, after: bool) -> None:
        self._target, self._method, self._after = target, method, after

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._target, name)
        if name != self._method:
            return found

        def call(*arguments: Any, **options: Any) -> None:
            if self._after:
                found(*arguments, **options)
            die()

        return call


IN_STEP = {"load batch": True, "forward": True, "backward": True, "all-reduce": False, "optimizer step": True}
"""Parts of a step; whether the rank dies after it."""
IN_SAVE = ("snapshot", "upload", "commit")


def arm(death: Death) -> None:
    """Make this process die there."""
    if death.phase in IN_STEP:
        real_step, after = loop._run_step, IN_STEP[death.phase]

        def run_step(phases: Sequence[Any], source: Any, state: Any, *others: Any) -> Any:
            if state.steps_done == death.step:
                match death.phase:
                    case "load batch":
                        source = Dying(source, "micro_batches", after)
                    case "forward":
                        phases = [replace(part, objective=Dying(part.objective, "loss", after)) for part in phases]
                    case "backward" | "optimizer step":
                        method = "backward" if death.phase == "backward" else "step"
                        phases = [replace(part, engine=Dying(part.engine, method, after)) for part in phases]
                    case "all-reduce":
                        loop.distributed = Dying(distributed, "all_sum", after)
            return real_step(phases, source, state, *others)

        loop._run_step = run_step
    elif death.phase in IN_SAVE:
        saves = [0]
        second = 2  # the first save is the one that is tried out
        if death.phase == "snapshot":
            real_copy = HostBuffer.copy

            def copy(self: HostBuffer, pieces: Any) -> Any:
                saves[0] += 1
                found = real_copy(self, list(pieces)[:1] if saves[0] == second else pieces)
                return die() if saves[0] == second else found

            HostBuffer.copy = copy
        elif death.phase == "upload":
            real_write = checkpoint_module.write_tensors

            def write(*arguments: Any, **options: Any) -> Any:
                saves[0] += 1
                found = real_write(*arguments, **options)
                return die() if saves[0] == second else found

            checkpoint_module.write_tensors = write
        else:  # after rank 0 has committed, before anybody has heard of it
            real_exchange = distributed.side_exchange

            def side_exchange() -> Any:
                inner, calls = real_exchange(), [0]
                saves[0] += 1
                is_last = saves[0] == second

                def exchange(value: Any) -> Any:
                    calls[0] += 1
                    if is_last and calls[0] == 2:
                        die()
                    return inner(value)

                return exchange

            distributed.side_exchange = side_exchange


@dataclass
class Listener:
    """Observer that remembers, and in which a rank may die."""

    death: Death | None
    told: Path | None
    """Where rank 0 tells what it hears; a later attempt goes on in it."""

    def phase(self, name: str, **progress: float) -> None:
        if self.death is not None and self.death.phase == name and progress.get("step", 0) >= self.death.step:
            die()

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        self.tell("values", step, {key: value for key, value in values.items() if not key.endswith("_s")})

    def tell(self, what: str, step: int, found: Any) -> None:
        """Write a line."""
        if self.told is not None:
            with self.told.open("a") as file:
                file.write(json.dumps({"what": what, "step": step, "found": found}) + "\n")

    def stop_requested(self) -> bool:
        return False

    def notify(self, text: str) -> None:
        pass

    def answers_stops(self, has_unsaved: Any) -> AbstractContextManager[None]:
        return nullcontext()


def work(folder: Path, case: Mapping[str, Any], death: Death | None, shard: Mapping[str, Any]) -> dict[str, Any] | None:
    """One rank of one attempt at a stage; rank 0 tells what came out."""
    ranks, stage = distributed.join(), case["stage"]
    if death is not None and death.rank == ranks.rank:
        arm(death)
    told = told_of(folder, case) if ranks.rank == 0 else None
    listener = Listener(death if death is not None and death.rank == ranks.rank else None, told)
    watch(listener, ranks)
    settings = {**STAGES[stage], **case.get("stage_settings", {})}
    made = run_stage(
        folder, ranks, listener, run=case["run"], stage=stage,
        spec={**settings, "shard": {**settings["shard"], **shard}},
        inputs={**INPUTS[stage], **case.get("inputs", {})},
        fingerprint=case.get("fingerprint") or f"{list(INPUTS).index(stage) + 1:064x}", name_as=case.get("name_as"),
    )  # fmt: skip
    distributed.leave()
    if made is None:
        return None
    candidate = made.candidate
    checks = [check.to_json() for check in candidate.checks]
    return {
        "digest": made.digest,
        "outcome": dict(candidate.outcome),
        "exactness": candidate.exactness,
        "checks": checks,
    }


def told_of(folder: Path, case: Mapping[str, Any]) -> Path:
    """The file of a case's lines."""
    return folder / f"told-{case['run']}-{case['stage']}.jsonl"


def watch(listener: Listener, ranks: distributed.Ranks) -> None:
    """Tell the sample ids of every step, and whether what was restored is what was saved."""
    real_step, real_restore = loop._run_step, StoreCheckpoint.restore

    def run_step(phases: Any, source: Any, state: Any, *others: Any) -> Any:
        batches = source.micro_batches(state.steps_done)
        rows = [int(row) for batch in batches for row in batch.sample_ids_B.tolist()]
        parts = distributed.gather_json(rows)
        listener.tell("ids", state.steps_done, [row for part in parts for row in part])
        return real_step(phases, source, state, *others)

    def restore(self: StoreCheckpoint, engine: Any) -> Any:
        found = real_restore(self, engine)
        if found is not None:
            manifest = self.store.latest_state(self.run, self.stage)
            with TensorReader(self.store, manifest) as reader:
                same = all(
                    torch.equal(
                        piece.values.cpu().reshape(-1),
                        reader.read_range(piece.group, piece.name, piece.start, piece.start + piece.values.numel()),
                    )
                    for piece in engine.state_out()
                )
                trainable = set(reader.names("param"))
                for name, tensor in engine.full_parameters():
                    same = same and (name not in trainable or torch.equal(tensor.float(), reader.read("param", name)))
            listener.tell("restored", found[0].steps_done, all(distributed.gather_json(same)))
        return found

    loop._run_step, StoreCheckpoint.restore = run_step, restore


def attempt(
    folder: Path, case: Mapping[str, Any], workers: int, death: Death | None, shard: Mapping[str, Any]
) -> tuple[list[int], dict[str, Any] | None, str]:
    """Fork a rank a worker; when one dies the others are killed, as a supervisor does. Exit codes, result, logs."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    found = folder / "found.json"
    found.unlink(missing_ok=True)
    logs = [folder / f"rank{rank}.log" for rank in range(workers)]
    children: dict[int, int] = {}
    for rank in range(workers):
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                output = os.open(logs[rank], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
                os.dup2(output, 1)
                os.dup2(output, 2)
                names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": workers, "LOCAL_WORLD_SIZE": workers}
                os.environ.update({name: str(value) for name, value in names.items()})
                os.environ.update({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)})
                result = work(folder, case, death, shard)
                if result is not None:
                    found.write_text(json.dumps(result))
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        children[pid] = rank
    codes = [0] * workers
    deadline = time.monotonic() + LOST_S

    def reap() -> None:
        for pid in list(children):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                codes[children.pop(pid)] = os.waitstatus_to_exitcode(status)

    while children:
        reap()
        if any(codes) or time.monotonic() > deadline:
            time.sleep(0.5)  # who died first may be seen last
            reap()
            for pid, rank in children.items():
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                codes[rank] = 1
            children.clear()
        time.sleep(0.01)
    text = "\n".join(log.read_text()[-3000:] for log in logs)
    return codes, json.loads(found.read_text()) if found.exists() else None, text


def run_case(folder: Path, case: Mapping[str, Any]) -> dict[str, Any]:
    """All attempts of a case; each but the last has to end by its rank's death."""
    deaths = [Death(**death) for death in case.get("deaths", [])]
    groups = case.get("workers", [2] * (len(deaths) + 1))
    shards = case.get("shards", [{}] * len(groups))
    result: dict[str, Any] | None = None
    for number, workers in enumerate(groups):
        death = deaths[number] if number < len(deaths) else None
        codes, result, text = attempt(folder, case, workers, death, shards[number])
        if death is not None and codes[death.rank] != -signal.SIGKILL:
            return {"name": case["name"], "error": f"rank {death.rank} did not die in {death.phase}: {codes}\n{text}"}
        if death is None and result is None:
            return {"name": case["name"], "error": f"exit codes {codes}\n{text}"}
    told: dict[str, dict[str, Any]] = {"values": {}, "ids": {}, "restored": {}}
    firsts: list[int] = []
    for line in told_of(folder, case).read_text().splitlines():
        item = json.loads(line)
        if item["what"] == "restored":
            firsts.append(item["step"])
        told[item["what"]].setdefault(str(item["step"]), []).append(item["found"])
    return {"name": case["name"], **(result or {}), **told, "firsts": firsts}


def main() -> None:
    """Run the cases one after the other; the first error ends the job."""
    job = json.loads(Path(sys.argv[1]).read_text())
    results = []
    for case in job["cases"]:
        started = time.monotonic()
        results.append({**run_case(Path(job["folder"]), case), "seconds": time.monotonic() - started})
        if "error" in results[-1]:
            break
    Path(sys.argv[2]).write_text(json.dumps(results))


if __name__ == "__main__":
    main()
