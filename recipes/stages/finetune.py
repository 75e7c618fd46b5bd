"""Fine-tuning: models of text on rows, diffusion models on further images."""

from collections.abc import Iterator
from typing import ClassVar, Literal, Self

from recipes.artifact_kinds import ImageKind, OutputKind
from recipes.data.images import ImageSource
from recipes.data.text import Source
from recipes.errors import FieldFinding, at
from recipes.fields import added_meaning, meaning
from recipes.models.base import TextFamily
from recipes.models.encoder import PseudoLabels
from recipes.models.type_table import Capability
from recipes.problem_codes import Code
from recipes.stages.answers import Counts, Held, Input, Progress, Role, Template, TextFacts, template_field
from recipes.stages.lora import CLASSIFIER_HEAD, Lora, pattern_rules
from recipes.stages.sharding import Shard
from recipes.stages.train import ImageTrain, Train
from recipes.stages.training_stage import ImageTraining, TextTraining

Part = Literal["language", "projector", "vision"]
"""Parts of a vision-language model."""


class Finetune(TextTraining):
    """Supervised learning on rows: responses to prompts (decoder, rnn) or to images with prompts (vision_language),
    targets of sources (encoder_decoder), or labels of texts (encoder).
    """

    data_role: ClassVar[Role] = "instructions"
    shown: ClassVar[tuple[str, ...]] = ("loss", "accuracy")
    curves: ClassVar[tuple[str, ...]] = ("loss", "accuracy", "perplexity", "ngram_perplexity")
    kind: Literal["finetune"] = meaning(description="Supervised fine-tuning.")
    init_from: str = meaning(description="The model to start from.")
    lora: Lora | None = meaning(None, description="Train adapters; null trains every parameter.")
    merge: bool = meaning(True, description="With lora: also commit the merged model; later stages need it.")
    loss_on: Literal["responses", "all"] = meaning("responses", description="Which tokens the loss counts.")
    template: Template | None = template_field("a `prompt` and its `completion`")
    parts: list[Part] | None = meaning(
        None,
        min_length=1,
        description="vision_language: which parts learn; null: with lora the language part, without it all of them.",
    )
    trainable: list[str] = added_meaning(
        [],
        description="Regular expressions that the names of parameters that learn start with; empty: what `lora` and "
        "`parts` say, else all of them.",
    )
    new_tokens: list[str] = added_meaning(
        [],
        description="Tokens that are added to the tokenizer; their rows of embedding and head start as the mean of the "
        "others.",
    )
    labelled_share: float = meaning(
        1.0, gt=0, le=1, description="encoder: share of the rows, chosen by their hash, whose labels are used."
    )
    pseudo_labels: PseudoLabels | None = meaning(
        None, description="encoder: learn from the rows without a label too; null leaves them out."
    )
    dropout: float | None = meaning(
        None,
        ge=0,
        lt=1,
        description="encoder: dropout on embeddings, residual branches and the input of the head while labels are "
        "learnt; null: the model's own.",
    )
    num_beams: int = meaning(
        1, ge=1, le=64, description="encoder_decoder: beams of the search that held-out BLEU and chrF are measured by."
    )
    data: Source = meaning(
        description="Rows with `messages`, `prompt`/`completion`, or `text`; for an encoder `text` and `label`; for a "
        "vision-language model also `image` or `images`."
    )
    evaluation: Source | None = meaning(
        None, description="Held-out rows; null: python-docs' validation split or hold_out."
    )
    train: Train = meaning(description="Steps, batch, optimiser, cadences.")
    shard: Shard = meaning(default_factory=Shard, description="Engine, ZeRO stage, precision.")

    def inputs(self) -> list[Input]:
        return [Input("init_from", self.init_from, ("model",))]

    def rules(self) -> Iterator[FieldFinding]:
        yield from super().rules()
        if self.lora is not None and self.new_tokens:
            message = "the adapter would be of a base with fewer tokens, which peft does not open it on"
            advice = "a stage before with new_tokens and `trainable: [embeddings]`, then lora with modules_to_save"
            yield at("new_tokens", self.new_tokens, Code.CONFLICTING_KEYS, message, advice)
        if self.lora is not None and self.trainable:
            message = "with lora the base is frozen; lora.modules_to_save names what learns whole"
            yield at("trainable", self.trainable, Code.CONFLICTING_KEYS, message, "remove one of them")
        for key in ("trainable", "new_tokens"):
            yield from _listed(key, getattr(self, key))
        for index, pattern in enumerate(self.trainable):
            yield from pattern_rules(f"trainable.{index}", pattern)

    def outputs(self) -> dict[str, OutputKind]:
        if self.lora is None:
            return {"model": "model"}
        return {"model": "model", "adapter": "adapter"} if self.merge else {"adapter": "adapter"}

    def text_rules(self, facts: TextFacts) -> Iterator[FieldFinding]:
        yield from super().text_rules(facts)
        if facts.is_classifier:
            message = "is a classifier already; a classifier starts from a pretrained encoder"
            yield at("init_from", self.init_from, Code.WRONG_ARTIFACT_KIND, message)
        if facts.image_tokens is not None and self.train.sequence_length < facts.image_tokens + 2:
            message = f"one image takes {facts.image_tokens} tokens of this model, which leaves no room for an answer"
            advice, length = f"above {facts.image_tokens + 1}", self.train.sequence_length
            yield at("train.sequence_length", length, Code.SEQUENCE_TOO_SHORT, message, advice)
        family = facts.family
        if self.new_tokens and family is not None and (family.has_classes or family.reads_images):
            message = f"no tokens are added to {family.noun}"
            yield at("new_tokens", self.new_tokens, Code.NOT_APPLICABLE, message, "remove the key")
        if self.is_classifier(family):
            yield from self._pseudo_label_rules()
        if self.lora is not None and family is not None and not family.takes_adapters:
            message = f"{family.noun} has no linear modules for an adapter"
            yield at("lora", "", Code.NOT_APPLICABLE, message, "remove the key")
        if family is not None and family.reads_targets and self.loss_on == "all":
            message = f"{family.noun} only generates targets; sources have no loss"
            yield at("loss_on", "all", Code.NOT_APPLICABLE, message, "remove the key")

    def _pseudo_label_rules(self) -> Iterator[FieldFinding]:
        if self.pseudo_labels is None:
            return
        if self.labelled_share == 1 and self.data.has_labels:
            yield FieldFinding("pseudo_labels", "", self.pseudo_labels.needs_unlabelled(self.data.source))
        steps, warmup = self.steps(), self.pseudo_labels.warmup_steps
        if steps is not None and warmup >= steps:
            message = f"pseudo-labels would never be used; the stage has {steps} steps"
            yield at("pseudo_labels.warmup_steps", warmup, Code.WARMUP_TOO_LONG, message, f"below {steps}")

    def needs(self) -> dict[Capability, tuple[str, str]]:
        needed = super().needs()
        if self.num_beams > 1:
            needed["generation"] = ("num_beams", "remove the key")
        return {**needed, "classes": ("init_from", "")}

    def is_classifier(self, family: TextFamily | None) -> bool:
        return family is not None and family.has_classes

    def new_heads(self, family: TextFamily | None) -> tuple[str, ...]:
        return (CLASSIFIER_HEAD,) if self.is_classifier(family) else ()

    @property
    def added_tokens(self) -> list[str]:
        return self.new_tokens

    @property
    def counted_tokens(self) -> Literal["responses", "all"]:
        return self.loss_on

    def text_start(self) -> str:
        return self.init_from

    def progress(self, start_family: TextFamily | None = None) -> Progress:
        if self.is_classifier(start_family):
            return Progress("step", "rows")
        return Progress("step", "target_tokens" if self.loss_on == "responses" else "tokens")

    def shrunk(self, *, is_built_here: bool) -> Self:
        # A model from outside the recipe keeps its size, and the length that its rows and images need.
        train = self.train.shrunk()
        return self._fewer_rows(
            pseudo_labels=None if self.pseudo_labels is None else self.pseudo_labels.shrunk(),
            train=train if is_built_here else train.changed(sequence_length=self.train.sequence_length),
        )

    def held(self, counts: Counts) -> Held:
        if self.lora is None:
            return Held(counts.full, 0, counts.full)
        return Held(counts.adapter, counts.frozen, counts.adapter + (counts.full if self.merge else 0))


