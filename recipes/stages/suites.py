"""Suites of an evaluation: what each measures, of which models, from which keys, and what its report holds."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from recipes.references import FolderRef, HubRef, StageRef, StoreRef, parse_reference
from recipes.stages.answers import Role

SuiteName = Literal["perplexity", "generation", "comparison", "targets", "images"]

PERPLEXITY = ("perplexity", "ngram_perplexity")
"""The second is of an n-gram model counted on the text that the model's chain learnt from, where the store has it."""
GENERATION = ("length_mean", "eos_rate", "distinct_2", "repetition", "kl", "kl_k3")
SCORES = ("score_mean", "score_sd", "second_score_mean")
AGAINST_FIRST = ("win_rate", "win_rate_low", "win_rate_high", "score_gain_sd")
TARGETS = ("loss", "perplexity", "bleu", "chrf", "eos_rate", "length_mean", "rows_left_out")
"""Of encoder-decoders: the loss of a target's token in nats, then what was written against the targets."""
IMAGES = (
    "fid", "fid_low", "fid_high", "fid_real", "fid_real_low", "fid_real_high", "fid_ratio", "kid", "kid_low",
    "kid_high", "precision", "recall", "coverage", "confidence", "classes_present",
    "smallest_class_share", "class_accuracy", "nearest_training", "nearest_training_real", "copy_share",
)  # fmt: skip


@dataclass(frozen=True)
class SuiteSpec:
    """What a recipe has to know of a suite; what measures is in `trainers.evaluation` and `rlhf`."""

    measures: str
    """Kind of model, in words."""
    metrics: tuple[str, ...]
    """Of each model."""
    against_first: tuple[str, ...] = ()
    """Of each model but the first, which they are compared with."""
    totals: tuple[str, ...] = ()
    """Metrics of no single model."""
    source: tuple[str, Role] | None = None
    """Key of the text that it reads, and the rows' role."""
    needs: tuple[str, ...] = ()
    """Keys that must be given."""
    takes: tuple[str, ...] = ()
    """Keys that serve this suite alone."""
    refuses: tuple[str, ...] = ()
    """Keys that have no effect with it."""
    num_models: int = 1
    """Least number of models."""
    is_alone: bool = False
    """Whether no other suite measures its models."""


SUITES: dict[SuiteName, SuiteSpec] = {
    "perplexity": SuiteSpec("language models", PERPLEXITY, source=("text", "text"), takes=("num_sequences",)),
    "generation": SuiteSpec("language models", GENERATION, totals=("prompts",), source=("prompts", "prompts")),
    "comparison": SuiteSpec(
        "language models",
        (*GENERATION, *SCORES),
        against_first=AGAINST_FIRST,
        totals=("prompts",),
        source=("prompts", "prompts"),
        needs=("reward",),
        num_models=2,
    ),
    "targets": SuiteSpec(
        "encoder-decoders",
        TARGETS,
        totals=("prompts",),
        source=("prompts", "seq2seq"),
        takes=("num_beams",),
        refuses=("reward", "second_scorer"),
        is_alone=True,
    ),
    "images": SuiteSpec(
        "image models",
        IMAGES,
        totals=("images", "draws"),
        needs=("features", "images"),
        takes=("features", "images"),
        is_alone=True,
    ),
}


def report_labels(texts: Sequence[str]) -> list[str]:
    """Short names of an evaluation's models as metric names spell them, numbered where they are equal."""
    labels: list[str] = []
    for text in texts:
        match parse_reference(text):
            case StageRef(stage, part):
                name = stage if part is None else f"{stage}_{part}"
            case FolderRef(path):
                name = path.rstrip("/").rsplit("/", 1)[-1]
            case HubRef(repo, _):
                name = repo.rsplit("/", 1)[-1]
            case StoreRef(name_or_fingerprint, _):
                name = name_or_fingerprint
        label = "".join(c if c.isascii() and c.isalnum() else "_" for c in name.lower()) or "model"
        taken = sum(other == label or other.startswith(f"{label}_n") for other in labels)
        labels.append(label if taken == 0 else f"{label}_n{taken + 1}")
    return labels
