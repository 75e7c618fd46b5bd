"""A benchmark's cases as a model is asked them: examples before each, shared by the ranks, answers kept as they come.

What an attempt has answered stays with the run, so that a resumed one does not ask it again.
"""

import hashlib
import json
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from recipes.errors import RequestError
from recipes.stages.benchmarks.case import SHOT_END, Benchmark, Case
from recipes.stages.benchmarks.union import AnyBenchmark
from recipes.stages.evaluate import Evaluate
from recipes.stages.suites import GAIN, NUM_CASES
from trainers.data.dataset import Dataset
from trainers.data.tokenizer import Tokenization, load_tokenization
from trainers.evaluation.intervals import mean_interval, paired
from trainers.evaluation.suite import REFERENCE, Measured, Parts
from trainers.runtime import distributed
from trainers.store.runs import SegmentWriter
from trainers.training.context import StageContext, model_folder, open_dataset, text_request

FLUSH_S = 2.0
"""Answers are kept at least this often."""


@dataclass(frozen=True)
class Asked:
    """A case as a model gets it."""

    number: int
    """Among the cases of its data."""
    id: str
    """Of its first row: file and number."""
    case: Case
    """With the examples before it."""
    bare: Case
    """Without."""
    record: Mapping[str, Any]
    """Its columns for the scorers."""
    dataset: Dataset
    """All cases of its data, by their numbers."""

    def line(self, surroundings: str) -> dict[str, Any]:
        """What a row in the artifact says of the case; `asked` is equal where a model reads the same."""
        read = json.dumps([self.case.to_json(), surroundings], ensure_ascii=False, sort_keys=True)
        asked = hashlib.sha256(read.encode()).hexdigest()[:16]
        question, answer = self.bare.best
        return {"asked": asked, "question": question, "answer": answer.strip(), "group": self.bare.group}


@dataclass(frozen=True)
class Answered:
    """What a model made of a case; a line of the artifact's `rows/NAME.jsonl`."""

    number: int
    id: str
    values: Mapping[str, float]
    """By figure."""
    said: str
    """What it chose or wrote."""
    details: Mapping[str, Any] = field(default_factory=dict)
    """The log-likelihoods of its options."""


@dataclass
class Journal:
    """Answers of one model to one benchmark: those of earlier attempts of this stage, and those that come."""

    context: StageContext
    name: str
    """Of the benchmark and the model."""
    known: dict[int, Answered]
    writer: SegmentWriter
    _flushed_at: float = 0.0

    @classmethod
    def of(cls, context: StageContext, name: str) -> "Journal":
        """Read what was answered before."""
        run, key = context.store.run(context.run), [context.fingerprint, name]
        lines = run.read_lines(f"cases/{context.stage}")
        known = {line["answer"]["number"]: Answered(**line["answer"]) for line in lines if line["of"] == key}
        writer = run.writer(f"cases/{context.stage}/{context.lease}/{context.ranks.rank}")
        return cls(context, name, known, writer)

    def add(self, answers: Sequence[Answered]) -> None:
        """Keep answers."""
        for answer in answers:
            self.known[answer.number] = answer
            self.writer.append({"of": [self.context.fingerprint, self.name], "answer": vars(answer)})
        if time.monotonic() - self._flushed_at > FLUSH_S:
            self.flush()

    def flush(self) -> None:
        """Make what was kept last."""
        self.writer.flush()
        self._flushed_at = time.monotonic()


Answer = Callable[[Evaluate, StageContext, AnyBenchmark, str, Tokenization, Sequence[Asked]], Any]
"""Yields lists of `Answered`: asks the model at a field path all of these cases."""


def measure_benchmark(
    name: str, answer: Answer, spec: Evaluate, context: StageContext, labels: Sequence[str], parts: Parts
) -> Measured:
    """Ask every model the cases of a benchmark that it has not answered; collective."""
    benchmark = spec.benchmarks[name]
    metrics: dict[str, float] = {}
    lines: list[dict[str, Any]] = []
    samples: list[dict[str, Any]] = []
    start: dict[int, dict[str, Any]] = {}
    for index, label in enumerate(labels):
        path, place = f"of.{index}", parts.place(index)
        tokenization = load_tokenization(model_folder(context, path))
        asked = open_cases(spec, context, name, tokenization)
        journal = Journal.of(context, f"{name} {label}")
        own = asked[context.ranks.rank :: context.ranks.world_size]
        todo = [one for one in own if one.number not in journal.known]
        if todo:
            answers = answer(spec, context, benchmark, path, tokenization, todo)
            done = len(own) - len(todo)
            for found in answers:
                journal.add(found)
                done += len(found)
                progress = {"rows": min(done * context.ranks.world_size, len(asked)), "rows_planned": len(asked)}
                context.observer.phase(name, **progress, **place)
        journal.flush()
        mine = [vars(journal.known[one.number]) for one in own]
        merged = {line["number"]: line for part in distributed.gather_json(mine) for line in part}
        rows = [merged[one.number] for one in asked]
        found = figures(benchmark, asked, rows)
        if index == 0:
            start = merged
        else:
            found |= gains(benchmark, start, merged)
        metrics |= {f"{label}.{name}.{figure}": value for figure, value in found.items()}
        told = [one.line(benchmark.surroundings) for one in asked]
        lines += [{"model": label, **one, **row} for one, row in zip(told, rows, strict=True)]
        samples += _samples(label, asked, rows, spec.num_samples, with_truth=index == 0)
    return Measured(metrics, samples, {name: lines})


