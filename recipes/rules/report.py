"""Names of the metrics in an evaluation's report, gates on ones that it will not have, and models that it refuses."""

from collections.abc import Iterator, Sequence

from recipes.errors import Finding, Problem
from recipes.loading.document import LoadedRecipe
from recipes.loading.schema_paths import nearest
from recipes.problem_codes import Code
from recipes.references import FolderRef, HubRef, StageRef, StoreRef, parse_reference
from recipes.stages.base import SOURCE_FIELDS
from recipes.stages.evaluate import Evaluate
from recipes.stages.reward import Reward

PERPLEXITY = ("perplexity", "ngram_perplexity")
"""The second is of an n-gram model counted on the text that the model's chain learnt from, where the store has it."""
GENERATION = ("length_mean", "eos_rate", "distinct_2", "repetition", "kl", "kl_k3")
TARGETS = ("loss", "perplexity", "bleu", "chrf", "eos_rate", "length_mean", "rows_left_out")
"""Of encoder-decoders: the loss of a target's token in nats, then what was written against the targets."""
SCORES = ("score_mean", "score_sd")
PICTURES = (
    "fid", "fid_low", "fid_high", "fid_real", "fid_real_low", "fid_real_high", "fid_ratio", "kid", "kid_low",
    "kid_high", "precision", "recall", "coverage", "confidence", "classes_present",
    "smallest_class_share", "class_accuracy", "nearest_training", "nearest_training_real", "copy_share",
)  # fmt: skip
AGAINST_START = ("win_rate", "win_rate_low", "win_rate_high", "score_gain_sd")


def report_labels(texts: Sequence[str]) -> list[str]:
    """Short names of an evaluation's models as metric names spell them, told apart by a number where they are equal."""
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


def report_metrics(stage: Evaluate) -> set[str]:
    """Every metric that the stage's report can hold."""
    labels = report_labels(stage.of)
    names = set()
    if "perplexity" in stage.suites:
        names |= {f"{label}.{name}" for label in labels for name in PERPLEXITY}
    if "generation" in stage.suites or "comparison" in stage.suites:
        names |= {f"{label}.{name}" for label in labels for name in GENERATION} | {"prompts"}
    if "comparison" in stage.suites:
        scores = SCORES if stage.second_scorer is None else (*SCORES, "second_score_mean")
        names |= {f"{label}.{name}" for label in labels for name in scores}
        names |= {f"{label}.{name}" for label in labels[1:] for name in AGAINST_START}
    if "targets" in stage.suites:
        names |= {f"{label}.{name}" for label in labels for name in TARGETS} | {"prompts"}
    if "images" in stage.suites:
        names |= {f"{label}.{name}" for label in labels for name in PICTURES} | {"pictures", "draws"}
    return names


def _is_known(loaded: LoadedRecipe, text: str) -> bool:
    """Whether a reference, if to a stage at all, means one of the recipe's, so that its metrics have the right name."""
    reference = parse_reference(text)
    return not isinstance(reference, StageRef) or reference.stage in {*loaded.recipe.stages, *loaded.unsound}


def unmeasured(family: str | None, suites: Sequence[str]) -> Finding | None:
    """Why an evaluation's suites of text do not measure a family, and what would be right; None: they do."""
    match family:
        case "encoder":
            message = "an encoder predicts no next token; its own finetune reports how it classifies"
            return Finding(Code.UNSUPPORTED_FAMILY, message, "remove it")
        case "vision_language":
            message = "an evaluate stage takes no vision-language model"
            return Finding(Code.UNSUPPORTED_FAMILY, message, "its own finetune reports how it answers")
        case "encoder_decoder" if "targets" not in suites:
            message = "an encoder-decoder writes targets of sources"
            return Finding(Code.UNSUPPORTED_FAMILY, message, "suites: [targets]")
        case "decoder" | "rnn" if "targets" in suites:
            found = "an rnn" if family == "rnn" else "a decoder"
            message = f"suite 'targets' measures encoder-decoders; this model is {found}"
            return Finding(Code.UNSUPPORTED_FAMILY, message, "suites: [perplexity]")
    return None


def check_gates(loaded: LoadedRecipe) -> Iterator[Problem]:
    """Gates on metrics that will not be measured, and bounds that nothing can meet."""
    for name, stage in loaded.stages_with(*SOURCE_FIELDS):
        if isinstance(stage, Reward) and all(use.field_path != "evaluation" for use in stage.sources()):
            message = "there are no held-out pairs, and the gate needs their accuracy"
            yield loaded.problem(
                Code.MISSING_HELD_OUT,
                f"stages.{name}.data",
                "",
                message,
                "give `evaluation`, or `hold_out: 0.05` in `data`",
            )
    for name, stage in loaded.stages_with("of", "suites", "second_scorer", "gates"):
        if not isinstance(stage, Evaluate) or not stage.gates:
            continue
        try:
            known = sorted(report_metrics(stage))
        except ValueError:
            continue
        for index, gate in enumerate(stage.gates):
            place = f"stages.{name}.gates.{index}"
            if gate.metric not in known and all(_is_known(loaded, text) for text in stage.of):
                guess = nearest(gate.metric, known)
                suggestion = f"did you mean {guess}?" if guess else "there are: " + ", ".join(known)
                message = f"the report of the suites {', '.join(stage.suites)} has no such metric"
                yield loaded.problem(Code.UNKNOWN_METRIC, f"{place}.metric", gate.metric, message, suggestion)
            if gate.min is not None and gate.max is not None and gate.min > gate.max:
                yield loaded.problem(
                    Code.MIN_ABOVE_MAX, f"{place}.min", gate.min, f"min must be at most max ({gate.max})"
                )
