"""diffusers' networks of a diffusion: UNet2DModel, and where captions condition it UNet2DConditionModel."""

from typing import Any

from recipes.models.images.ddpm import Ddpm

HEAD = 8
"""Channels of an attention head at most."""


def build_unet(architecture: Ddpm, shape: tuple[int, ...], num_classes: int, text_width: int | None) -> Any:
    """Build the network for images or latents [C, H, W]; `text_width` is that of the captions' hidden states."""
    channels, height, _ = shape
    widths, attention = tuple(architecture.block_out_channels), architecture.attention_levels
    levels = range(len(widths))
    options: dict[str, Any] = {
        "sample_size": height,
        "in_channels": channels,
        "out_channels": channels,
        "block_out_channels": widths,
        "layers_per_block": architecture.layers_per_block,
        "norm_num_groups": architecture.norm_num_groups,
    }
    if text_width is None:
        from diffusers.models.unets.unet_2d import UNet2DModel

        return UNet2DModel(
            **options,
            down_block_types=tuple("AttnDownBlock2D" if at in attention else "DownBlock2D" for at in levels),
            up_block_types=tuple("AttnUpBlock2D" if at in attention else "UpBlock2D" for at in reversed(levels)),
            attention_head_dim=min(HEAD, *widths),
            num_class_embeds=num_classes + architecture.is_guidable if architecture.class_conditional else None,
        )
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

    return UNet2DConditionModel(
        **options,
        down_block_types=tuple("CrossAttnDownBlock2D" if at in attention else "DownBlock2D" for at in levels),
        up_block_types=tuple("CrossAttnUpBlock2D" if at in attention else "UpBlock2D" for at in reversed(levels)),
        attention_head_dim=tuple(num_heads(width) for width in widths),  # this class reads it as the number of heads
        cross_attention_dim=text_width,
    )


def num_heads(width: int) -> int:
    """Return the attention heads of a level."""
    return max(1, width // HEAD)
