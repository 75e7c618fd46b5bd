"""The preference stage in one process: tiny models learn pairs by every loss, and the start is asked once."""

import json
import math
from dataclasses import replace
from typing import Any

import pytest

from recipes.errors import Preempted
from recipes.stages.preference import Preference
from rlhf.text.preference_stage import run_preference
from tests.integration.rlhf.workshop import PLAIN, Listener, Workshop, jsonl, open_workshop
from trainers.training.context import StageContext

LOSSES: dict[str, dict[str, Any]] = {
    "dpo": {"name": "dpo"},
    "dpo-normalised": {"name": "dpo", "beta": 5.0, "length_normalised": True},
    "ipo": {"name": "ipo", "beta": 1.0},
    "hinge": {"name": "hinge"},
    "robust": {"name": "robust"},
    "orpo": {"name": "orpo", "odds_weight": 1.0},
    "simpo": {"name": "simpo"},
    "kto": {"name": "kto"},
}


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    """A tiny chat model and pairs of answers."""
    found = open_workshop(tmp_path_factory.mktemp("workshop"), width=16)
    pairs = [json.loads(line) for line in (found.folder / "pairs.jsonl").read_text().splitlines()]
    sides = [(side, pair) for pair in pairs for side in ("chosen", "rejected")]
    rows = [{"prompt": pair["prompt"], "completion": pair[side], "label": side == "chosen"} for side, pair in sides]
    jsonl(found.folder / "judged.jsonl", rows)
    return found


def spec_of(loss: dict[str, Any], *, lora: bool = True, steps: int = 30, **changes: Any) -> Preference:
    train = {"steps": steps, "global_batch": 8, "sequence_length": 64, "optimizer": {"lr": 2e-2}}
    return Preference.model_validate(
        {
            "kind": "preference",
            "init_from": "chat",
            "loss": loss,
            "lora": {"r": 4, "alpha": 8, "dropout": 0.5} if lora else None,
            "data": {
                "source": "jsonl",
                "files": ["judged.jsonl" if loss["name"] == "kto" else "pairs.jsonl"],
                "hold_out": 0.2,
            },
            "train": {**train, "evaluate_every": steps, "save_every": 100, **changes},
            "shard": PLAIN,
        }
    )


def heard(context: StageContext) -> Listener:
    assert isinstance(context.observer, Listener)
    return context.observer


@pytest.mark.parametrize("name", LOSSES)
def test_a_model_learns_pairs_by_every_loss(workshop: Workshop, name: str) -> None:
    context = workshop.context(f"learns-{name}", {"init_from": "chat"})
    candidate = run_preference(spec_of(LOSSES[name]), context)
    workshop.keep(f"learns-{name}", candidate, {"init_from": "chat"})
    made = workshop.made[f"learns-{name}"]
    assert made.kind == "adapter"
    assert {file.split("/")[0] for file in made.files} == {"model", "adapter"}
    assert not candidate.gate_reasons
    evaluation: Any = made.metrics["evaluation"]
    assert evaluation["accuracy"] > 0.9
    assert evaluation["held_out"] is True
    assert evaluation["chosen_reward"] - evaluation["rejected_reward"] == pytest.approx(evaluation["margin"], abs=1e-4)
    first, last = heard(context).heard[0][1], heard(context).heard[-2][1]
    assert last["loss"] < first["loss"]
    if name == "kto":
        assert last["kl"] > first["kl"] == 0.0
        assert last["chosen_reward"] > 0.05 + last["rejected_reward"]
    else:
        assert last["margin"] > first["margin"] + 0.1
    asked = any(phase == "reference" for phase, _ in heard(context).phases)
    assert asked == (name not in ("orpo", "simpo"))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("lora", [True, False])
def test_before_its_first_update_the_policy_is_the_reference_to_the_bit(
    workshop: Workshop, precision: str, lora: bool
) -> None:
    """In every precision: the start is asked in the micro-batches that train, with dropout off."""
    context = workshop.context(f"first-{precision}-{'lora' if lora else 'full'}", {"init_from": "chat"})
    spec = spec_of(LOSSES["dpo"], lora=lora, steps=1)
    run_preference(spec.changed(shard=spec.shard.changed(precision=precision, micro_batch=2)), context)
    first = heard(context).heard[0][1]
    assert (first["margin"], first["accuracy"]) == (0.0, 0.5)
    assert first["loss"] == pytest.approx(0.693147, abs=1e-6)


class Stopping(Listener):
    """Asks to stop from a step on."""

    def phase(self, name: str, **progress: float) -> None:
        super().phase(name, **progress)
        self.step = progress.get("step", 0)

    def stop_requested(self) -> bool:
        return self.step >= 4


def test_a_resume_asks_the_start_for_nothing_that_is_known(workshop: Workshop) -> None:
    """Also where more steps, and so more rows, were asked for: then for those alone."""
    spec = spec_of(LOSSES["dpo"], steps=2, global_batch=8)
    longer = spec.changed(train=spec.train.changed(steps=6))
    straight = run_preference(longer, workshop.context("straight", {"init_from": "chat"}))
    with pytest.raises(Preempted):
        run_preference(longer, replace(workshop.context("resumed", {"init_from": "chat"}), observer=Stopping()))
    context = workshop.context("resumed", {"init_from": "chat"})
    resumed = run_preference(longer, context)
    assert not any(phase == "reference" for phase, _ in heard(context).phases)
    assert heard(context).heard[0][0] == 6
    assert resumed.files == straight.files

    run_preference(spec, workshop.context("extended", {"init_from": "chat"}))
    context = workshop.context("extended", {"init_from": "chat"})
    extended = run_preference(longer.changed(train=longer.train.changed(schedule=spec.train.schedule)), context)
    assert any(phase == "reference" for phase, _ in heard(context).phases)
    assert math.isfinite(heard(context).heard[0][1]["loss"])
    assert extended.outcome["steps_done"] == 6


def test_the_gate_names_a_policy_that_prefers_no_better_than_chance(workshop: Workshop) -> None:
    spec = spec_of(LOSSES["dpo"], steps=1).changed(min_accuracy=1.0)
    spec = spec.changed(train=spec.train.changed(optimizer=spec.train.optimizer.changed(lr=1e-9)))
    candidate = run_preference(spec, workshop.context("gate", {"init_from": "chat"}))
    (reason,) = candidate.gate_reasons
    assert reason.endswith("is below min_accuracy 1.0")
