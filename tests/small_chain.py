"""A tiny chain of every kind of stage, run by ranks that may die in a named phase."""

import functools
import json
import os
import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from tests.observers import Quiet
from tests.ranks import start_ranks
from tests.stages import run_stage
from trainers.checkpoint import checkpoint as checkpoint_module
from trainers.checkpoint.background import HostBuffer
from trainers.checkpoint.checkpoint import StoreCheckpoint
from trainers.runtime import distributed
from trainers.store.state import TensorReader
from trainers.training import loop, optimiser_step

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
        "kind": "rl", "actor": "chat", "rewards": {"judge": {"model": "judge"}}, "lora": {"r": 4},
        "prompts": {"source": "jsonl", "files": ["prompts.jsonl"]},
        "rollout": {"prompts_per_iteration": 8, "max_prompt_tokens": 48, "max_new_tokens": 8},
        "algorithm": {
            "name": "ppo", "iterations": 3, "epochs": 2, "mini_batches": 2, "optimizer": {"lr": 1e-2}, "save_every": 1,
        },
        "shard": SHARD,
    },
}  # fmt: skip
INPUTS = {
    "base": {},
    "chat": {"init_from": "base"},
    "judge": {"init_from": "chat"},
    "policy": {"actor": "chat", "rewards.judge.model": "judge"},
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


@dataclass(frozen=True)
class Case:
    """A stage of the chain in a separate run, by one group of ranks after another."""

    name: str
    stage: str
    run: str
    deaths: Sequence[Death] = ()
    """Where a rank dies, of each group but the last."""
    workers: Sequence[int] = ()
    """Sizes of the groups; two ranks each where it is empty."""
    shards: Sequence[Mapping[str, Any]] = ()
    """What differs from the stage's sharding, by group."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """What differs from STAGES."""
    inputs: Mapping[str, str] = field(default_factory=dict)
    """What differs from INPUTS."""
    fingerprint: str = ""
    name_as: str | None = None
    """The artifact's name in the store."""


@dataclass(frozen=True)
class Result:
    """What the last group made."""

    digest: str
    outcome: dict[str, Any]
    exactness: str
    checks: list[dict[str, Any]]


@dataclass(frozen=True)
class Outcome:
    """What a case came to: the result, and what rank 0 told in all attempts, by step, a value an attempt."""

    result: Result
    values: dict[int, list[dict[str, float]]]
    """Metrics."""
    ids: dict[int, list[list[int]]]
    """Sample ids of all ranks, rank after rank."""
    restored: dict[int, list[bool]]
    """Whether what was restored is what was saved."""
    firsts: list[int]
    """The steps that were restored, in order."""


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
        real_step, after = loop.run_step, IN_STEP[death.phase]

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
                        optimiser_step.distributed = Dying(distributed, "all_sum", after)
            return real_step(phases, source, state, *others)

        loop.run_step = run_step
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
class Listener(Quiet):
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


def work(folder: Path, case: Case, death: Death | None, shard: Mapping[str, Any]) -> Result | None:
    """One rank of one attempt at a stage; rank 0 tells what came out."""
    ranks, stage = distributed.join(), case.stage
    own = death if death is not None and death.rank == ranks.rank else None
    if own is not None:
        arm(own)
    listener = Listener(own, told_of(folder, case) if ranks.rank == 0 else None)
    watch(listener, ranks)
    settings = {**STAGES[stage], **case.settings}
    made = run_stage(
        folder, ranks, listener, run=case.run, stage=stage,
        spec={**settings, "shard": {**settings["shard"], **shard}},
        inputs={**INPUTS[stage], **case.inputs},
        fingerprint=case.fingerprint or f"{list(INPUTS).index(stage) + 1:064x}", name_as=case.name_as,
    )  # fmt: skip
    distributed.leave()
    if made is None:
        return None
    candidate = made.candidate
    checks = [check.to_json() for check in candidate.checks]
    return Result(made.digest, dict(candidate.outcome), candidate.exactness, checks)


def told_of(folder: Path, case: Case) -> Path:
    """The file of a case's lines."""
    return folder / f"told-{case.run}-{case.stage}.jsonl"


def watch(listener: Listener, ranks: distributed.Ranks) -> None:
    """Tell the sample ids of every step, and whether what was restored is what was saved."""
    real_step, real_restore = loop.run_step, StoreCheckpoint.restore

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

    loop.run_step, StoreCheckpoint.restore = run_step, restore


class SmallChain:
    """A folder with the chain's data, a store, and what runs cases there."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        lines = [f"The number {n} comes before {n + 1}.\nAnd {n} is {n % 2} modulo 2." for n in range(120)]
        (folder / "text.txt").write_text("\n\n".join(lines))
        prompts = [f"What comes after {n}?" for n in range(60)]
        rows = {
            "chat": [{"prompt": p, "completion": f"After {n} comes {n + 1}."} for n, p in enumerate(prompts)],
            "pairs": [{"prompt": p, "chosen": f"It is {n + 1}.", "rejected": "no no"} for n, p in enumerate(prompts)],
            "prompts": [{"prompt": p} for p in prompts],
        }
        for name, items in rows.items():
            (folder / f"{name}.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))

    def run(self, cases: Sequence[Case]) -> dict[str, Outcome]:
        """Run cases in turn; outcomes by name."""
        return {case.name: self._run(case) for case in cases}

    def _run(self, case: Case) -> Outcome:
        """All attempts of a case; each but the last has to end by its rank's death."""
        deaths: list[Death | None] = [*case.deaths, None]
        workers = case.workers or [2] * len(deaths)
        shards = case.shards or [{}] * len(deaths)
        result: Result | None = None
        for death, size, shard in zip(deaths, workers, shards, strict=True):
            ended = start_ranks(self.folder, size, functools.partial(work, self.folder, case, death, shard))
            if death is None:
                result = ended.results.get(0)
                assert result is not None, f"{case.name}: exit codes {ended.codes}\n{ended.logs}"
            else:
                text = f"{case.name}: rank {death.rank} did not die in {death.phase}: {ended.codes}\n{ended.logs}"
                assert ended.codes[death.rank] == -signal.SIGKILL, text
        assert result is not None
        told: dict[str, dict[int, list[Any]]] = {"values": {}, "ids": {}, "restored": {}}
        firsts: list[int] = []
        for line in told_of(self.folder, case).read_text().splitlines():
            item = json.loads(line)
            if item["what"] == "restored":
                firsts.append(item["step"])
            told[item["what"]].setdefault(item["step"], []).append(item["found"])
        return Outcome(result, **told, firsts=firsts)
