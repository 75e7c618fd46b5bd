"""Benchmarks that are tasks of lm-eval, against lm-eval itself on the same model and rows."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from recipes.errors import RequestError
from tests.unit.rlhf.test_benchmarks import CHOICES, QUESTIONS, Bench, Watcher

lm_eval: Any = pytest.importorskip("lm_eval", reason="lm-eval is not installed (the extra `eval`)")

ROWS = [
    {"question": QUESTIONS[row], "choices": CHOICES[row], "gold": row % 4, "answer": CHOICES[row][row % 4]}
    for row in range(12)
]
CHOOSING = {
    "output_type": "multiple_choice", "doc_to_text": "Question: {{question}}\nAnswer:", "doc_to_choice": "choices",
    "doc_to_target": "gold", "description": "Answer.\n\n",
    "metric_list": [
        {"metric": name, "aggregation": "mean", "higher_is_better": True} for name in ("acc", "acc_norm")
    ],
}  # fmt: skip
CONTINUING = {
    "output_type": "loglikelihood", "doc_to_text": "{{question}}", "doc_to_target": "{{answer}}",
    "metric_list": [
        {"metric": "acc", "aggregation": "mean", "higher_is_better": True},
        {"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False},
    ],
}  # fmt: skip
WRITING = {
    "output_type": "generate_until", "doc_to_text": "Q: {{question}}\nA:", "doc_to_target": "{{answer}}",
    "generation_kwargs": {"until": ["fox", "\n\n"], "max_gen_toks": 8, "do_sample": False},
    "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    "filter_list": [
        {"name": "first", "filter": [{"function": "regex", "regex_pattern": "(\\w+)"}, {"function": "take_first"}]},
        {"name": "whole", "filter": [{"function": "take_first"}]},
    ],
}  # fmt: skip


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("lm_eval"))


def by_lm_eval(bench: Bench, task: dict[str, Any], shots: int) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """What `lm_eval` makes of the model's folder and the rows' file, as its command line would."""
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    source = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(bench.folder / "rows.jsonl")}}}
    config = {"task": "by_hand", **task, **source, "test_split": "test", "fewshot_split": "test"}
    model = HFLM(pretrained=str(bench.folder / "model"), device="cpu", dtype="float32", batch_size=1)
    plain = TaskManager(include_defaults=False)
    found = lm_eval.simple_evaluate(model, tasks=[config], num_fewshot=shots, bootstrap_iters=0, task_manager=plain)
    samples = {(line["doc_id"], line["filter"]): line for line in found["samples"]["by_hand"]}
    return found["results"]["by_hand"], [line for _, line in sorted(samples.items())]


def test_choices(bench: Bench) -> None:
    keys = {"suite": "lm_eval", "task": CHOOSING, "figures": ["acc", "acc_norm"], "shots": 2}
    found, lines = bench.measure(ROWS, **keys)
    wanted, samples = by_lm_eval(bench, CHOOSING, 2)
    assert (found["acc"], found["acc_norm"]) == (wanted["acc,none"], wanted["acc_norm,none"])
    for line, sample in zip(lines, samples, strict=True):
        assert line["details"]["logprobs"] == pytest.approx([each[0] for each in sample["filtered_resps"]], rel=1e-6)
        assert line["values"]["acc"] == sample["acc"]
        assert line["details"]["context"].count("Question:") == 3
    assert found["n"] == 12
    assert found["acc_low"] < found["acc"] < found["acc_high"]


def test_a_stopped_task_continues_with_the_same_examples(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Examples are drawn from all rows in their order, also where only some rows are asked."""
    monkeypatch.setattr("trainers.evaluation.cases.FLUSH_S", 0.0)
    monkeypatch.setattr("trainers.evaluation.suites.lm_eval_task.ROWS_AT_ONCE", 4)
    keys = {"suite": "lm_eval", "task": CHOOSING, "shots": 2}
    straight = bench.measure(ROWS, **keys)
    first, second = Watcher(stop_after=4), Watcher()
    with pytest.raises(KeyboardInterrupt):
        bench.measure(ROWS, first, run="stopped", **keys)
    assert bench.measure(ROWS, second, run="stopped", **keys) == straight
    assert (first.rows, second.rows) == ([4], [8, 12])


