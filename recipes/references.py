"""What a stage takes as input: names of stages, store addresses, local folders and hub ids, and what each must be."""

import re
from dataclasses import dataclass
from typing import Literal, cast

from recipes.data.images import ImageSource
from recipes.data.text import ExistingTokenizer, PythonDocs, PythonSummaries, Source
from recipes.stages.ddpo import ClassReward
from recipes.stages.kinds import (
    Evaluate,
    Finetune,
    FinetuneImages,
    PpoImages,
    PpoStage,
    Pretrain,
    PretrainImages,
    Reward,
    Stage,
    Template,
)

PartKind = Literal[
    "model",
    "adapter",
    "reward_model",
    "critic",
    "report",
    "tokenizer",
    "text_classifier",
    "classifier",
    "vae",
    "gan",
    "ddpm",
]

DRAWING_KINDS: tuple[PartKind, ...] = ("vae", "gan", "ddpm")
"""Models that draw pictures."""

_NAME = r"[a-z][a-z0-9_-]{0,62}"
_STAGE = re.compile(rf"({_NAME})(?:\.([a-z_]+))?")
_STORE = re.compile(rf"store://([0-9a-f]{{8,64}}|{_NAME})(?:\.([a-z_]+))?")
_HUB = re.compile(r"hf://([A-Za-z0-9][\w.-]*(?:/[A-Za-z0-9][\w.-]*)?)(?:@([A-Za-z0-9][\w.-]*))?")


@dataclass(frozen=True, slots=True)
class StageRef:
    """Another stage of the same recipe, or one part of what it makes."""

    stage: str
    part: str | None = None


@dataclass(frozen=True, slots=True)
class StoreRef:
    """An artifact of the store by its given name or by (a prefix of) its fingerprint."""

    name_or_fingerprint: str
    part: str | None = None


@dataclass(frozen=True, slots=True)
class FolderRef:
    """A local folder in the Hugging Face layout; relative paths start at the recipe's folder."""

    path: str


@dataclass(frozen=True, slots=True)
class HubRef:
    """A model of the Hugging Face hub at one revision."""

    repo: str
    revision: str


Reference = StageRef | StoreRef | FolderRef | HubRef


@dataclass(frozen=True, slots=True)
class Input:
    """One input of a stage: where it stands, what is written there, and which kinds of part fit."""

    field_path: str
    text: str
    wants: tuple[PartKind, ...]


def parse_reference(text: str) -> Reference:
    """Read a reference; raises ValueError that says what is wrong with it."""
    if "\x00" in text or text != text.strip() or not text:
        raise ValueError("a reference is a stage name, store://NAME, hf://ORG/NAME@REVISION or a folder")
    if text.startswith("store://"):
        match = _STORE.fullmatch(text)
        if match is None:
            raise ValueError(
                "a store address is store://NAME or store://FINGERPRINT (at least 8 hex digits), then .PART"
            )
        return StoreRef(match.group(1), match.group(2))
    if text.startswith("hf://"):
        match = _HUB.fullmatch(text)
        if match is None:
            raise ValueError("a hub id is hf://ORG/NAME@REVISION")
        if match.group(2) is None:
            raise ValueError(f"a hub id needs its revision, for example {text}@main")
        return HubRef(match.group(1), match.group(2))
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]*:", text):
        raise ValueError(f"unknown scheme {text.split(':')[0]!r}; known are store:// and hf://")
    if text.startswith("~"):
        raise ValueError("'~' is not expanded in recipes; write the whole path")
    if "/" in text or text in (".", ".."):
        return FolderRef(text)
    match = _STAGE.fullmatch(text)
    if match is None:
        raise ValueError(
            "not a stage name (lower case letters, digits, _ and -); a local folder needs a '/', as in ./model"
        )
    return StageRef(match.group(1), match.group(2))


INPUT_FIELDS = (
    "init_from", "tokenizer", "autoencoder", "text_encoder", "actor", "reward", "suites", "of", "features",
    "second_scorer",
)  # fmt: skip
"""Fields that `stage_inputs` and `start_of` read, of any kind of stage."""


def stage_inputs(stage: Stage) -> list[Input]:
    """Every input in the order of its fields; field paths are relative to the stage (`init_from`, `of.0`)."""
    match stage:
        case Pretrain():
            inputs = [] if stage.init_from is None else [Input("init_from", stage.init_from, ("model",))]
            if isinstance(stage.tokenizer, ExistingTokenizer):
                inputs.append(Input("tokenizer.from", stage.tokenizer.from_, ("tokenizer", "model")))
            return inputs
        case PretrainImages():
            inputs = [] if stage.autoencoder is None else [Input("autoencoder", stage.autoencoder, ("vae",))]
            if stage.text_encoder is not None:
                inputs.append(Input("text_encoder", stage.text_encoder, ("model", "text_classifier")))
            return inputs
        case FinetuneImages():
            return [Input("init_from", stage.init_from, ("ddpm",))]
        case Finetune() | Reward():
            return [Input("init_from", stage.init_from, ("model",))]
        case PpoStage():
            return [Input("actor", stage.actor, ("model",)), Input("reward", stage.reward, ("reward_model",))]
        case PpoImages():
            inputs = [Input("actor", stage.actor, ("ddpm",))]
            if isinstance(stage.reward, ClassReward):
                inputs.append(Input("reward.classifier", stage.reward.classifier, ("classifier",)))
            return inputs
        case Evaluate():
            wants: tuple[PartKind, ...] = DRAWING_KINDS if "images" in stage.suites else ("model",)
            inputs = [Input(f"of.{index}", text, wants) for index, text in enumerate(stage.of)]
            if stage.features is not None:
                inputs.append(Input("features", stage.features, ("classifier",)))
            for field in ("reward", "second_scorer"):
                text = getattr(stage, field)
                if text is not None:
                    inputs.append(Input(field, text, ("reward_model",)))
            return inputs


