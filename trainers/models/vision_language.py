"""Decoders with a vision tower, by transformers' own classes: their forward with images, and which parts learn.

B batch, T tokens, F features of images, D width.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, get_args

import torch
from torch import Tensor, nn

from recipes.errors import StageError
from recipes.models.model_kinds import ModelKind
from recipes.models.type_table import find_record
from recipes.models.vision_language import VISION_LANGUAGE, image_size_rule, image_token_rule
from recipes.stages.finetune import Finetune, Part
from recipes.stages.lora import Lora
from recipes.stages.pretrain import Pretrain
from trainers.data.batches import ImageTextBatch
from trainers.data.image_processor import ImageProcessor, load_image_processor
from trainers.data.tokenizer import Tokenization
from trainers.models.attention import attention_name, packed_attention_bias
from trainers.models.forward_forms import image_arguments, record_of
from trainers.models.protocol import FamilyRuntime, TokenizerFacts
from trainers.models.token_losses import head_cross_entropy
from trainers.objectives.protocol import Learning
from trainers.objectives.vision_language import ImageTextObjective

PARTS: tuple[Part, ...] = get_args(Part)
MERGERS = ("merger", "deepstack_merger_list")
"""Modules that bring features to the decoder's width where they lie within the tower."""


class ImageTextTokenLosses(nn.Module):
    """A vision-language model whose forward returns the loss sum over target tokens."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: ImageTextBatch) -> Tensor:
        """Return the summed negative log-likelihood of the targets."""
        model: Any = self.model
        tokens = batch.tokens
        hidden_BTD = image_text_hidden_states(model, batch)
        mask = tokens.loss_mask_BT[:, 1:]
        return head_cross_entropy(model, hidden_BTD[:, :-1][mask], tokens.input_ids_BT[:, 1:][mask])


def image_text_hidden_states(model: Any, batch: ImageTextBatch) -> Tensor:
    """Run tower, projector and decoder: over packed rows, where no token sees another segment, or over a row each.

    The tower runs in every batch, over another image where there is none: sharded parameters are gathered by all
    ranks together, and every trainable parameter has a gradient in every step.
    """
    tokens, backbone = batch.tokens, model.base_model
    images = image_arguments(model, tokens.input_ids_BT, batch.images)
    if record_of(model).packing is None:
        if int(tokens.segment_ids_BT.max()) > 1:
            raise ValueError(f"{model.config.model_type}: rows of a sequence cannot be kept apart")
        given = {"attention_mask": (tokens.segment_ids_BT > 0).long()}
    else:
        bias = packed_attention_bias(tokens.segment_ids_BT, model.dtype)
        given = {"attention_mask": bias, "position_ids": tokens.position_ids_BT}
    if batch.has_images:
        output = backbone(input_ids=tokens.input_ids_BT, use_cache=False, **given, **images)
    else:
        embedded_BTD = backbone.get_input_embeddings()(tokens.input_ids_BT)
        nothing = 0 * sum(features.sum() for features in image_features(model, images))
        given["position_ids"] = tokens.position_ids_BT  # a model may keep those of the images that it saw before
        output = backbone(inputs_embeds=embedded_BTD + nothing, use_cache=False, **given)
    last: Tensor = output.last_hidden_state
    return last


def image_features(model: Any, images: Mapping[str, Tensor]) -> list[Tensor]:
    """Return what the tower and the projector make of images: for their tokens [F, D], then for deeper layers."""
    known = {name: value for name, value in images.items() if name != "mm_token_type_ids"}
    found = model.base_model.get_image_features(**known, return_dict=True)
    levels = [found.pooler_output, *(getattr(found, "deepstack_features", None) or ())]
    return [level if isinstance(level, Tensor) else torch.cat(list(level)) for level in levels]


def part_modules(model: Any) -> dict[Part, list[str]]:
    """Return where each part lies in transformers' model, as the ends of paths; the rest is the language part's."""
    backbone = model.base_model
    paths = {id(module): name for name, module in backbone.named_modules()}
    decoder, tower = (paths[id(module)] for module in (model.get_decoder(), model.get_encoder(modality="image")))
    inside = dict(backbone.get_submodule(tower).named_children())
    merging = [f"{tower}.{name}" for name in inside if name in MERGERS]
    around = [name for name, _ in backbone.named_children() if name not in (decoder, tower)]
    return {
        "language": [decoder],
        "projector": [*around, *merging],
        "vision": [name for name in (f"{tower}.{child}" for child in inside) if name not in merging]
        if merging
        else [tower],
    }


def learning_parts(parts: Sequence[Part] | None, lora: Lora | None) -> tuple[Part, ...]:
    """Return which parts learn: those of the recipe, else with adapters the language part, without all of them."""
    if parts is not None:
        return tuple(parts)
    return PARTS if lora is None else ("language",)


def freeze(model: nn.Module, parts: Sequence[Part]) -> None:
    """Leave only the parts' parameters trainable, the head with the language part, and none that no loss reaches."""
    unused, modules = unused_prefixes(model), part_modules(model)
    for key, parameter in model.named_parameters():
        found = (part for part, names in modules.items() if any(f".{name}." in f".{key}" for name in names))
        part = next(found, "language")
        parameter.requires_grad_(part in parts and not any(prefix in f".{key}" for prefix in unused))