def test_continuations_and_whether_they_are_likeliest(bench: Bench) -> None:
    greedy = bench.tokenizer.decode(
        bench.model.generate(**bench.tokenizer(QUESTIONS[0], return_tensors="pt"), max_new_tokens=1, do_sample=False)[
            0, -1:
        ]
    )
    rows = [{**row, "answer": greedy.strip() if place == 0 else row["answer"]} for place, row in enumerate(ROWS)]
    found, lines = bench.measure(rows, suite="lm_eval", task=CONTINUING)
    wanted, samples = by_lm_eval(bench, CONTINUING, 0)
    assert found["acc"] == wanted["acc,none"]
    for line, sample in zip(lines, samples, strict=True):
        assert line["details"]["logprobs"] == pytest.approx([sample["filtered_resps"][0][0]], rel=1e-6)
    with pytest.raises(RequestError):
        bench.measure(rows, suite="lm_eval", task=CONTINUING, figures=["perplexity"])


def test_written_answers_through_filters(bench: Bench) -> None:
    keys = {"suite": "lm_eval", "task": WRITING, "figures": ["exact_match", "exact_match,whole"]}
    _, lines = bench.measure(ROWS, **keys)
    rows = [
        {**row, "answer": "".join(re.findall(r"\w+", line["said"])[:1])} for row, line in zip(ROWS, lines, strict=True)
    ]
    found, lines = bench.measure(rows, **keys)
    wanted, samples = by_lm_eval(bench, WRITING, 0)
    assert (found["exact_match"], found["exact_match_whole"]) == (
        wanted["exact_match,first"],
        wanted["exact_match,whole"],
    )
    assert found["exact_match"] > 0
    whole = [sample["filtered_resps"][0] for sample in samples if sample["filter"] == "whole"]
    assert [line["said"] for line in lines] == [text.strip() for text in whole]


@pytest.mark.long
def test_a_task_of_the_package_by_its_name(bench: Bench, tmp_path: Path) -> None:
    """HellaSwag, whose rows lm-eval's own function cleans, on rows of the recipe's; nothing is downloaded."""
    rows = [
        {"ind": row, "activity_label": "Fox", "ctx_a": f"{QUESTIONS[row]} [title]", "ctx_b": "it jumps", "ctx": "",
         "endings": CHOICES[row], "label": str(row % 4), "split": "val", "split_type": "", "source_id": ""}
        for row in range(6)
    ]  # fmt: skip
    found, lines = bench.measure(rows, suite="lm_eval", task="hellaswag", figures=["acc_norm"])
    context = f"Fox: {QUESTIONS[0]}. It jumps"
    assert lines[0]["details"]["context"] == context
    logprobs = [bench.logprob(context, f" {text}") for text in CHOICES[0]]
    assert lines[0]["details"]["logprobs"] == pytest.approx(logprobs, rel=1e-6)
    assert json.loads(lines[0]["question"])["ind"] == 0
    assert found["n"] == 6


@pytest.mark.parametrize(
    ("keys", "named"),
    [
        pytest.param({"task": "no_such_task"}, "no_such_task", marks=pytest.mark.long),
        ({"task": {**CHOOSING, "doc_to_text": "{{missing}}"}}, "benchmarks.b"),
        ({"task": CHOOSING, "figures": ["f1"]}, "f1"),
        ({"task": WRITING, "figures": ["exact_match,none"]}, "none"),
    ],
)
def test_what_a_task_does_not_have_is_named(bench: Bench, keys: dict[str, Any], named: str) -> None:
    with pytest.raises(RequestError, match=named):
        bench.measure(ROWS, suite="lm_eval", **keys)
