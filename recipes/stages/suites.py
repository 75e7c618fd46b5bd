"""Suites of an evaluation: what each measures, of which models, from which keys, and what its report holds."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from recipes.references import FolderRef, HubRef, StageRef, StoreRef, parse_reference
from recipes.stages.answers import Role

SuiteName = Literal["perplexity", "generation", "comparison", "targets", "images"]

PERPLEXITY = ("perplexity", "ngram_perplexity")
"""The second is of an n-gram model counted on the text that the model's chain learnt from, where the store has it."""
TRUTH, NOISE = "truth", "random_tokens"
"""Labels of reference answers, scored next to the models': the data's own, and random tokens of the same length."""
TEXTS = ("length_mean", "distinct_2", "repetition", "real_words", "ngram_loss")
"""Of any answers. The last two are by the text that the first model's chain learnt from, where the store has it: the
share of words that it holds, and the loss of an n-gram model counted on it, in nats a token.
"""
GENERATION = (*TEXTS, "eos_rate", "kl", "kl_k3")
SCORES = ("score_mean", "score_sd")
WINS = ("win_rate_{}", "win_rate_{}_low", "win_rate_{}_high")
"""By a term of the reward, over the first model."""
BEATS_TRUTH = "beats_truth_{}"
"""By a term of the reward: the share of prompts at which an answer has more than the true one, ties counted half."""
FIGURES_FILE = "benchmarks.json"
"""Of an evaluation's artifact: the figures of each benchmark, and those of which more is better."""
INTERVAL, NUM_CASES = ("_low", "_high"), "n"
"""Of a benchmark's figures: the ends of the 95 % interval, and how many rows it is of."""
GAIN = ("_gain", "_gain_low", "_gain_high", "_gain_p")
"""What a later model has more of them than the first on the same rows, its 95 % interval, and the test's p-value."""
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
    of_known: tuple[str, ...] = ()
    """Metrics of reference answers."""
    counts_wins: bool = False
    """Whether models and reference answers are compared with the first model and with the truth."""
    totals: tuple[str, ...] = ()
    """Metrics of no single model."""
    source: tuple[str, Role] | None = None
    """Key of the text that it reads, and the rows' role."""
    needs: tuple[str, ...] = ()
    """Keys that must be given."""
    takes: tuple[str, ...] = ()
    """Keys that serve this suite alone."""
    num_models: int = 1
    """Least number of models."""
    is_alone: bool = False
    """Whether no other suite measures its models."""


SUITES: dict[SuiteName, SuiteSpec] = {
    "perplexity": SuiteSpec("language models", PERPLEXITY, source=("text", "text"), takes=("num_sequences",)),
    "generation": SuiteSpec(
        "language models", GENERATION, of_known=TEXTS, totals=("prompts",), source=("prompts", "prompts")
    ),
    "comparison": SuiteSpec(
        "language models",
        (*GENERATION, *SCORES),
        of_known=(*TEXTS, *SCORES),
        counts_wins=True,
        totals=("prompts",),
        source=("prompts", "prompts"),
        needs=("rewards",),
        num_models=2,
    ),
    "targets": SuiteSpec(
        "encoder-decoders",
        TARGETS,
        totals=("prompts",),
        source=("prompts", "seq2seq"),
        takes=("num_beams",),
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


def noise_findings(metrics: Mapping[str, Any]) -> list[str]:
    """What is to be known before any win rate of a report is read: terms that prefer noise to the truth."""
    prefix, found = f"{NOISE}.{BEATS_TRUTH.format('')}", []
    for name, share in metrics.items():
        if name.startswith(prefix) and share > 0.5:
            term = name.removeprefix(prefix)
            found.append(
                f"{term} prefers random tokens to the true answer at {share:.0%} of the prompts: what it says of a "
                "policy's answers is not their quality"
            )
    return found


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
        taken = sum(other == label or other.startswith(f"{label}_n") for other in (TRUTH, NOISE, *labels))
        labels.append(label if taken == 0 else f"{label}_n{taken + 1}")
    return labels
