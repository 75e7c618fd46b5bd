"""What one rank does in a case of training: a curve, a resume, a step that is skipped."""

import hashlib
import sys
from dataclasses import fields
from typing import Any

import torch

from recipes.errors import StageError
from recipes.stages.optim import Schedule
from tests.numerics.outcomes import Case, Outcome
from tests.numerics.small_training import (
    STEPS,
    PoisonedObjective,
    Record,
    Rows,
    digest_of,
    global_batch,
    make_engine,
    open_checkpoint,
    run_train,
)
from trainers.checkpoint.background import HostBuffer
from trainers.checkpoint.checkpoint import StoreCheckpoint
from trainers.checkpoint.loop_state import SourceState
from trainers.engine.protocol import Engine
from trainers.objectives.language_model import LanguageModelObjective
from trainers.runtime import distributed
from trainers.training.schedule import learning_rate_factor


def do_curve(case: Case) -> Outcome:
    """Train and report losses and norms."""
    engine, observer, _ = run_train(case, Rows(STEPS))
    frozen = sorted(name for name, parameter in engine.module.named_parameters() if not parameter.requires_grad)
    engine.close()
    return {"losses": observer.losses, "norms": observer.norms, "frozen": len(frozen)}


def do_start(case: Case) -> Outcome:
    """Hold a fresh engine's masters against the fp32 weights that it was given, and its parameters against these."""
    given = dict(make_engine({**case, "engine": "plain", "zero": 0, "precision": "fp32"}).full_parameters())
    engine = make_engine(case)
    off, elements = 0.0, 0
    for piece in engine.state_out():
        if piece.group == "param":
            wanted = given[piece.name].reshape(-1)[piece.start : piece.start + piece.values.numel()]
            off = max(off, float((piece.values.cpu() - wanted).abs().max()))
            elements += piece.values.numel()
    rounded = all(torch.equal(tensor, given[name].to(tensor.dtype)) for name, tensor in engine.full_parameters())
    engine.close()
    found = distributed.gather_json({"off": off, "elements": elements, "rounded": rounded})
    return {"ranks": found, "elements": sum(tensor.numel() for tensor in given.values())}


def do_resume(case: Case) -> Outcome:
    """Train straight; then again with a stop on the way and a fresh engine that goes on from the store."""
    straight, observed, _ = run_train(case, Rows(6))
    wanted = digest_of(straight)
    straight.close()
    checkpoint = open_checkpoint(case)
    stopped = Record(stop_at=2)
    first, _, outcome = run_train(case, Rows(6), checkpoint=checkpoint, observer=stopped)
    assert outcome is None, "the stop request did not preempt"
    first.close()
    source = Rows(6)
    second, resumed, outcome = run_train(case, source, checkpoint=checkpoint)
    found = digest_of(second)
    second.close()
    return {
        "wanted": wanted,
        "found": found,
        "straight": observed.losses,
        "resumed": resumed.losses,
        "steps": resumed.steps,
        "first_rows": source.seen[0],
        "memory": source.memory,
        "state": outcome.state,
    }


def do_save(case: Case) -> Outcome:
    """Train half-way and leave the state in the store, and the curve that a straight run has."""
    straight, observed, _ = run_train(case, Rows(STEPS))
    straight.close()
    engine, _, _ = run_train(case, Rows(STEPS), checkpoint=open_checkpoint(case), observer=Record(stop_at=4))
    engine.close()
    return {"losses": observed.losses}


def do_continue(case: Case) -> Outcome:
    """Go on from a state that other ranks or another engine saved, without writing."""

    class ReadOnly(StoreCheckpoint):
        def save(self, engine: Engine, loop: Any, source: SourceState) -> None:
            pass

    whole = open_checkpoint(case, take=False)
    checkpoint = ReadOnly(**{item.name: getattr(whole, item.name) for item in fields(whole) if item.init})
    engine, observed, _ = run_train(case, Rows(STEPS), checkpoint=checkpoint)
    engine.close()
    return {"losses": observed.losses, "steps": observed.steps}