def _listed(key: str, items: list[str]) -> Iterator[FieldFinding]:
    """Items that are empty or listed twice."""
    for index, item in enumerate(items):
        if not item:
            yield at(f"{key}.{index}", item, Code.WRONG_LENGTH, "must not be empty")
        elif item in items[:index]:
            yield at(f"{key}.{index}", item, Code.DUPLICATE_ITEM, "listed twice")


class FinetuneImages(ImageTraining):
    """Continue training a model of images on other images; labels or captions stay what it was conditioned on."""

    shown: ClassVar[tuple[str, ...]] = ("loss",)
    curves: ClassVar[tuple[str, ...]] = ("loss", "mse", "bits_per_dim")
    kind: Literal["finetune"] = meaning(description="Fine-tuning on images.")
    family: Literal["ddpm"] = meaning(description="The family of the model; without the key a language model is tuned.")
    init_from: str = meaning(description="The diffusion to start from.")
    lora: Lora | None = meaning(
        None, description="Train adapters on the network's attention; null trains every parameter."
    )
    data: ImageSource = meaning(description="Training images, with labels or captions where the model reads them.")
    evaluation: ImageSource | None = meaning(None, description="Held-out images; null: the source's hold_out.")
    train: ImageTrain = meaning(description="Steps, batch, optimiser, cadences.")
    shard: Shard = meaning(default_factory=Shard, description="Engine, ZeRO stage, precision.")

    def inputs(self) -> list[Input]:
        return [Input("init_from", self.init_from, (ImageKind(self.family),))]

    def outputs(self) -> dict[str, OutputKind]:
        model: dict[str, OutputKind] = {"model": ImageKind(self.family)}
        return model if self.lora is None else {**model, "adapter": "adapter"}

    def image_start(self) -> str:
        return self.init_from

    def progress(self, start_family: TextFamily | None = None) -> Progress:
        return Progress("step", "images")

    def shrunk(self, *, is_built_here: bool) -> Self:
        return self._fewer_rows(train=self.train.shrunk())
