"""Benchmarks that are tasks of the lm-evaluation-harness: its requests answered here, its metrics of the answers."""

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from itertools import groupby, islice
from typing import Any

import numpy as np
import torch
from jinja2 import TemplateError
from torch import nn

from recipes.errors import CapacityError, RequestError
from recipes.stages.benchmarks.case import Case, Likelihood
from recipes.stages.benchmarks.lm_eval import LmEval, spelt
from recipes.stages.benchmarks.union import AnyBenchmark
from recipes.stages.evaluate import Evaluate
from trainers.data.batches import pad_texts
from trainers.data.tokenizer import Tokenization
from trainers.evaluation.cases import Answered, Asked
from trainers.evaluation.suite import open_measured
from trainers.inference.generation import generate, sampling_settings
from trainers.inference.likelihood import Scored, log_likelihoods, tokenized
from trainers.training.context import StageContext

EXAMPLES_SEED = 1234
"""By which lm-eval draws examples where nothing else is said."""
ROWS_AT_ONCE = 32
PROMPTS_AT_ONCE = 16
MAX_NEW_TOKENS = 256
"""Of an answer where a task does not say."""


def ask_task(
    spec: Evaluate,
    context: StageContext,
    benchmark: AnyBenchmark,
    path: str,
    tokenization: Tokenization,
    asked: Sequence[Asked],
) -> Iterator[list[Answered]]:
    """Yield the task's metrics of rows, some at a time; examples are drawn from all of them, as lm-eval does."""
    assert isinstance(benchmark, LmEval)
    name = next(name for name, item in spec.benchmarks.items() if item is benchmark)
    everyone = [Case.from_json(record["case"]) for record in asked[0].dataset.records]
    task = open_task(name, benchmark, [json.loads(case.best[0]) for case in everyone])
    instances = defaultdict(list)
    for instance in task.instances:
        instances[instance.doc_id].append(instance)
    model = open_measured(spec, context, path, "language_model")
    for start in range(0, len(asked), ROWS_AT_ONCE):
        chunk = asked[start : start + ROWS_AT_ONCE]
        requests = [instance for one in chunk for instance in sorted(instances[one.number], key=lambda each: each.idx)]
        for request, response in zip(requests, responses(model, requests, tokenization), strict=True):
            request.resps.append(response)
        for ensemble in task._filters:
            ensemble.apply(requests)
        yield [_answered(name, benchmark, task, one, instances[one.number]) for one in chunk]


def open_task(name: str, benchmark: LmEval, rows: Sequence[Mapping[str, Any]]) -> Any:
    """A task of the harness with its requests for all of these rows; raises RequestError for what is not supported."""
    try:
        import datasets
        from lm_eval.api.task import ConfigurableTask
    except ImportError as error:
        raise CapacityError(f"benchmarks.{name}: {error}; pip install 'trainwright[eval]'") from None
    data = datasets.Dataset.from_list([dict(row) for row in rows])
    given = _shipped(name, benchmark.task) if isinstance(benchmark.task, str) else {"task": name, **benchmark.task}
    config = {
        **given, "custom_dataset": lambda **_: {"test": data}, "dataset_kwargs": None, "training_split": None,
        "validation_split": None, "test_split": "test", "fewshot_split": "test",
    }  # fmt: skip
    if isinstance(shown := config.get("fewshot_config"), dict) and "split" in shown:
        config["fewshot_config"] = {**shown, "split": "test"}
    for key in ("tag", "group", "include"):
        config.pop(key, None)
    try:
        task = ConfigurableTask(config=config)
    except (KeyError, TypeError, ValueError, TemplateError) as error:
        raise RequestError(f"benchmarks.{name}: lm-eval refuses the task: {type(error).__name__}: {error}") from error
    _demand_means(name, benchmark, task)
    if benchmark.shots is not None:
        task.set_config(key="num_fewshot", value=benchmark.shots)
    task.set_fewshot_seed(seed=EXAMPLES_SEED)
    task.build_all_requests()
    if task.config.repeats != 1:
        raise RequestError(f"benchmarks.{name}: the task asks each row {task.config.repeats} times; 1 is supported")
    return task


def _batched(values: Iterator[int], size: int) -> Iterator[list[int]]:
    """Yield values, some at a time."""
    while batch := list(islice(values, size)):
        yield batch


@cache
def _manager() -> Any:
    """The index of lm-eval's tasks, whose thousands of files are read once."""
    from lm_eval.tasks import TaskManager

    return TaskManager()


def _shipped(name: str, task: str) -> dict[str, Any]:
    """The keys of a task that lm-eval ships, with its functions."""
    entry = _manager().task_index.get(task)
    if entry is None or entry.yaml_path is None or entry.kind.name != "TASK":
        found = "no task" if entry is None else f"a {entry.kind.name.lower()}, no single task,"
        raise RequestError(f"benchmarks.{name}.task: lm-eval has {found} {task!r}")
    from lm_eval.tasks._yaml_loader import load_yaml

    return dict(load_yaml(entry.yaml_path, resolve_func=True))