def do_skip(case: Case) -> Outcome:
    """Meet one non-finite loss on one rank: nothing may change on any rank, and the run goes on."""
    engine = make_engine(case)
    before = digest_of(engine)
    objective = PoisonedObjective()
    for batch in Rows(1, broken=(0,)).micro_batches(0):
        engine.backward(objective.loss(engine.module, batch).loss_sum / 100)
    info = engine.step({"model": 1e-2})
    after = digest_of(engine)
    engine.close()
    limited = {**case, "objective": "poisoned", "max_skipped_steps": 1}
    ran, observed, outcome = run_train(limited, Rows(6, broken=(2,)))
    params = [hashlib.sha256(tensor.float().numpy().tobytes()).hexdigest() for _, tensor in ran.full_parameters()]
    ran.close()
    message = ""
    try:
        run_train(limited, Rows(6, broken=(1, 3)))
    except StageError as error:
        message = str(error)
    return {
        "applied": info.applied,
        "unchanged": before == after,
        "skipped": outcome.skipped_steps,
        "applied_steps": ran.steps_applied,
        "losses": observed.losses,
        "norms": observed.norms,
        "equal_on_ranks": len(set(map(str, distributed.gather_json(params)))) == 1,
        "message": message,
    }


def do_gathered(case: Case) -> Outcome:
    """Forward with whole parameters on one rank alone, train on, and compare with an undisturbed run."""
    quiet, observed, _ = run_train(case, Rows(3))
    quiet.close()
    engine = make_engine(case)
    objective = LanguageModelObjective()
    losses = []
    for step in range(3):
        weight = float(distributed.all_sum([sum(objective.weight(b) for b in Rows(3).micro_batches(step))])[0])
        with engine.gathered() as module:
            if distributed.rank() == 0:
                with torch.no_grad():
                    objective.loss(module, global_batch(step))
        total = 0.0
        for batch in Rows(3).micro_batches(step):
            loss = objective.loss(engine.module, batch).loss_sum
            total += float(loss.detach())
            engine.backward(loss / weight)
        schedule = Schedule(name="cosine", warmup_steps=2)
        engine.step({"model": 1e-2 * learning_rate_factor(schedule, step, STEPS)})
        losses.append(distributed.all_sum([total])[0] / weight)
    engine.close()
    return {"quiet": observed.losses, "disturbed": losses}


def do_partition(case: Case) -> Outcome:
    """Give every rank its part of a state back, and count what it reads and what its save holds."""
    engine = make_engine(case)
    objective = LanguageModelObjective()
    for batch in Rows(1).micro_batches(0):
        engine.backward(objective.loss(engine.module, batch).loss_sum / 100)
    engine.step({"model": 1e-2})
    wanted = digest_of(engine)
    buffer = HostBuffer()
    held = {(piece.group, piece.name): (piece.start, piece.values.clone()) for piece in buffer.copy(engine.state_out())}
    engine.state_in(lambda group, name, start, stop: torch.zeros(stop - start), steps_applied=0)
    emptied = digest_of(engine)
    num_read = 0

    def read(group: str, name: str, start: int, stop: int) -> torch.Tensor:
        nonlocal num_read
        num_read += stop - start
        first, values = held[group, name]
        return values[start - first : stop - first]

    engine.state_in(read, steps_applied=1)
    found = digest_of(engine)
    sizes = [tensor.numel() for _, tensor in engine.full_parameters()]
    engine.close()
    return {
        "read": distributed.gather_json(num_read),
        "held": distributed.gather_json(sum(values.numel() for _, values in held.values())),
        "buffer": distributed.gather_json(buffer.num_bytes),
        "tensors": 3 * len(sizes),
        "elements": 3 * sum(sizes),
        "emptied": emptied,
        "wanted": wanted,
        "found": found,
        "unused": sorted({"torch._inductor.compile_fx", "scipy.optimize", "sklearn"} & set(sys.modules)),
    }


DO = {
    "curve": do_curve, "start": do_start, "resume": do_resume, "save": do_save, "continue": do_continue,
    "skip": do_skip, "gathered": do_gathered, "partition": do_partition,
}  # fmt: skip


def run(case: Case) -> Outcome:
    """Run a case on this rank."""
    return DO[case["do"]](case)
