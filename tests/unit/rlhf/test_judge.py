"""A language model as a judge of answers: both orders, ties, what is no verdict, its bias; by HTTP, from the store."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter, ValidationError

from launch.runs.suites import suites_of
from recipes.errors import StageError
from recipes.stages.evaluate import Evaluate
from recipes.stages.rewards.judge import choice_of
from recipes.stages.rewards.union import RewardTerm
from rlhf.rewards.judge import Preference
from rlhf.rewards.terms import open_text_terms
from tests.chat_models import DOCUMENT_END, chat_tokenizer, write_chat_model, write_rows
from tests.endpoints import Answer, endpoint, gives
from tests.observers import Quiet
from trainers.evaluation.evaluate_stage import run_evaluate
from trainers.models.imports import import_folder
from trainers.runtime.distributed import Ranks
from trainers.store.store import Store
from trainers.training.context import StageContext

TERM: TypeAdapter[Any] = TypeAdapter(RewardTerm)
ANSWERS = re.compile(r"\[Answer A\]\n(.*?)\n\n\[Answer B\]\n(.*?)\n\nReply", re.DOTALL)
RECORDS = [{"id": f"rows.jsonl:{row}", "prompt": f"question {row}", "columns": {"answer": "four"}} for row in range(4)]
TEXTS = ["much longer", "i", " four", "cats"]


def says(choose: Callable[[str, str], str]) -> Answer:
    """An endpoint whose model chooses between the two answers that it is shown."""

    def answer(body: dict[str, Any]) -> tuple[int, bytes]:
        found = ANSWERS.search(body["messages"][0]["content"])
        assert found is not None
        content = choose(found[1], found[2])
        return 200, json.dumps({"choices": [{"message": {"role": "assistant", "content": content}}]}).encode()

    return answer


def longer(first: str, second: str) -> str:
    """The longer answer; it reasons first, and mentions the other one."""
    verdict = "C" if len(first) == len(second) else "A" if len(first) > len(second) else "B"
    return f"Not [[{'B' if verdict == 'A' else 'A'}]], I think. [[{verdict}]]"


def judged(url: str, **keys: Any) -> dict[str, list[float]]:
    term = TERM.validate_python({"judge": url, "served_as": "m", **keys})
    opened = open_text_terms({"j": term}, Path(), RECORDS)
    return {each.name: each.values(TEXTS, RECORDS) for each in opened}


def test_a_response_is_compared_with_the_rows_answer_in_both_orders() -> None:
    with endpoint([gives(500, "busy"), says(longer)]) as (url, asked):
        found = judged(url, parallel=1)
    assert found == {"j": [1, 0, 0.5, 0.5], "j_unparsed": [0] * 4, "j_first_shown": [0.5] * 4}
    assert len(asked) == 1 + 6  # one again; equal answers are a tie without a question
    orders = {ANSWERS.search(body["messages"][0]["content"])[1] for body in asked[1:3]}  # type: ignore[index]
    assert orders == {"much longer", "four"}
    assert (asked[0]["model"], asked[0]["temperature"]) == ("m", 0)


def test_a_judge_that_prefers_what_stands_first_is_seen_and_decides_nothing() -> None:
    with endpoint([says(lambda first, second: "[[A]]")]) as (url, _):
        found = judged(url)
    assert found["j"] == [0.5] * 4
    assert found["j_first_shown"] == [1, 1, 0.5, 1]


def test_what_is_no_verdict_is_counted() -> None:
    with endpoint([says(lambda first, second: "[[B]]" if first == "four" else "It depends.")]) as (url, _):
        found = judged(url)
    assert found["j"] == [1, 1, 0.5, 1]  # by the one verdict that there is
    assert found["j_unparsed"] == [0.5, 0.5, 0, 0.5]
    assert Preference(None, None).value == 0.5


@pytest.mark.parametrize(
    ("said", "choice"),
    [("[[A]]", "first"), ("[[ B ]].", "second"), ("b", "second"), ("Answer A.", "first"), ("tie", "tie"),
     ("A good question", None), ("", None), ("[[D]]", None)],
)  # fmt: skip
def test_verdicts(said: str, choice: str | None) -> None:
    assert choice_of(said) == choice


def test_an_endpoint_that_answers_something_else_or_not_in_time_ends_the_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    with endpoint([gives(200, '{"choices": []}')]) as (url, _), pytest.raises(StageError, match="choices"):
        judged(url)
    with endpoint([gives(503, "")]) as (url, _), pytest.raises(StageError, match=r"0\.2 s.*503"):
        judged(url, deadline_s=0.2)
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    with pytest.raises(StageError, match="NO_SUCH_KEY"):
        judged("http://localhost:1/v1", key_from="NO_SUCH_KEY")


@pytest.mark.parametrize("keys", [{"judge": "http://h/v1"}, {"judge": "chat", "served_as": "m"}])
def test_an_endpoint_needs_the_models_name_and_a_stage_none(keys: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match="served_as"):
        TERM.validate_python(keys)


def test_an_evaluation_gives_win_rates_by_an_endpoint_and_by_a_model_of_the_store(tmp_path: Path) -> None:
    store = Store.open(str(tmp_path / "store"))
    folder = write_chat_model(tmp_path / "model", chat_tokenizer(eos=DOCUMENT_END), initializer_range=0.5)
    made = import_folder(store, folder)
    other = write_chat_model(tmp_path / "other", chat_tokenizer(eos=DOCUMENT_END), initializer_range=0.2)
    rows = [{"prompt": f"the quick fox {row}", "answer": "lazy dog"} for row in range(6)]
    write_rows(tmp_path / "rows.jsonl", rows)
    with endpoint([says(longer)]) as (url, _):
        spec = Evaluate.model_validate(
            {
                "kind": "evaluate", "of": ["m", "store://other"], "num_prompts": 6,
                "suites": ["generation", "comparison"],
                "prompts": {"source": "jsonl", "files": ["rows.jsonl"]}, "num_samples": 6, "template": "none",
                "rewards": {"far": {"judge": url, "served_as": "x"}, "near": {"judge": "./m", "max_new_tokens": 4}},
                "sampling": {"max_prompt_tokens": 32, "max_new_tokens": 8},
                "shard": {"engine": "plain", "precision": "fp32"},
            }
        )  # fmt: skip
        inputs = {"of.0": made, "of.1": import_folder(store, other), "rewards.near.judge": made}
        context = StageContext(
            store, "run", "e", "f" * 64, 1, 0, tmp_path, inputs, {}, Quiet(), Ranks(0, 1, 0, torch.device("cpu"))
        )
        candidate = run_evaluate(spec, context, suites_of(spec))
    assert candidate is not None
    samples = json.loads(store.objects.get_bytes(candidate.files["samples.json"].sha256))
    metrics = candidate.metrics
    written = {(line["prompt"], line["model"]): line["response"] for line in samples}
    own, rival = ([text for (_, model), text in written.items() if model == name] for name in ("other", "m"))
    assert len(own) == len(rival) == 6
    won = [
        0.5 if len(one) == len(other) else float(len(one) > len(other)) for one, other in zip(own, rival, strict=True)
    ]
    assert metrics["other.win_rate_far"] == pytest.approx(sum(won) / 6)
    assert any(value != 0.5 for value in won)
    assert metrics["m.reward_near_unparsed"] == metrics["random_tokens.near_unparsed"] == 1
    assert metrics["m.reward_near"] == metrics["random_tokens.win_rate_near"] == 0.5
    assert metrics["m.reward_far_unparsed"] == 0
    assert metrics["random_tokens.far_first_shown"] == pytest.approx(0.5)
    assert set(metrics) >= {name for name in spec.metrics() if "far" in name or "near" in name}