def open_cases(spec: Evaluate, context: StageContext, name: str, tokenization: Tokenization) -> list[Asked]:
    """Return a benchmark's cases with their examples; raises RequestError where these are too few. Collective."""
    benchmark = spec.benchmarks[name]

    def opened(key: str) -> Dataset:
        use = spec.get_source(f"benchmarks.{name}.{key}")
        return open_dataset(context, text_request(context, use, tokenization, benchmark.max_tokens))

    dataset = opened("data")
    shots = benchmark.num_shots
    others = spec.find_source(f"benchmarks.{name}.examples")
    pool = _by_group(dataset if others is None else opened("examples")) if shots else {}
    everyone = [one for group in pool.values() for one in group]
    asked: list[Asked] = []
    for number, record in enumerate(dataset.records):
        case, row = Case.from_json(record["case"]), record["id"]
        there = [one for place, one in pool.get(case.group, everyone) if others is not None or place != number]
        before = examples(there, shots, f"{context.seed} {number}", f"benchmarks.{name}: {row}")
        asked.append(Asked(number, row, case.asked(f"{benchmark.beginning}{before}"), case, record, dataset))
    fitting = [one for one in asked if _tokens(one.case, tokenization) + benchmark.writes <= benchmark.max_tokens]
    if len(fitting) < len(asked):
        left_out = f"{len(asked) - len(fitting)} of {len(asked)} cases are left out"
        context.observer.notify(f"benchmarks.{name}: {left_out}: longer than max_tokens ({benchmark.max_tokens})")
    if not fitting:
        raise RequestError(f"benchmarks.{name}: no case has at most {benchmark.max_tokens} tokens: raise max_tokens")
    return fitting


def _by_group(dataset: Dataset) -> dict[str, list[tuple[int, Case]]]:
    found: dict[str, list[tuple[int, Case]]] = {}
    for number, record in enumerate(dataset.records):
        case = Case.from_json(record["case"])
        found.setdefault(case.group, []).append((number, case))
    return found


def _tokens(case: Case, tokenization: Tokenization) -> int:
    """The tokens of a case's longest text, one more for a beginning."""
    return 1 + max(map(len, tokenization.encode_batch([option.context + option.text for option in case.options])))


def examples(there: Sequence[Case], shots: int, key: str, place: str) -> str:
    """Return so many answered questions of those that are there, drawn by a key."""
    if len(there) < shots:
        raise RequestError(f"{place}: {shots} shots, but there are {len(there)} other rows of its subject")
    return "".join("".join(case.best) + SHOT_END for case in random.Random(key).sample(there, shots))


def figures(benchmark: Benchmark, asked: Sequence[Asked], rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return each figure with its interval and the number of cases; the first one by group as well."""
    found: dict[str, float] = {NUM_CASES: float(len(rows))}
    for metric in benchmark.metrics:
        if values := [row["values"][metric] for row in rows if metric in row["values"]]:
            mean, low, high = mean_interval(values)
            found |= {metric: mean, f"{metric}_low": low, f"{metric}_high": high}
    for reference in benchmark.references:
        found[reference] = sum(row["values"][reference] for row in rows) / len(rows)
    groups: dict[str, list[float]] = {}
    first = benchmark.metrics[0]
    for one, row in zip(asked, rows, strict=True):
        groups.setdefault(one.case.group, []).append(row["values"][first])
    for group, values in groups.items() if len(groups) > 1 else ():
        spelt = "".join(c if c.isascii() and c.isalnum() else "_" for c in group.lower()) or "none"
        found |= {f"{first}.{spelt}": sum(values) / len(values), f"{first}.{spelt}.{NUM_CASES}": float(len(values))}
    return found


def gains(
    benchmark: Benchmark, start: Mapping[int, Mapping[str, Any]], rows: Mapping[int, Mapping[str, Any]]
) -> dict[str, float]:
    """Return what a model has more than the first of each figure, on the cases that both were asked."""
    found: dict[str, float] = {}
    for metric in benchmark.metrics:
        values = [{number: row["values"].get(metric) for number, row in answers.items()} for answers in (start, rows)]
        first, second = ({number: value for number, value in each.items() if value is not None} for each in values)
        if both := sorted(first.keys() & second.keys()):
            gain = paired([first[number] for number in both], [second[number] for number in both])
            found |= {f"{metric}{end}": value for end, value in zip(GAIN, gain, strict=True)}
    return found


def _samples(
    label: str, asked: Sequence[Asked], rows: Sequence[Mapping[str, Any]], count: int, *, with_truth: bool
) -> list[dict[str, Any]]:
    """Lines {prompt, model, response, rewards} of the first cases; the data's own answer stands first."""
    lines: list[dict[str, Any]] = []
    for one, row in list(zip(asked, rows, strict=True))[:count]:
        context, best = one.case.best
        prompt = context or f"({one.id})"
        if with_truth and one.case.right:
            lines.append({"prompt": prompt, "model": REFERENCE, "response": best.strip()})
        lines.append({"prompt": prompt, "model": label, "response": row["said"], "rewards": row["values"]})
    return lines
