"""Which function measures each suite of an evaluation; suites whose models share their answers share one."""

from collections.abc import Sequence
from functools import partial

from recipes.stages.evaluate import Evaluate
from recipes.stages.suites import SUITES, SuiteName
from rlhf.text.answers import measure_answers
from rlhf.text.written_answers import write
from trainers.evaluation.cases import Answer, measure_benchmark
from trainers.evaluation.suite import Measured, Parts, Suite
from trainers.evaluation.suites.likelihood import choose
from trainers.evaluation.suites.lm_eval_task import ask_task
from trainers.evaluation.suites.perplexity import measure_perplexity
from trainers.evaluation.suites.seq2seq import measure_targets
from trainers.training.context import StageContext


def _measure_images(spec: Evaluate, context: StageContext, labels: Sequence[str], parts: Parts) -> Measured:
    from trainers.evaluation.suites.images import measure_images  # imports image families, which text does not need

    return measure_images(spec, context, labels, parts)


MEASURES: dict[SuiteName, Suite] = {
    "perplexity": measure_perplexity,
    "generation": measure_answers,
    "comparison": measure_answers,
    "targets": measure_targets,
    "images": _measure_images,
}

ANSWERS: dict[str, Answer] = {
    "multiple_choice": choose,
    "last_word": choose,
    "pairs": choose,
    "bbq": choose,
    "generate": write,
    "code": write,
    "lm_eval": ask_task,
}
"""Who answers the cases of each suite of benchmarks."""


def suites_of(spec: Evaluate) -> list[Suite]:
    """Return what measures the stage's models, each once, and then its benchmarks."""
    found = list(dict.fromkeys(MEASURES[name] for name in SUITES if name in spec.suites))
    asked = [partial(measure_benchmark, name, ANSWERS[benchmark.suite]) for name, benchmark in spec.benchmarks.items()]
    return [*found, *asked]
