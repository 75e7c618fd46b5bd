"""What a stage of images starts from: random weights, or another model's, maybe with adapters on its attention."""

from dataclasses import dataclass, replace
from typing import Any

from recipes.data.images import Shape, missing_labels, shape_rule
from recipes.errors import RequestError
from recipes.models.images.tally import PROJECTIONS
from recipes.stages.finetune import FinetuneImages
from recipes.stages.lora import Lora
from recipes.stages.pretrain import PretrainImages
from trainers.data.dataset import Dataset
from trainers.data.order import drawn_rows
from trainers.models.images.build import Blueprint, load_tensors, open_blueprint, open_family, read_tensors
from trainers.models.images.latents import LatentCodec, fit_codec
from trainers.models.images.protocol import ImageFacts, ImageFamily
from trainers.models.images.text_encoder import TextEncoder, example_captions, read_captions
from trainers.models.lora import add_adapter
from trainers.runtime.randomness import stream_seed
from trainers.training.context import StageContext, model_folder

EXAMPLE_ROWS = 4096
"""Images among whose captions a model's examples are looked for."""


@dataclass(frozen=True)
class ImageStart:
    """A family ready to be trained, and the set as it reads it."""

    blueprint: Blueprint
    family: ImageFamily
    dataset: Dataset
    ema_decay: float | None = None
    """Decay of the moving average that is kept; adapters are kept as they are."""
    peft_config: Any = None
    """peft's configuration of the adapters; None: every parameter is trained."""


def start_training(spec: PretrainImages | FinetuneImages, context: StageContext, dataset: Dataset) -> ImageStart:
    """Build or open the family, equal on every rank; raises RequestError for images that do not fit it."""
    if isinstance(spec, FinetuneImages):
        return _go_on(spec, context, dataset)
    text = _open_text_encoder(spec, context)
    dataset = with_caption_tokens(dataset, text)
    facts = ImageFacts.of(dataset, () if text is None else _examples(dataset))
    blueprint = Blueprint(spec.architecture, facts, _open_codec(spec, context, dataset), text)
    family = blueprint.build(stream_seed(context.seed, "weights"))
    return ImageStart(blueprint, family, dataset, spec.architecture.averaging)


def with_caption_tokens(dataset: Dataset, text: TextEncoder | None) -> Dataset:
    """Tokenize a set's captions, where there is something that reads them."""
    return dataset if text is None else read_captions(text, dataset)


def require_shape(dataset: Dataset, shape: Shape, name: str) -> None:
    """Raise RequestError unless a set's images have the shape of those of `name`."""
    if (finding := shape_rule(dataset.shape, shape, name)) is not None:
        raise RequestError.of(finding)


def require_labels(dataset: Dataset, reader: str) -> None:
    """Raise RequestError for a set without the labels that `reader` reads."""
    if not dataset.classes:
        raise RequestError(str(missing_labels(reader)))


def _go_on(spec: FinetuneImages, context: StageContext, dataset: Dataset) -> ImageStart:
    folder = model_folder(context, "init_from")
    blueprint = open_blueprint(folder)
    facts = blueprint.facts
    require_shape(dataset, facts.shape, spec.init_from)
    if blueprint.architecture.label_reader is not None:
        require_labels(dataset, spec.init_from)
        dataset = dataset.with_classes(facts.classes)
    dataset = with_caption_tokens(dataset, blueprint.text)
    if blueprint.text is not None:
        blueprint = replace(blueprint, facts=replace(facts, captions=_examples(dataset)))
    family = blueprint.build(0)
    load_tensors(family, read_tensors(folder, family), str(folder))
    if spec.lora is None:
        return ImageStart(blueprint, family, dataset, blueprint.architecture.averaging)
    config = adapt(family, spec.lora, stream_seed(context.seed, "adapter"))
    return ImageStart(blueprint, family, dataset, None, config)


def adapt(family: ImageFamily, lora: Lora, seed: int) -> Any:
    """Put adapters on the attention of a diffusion's network; returns peft's configuration."""
    targets = list(PROJECTIONS) if lora.target_modules == "all-linear" else lora.target_modules
    return add_adapter(family.net, lora, seed=seed, targets=targets)


def _open_text_encoder(spec: PretrainImages, context: StageContext) -> TextEncoder | None:
    if spec.text_encoder is None:
        return None
    folder = model_folder(context, "text_encoder")
    return TextEncoder(folder, folder)


def _open_codec(spec: PretrainImages, context: StageContext, dataset: Dataset) -> LatentCodec | None:
    """Open the autoencoder of a latent diffusion."""
    if spec.autoencoder is None:
        return None
    autoencoder = open_family(model_folder(context, "autoencoder"))
    require_shape(dataset, autoencoder.facts.shape, "the autoencoder")
    return fit_codec(autoencoder, dataset)


def _examples(dataset: Dataset) -> tuple[str, ...]:
    rows = drawn_rows(dataset.digest, 0, min(EXAMPLE_ROWS, len(dataset)), len(dataset))
    return example_captions(dataset, rows)