def excluded_modules(model: nn.Module, parts: Sequence[Part]) -> str:
    """Return peft's pattern of the modules that get no adapter: those of other parts, and those that nothing reads."""
    others = [f"{name}." for part, names in part_modules(model).items() if part not in parts for name in names]
    prefixes = [*others, *(prefix.removeprefix(".") for prefix in unused_prefixes(model))]
    return rf"(.*\.)?({'|'.join(re.escape(prefix) for prefix in prefixes)}).*"


def unused_prefixes(model: Any) -> list[str]:
    """Return what names the tower's parameters behind the layer whose features are taken: nothing reads them."""
    config = model.config
    if not hasattr(config, "vision_feature_layer"):
        return []
    layers = config.vision_config.num_hidden_layers
    taken = config.vision_feature_layer
    states = [taken] if isinstance(taken, int) else list(taken)
    used = max(state if state >= 0 else layers + 1 + state for state in states)
    (tower,) = (f".{name}" for name in part_modules(model)["vision"])
    return [f"{tower}.encoder.layers.{number}." for number in range(used, layers)] + [
        f"{tower}.post_layernorm.",
        f"{tower}.head.",
    ]


def demand_fitting(model: Any, processor: ImageProcessor) -> None:
    """Raise StageError where the processor's image tokens are not those of the model."""
    config = model.config
    finding = image_token_rule(processor.image_token, processor.image_id, config.image_token_id)
    if finding is not None:
        raise StageError.of(finding)
    ids = torch.from_numpy(processor.sample.ids.astype("int64")).to(next(iter(model.parameters())).device)
    with torch.no_grad():
        features_FD, *_ = image_features(model, image_arguments(model, ids[None], sample_images(processor)))
    if (finding := image_size_rule(int((ids == processor.image_id).sum()), len(features_FD))) is not None:
        raise StageError.of(finding)


def sample_images(processor: ImageProcessor) -> dict[str, Tensor]:
    """Return what a model takes of the image that its outputs are compared on."""
    return {name: torch.from_numpy(value) for name, value in processor.sample.arrays.items()}


class VisionLanguageRuntime(FamilyRuntime):
    """Decoders that answer about images; models come from outside."""

    kinds: ClassVar[tuple[ModelKind, ...]] = ("vision_language_model",)

    def build(
        self, architecture: Mapping[str, Any], facts: TokenizerFacts, *, seed: int, device: torch.device
    ) -> nn.Module:
        """Raise StageError: recipes build none."""
        raise StageError("vision-language models come from outside; none is built from random weights")

    def stock_class(self, model_type: str, kind: ModelKind) -> Any:
        """Return transformers' class."""
        import transformers

        return getattr(transformers, next(iter(VISION_LANGUAGE.types[model_type].classes)))

    def attention(self, device: torch.device, model_type: str) -> dict[str, str]:
        """Return the decoder's as of any decoder that takes it, torch's own kernel for the tower."""
        record = find_record(model_type)
        has_own = record is not None and record.cpu_attention != "block_causal"
        return {"text_config": "sdpa" if has_own else attention_name(device), "vision_config": "sdpa", "": "sdpa"}

    def learning(self, spec: Pretrain | Finetune, model: nn.Module, tokenization: Tokenization, seed: int) -> Learning:
        """Return the next token's loss over packed rows with images."""
        return Learning(ImageTextTokenLosses(model), ImageTextObjective())

    def open_images(self, folder: Path) -> ImageProcessor:
        """Open the folder's image processor."""
        return load_image_processor(folder)

    def freeze(self, spec: Finetune, model: nn.Module, images: ImageProcessor | None) -> str | tuple[()]:
        """Leave only the parts that learn trainable; raises StageError where the processor is not the model's."""
        assert images is not None
        demand_fitting(model, images)
        parts = learning_parts(spec.parts, spec.lora)
        freeze(model, parts)
        return excluded_modules(model, parts)
