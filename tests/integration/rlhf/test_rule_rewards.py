"""RL by rules alone in one process: sums of terms, the probe, columns that a reward reads."""

from typing import Any

import pytest

from recipes.errors import RequestError, StageError
from recipes.stages.rl import RlText
from rlhf.task import run_rl
from tests.integration.rlhf.workshop import Workshop, jsonl, ppo_spec


def rules_spec(lora: bool, **settings: Any) -> RlText:
    keys = ppo_spec(lora, **settings).model_dump(mode="json", by_alias=True)
    keys["prompts"] = {"source": "jsonl", "files": ["sums.jsonl"]}
    keys["rewards"] = {
        "short": {"rule": "length", "max": 8, "unit": "characters", "slack": 30, "weight": 2.0},
        "right": {"rule": "number"},
    }
    return RlText.model_validate(keys)


@pytest.mark.parametrize("lora", [True, False])
def test_rules_alone_need_no_reward_model(workshop: Workshop, lora: bool) -> None:
    rows = [{"prompt": [{"role": "user", "content": f"What is {n}?"}], "answer": n} for n in range(20)]
    jsonl(workshop.folder / "sums.jsonl", rows)
    spec, name = rules_spec(lora, iterations=2), "rules-" + ("lora" if lora else "full")
    assert [item.field_path for item in spec.inputs()] == ["actor"]
    context = workshop.context(name, {"actor": "chat"})
    candidate = run_rl(spec, context)
    assert candidate is not None
    workshop.keep(name, candidate, {"actor": "chat"})
    start, end = candidate.metrics["start"], candidate.metrics["end"]
    for report in (start, end):
        assert report["score_mean"] == pytest.approx(2 * report["reward/short"] + report["reward/right"], abs=1e-5)
    for line in workshop.store.run("run").read_lines(f"samples/{name}"):
        assert line["rewards"].keys() == {"short", "right"}
        assert line["score"] == pytest.approx(2 * line["rewards"]["short"] + line["rewards"]["right"], abs=1e-5)


def test_the_probe_knows_truth_from_noise_and_refuses_a_reward_that_does_not(workshop: Workshop) -> None:
    rows = [{"prompt": f"What is {n}?", "answer": n} for n in range(100, 130)]
    jsonl(workshop.folder / "sums.jsonl", rows)
    spec = rules_spec(True, iterations=1)
    spec = spec.changed(rewards={"right": spec.rewards["right"].changed(weight=2.0)})
    candidate = run_rl(spec, workshop.context("probed", {"actor": "chat"}))
    assert candidate is not None
    table = candidate.metrics["probe"]
    assert list(table) == ["truth", "other_answers", "first_halves", "random_tokens", "start"]
    assert table["truth"] == {"right": 1.0, "score": 2.0}
    assert table["other_answers"] == table["random_tokens"] == {"right": 0.0, "score": 0.0}
    assert table["start"]["right"] == candidate.metrics["start"]["reward/right"]

    upside_down = spec.changed(rewards={"wrong": spec.rewards["right"].changed(weight=-1.0)})
    with pytest.raises(StageError, match=r"(?s)truth +1\.000 +-1\.000"):
        run_rl(upside_down, workshop.context("refused-reward", {"actor": "chat"}))
    context = workshop.context("warned", {"actor": "chat"})
    warned = run_rl(upside_down.changed(probe="warn"), context)
    assert warned is not None
    assert warned.metrics["probe"]["truth"]["score"] == -1.0
    unasked = run_rl(upside_down.changed(probe="off"), workshop.context("unasked", {"actor": "chat"}))
    assert unasked is not None
    assert "probe" not in unasked.metrics


def test_a_row_without_the_rewards_column_is_named(workshop: Workshop) -> None:
    jsonl(workshop.folder / "sums.jsonl", [{"prompt": "a", "answer": 1}, {"prompt": "b", "anwser": 2}])
    with pytest.raises(RequestError, match=r"sums\.jsonl:2: .*'answer'.* anwser"):
        run_rl(rules_spec(True), workshop.context("no-column", {"actor": "chat"}))
