"""The kinds of stage, one model each."""

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from recipes.data.images import ImageSource
from recipes.data.text import Source, Tokenizer
from recipes.errors import Finding
from recipes.fields import Strict, TagAt, added_meaning, meaning, placement, raise_all, refuse
from recipes.models.architecture import Architecture
from recipes.models.encoder import Corruption, PseudoLabels
from recipes.models.encoder_decoder import SpanCorruption
from recipes.models.image_models import Ddpm, ImageArchitecture
from recipes.problem_codes import Code
from recipes.stages.ddpo import Ddpo, PictureReward, PictureRollout
from recipes.stages.lora import Lora
from recipes.stages.ppo import Ppo, Rollout, Sampling
from recipes.stages.sharding import Shard
from recipes.stages.train import ImageTrain, Train

Part = Literal["language", "projector", "vision"]
"""Parts of a vision-language model."""
Template = Literal["chat", "none"]
"""How rows of plain text are put to a model: as turns of its chat template, or as they are."""


def _template(rows: str) -> Any:
    return added_meaning(
        None,
        description=f"How {rows} of plain text are put to the model: chat, as the user's and the assistant's turns in "
        "its chat template; none, as they are, one after the other. None: chat where a decoder or rnn has a template. "
        "Rows of messages always take the template.",
    )


class _Stage(Strict):
    seed: int | None = meaning(None, ge=0, lt=2**63, description="Seed of this stage; None takes the recipe's.")
    gate: Literal["enforce", "ignore"] = placement(
        "enforce", description="Whether this stage refuses an input whose gate failed."
    )
    verification: Literal["enforce", "ignore"] = placement(
        "enforce",
        description="Whether files unlike the trained model are withheld; ignore commits them with a failed gate.",
    )


