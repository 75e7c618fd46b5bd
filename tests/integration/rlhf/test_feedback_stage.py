"""The feedback stage in one process: a tiny model answers twice, a rule judges, another stage learns from it."""

import json
from typing import Any

import pytest

from launch.inputs.feedback import with_feedback_rows
from recipes.stages.feedback import Feedback
from recipes.stages.preference import Preference
from rlhf.text.pairs import run_feedback
from rlhf.text.preference_stage import run_preference
from rlhf.text.reward_stage import run_reward
from tests.integration.rlhf.workshop import PLAIN, Workshop, open_workshop, reward_spec
from trainers.training.context import Candidate


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return open_workshop(tmp_path_factory.mktemp("workshop"), width=16)


def judge(workshop: Workshop, stage: str, inputs: dict[str, str] | None = None, **changes: Any) -> Candidate:
    spec = Feedback.model_validate(
        {
            "kind": "feedback",
            "of": "chat",
            "prompts": {"source": "jsonl", "files": ["chats.jsonl"]},
            "sampling": {"max_new_tokens": 8, "max_prompt_tokens": 40},
            "num_prompts": 40,
            "shard": PLAIN,
            **changes,
        }
    )
    found = run_feedback(spec, workshop.context(stage, {"of": "chat", **(inputs or {})}))
    assert found is not None
    return found


def lines(workshop: Workshop, candidate: Candidate, name: str) -> list[dict[str, Any]]:
    data = workshop.store.objects.get_bytes(candidate.files[name].sha256)
    return [json.loads(line) for line in data.splitlines()]


def test_a_rule_judges_and_a_policy_learns_from_it(workshop: Workshop) -> None:
    rewards = {"short": {"rule": "length", "unit": "characters", "max": 0, "slack": 1000}}
    candidate = judge(workshop, "judged", judge="rule", rewards=rewards)
    pairs, rows = lines(workshop, candidate, "pairs.jsonl"), lines(workshop, candidate, "preferences.jsonl")
    assert len(pairs) == 40 - candidate.metrics["equal_answers"]
    assert len({pair["source"] for pair in pairs}) == len(pairs)
    assert len(rows) == candidate.metrics["pairs"] - candidate.metrics["ties"] > 20
    by_id = {pair["id"]: pair for pair in pairs}
    for row in rows:
        pair = by_id[row["pair"]]
        worth = {text: rewards["score"] for text, rewards in zip(pair["answers"], pair["rewards"], strict=True)}
        assert worth[row["chosen"]] > worth[row["rejected"]]
        assert row["annotators"] == ["rule"]
    workshop.keep("judged", candidate, {"of": "chat"})

    spec = Preference.model_validate(
        {
            "kind": "preference",
            "init_from": "chat",
            "data": {"source": "feedback", "from": "judged", "hold_out": 0.2},
            "train": {"steps": 20, "global_batch": 8, "sequence_length": 64, "optimizer": {"lr": 1e-2}},
            "min_accuracy": 0.0,
            "shard": PLAIN,
        }
    )
    given = {"init_from": "chat", "data.from": "judged"}
    assert {item.field_path: item.text for item in spec.inputs()} == given
    context = workshop.context("learnt", given)
    read, fields = with_feedback_rows(spec, context.inputs, workshop.store)
    assert fields == {"data", "evaluation"}
    learnt = run_preference(read, context)  # type: ignore[arg-type]
    assert learnt is not None
    assert learnt.metrics["data"]["rows_in"] > 0


def test_equal_seeds_give_equal_pairs_and_people_get_these_alone(workshop: Workshop) -> None:
    one, other = (judge(workshop, "asked") for _ in range(2))
    assert one.files == other.files
    assert set(one.files) == {"pairs.jsonl"}


def test_a_reward_model_judges_the_pairs_that_its_score_and_a_rule_differ_on(workshop: Workshop) -> None:
    given = {"init_from": "chat"}
    workshop.keep("scorer", run_reward(reward_spec(False), workshop.context("scorer", given)), given)
    rewards = {
        "model": {"model": "scorer"},
        "short": {"rule": "length", "unit": "characters", "max": 0, "slack": 1000, "weight": 0},
    }
    written = {"prompt": "asked before", "chosen": "good", "rejected": "bad", "annotator": "ann"}
    (workshop.folder / "labelled.jsonl").write_text(json.dumps(written) + "\n")
    inputs = {"rewards.model.model": "scorer"}
    settings: dict[str, Any] = {"judge": "reward", "rewards": rewards, "template": "none"}
    whole = judge(workshop, "whole", inputs, **settings)
    some = judge(
        workshop, "some", inputs, **settings,
        choose={"by": "disagreement", "pairs": 8, "between": ["model", "short"]},
        labelled={"source": "jsonl", "files": ["labelled.jsonl"]},
    )  # fmt: skip
    rows = {row["pair"]: row for row in lines(workshop, whole, "preferences.jsonl")}
    for pair in lines(workshop, whole, "pairs.jsonl"):
        gain = pair["rewards"][0]["score"] - pair["rewards"][1]["score"]
        assert (rows[pair["id"]]["chosen"] == pair["answers"][0]) == (gain > 0) if gain else pair["id"] not in rows
    assert "pairs_made" not in whole.metrics
    assert some.metrics["pairs_made"] == whole.metrics["pairs"]
    chosen = lines(workshop, some, "preferences.jsonl")
    mine = [row for row in chosen if row["annotators"] == ["ann"]]
    assert [(row["prompt"], row["chosen"], row["rejected"]) for row in mine] == [("asked before", "good", "bad")]
    assert some.metrics["pairs"] == 8 + 1
    assert {row["pair"] for row in chosen} - {mine[0]["pair"]} <= set(rows)
