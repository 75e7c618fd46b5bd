"""Pretraining: models of text, and models of images."""

from collections.abc import Iterator
from typing import ClassVar, Literal, Self

from pydantic import model_validator

from recipes.artifact_kinds import OutputKind
from recipes.data.images import ImageSource
from recipes.data.text import Source
from recipes.data.tokenizers import ExistingTokenizer, Tokenizer, TrainTokenizer
from recipes.errors import FieldFinding, Finding, at
from recipes.fields import added_meaning, meaning, raise_all, refuse
from recipes.models.architecture import TEXT_FAMILIES, Architecture
from recipes.models.base import TextFamily
from recipes.models.encoder import Corruption
from recipes.models.encoder_decoder import SpanCorruption
from recipes.models.images.architecture import ENCODING_KINDS, IMAGE_FAMILIES, ImageArchitecture
from recipes.problem_codes import Code
from recipes.stages.answers import Counts, Held, Input, Progress, Role, TextFacts
from recipes.stages.sharding import Shard
from recipes.stages.train import ImageTrain, Train
from recipes.stages.training_stage import ImageTraining, TextTraining
from recipes.tokenizers.sentinels import count_sentinels

CAPTION_READERS = "an encoder or a decoder"


class Pretrain(TextTraining):
    """Train a model of text, from random weights or from another model's.

    The objective follows from the family: the next token (decoder, rnn), hidden tokens (encoder), or hidden spans
    (encoder_decoder).
    """

    data_role: ClassVar[Role] = "text"
    reads_chats: ClassVar[bool] = False
    shown: ClassVar[tuple[str, ...]] = ("loss",)
    curves: ClassVar[tuple[str, ...]] = ("loss", "perplexity", "ngram_perplexity")
    kind: Literal["pretrain"] = meaning(description="Language-model training on plain text.")
    init_from: str | None = meaning(
        None, description="Continue from this model; then architecture and tokenizer are its own."
    )
    reset_weights: bool = added_meaning(
        False, description="With init_from: take its configuration and tokenizer, and start from random weights."
    )
    architecture: Architecture | None = meaning(None, description="What to build from random weights.")
    tokenizer: Tokenizer | None = meaning(None, description="Tokenizer to train or to take.")
    corruption: Corruption | None = meaning(
        None, description="encoder: what is hidden and has to be restored; null: the defaults."
    )
    span_corruption: SpanCorruption | None = meaning(
        None, description="encoder_decoder: which spans are hidden and have to be written; null: the defaults."
    )
    data: Source = meaning(description="Training text: rows with a `text` column, or with `prompt` and `completion`.")
    evaluation: Source | None = meaning(
        None, description="Held-out text; null: python-docs' validation split or the source's hold_out."
    )
    train: Train = meaning(description="Steps, batch, optimiser, cadences.")
    shard: Shard = meaning(default_factory=Shard, description="Engine, ZeRO stage, precision.")

    @model_validator(mode="after")
    def _one_origin(self) -> "Pretrain":
        if self.init_from is None and (self.architecture is None or self.tokenizer is None):
            refuse(Code.MISSING_KEY, "give architecture and tokenizer, or init_from")
        if self.init_from is not None and (self.architecture is not None or self.tokenizer is not None):
            refuse(Code.CONFLICTING_KEYS, "init_from brings its own architecture and tokenizer; remove them")
        return self

    def inputs(self) -> list[Input]:
        inputs = [] if self.init_from is None else [Input("init_from", self.init_from, ("model",))]
        if isinstance(self.tokenizer, ExistingTokenizer):
            inputs.append(Input("tokenizer.from", self.tokenizer.from_, ("tokenizer", "model")))
        return inputs

    def outputs(self) -> dict[str, OutputKind]:
        return {"model": "model"}

    def text_start(self) -> str | None:
        return self.init_from

    @property
    def own_tokenizer(self) -> Tokenizer | None:
        return self.tokenizer

    @property
    def own_architecture(self) -> Architecture | None:
        return self.architecture

    @property
    def draws_weights(self) -> bool:
        return self.reset_weights

    @property
    def counted_tokens(self) -> Literal["responses", "all"]:
        return "all"

    def refuse_model(self, family: TextFamily | None) -> Finding | None:
        if family is None or family.is_built_here:
            return None
        return Finding(Code.UNSUPPORTED_FAMILY, f"{family.plural} can only be fine-tuned")

    def text_rules(self, facts: TextFacts) -> Iterator[FieldFinding]:
        yield from super().text_rules(facts)
        if facts.is_classifier:
            message = "is a classifier already; pretraining starts from a pretrained encoder"
            yield at("init_from", self.init_from, Code.WRONG_ARTIFACT_KIND, message)
        if facts.family is not None and "span_corruption" in facts.family.keys:
            yield from self._sentinel_rules(facts)
        if facts.family is not None and isinstance(self.tokenizer, TrainTokenizer):
            yield from _token_rules(self.tokenizer, facts.family)

    def rules(self) -> Iterator[FieldFinding]:
        yield from super().rules()
        if self.reset_weights and self.init_from is None:
            message = "reset_weights has no effect without init_from"
            yield at("reset_weights", True, Code.NO_EFFECT, message, "remove the key")
        family = None if self.architecture is None else TEXT_FAMILIES[self.architecture.family]
        if family is not None and family.is_recurrent and not self.train.packing:
            message = f"{family.noun} reads its text as one stream"
            yield at("train.packing", False, Code.NOT_APPLICABLE, message, "remove the key")

    def no_checkpointing(self) -> Finding | None:
        family = None if self.architecture is None else TEXT_FAMILIES[self.architecture.family]
        if family is None or not family.is_recurrent:
            return None
        message = f"{family.noun} does not support gradient checkpointing"
        return Finding(Code.NOT_APPLICABLE, message, "remove the key")

    def _sentinel_rules(self, facts: TextFacts) -> Iterator[FieldFinding]:
        """An encoder-decoder needs a sentinel for every span that is hidden of its text."""
        if facts.special_tokens is None:
            return
        length, known = self.train.sequence_length, count_sentinels(facts.special_tokens)
        needed = (self.span_corruption or SpanCorruption()).num_spans(length)
        if known < needed:
            code = Code.TOO_FEW_SENTINELS
            message = f"{needed} spans are hidden of {length} tokens; the tokenizer has {known} sentinels"
            if isinstance(self.tokenizer, TrainTokenizer):
                yield at("tokenizer.num_sentinels", known, code, message, f"at least {needed}")
            else:
                yield at("train.sequence_length", length, code, message, "hide fewer spans")

    def progress(self, start_family: TextFamily | None = None) -> Progress:
        family = start_family if self.architecture is None else TEXT_FAMILIES[self.architecture.family]
        return Progress("step", "tokens" if family is None else family.pretraining_counts)

    def shrunk(self, *, is_built_here: bool) -> Self:
        return self._fewer_rows(
            architecture=None if self.architecture is None else self.architecture.shrunk(),
            tokenizer=None if self.tokenizer is None else self.tokenizer.shrunk(),
            train=self.train.shrunk(),
        )

    def held(self, counts: Counts) -> Held:
        return Held(counts.full, 0, counts.full)


