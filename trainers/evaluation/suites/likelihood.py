"""Benchmarks by likelihood: multiple choice, TruthfulQA, pairs of sentences."""

from collections.abc import Iterator, Sequence

from recipes.stages.benchmarks.union import AnyBenchmark
from recipes.stages.evaluate import Evaluate
from trainers.data.tokenizer import Tokenization
from trainers.evaluation.cases import Answered, Asked
from trainers.evaluation.suite import open_measured
from trainers.inference.likelihood import log_likelihoods, tokenized
from trainers.training.context import StageContext


def choose(
    spec: Evaluate,
    context: StageContext,
    benchmark: AnyBenchmark,
    path: str,
    tokenization: Tokenization,
    asked: Sequence[Asked],
) -> Iterator[list[Answered]]:
    """Yield what a model holds for likeliest, some cases at a time; one that is too long is an error of the recipe."""
    model = open_measured(spec, context, path, "language_model")
    texts = [[tokenized(option.context, option.text, tokenization) for option in one.case.options] for one in asked]
    for found in log_likelihoods(model, texts):
        answers: list[Answered] = []
        for place, likelihoods in found.items():
            one, logprobs = asked[place], [each.nats for each in likelihoods]
            values, said = benchmark.values(likelihoods, one.case), benchmark.picked(logprobs, one.case)
            details = {"logprobs": logprobs, "right": list(one.case.right)}
            answers.append(Answered(one.number, one.id, values, said, details))
        yield answers
