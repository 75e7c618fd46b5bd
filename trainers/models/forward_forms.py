"""How a type's stock classes are run, by its record: rows kept apart, and logits from the last hidden states.

B batch, T tokens, D width, V vocabulary.
"""

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from recipes.models.type_table import TypeRecord, find_record
from trainers.models.attention import packed_attention_bias, segment_attention_bias
from trainers.models.shared_rows import AttentionCount, SharedRows

PLAIN = TypeRecord(family="", classes={}, packing="bias", decoding="bias")
"""Of a model that transformers does not have."""


def record_of(model: Any) -> TypeRecord:
    """Return the record of a model's type; of one that is made of models of any type that of its language part."""
    return find_record(model.config.model_type) or find_record(model.config.get_text_config().model_type) or PLAIN


def image_arguments(model: Any, input_ids_BT: Tensor, images: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return what a vision-language model is given of the images in these tokens: values in its precision, and where it
    asks for that which tokens are an image's.
    """
    device, bare = input_ids_BT.device, model.get_base_model() if hasattr(model, "get_base_model") else model
    given = {
        name: value.to(device, model.dtype) if value.is_floating_point() else value.to(device)
        for name, value in images.items()
    }
    if given and "mm_token_type_ids" in inspect.signature(type(bare.base_model).forward).parameters:
        given["mm_token_type_ids"] = (input_ids_BT == model.config.image_token_id).int()
    return given


def has_windows(model: Any) -> bool:
    """Tell whether some layers see only a part of what came before, which one additive mask for all cannot say."""
    config = model.config.get_text_config()
    kinds = getattr(config, "layer_types", None)
    if kinds:
        return any(kind in ("sliding_attention", "chunked_attention") for kind in kinds)
    return getattr(config, "sliding_window", None) is not None and getattr(config, "use_sliding_window", True)


@torch.no_grad()
def can_share_rows(network: Any) -> bool:
    """Tell whether tokens of a decoder see each other by attention alone that knows of shared rows, in every layer.

    The network has to be whole: it reads two tokens.
    """
    if record_of(network).packing != "bias" or has_windows(network):
        return False
    parameters = inspect.signature(type(network.base_model).forward).parameters.values()
    if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return False
    layers, place = AttentionCount(), torch.arange(2, device=network.device)
    told = {**SharedRows(place[None], place).inputs(torch.zeros_like(place)[None]), "shared_rows": layers}
    network.base_model(**told, use_cache=False)
    return layers.count == int(network.config.get_text_config().num_hidden_layers)


def packed_inputs(model: Any, segment_ids_BT: Tensor, position_ids_BT: Tensor) -> dict[str, Any]:
    """Return what a decoder is told besides its tokens, so that none sees another segment.

    A type whose rows cannot be kept apart is given one row a sequence, right-padded: what stands after it is not seen.
    """
    form = record_of(model).packing
    match "positions" if form == "bias" and has_windows(model) else form:
        case "bias":
            bias = packed_attention_bias(segment_ids_BT, model.dtype)
            return {"attention_mask": bias, "position_ids": position_ids_BT}
        case "positions":
            # transformers' own masks, sliding windows too, restart where positions do.
            return {"attention_mask": None, "position_ids": position_ids_BT}
        case "kinds":
            return {"attention_mask": _masks_by_kind(model, segment_ids_BT), "position_ids": position_ids_BT}
        case None:
            if int(segment_ids_BT.max()) > 1:
                raise ValueError(f"{model.config.model_type}: rows of a sequence cannot be kept apart")
            return {"attention_mask": None}


def encoder_inputs(model: Any, segment_ids_BT: Tensor, position_ids_BT: Tensor) -> dict[str, Tensor]:
    """Return what an encoder is told besides its tokens, so that none sees another segment, or padding."""
    record = record_of(model)
    if record.packing is None:
        return {"attention_mask": (segment_ids_BT > 0).long()}
    first = int(model.config.pad_token_id) + 1 if record.first_position == "after_pad" else 0
    return {
        "attention_mask": segment_attention_bias(segment_ids_BT, model.dtype),
        "position_ids": position_ids_BT + first if first else position_ids_BT,
    }


def _masks_by_kind(model: Any, segment_ids_BT: Tensor) -> dict[str, Tensor]:
    """Return an additive mask for each kind of layer: a window counts the token itself."""
    bias_B1TT = packed_attention_bias(segment_ids_BT, model.dtype)
    places_T = torch.arange(segment_ids_BT.shape[1], device=segment_ids_BT.device)
    window = model.config.get_text_config().sliding_window
    is_far_TT = places_T[:, None] - places_T[None, :] >= window
    windowed_B1TT = bias_B1TT.masked_fill(is_far_TT, torch.finfo(model.dtype).min)
    return {"full_attention": bias_B1TT, "sliding_attention": windowed_B1TT}


def scaled(model: Any, hidden: Tensor) -> Tensor:
    """Return the states such that the head's product is what logits are made of; most types do not scale."""
    scale = record_of(model).scale
    if scale is None:
        return hidden
    key, power = scale
    found = getattr(model.config.get_text_config(), key)
    return hidden if found is None else hidden * float(found) ** power


def softcap_of(model: Any) -> float | None:
    """Return the bound c of logits c * tanh(x / c); None: they have none."""
    key = record_of(model).softcap
    found = None if key is None else getattr(model.config.get_text_config(), key)
    return None if found is None else float(found)


def head_logits(model: Any, hidden: Tensor) -> Tensor:
    """Return the logits of last hidden states, as the stock class makes them."""
    head = model.get_output_embeddings()
    logits: Tensor = head(scaled(model, hidden).to(head.weight.dtype))  # some types add up in fp32
    cap = softcap_of(model)
    return logits if cap is None else torch.tanh(logits / cap) * cap
