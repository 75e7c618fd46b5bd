"""The kinds of language models: what there is to know of each, in one table (pure)."""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

from recipes.artifact_kinds import OutputKind

ModelKind = Literal[
    "language_model",
    "masked_model",
    "seq2seq_model",
    "score_model",
    "value_model",
    "text_classifier",
    "vision_language_model",
]
"""Stock class: ...ForCausalLM, ...ForMaskedLM, ...ForConditionalGeneration, with one label
...ForSequenceClassification and ...ForTokenClassification, with classes ...ForSequenceClassification;
...ForConditionalGeneration with images."""


@dataclass(frozen=True, slots=True)
class KindFacts:
    """What is known of a kind of model wherever it matters which one a model is."""

    output: OutputKind
    """What an artifact of one is."""
    auto_class: str
    """transformers' class that opens one of any type."""
    predicts_tokens: bool = False
    """Whether its outputs are logits over the vocabulary at every position, as those of all that is pretrained."""
    writes: bool = False
    """Whether it writes text, and so has a configuration of how."""
    fills_masks: bool = False
    has_score: bool = False
    """Whether its head gives one number, of a sequence or of each token."""
    scores_tokens: bool = False
    has_classes: bool = False
    reads_targets: bool = False
    """Whether a separate decoder reads the targets."""
    reads_images: bool = False

    @property
    def continues(self) -> bool:
        """Whether it continues what it reads."""
        return self.writes and not self.reads_targets

    @property
    def reads_both_ways(self) -> bool:
        """Whether it is an encoder."""
        return self.fills_masks or self.has_classes


MODEL_KINDS: dict[ModelKind, KindFacts] = {
    "language_model": KindFacts("model", "AutoModelForCausalLM", predicts_tokens=True, writes=True),
    "masked_model": KindFacts("model", "AutoModelForMaskedLM", predicts_tokens=True, fills_masks=True),
    "seq2seq_model": KindFacts("model", "AutoModelForSeq2SeqLM", predicts_tokens=True, writes=True, reads_targets=True),
    "vision_language_model": KindFacts(
        "model", "AutoModelForImageTextToText", predicts_tokens=True, writes=True, reads_images=True
    ),
    "score_model": KindFacts("reward_model", "AutoModelForSequenceClassification", has_score=True),
    "value_model": KindFacts("critic", "AutoModelForTokenClassification", has_score=True, scores_tokens=True),
    "text_classifier": KindFacts("text_classifier", "AutoModelForSequenceClassification", has_classes=True),
}


def kinds_of(classes: Collection[str]) -> dict[ModelKind, KindFacts]:
    """The kinds of model that a type makes whose classes are known by these kinds."""
    return {kind: facts for kind, facts in MODEL_KINDS.items() if kind in classes}


def trained_kind(classes: Collection[str]) -> ModelKind:
    """Which kind of model is pretrained of such a type: there is one."""
    return next(kind for kind, facts in kinds_of(classes).items() if facts.predicts_tokens)


def has_images(classes: Collection[str]) -> bool:
    """Whether such a type reads images."""
    return any(facts.reads_images for facts in kinds_of(classes).values())
