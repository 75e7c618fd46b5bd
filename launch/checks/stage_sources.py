"""The sources of text that stages read, each with the layout through which its model gets the rows."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from launch.inputs.data_check import row_roles
from recipes.data.tokenizers import ExistingTokenizer, TrainTokenizer
from recipes.errors import RequestError, StoreDamaged
from recipes.loaded_recipe import LoadedRecipe
from recipes.models.architecture import MODEL_TYPES
from recipes.models.base import TextFamily
from recipes.models.vision_language import VisionFacts
from recipes.references import FolderRef, Reference, StoreRef, parse_reference
from recipes.rules.chain import origin
from recipes.rules.models import model_facts
from recipes.stages.answers import Role, SourceUse, default_template
from recipes.stages.base import TextStage
from recipes.stages.pretrain import Pretrain
from trainers.data.encoding import TextSettings
from trainers.data.image_processor import CountedImages
from trainers.data.layouts.image_text import ImageText
from trainers.data.layouts.registry import TextLayout, text_layout
from trainers.data.row_forms import RowRole
from trainers.data.tokenizer import (
    TOKENIZER_FILES,
    Tokenization,
    load_tokenization,
    tokenization_from_files,
    train_tokenizer,
)
from trainers.store.manifest import ArtifactManifest
from trainers.store.store import Store


@dataclass(frozen=True, slots=True)
class StageSource:
    """A source of text of a stage, as its model gets it."""

    stage: str
    use: SourceUse
    role: RowRole
    layout: TextLayout
    name: str
    """Of the source in a mixture; empty outside of one."""
    is_trained: bool
    """Whether the tokenizer is known; one that is yet to be trained has no merges, so that it counts bytes."""

    @property
    def known_tokenization(self) -> Tokenization | None:
        """Its tokenizer; None: it is yet to be trained."""
        return self.layout.text.tokenization if self.is_trained else None

    @property
    def place(self) -> str:
        """The recipe's field."""
        return f"stages.{self.stage}.{self.use.field_path}"


@dataclass(frozen=True, slots=True)
class _Reader:
    """The tokenizer of a stage's model."""

    tokenization: Tokenization
    is_trained: bool
    family: TextFamily | None = None
    """Of a model of the store, which the recipe does not tell."""


def stage_sources(loaded: LoadedRecipe, store: Store | None = None) -> Iterator[StageSource]:
    """Yield every source of text whose tokenizer the recipe, a folder or the store tells, with images where a folder
    says how they become tokens.
    """
    readers: dict[str, _Reader | None] = {}
    stages = dict(
        loaded.stages_with("init_from", "tokenizer")
    )  # a model may start from a stage with mistakes elsewhere
    for name, stage in loaded.recipe.stages.items():
        if not isinstance(stage, TextStage):
            continue
        source = origin(stage.text_start() or name, stages)
        key = repr(source)
        if key not in readers:
            try:
                readers[key] = _reader(loaded, source, store)
            except (RequestError, StoreDamaged):  # reported at the input itself
                readers[key] = None
        reader = readers[key]
        family = None if reader is None else reader.family or model_facts(loaded, stage).family
        if reader is None:
            continue
        images = None
        if family is not None and family.reads_images:
            images = _counted_images(model_facts(loaded, stage).vision, reader.tokenization)
            if images is None:
                continue
        for use, source_name in [member for whole in stage.sources() for member in whole.named_members()]:
            if not use.is_derived and not use.facts.is_images:
                role = row_roles(use, family)[0]
                layout = _layout(stage, use, role, reader.tokenization, images)
                yield StageSource(name, use, role, layout, source_name, reader.is_trained)


def _reader(loaded: LoadedRecipe, source: Pretrain | Reference | None, store: Store | None) -> _Reader | None:
    tokenizer = source.tokenizer if isinstance(source, Pretrain) else None
    if isinstance(tokenizer, TrainTokenizer):
        return _Reader(train_tokenizer(tokenizer, []), is_trained=False)
    overrides = tokenizer if isinstance(tokenizer, ExistingTokenizer) else None
    reference = parse_reference(overrides.from_) if overrides is not None else source
    match reference:
        case FolderRef():
            return _Reader(load_tokenization(Path(loaded.base_dir / reference.path), overrides), is_trained=True)
        case StoreRef() if store is not None:
            return _stored_reader(store.resolve(reference.name_or_fingerprint), store, overrides)
    return None


def _stored_reader(artifact: ArtifactManifest, store: Store, overrides: ExistingTokenizer | None) -> _Reader:
    prefix = next((f"{part}/" for part in ("model", "actor") if f"{part}/tokenizer.json" in artifact.files), "")
    names = [name for name in TOKENIZER_FILES if prefix + name in artifact.files]
    files = {name: store.objects.get_bytes(artifact.files[prefix + name].sha256) for name in names}
    family = MODEL_TYPES.get(str((artifact.architecture or {}).get("model_type")))
    return _Reader(tokenization_from_files(files, overrides), is_trained=True, family=family)


def _counted_images(vision: VisionFacts | None, tokenization: Tokenization) -> CountedImages | None:
    if vision is None or vision.image_token not in (tokenization.facts.vocabulary or {}):
        return None
    return CountedImages(vision, tokenization.token_id(vision.image_token))


def _layout(
    stage: TextStage, use: SourceUse, role: RowRole, tokenization: Tokenization, images: CountedImages | None
) -> TextLayout:
    template = stage.own_template or default_template(cast(Role, role), tokenization.chat_template is not None)
    settings = TextSettings(tokenization, stage.text_length(use), loss_on=stage.counted_tokens, template=template)
    return text_layout(role, settings, use.carried, use.form) if images is None else ImageText(settings, images)