class PretrainImages(ImageTraining):
    """Train a model of images from random weights: a classifier, or one that draws."""

    shown: ClassVar[tuple[str, ...]] = ("loss", "accuracy", "elbo", "generator_loss")
    curves: ClassVar[tuple[str, ...]] = ("loss", "kl", "accuracy", "elbo", "mse", "bits_per_dim")
    kind: Literal["pretrain"] = meaning(description="Training on images.")
    architecture: ImageArchitecture = meaning(description="The family: its network and its objective.")
    autoencoder: str | None = meaning(
        None, description="ddpm: a VAE of type autoencoder_kl in whose latents the diffusion runs; null: in pixels."
    )
    text_encoder: str | None = meaning(
        None,
        description="ddpm: an encoder or decoder whose hidden states of the captions condition the images; it stays "
        "as it is, and its tokenizer reads the captions. null: no captions.",
    )
    data: ImageSource = meaning(description="Training images, with labels or captions where the family needs them.")
    evaluation: ImageSource | None = meaning(None, description="Held-out images; null: the source's hold_out.")
    train: ImageTrain = meaning(description="Steps, batch, optimiser, cadences.")
    shard: Shard = meaning(default_factory=Shard, description="Engine, ZeRO stage, precision.")

    @model_validator(mode="after")
    def _fitting(self) -> "PretrainImages":
        raise_all(self._misfits())
        return self

    def _misfits(self) -> Iterator[Finding]:
        for key in ("autoencoder", "text_encoder"):
            if getattr(self, key) is not None and key not in self.architecture.keys:
                owners = " or ".join(kind for kind, family in IMAGE_FAMILIES.items() if key in family.keys)
                message = f"{key} needs family {owners}; the family here is {self.architecture.family}"
                yield Finding(Code.NOT_APPLICABLE, message)
        yield from self.architecture.condition_rules(reads_captions=self.text_encoder is not None)

    def inputs(self) -> list[Input]:
        inputs = [] if self.autoencoder is None else [Input("autoencoder", self.autoencoder, ENCODING_KINDS)]
        if self.text_encoder is not None:
            inputs.append(Input("text_encoder", self.text_encoder, ("model", "text_classifier")))
        return inputs

    def outputs(self) -> dict[str, OutputKind]:
        return {"model": self.architecture.kind()}

    @property
    def largest_zero(self) -> int:
        return self.architecture.largest_zero

    def rules(self) -> Iterator[FieldFinding]:
        yield from super().rules()
        if self.shard.zero != "auto" and self.shard.zero > self.largest_zero:
            message = "its networks call each other, so each worker needs all parameters"
            yield at("shard.zero", self.shard.zero, Code.OUT_OF_RANGE, message, f"at most {self.largest_zero}")
        yield from self.architecture.training_rules(steps=self.steps(), grid=self.train.grid)

    def progress(self, start_family: TextFamily | None = None) -> Progress:
        return Progress("step", "images")

    def shrunk(self, *, is_built_here: bool) -> Self:
        return self._fewer_rows(architecture=self.architecture.shrunk(), train=self.train.shrunk())


def _token_rules(tokenizer: TrainTokenizer, family: TextFamily) -> Iterator[FieldFinding]:
    for key in family.needed_tokens:
        if getattr(tokenizer, key) is None:
            advice = f'for example "<|{key[:-6]}|>"'
            yield at(f"tokenizer.{key}", "", Code.MISSING_SPECIAL_TOKEN, f"{family.noun} needs this token", advice)
    if tokenizer.cls_token is not None and "cls_token" not in family.needed_tokens:
        message = "with it the tokenizer would end every prompt with the end token; it is for encoders only"
        yield at("tokenizer.cls_token", tokenizer.cls_token, Code.NOT_APPLICABLE, message, "remove the key")


def text_encoder_rule(family: TextFamily | None) -> Finding | None:
    """Why a language model of a family cannot read captions; None: it can, or the family is not known."""
    if family is None or family.reads_captions:
        return None
    return Finding(Code.UNSUPPORTED_FAMILY, f"{family.noun} cannot be a text_encoder", CAPTION_READERS)
