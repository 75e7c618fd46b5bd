"""Which function measures each suite of an evaluation; suites whose models share their answers share one."""

from collections.abc import Sequence

from recipes.stages.evaluate import Evaluate
from recipes.stages.suites import SUITES, SuiteName
from rlhf.text.answers import measure_answers
from trainers.evaluation.suite import Measured, Parts, Suite
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


def suites_of(spec: Evaluate) -> list[Suite]:
    """Return what measures the stage's models, each once."""
    return list(dict.fromkeys(MEASURES[name] for name in SUITES if name in spec.suites))