def stage_parts(stage: Stage) -> dict[str, PartKind]:
    """What a stage makes, by part name; the first is what a bare stage name means."""
    match stage:
        case Pretrain():
            return {"model": "model"}
        case PretrainImages():
            return {"model": stage.architecture.family}
        case FinetuneImages() | PpoImages():
            return {"model": "ddpm"} if stage.lora is None else {"model": "ddpm", "adapter": "adapter"}
        case Finetune():
            if stage.lora is None:
                return {"model": "model"}
            return {"model": "model", "adapter": "adapter"} if stage.merge else {"adapter": "adapter"}
        case Reward():
            return {"model": "reward_model"}
        case PpoStage():
            if stage.lora is None:
                return {"actor": "model", "critic": "critic"}
            if stage.merge:
                return {"actor": "model", "critic": "critic", "adapter": "adapter"}
            return {"adapter": "adapter", "critic": "critic"}
        case Evaluate():
            return {"report": "report"}


Role = Literal["text", "instructions", "labels", "seq2seq", "preferences", "prompts", "images"]


@dataclass(frozen=True, slots=True)
class SourceUse:
    """One data source of a stage: where it stands, what its rows are for, and the source with its default filled in."""

    field_path: str
    source: Source | ImageSource
    role: Role
    held_out: bool = False
    """Whether rows are taken from the source's held-out share (`hold_out`) instead of the rest."""

    @property
    def rows(self) -> Source:
        """The source of a use that is no use of pictures."""
        assert self.role != "images", f"{self.field_path} is a source of pictures"
        return cast(Source, self.source)

    @property
    def pictures(self) -> ImageSource:
        """The source of a use of pictures."""
        assert self.role == "images", f"{self.field_path} is no source of pictures"
        return cast(ImageSource, self.source)


SOURCE_FIELDS = ("data", "evaluation", "prompts", "text", "images", "suites")
"""Fields that `stage_sources` reads, of any kind of stage."""


def stage_sources(stage: Stage) -> list[SourceUse]:
    """Every data source of the stage; a missing one is what its field's description says it defaults to."""
    match stage:
        case Pretrain():
            return _training_sources(stage.data, stage.evaluation, "text")
        case PretrainImages() | FinetuneImages():
            return _training_sources(stage.data, stage.evaluation, "images")
        case Finetune():
            return _training_sources(stage.data, stage.evaluation, "instructions")
        case Reward():
            return _training_sources(stage.data, stage.evaluation, "preferences")
        case PpoStage():
            text = [] if stage.text is None else [SourceUse("text", stage.text, "text")]
            return [SourceUse("prompts", stage.prompts, "prompts"), *text]
        case PpoImages():
            return [] if stage.prompts is None else [SourceUse("prompts", stage.prompts, "images")]
        case Evaluate():
            default = PythonDocs(source="python-docs", split="test")
            uses = []
            if "perplexity" in stage.suites:
                uses.append(_held_out_use("text", stage.text or default, "text"))
            if "generation" in stage.suites or "comparison" in stage.suites:
                uses.append(_held_out_use("prompts", stage.prompts or default, "prompts"))
            if "targets" in stage.suites:
                uses.append(_held_out_use("prompts", stage.prompts or default, "seq2seq"))
            if stage.images is not None:
                uses.append(SourceUse("images", stage.images, "images"))
            return uses


CHAT_ROLES: tuple[Role, ...] = ("instructions", "preferences", "prompts")
"""What rows of prompts and answers are for."""


def default_template(role: Role, has_chat_template: bool) -> Template:
    """How plain text of the role is put to a model where the recipe does not say."""
    return "chat" if has_chat_template and role in CHAT_ROLES else "none"


def find_source(stage: Stage, field_path: str) -> SourceUse | None:
    """The stage's source at a field path (`data`, `evaluation`, `prompts`, `text`); None: it reads none there."""
    return next((use for use in stage_sources(stage) if use.field_path == field_path), None)


def get_source(stage: Stage, field_path: str) -> SourceUse:
    """The source that the stage's kind always has at a field path."""
    found = find_source(stage, field_path)
    assert found is not None, f"a {stage.kind} stage reads nothing as {field_path}"
    return found


def _held_out_use(field_path: str, source: Source | ImageSource, role: Role) -> SourceUse:
    """An evaluation reads what `hold_out` keeps away from training; of a source without it every row."""
    held_out = not isinstance(source, PythonDocs | PythonSummaries) and source.hold_out > 0
    return SourceUse(field_path, source, role, held_out=held_out)


def _training_sources(
    data: Source | ImageSource, evaluation: Source | ImageSource | None, role: Role
) -> list[SourceUse]:
    """The training rows, and those to evaluate on: the recipe's own, python-docs' next split, or what is held out."""
    training = SourceUse("data", data, role)
    if evaluation is not None:
        return [training, _held_out_use("evaluation", evaluation, role)]
    if isinstance(data, PythonDocs | PythonSummaries):
        if data.split == "test":
            return [training]
        split = "validation" if data.split == "train" else "test"
        whole = {"source": data.source, "split": split, "max_dropped": data.max_dropped}
        return [training, SourceUse("evaluation", type(data).model_validate(whole), role)]
    return [training, SourceUse("evaluation", data, role, held_out=True)] if data.hold_out > 0 else [training]