def _demand_means(name: str, benchmark: LmEval, task: Any) -> None:
    aggregations, better = task.aggregation(), task.higher_is_better()
    for figure in benchmark.figures:
        metric = figure.partition(",")[0]
        if metric not in aggregations:
            raise RequestError(f"benchmarks.{name}.figures: no metric {metric!r}; it has {', '.join(aggregations)}")
        if aggregations[metric].__name__ != "mean" or not better.get(metric):
            raise RequestError(
                f"benchmarks.{name}.figures: {metric!r} is no mean of rows of which more is better; only these have a "
                "value for each row"
            )


def _answered(name: str, benchmark: LmEval, task: Any, one: Asked, requests: Sequence[Any]) -> Answered:
    ordered = sorted(requests, key=lambda each: each.idx)
    values: dict[str, float] = {}
    first = next(iter(ordered[0].filtered_resps))
    for figure in benchmark.figures:
        metric, _, wanted = figure.partition(",")
        if (key := wanted or first) not in ordered[0].filtered_resps:
            raise RequestError(f"benchmarks.{name}.figures: no filter {key!r}; {', '.join(ordered[0].filtered_resps)}")
        found = task.process_results(ordered[0].doc, [each.filtered_resps[key] for each in ordered])
        values[spelt(figure)] = float(found[metric])
    texts = [each.resps[0] for each in ordered]
    if isinstance(texts[0], str):
        return Answered(one.number, one.id, values, texts[0].strip(), {})
    likeliest = max(range(len(texts)), key=lambda place: texts[place][0])
    details = {"logprobs": [text[0] for text in texts], "context": ordered[0].args[0]}
    return Answered(one.number, one.id, values, str(ordered[likeliest].args[1]).strip(), details)


def responses(model: nn.Module, requests: Sequence[Any], tokenization: Tokenization) -> list[Any]:
    """What a model answers to requests of the harness: (log-likelihood, is greedy), or text."""
    kinds = {request.request_type for request in requests}
    if kinds <= {"loglikelihood", "multiple_choice"}:
        return _likelihoods(model, [request.args for request in requests], tokenization)
    if kinds == {"generate_until"}:
        return _texts(model, [request.args for request in requests], tokenization)
    raise RequestError(f"lm-eval's requests of kind {', '.join(sorted(kinds))} are not answered here")


def _most(model: Any) -> int:
    """Tokens that a model reads; more of them are cut off on the left, as lm-eval does."""
    return int(getattr(model.config, "max_position_embeddings", None) or 2048)


def _likelihoods(model: Any, pairs: Sequence[tuple[str, str]], tokenization: Tokenization) -> list[Likelihood]:
    most = _most(model)
    cases = []
    for scored in (tokenized(context, text, tokenization) for context, text in pairs):
        cut = max(0, len(scored.tokens) - most - 1)
        cases.append([Scored(scored.tokens[cut:], max(1, scored.start - cut))])
    found = {place: values[0] for done in log_likelihoods(model, cases) for place, values in done.items()}
    return [found[place] for place in range(len(cases))]


def _texts(model: Any, requests: Sequence[tuple[str, dict[str, Any]]], tokenization: Tokenization) -> list[str]:
    lengths = [_length(settings) for _, settings in requests]
    prompts = [
        tokens[-max(1, _most(model) - length) :]
        for tokens, length in zip(tokenization.encode_openings([text for text, _ in requests]), lengths, strict=True)
    ]
    order = sorted(range(len(requests)), key=lambda place: (lengths[place], -len(prompts[place])))
    found: dict[int, str] = {}
    for length, places in groupby(order, key=lambda place: lengths[place]):
        for batch in _batched(places, PROMPTS_AT_ONCE):
            written = _written(model, [prompts[place] for place in batch], length, tokenization)
            found |= dict(zip(batch, written, strict=True))
    return [_cut(found[place], settings) for place, (_, settings) in enumerate(requests)]


def _length(settings: Mapping[str, Any]) -> int:
    """Most tokens of an answer."""
    if settings.get("do_sample") or float(settings.get("temperature") or 0) > 0:
        raise RequestError("lm-eval's task draws answers (do_sample); only greedy ones are supported")
    return int(settings.get("max_gen_toks") or settings.get("max_new_tokens") or MAX_NEW_TOKENS)


def _written(model: Any, prompts: Sequence[Sequence[int]], length: int, tokenization: Tokenization) -> list[str]:
    """What a model writes after each prompt, greedily."""
    device, sampling = next(model.parameters()).device, sampling_settings(tokenization, length, 0.0)
    batch = pad_texts([np.asarray(tokens) for tokens in prompts], sampling.pad_id, left=True)
    with torch.no_grad():
        made = generate(model, batch.input_ids_BT.to(device), batch.attention_mask_BT.to(device), sampling, None)
    rows = zip(made.tokens_BR, made.response_mask_BR, strict=True)
    return [tokenization.decode(tokens[mask].tolist()) for tokens, mask in rows]


def _cut(text: str, settings: Mapping[str, Any]) -> str:
    """A text up to the first of the settings' ends."""
    until = settings.get("until") or []
    for end in [until] if isinstance(until, str) else until:
        text = text.split(end)[0] if end else text
    return text