class Pretrain(_Stage):
    """Train a model of text, from random weights or from another model's.

    The objective follows from the family: the next token (decoder, rnn), hidden tokens (encoder), or hidden spans
    (encoder_decoder).
    """

    kind: Literal["pretrain"] = meaning(description="Language-model training on plain text.")
    init_from: str | None = meaning(
        None, description="Continue from this model; then architecture and tokenizer are its own."
    )
    architecture: Architecture | None = meaning(None, description="What to build from random weights.")
    tokenizer: Tokenizer | None = meaning(None, description="Tokenizer to train or to take.")
    corruption: Corruption | None = meaning(
        None, description="encoder: what is hidden and has to be restored; None: the defaults."
    )
    span_corruption: SpanCorruption | None = meaning(
        None, description="encoder_decoder: which spans are hidden and have to be written; None: the defaults."
    )
    data: Source = meaning(description="Training text: rows with a `text` column, or with `prompt` and `completion`.")
    evaluation: Source | None = meaning(
        None, description="Held-out text; None: python-docs' validation split or the source's hold_out."
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


class PretrainImages(_Stage):
    """Train a model of pictures from random weights: a classifier, or one that draws."""

    kind: Literal["pretrain"] = meaning(description="Training on pictures.")
    architecture: ImageArchitecture = meaning(description="The family: its network and its objective.")
    autoencoder: str | None = meaning(
        None, description="ddpm: a VAE of type autoencoder_kl in whose latents the diffusion runs; None: in pixels."
    )
    text_encoder: str | None = meaning(
        None,
        description="ddpm: an encoder or decoder whose hidden states of the captions condition the pictures; it stays "
        "as it is, and its tokenizer reads the captions. None: no captions.",
    )
    data: ImageSource = meaning(description="Training pictures, with labels or captions where the family needs them.")
    evaluation: ImageSource | None = meaning(None, description="Held-out pictures; None: the source's hold_out.")
    train: ImageTrain = meaning(description="Steps, batch, optimiser, cadences.")
    shard: Shard = meaning(default_factory=Shard, description="Engine, ZeRO stage, precision.")

    @model_validator(mode="after")
    def _fitting(self) -> "PretrainImages":
        raise_all(self._misfits())
        return self

    def _misfits(self) -> Iterator[Finding]:
        if not isinstance(self.architecture, Ddpm):
            for key in ("autoencoder", "text_encoder"):
                if getattr(self, key) is not None:
                    yield Finding(
                        Code.NOT_APPLICABLE, f"{key} needs family ddpm; the family here is {self.architecture.family}"
                    )
            return
        if self.architecture.class_conditional and self.text_encoder is not None:
            yield Finding(
                Code.CONFLICTING_KEYS,
                "give text_encoder or class_conditional: true, not both: the caption names the class",
            )
        has_condition = self.architecture.class_conditional or self.text_encoder is not None
        if self.architecture.guidance != 1 and not has_condition:
            yield Finding(Code.UNMET_REQUIREMENT, "guidance needs class_conditional: true, or a text_encoder")


class Finetune(_Stage):
    """Supervised learning on rows: responses to prompts (decoder, rnn) or to pictures with prompts (vision_language),
    targets of sources (encoder_decoder), or labels of texts (encoder).
    """

    kind: Literal["finetune"] = meaning(description="Supervised fine-tuning.")
    init_from: str = meaning(description="The model to start from.")
    lora: Lora | None = meaning(None, description="Train adapters; None trains every parameter.")
    merge: bool = meaning(True, description="With lora: also commit the merged model; later stages need it.")
    loss_on: Literal["responses", "all"] = meaning("responses", description="Which tokens the loss counts.")
    template: Template | None = _template("a `prompt` and its `completion`")
    parts: list[Part] | None = meaning(
        None,
        min_length=1,
        description="vision_language: which parts learn; None: with lora the language part, without it all of them.",
    )
    labelled_share: float = meaning(
        1.0, gt=0, le=1, description="encoder: share of the rows, chosen by their hash, whose labels are used."
    )
    pseudo_labels: PseudoLabels | None = meaning(
        None, description="encoder: learn from the rows without a label too; None leaves them out."
    )
    dropout: float | None = meaning(
        None,
        ge=0,
        lt=1,
        description="encoder: dropout on embeddings, residual branches and the input of the head while labels are "
        "learnt; None: the model's own.",
    )
    num_beams: int = meaning(
        1, ge=1, le=64, description="encoder_decoder: beams of the search that held-out BLEU and chrF are measured by."
    )
    data: Source = meaning(
        description="Rows with `messages`, `prompt`/`completion`, or `text`; for an encoder `text` and `label`; for a "
        "vision-language model also `image` or `images`."
    )
    evaluation: Source | None = meaning(
        None, description="Held-out rows; None: python-docs' validation split or hold_out."
    )
    train: Train = meaning(description="Steps, batch, optimiser, cadences.")
    shard: Shard = meaning(default_factory=Shard, description="Engine, ZeRO stage, precision.")


class FinetuneImages(_Stage):
    """Go on training a model of pictures on others; what it is conditioned on, it brings along."""

    kind: Literal["finetune"] = meaning(description="Fine-tuning on pictures.")
    family: Literal["ddpm"] = meaning(description="The family of the model; without the key a language model is tuned.")
    init_from: str = meaning(description="The diffusion to start from.")
    lora: Lora | None = meaning(
        None, description="Train adapters on the network's attention; None trains every parameter."
    )
    data: ImageSource = meaning(description="Training pictures, with labels or captions where the model reads them.")
    evaluation: ImageSource | None = meaning(None, description="Held-out pictures; None: the source's hold_out.")
    train: ImageTrain = meaning(description="Steps, batch, optimiser, cadences.")
    shard: Shard = meaning(default_factory=Shard, description="Engine, ZeRO stage, precision.")


class Reward(_Stage):
    """Reward model: backbone and scalar head, Bradley-Terry loss on chosen against rejected."""

    kind: Literal["reward"] = meaning(description="Reward modelling.")
    init_from: str = meaning(description="The model to start from.")
    lora: Lora | None = meaning(None, description="Train adapters and the head; None trains every parameter.")
    template: Template | None = _template("a `prompt` and its answers")
    data: Source = meaning(description="Rows with `chosen` and `rejected`, `prompt` optional.")
    evaluation: Source | None = meaning(
        None, description="Held-out pairs; None: python-docs' validation split or hold_out."
    )
    center_coefficient: float = meaning(
        0.0, ge=0, le=10, description="Weight of (r_chosen + r_rejected)^2, which centres scores."
    )
    min_accuracy: float = meaning(0.55, ge=0, le=1, description="Gate: least share of held-out pairs ranked right.")
    train: Train = meaning(description="Steps, batch (in pairs), optimiser, cadences.")
    shard: Shard = meaning(default_factory=Shard, description="Engine, ZeRO stage, precision.")


class PpoStage(_Stage):
    """Proximal policy optimisation of a model against a reward model."""

    kind: Literal["ppo"] = meaning(description="Reinforcement learning from a reward model.")
    actor: str = meaning(description="The model to start from; also the reference.")
    reward: str = meaning(description="The reward model.")
    critic: Literal["actor", "reward"] = meaning("reward", description="Whose weights the critic starts from.")
    lora: Lora | None = meaning(
        None, description="Adapters for actor and critic on one frozen backbone; None trains full copies."
    )
    merge: bool = meaning(True, description="With lora: also commit the merged actor.")
    prompts: Source = meaning(description="Rows with `prompt` (or `messages`).")
    template: Template | None = _template("prompts")
    text: Source | None = meaning(
        None, description="Text whose language-model loss is mixed into the updates with ppo.text_coef; None for none."
    )
    rollout: Rollout = meaning(default_factory=Rollout, description="How experience is drawn.")
    ppo: Ppo = meaning(description="The algorithm's settings.")
    shard: Shard = meaning(default_factory=Shard, description="Engine, ZeRO stage, precision.")

    @model_validator(mode="after")
    def _text_has_weight(self) -> "PpoStage":
        if (self.text is None) != (self.ppo.text_coef == 0):
            found = "text without ppo.text_coef" if self.text is not None else "ppo.text_coef without text"
            refuse(Code.UNMET_REQUIREMENT, f"text and a ppo.text_coef above 0 go together; found {found}")
        return self


class PpoImages(_Stage):
    """Reward-tuned diffusion: proximal policy optimisation of what a model draws, step by step, against a reward."""

    kind: Literal["ppo"] = meaning(description="Reinforcement learning from a reward of pictures.")
    actor: str = meaning(description="The diffusion model to start from; also the reference.")
    reward: PictureReward = meaning(description="What a picture is rewarded for.")
    lora: Lora | None = added_meaning(
        None, description="Train adapters on the network's attention; None trains every parameter."
    )
    prompts: ImageSource | None = added_meaning(
        None,
        description="Of an actor that draws from captions: pictures whose captions are drawn from, by the seed; their "
        "labels are the classes that a reward asks for.",
    )
    rollout: PictureRollout = meaning(default_factory=PictureRollout, description="How experience is drawn.")
    ppo: Ddpo = meaning(description="The algorithm's settings.")
    shard: Shard = meaning(default_factory=Shard, description="Engine, ZeRO stage, precision.")


class Bound(Strict):
    """A gate on one metric."""

    metric: str = meaning(
        pattern=r"^[a-z0-9_]+(\.[a-z0-9_]+)*$", description="Dotted name in the report, for example policy.win_rate."
    )
    min: float | None = meaning(None, description="Smallest value that passes.")
    max: float | None = meaning(None, description="Largest value that passes.")

    @model_validator(mode="after")
    def _some_bound(self) -> "Bound":
        if self.min is None and self.max is None:
            refuse(Code.MISSING_KEY, f"gate on {self.metric}: give min, max or both")
        return self


ALONE = {"targets": "encoder-decoders", "images": "models of pictures"}
"""Suites that measure what no other suite does."""


class Evaluate(_Stage):
    """Measure models: perplexity, answers, with a reward model scores and win rate; or targets of encoder-decoders; or
    models of pictures.
    """

    kind: Literal["evaluate"] = meaning(description="Evaluation; makes a report.")
    of: list[str] = meaning(
        min_length=1,
        max_length=16,
        description="Models to measure; the first is the start that others are compared with.",
    )
    reward: str | None = meaning(None, description="Reward model that scores responses.")
    second_scorer: str | None = meaning(
        None, description="A second reward model, trained on other data, that judges comparisons."
    )
    features: str | None = meaning(None, description="images: the classifier whose features measure pictures.")
    suites: list[Literal["perplexity", "generation", "comparison", "targets", "images"]] = meaning(
        default_factory=lambda: ["perplexity", "generation"],
        min_length=1,
        description="perplexity of held-out text; generation: length, EOS rate, distinct-2, KL, samples; comparison: "
        "scores and win rate; targets, alone, for encoder-decoders: loss, BLEU and chrF of held-out targets; "
        "images, alone: distances of drawn pictures to real ones, classes, copies.",
    )
    text: Source | None = meaning(
        None,
        description="Held-out text for perplexity; with hold_out the rows that it keeps away from training. None: "
        "python-docs' test split.",
    )
    prompts: Source | None = meaning(
        None,
        description="Held-out prompts, for targets with their completions; with hold_out the rows that it keeps away "
        "from training. None: python-docs' test split.",
    )
    images: ImageSource | None = meaning(
        None,
        description="images: real pictures; its hold_out is what drawn ones are compared with, the rest what may have "
        "been copied.",
    )
    num_images: int = meaning(
        1000, ge=8, le=10**6, description="images: most pictures of a draw; never more than are held out."
    )
    num_draws: int = meaning(
        5, ge=2, le=10, description="images: independent draws of each model; intervals are those of their means."
    )
    num_prompts: int = meaning(
        200,
        ge=1,
        le=10**6,
        description="At most this many prompts to answer, drawn by the seed; targets: the rows that a finetune's "
        "evaluation takes.",
    )
    num_sequences: int | None = added_meaning(
        None,
        ge=1,
        le=10**9,
        description="At most this many sequences of the perplexity text; None: as many as num_prompts.",
    )
    template: Template | None = _template("prompts")
    num_samples: int = meaning(8, ge=0, le=1000, description="Responses of each model kept in the report.")
    sequence_length: int = meaning(
        256,
        ge=8,
        le=10**7,
        description="Tokens per sequence of the perplexity text, which recurrent models read on in; targets: the most "
        "that a source, a target and what is written may have, longer rows are left out and counted.",
    )
    num_beams: int = meaning(
        1, ge=1, le=64, description="targets: beams of the search that BLEU and chrF are measured by; 1: greedily."
    )
    sampling: Sampling = meaning(default_factory=Sampling, description="How responses are drawn.")
    gates: list[Bound] = meaning(
        default_factory=list, description="Bounds that the report must meet for its gate to pass."
    )
    shard: Shard = meaning(
        default_factory=Shard, description="Precision of the forward passes; engine and ZeRO stage have no effect."
    )

    @model_validator(mode="after")
    def _suites_have_what_they_need(self) -> "Evaluate":
        raise_all(self._misfits())
        return self

    def _misfits(self) -> Iterator[Finding]:
        if "comparison" in self.suites and (self.reward is None or len(self.of) < 2):
            yield Finding(Code.MISSING_KEY, "suite 'comparison' needs `reward` and at least two models in `of`")
        if self.num_sequences is not None and "perplexity" not in self.suites:
            yield Finding(
                Code.NO_EFFECT, f"num_sequences ({self.num_sequences}) has no effect without suite 'perplexity'"
            )
        for suite, measured in ALONE.items():
            if suite in self.suites and len(self.suites) > 1:
                yield Finding(
                    Code.CONFLICTING_KEYS,
                    f"suite {suite!r} cannot be combined with other suites: it measures {measured}",
                )
        if "targets" in self.suites:
            if self.reward is not None or self.second_scorer is not None:
                yield Finding(
                    Code.NO_EFFECT, "reward models score answers; suite 'targets' takes no reward and no second_scorer"
                )
        elif self.num_beams > 1:
            yield Finding(Code.NO_EFFECT, f"num_beams ({self.num_beams}) has no effect without suites: [targets]")
        if "images" in self.suites:
            if self.features is None or self.images is None or self.images.hold_out == 0:
                yield Finding(
                    Code.MISSING_KEY,
                    "suite 'images' needs `features` (a classifier) and `images` with a hold_out above 0",
                )
        elif self.features is not None or self.images is not None:
            yield Finding(Code.NO_EFFECT, "features and images have no effect without suites: [images]")


PretrainFamily = Annotated[
    Annotated[Pretrain, Tag("decoder")]
    | Annotated[Pretrain, Tag("encoder")]
    | Annotated[Pretrain, Tag("encoder_decoder")]
    | Annotated[Pretrain, Tag("rnn")]
    | Annotated[PretrainImages, Tag("classifier")]
    | Annotated[PretrainImages, Tag("vae")]
    | Annotated[PretrainImages, Tag("gan")]
    | Annotated[PretrainImages, Tag("ddpm")],
    Discriminator(TagAt(("architecture", "family"), instead=("init_from", "decoder"))),
]
"""What trains each family; `init_from` without an architecture goes on from a language model."""

FinetuneFamily = Annotated[
    Annotated[Finetune, Tag("text")] | Annotated[FinetuneImages, Tag("ddpm")],
    Discriminator(TagAt(("family",), default="text")),
]
"""What tunes each family; language models tell theirs themselves."""

PpoEstimator = Annotated[
    Annotated[PpoStage, Tag("gae")] | Annotated[PpoImages, Tag("ddpo")],
    Discriminator(TagAt(("ppo", "estimator"), default="gae")),
]
"""One algorithm, and what its samples are: responses, or pictures."""

Stage = Annotated[PretrainFamily | FinetuneFamily | Reward | PpoEstimator | Evaluate, Field(discriminator="kind")]

SEMANTICS = {"pretrain": 3, "finetune": 4, "reward": 3, "ppo": 4, "evaluate": 5}
"""Version of each kind's mathematics; part of the fingerprint, raised when the mathematics is mended."""
