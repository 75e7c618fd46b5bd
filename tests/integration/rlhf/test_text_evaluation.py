"""Evaluation of a model of texts in one process: progress, bounds, lost rows."""

from typing import Any

import pytest

from launch.runs.suites import suites_of
from recipes.errors import RequestError
from recipes.stages.evaluate import Evaluate
from tests.integration.rlhf.workshop import (
    PLAIN,
    Listener,
    Workshop,
    jsonl,
)
from trainers.evaluation.evaluate_stage import run_evaluate


def examine(workshop: Workshop, **changes: Any) -> tuple[dict[str, Any], Listener]:
    """Evaluate the chat model; returns the metrics and what was heard."""
    spec = Evaluate.model_validate(
        {
            "kind": "evaluate",
            "of": ["chat"],
            "text": {"source": "text", "files": ["text.txt"], "documents": "paragraph"},
            "prompts": {"source": "jsonl", "files": ["prompts.jsonl"]},
            "num_prompts": 4,
            "sequence_length": 32,
            "sampling": {"max_new_tokens": 8, "max_prompt_tokens": 48},
            "shard": PLAIN,
            **changes,
        }
    )
    context = workshop.context("eval", {"of.0": "chat"})
    report = run_evaluate(spec, context, suites_of(spec))
    assert report is not None
    assert isinstance(context.observer, Listener)
    return dict(report.metrics), context.observer


def test_an_evaluation_says_how_many_rows_of_each_suite_are_done(workshop: Workshop) -> None:
    _, listener = examine(workshop, num_sequences=18, sequence_length=16)
    for name, planned, parts in (("perplexity", 18, 0), ("answer", 4, 1), ("judge", 4, 1)):
        rows = [place for heard, place in listener.phases if heard == name]
        assert {place["rows_planned"] for place in rows} == {planned}
        assert {(place["step"], place["steps_planned"]) for place in rows} == {(parts, 2)}
        counts = [place["rows"] for place in rows]
        assert counts == sorted(counts)
    assert [place["rows"] for heard, place in listener.phases if heard == "perplexity"] == [0, 16, 18]


def test_num_prompts_bounds_the_text_of_perplexity(workshop: Workshop) -> None:
    asked = {"suites": ["perplexity"]}
    few, listener = examine(workshop, **asked)
    assert [place["rows"] for heard, place in listener.phases if heard == "perplexity"][-1] == 4
    all_of_it, _ = examine(workshop, **asked, num_sequences=10**6)
    limited, listener = examine(
        workshop,
        **asked,
        num_sequences=10**6,
        text={"source": "text", "files": ["text.txt"], "documents": "paragraph", "limit": 2},
    )
    rows = [place["rows"] for heard, place in listener.phases if heard == "perplexity"][-1]
    assert rows <= 4
    assert len({metrics["chat.perplexity"] for metrics in (few, all_of_it, limited)}) == 3


def test_lost_rows_are_told_and_too_many_stop_the_stage(workshop: Workshop) -> None:
    def evaluation(long: int, **source: float) -> list[str]:
        rows = [{"prompt": "What?"}] + [{"prompt": f"What does {n} do with every file?" * 9} for n in range(long)]
        jsonl(workshop.folder / "lengths.jsonl", rows)
        prompts = {"source": "jsonl", "files": ["lengths.jsonl"], **source}
        return examine(workshop, suites=["generation"], num_samples=0, prompts=prompts)[1].told

    assert evaluation(0) == []
    said = "prompts: 4 of 5 rows (80%) dropped: 4 longer than 48 tokens; for example lengths.jsonl:2"
    assert evaluation(4) == [f"warning: {said}, lengths.jsonl:3, lengths.jsonl:4"]
    with pytest.raises(RequestError, match=r"19 of 20 rows .* more than max_dropped .*eval.prompts.max_dropped: 1"):
        evaluation(19)
    assert "19 of 20 rows" in evaluation(19, max_dropped=1.0)[0]
    with pytest.raises(RequestError, match="more than max_dropped"):
        evaluation(4, max_dropped=0.5)
