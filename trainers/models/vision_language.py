"""A decoder with a vision tower (transformers' Llava): its forward with images, and which of its parts learn.

B batch, T tokens, I images, F features of an image, D width.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from recipes.errors import StageError
from recipes.models.vision_language import image_size_rule, image_token_rule
from recipes.stages.finetune import Finetune, Part
from recipes.stages.lora import Lora
from recipes.stages.pretrain import Pretrain
from trainers.data.batches import ImageTextBatch
from trainers.data.image_processor import ImageProcessor, load_image_processor
from trainers.data.tokenizer import Tokenization
from trainers.models.attention import attention_name, packed_attention_bias
from trainers.models.protocol import FamilyRuntime, ModelKind, TokenizerFacts
from trainers.models.token_losses import head_cross_entropy
from trainers.objectives.protocol import Learning
from trainers.objectives.vision_language import ImageTextObjective

MODULES: dict[Part, str] = {
    "language": "language_model",
    "projector": "multi_modal_projector",
    "vision": "vision_tower",
}
"""Where each part lies in transformers' model."""


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
    """Run tower, projector and decoder over packed rows; no token sees another segment.

    The tower runs in every batch, over an empty image where there is none: sharded parameters are gathered by all
    ranks together, and every trainable parameter has a gradient in every step.
    """
    tokens, backbone = batch.tokens, model.base_model
    embedded_BTD = backbone.get_input_embeddings()(tokens.input_ids_BT)
    pixels = batch.pixels_ICHW.to(model.dtype)
    is_blank = len(pixels) == 0
    if is_blank:
        pixels = pixels.new_zeros((1, *pixels.shape[1:]))
    features = torch.cat(list(backbone.get_image_features(pixels, return_dict=True).pooler_output)).to(
        embedded_BTD.dtype
    )
    if is_blank:
        embedded_BTD = embedded_BTD + 0 * features.sum()
    else:
        is_place_BT1 = (tokens.input_ids_BT == model.config.image_token_id)[..., None]
        embedded_BTD = embedded_BTD.masked_scatter(is_place_BT1, features)
    output = backbone.language_model(
        inputs_embeds=embedded_BTD,
        attention_mask=packed_attention_bias(tokens.segment_ids_BT, model.dtype),
        position_ids=tokens.position_ids_BT,
        use_cache=False,
    )
    last: Tensor = output.last_hidden_state
    return last


def learning_parts(parts: Sequence[Part] | None, lora: Lora | None) -> tuple[Part, ...]:
    """Return which parts learn: those of the recipe, else with adapters the language part, without all of them."""
    if parts is not None:
        return tuple(parts)
    return tuple(MODULES) if lora is None else ("language",)


def freeze(model: nn.Module, parts: Sequence[Part]) -> None:
    """Leave only the parts' parameters trainable, the head with the language part, and none that no loss reaches."""
    unused = unused_prefixes(model)
    for key, parameter in model.named_parameters():
        part = next((part for part, module in MODULES.items() if f".{module}." in f".{key}"), "language")
        parameter.requires_grad_(part in parts and not any(prefix in f".{key}" for prefix in unused))


def excluded_modules(model: nn.Module, parts: Sequence[Part]) -> str:
    """Return peft's pattern of the modules that get no adapter: those of other parts, and those that nothing reads."""
    others = [f"{module}." for part, module in MODULES.items() if part not in parts]
    prefixes = [*others, *(prefix.removeprefix(".") for prefix in unused_prefixes(model))]
    return rf"(.*\.)?({'|'.join(re.escape(prefix) for prefix in prefixes)}).*"


def unused_prefixes(model: Any) -> list[str]:
    """Return what names the tower's parameters behind the layer whose features are taken: nothing reads them."""
    config = model.config
    layers = config.vision_config.num_hidden_layers
    taken = config.vision_feature_layer
    states = [taken] if isinstance(taken, int) else list(taken)
    used = max(state if state >= 0 else layers + 1 + state for state in states)
    tower = f".{MODULES['vision']}"
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
    with torch.no_grad():
        weight = next(model.base_model.vision_tower.parameters())
        pixels = torch.zeros((1, *processor.shape_CHW), dtype=weight.dtype, device=weight.device)
        (features_FD,) = model.base_model.get_image_features(pixels, return_dict=True).pooler_output
    if (finding := image_size_rule(processor.tokens_per_image, len(features_FD))) is not None:
        raise StageError.of(finding)


def probe_pixels(config: Any) -> Tensor:
    """Return a fixed pattern [1, C, H, W] that a model's outputs are compared on."""
    vision = config.vision_config
    count = vision.num_channels * vision.image_size**2
    pattern = torch.sin(torch.arange(count, dtype=torch.float64) * 0.37).float()
    return pattern.view(1, vision.num_channels, vision.image_size, vision.image_size)


class VisionLanguageRuntime(FamilyRuntime):
    """LLaVA: answers about images; models come from outside."""

    kinds: ClassVar[tuple[ModelKind, ...]] = ("vision_language_model",)

    def build(
        self, architecture: Mapping[str, Any], facts: TokenizerFacts, *, seed: int, device: torch.device
    ) -> nn.Module:
        """Raise StageError: recipes build none."""
        raise StageError("vision-language models come from outside; none is built from random weights")

    def stock_class(self, model_type: str, kind: ModelKind) -> Any:
        """Return transformers' class."""
        from transformers.models.llava.modeling_llava import LlavaForConditionalGeneration

        return LlavaForConditionalGeneration

    def attention(self, device: torch.device, model_type: str) -> dict[str, str]:
        """Return the decoder's as of any decoder, torch's own kernel for the tower."""
        return {"text_config": attention_name(device), "vision_config": "sdpa", "": "sdpa"}

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
