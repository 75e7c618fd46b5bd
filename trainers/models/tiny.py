"""Tiny configurations of any model type of transformers: its own defaults with every size made small."""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from recipes.models.model_kinds import MODEL_KINDS, ModelKind
from recipes.models.type_table import TypeRecord

MOST_PARAMETERS = 3_000_000
"""Of a tiny model."""
CLOSE = 2e-4
"""Share of the largest value by which two ways to compute a tensor may differ."""
VOCABULARY = 101
PAD, BOS, EOS = 0, 1, 2
WIDTH, WIDE, HEADS, HEAD, LAYERS, LONGEST = 32, 48, 4, 8, 2, 64

SIZES: dict[str, float] = {
    **dict.fromkeys(
        (
            "hidden_size", "d_model", "n_embd", "dim", "emb_dim", "embedding_size", "word_embed_proj_dim", "embed_dim",
            "hidden_dim", "model_dim", "lru_width", "attention_hidden_size",
        ),
        WIDTH,
    ),
    **dict.fromkeys(
        (
            "intermediate_size", "ffn_dim", "d_ff", "n_inner", "ffn_hidden_size", "encoder_ffn_dim", "decoder_ffn_dim",
            "moe_intermediate_size", "shared_expert_intermediate_size", "shared_intermediate_size",
            "moe_shared_expert_intermediate_size", "dense_intermediate_size", "expert_ffn_hidden_size", "dff",
            "block_ff_dim", "intermediate_size_mlp", "prefix_dense_intermediate_size",
        ),
        WIDE,
    ),
    **dict.fromkeys(
        (
            "num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers",
            "num_decoder_layers", "num_blocks",
        ),
        LAYERS,
    ),
    **dict.fromkeys(
        (
            "num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads",
            "decoder_attention_heads",
        ),
        HEADS,
    ),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "n_kv_heads", "multi_query_group_num"), 2),
    **dict.fromkeys(("head_dim", "d_kv", "qk_nope_head_dim", "v_head_dim", "attention_head_dim", "kv_channels"), HEAD),
    **dict.fromkeys(("global_head_dim", "swa_head_dim", "swa_v_head_dim", "attention_head_size"), HEAD),
    "qk_rope_head_dim": 4, "q_lora_rank": 16, "kv_lora_rank": 8, "qk_head_dim": 12, "o_lora_rank": 8, "rotary_dim": 4,
    **dict.fromkeys(
        ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "num_experts_per_layer"), 4
    ),
    **dict.fromkeys(
        ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k", "num_selected_experts"), 2
    ),
    **dict.fromkeys(("n_group", "topk_group", "first_k_dense_replace", "n_shared_experts", "num_dense_layers"), 1),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_sequence_length", "n_ctx", "max_seq_len"), LONGEST),
    **dict.fromkeys(("max_encoder_position_embeddings", "max_decoder_position_embeddings"), LONGEST),
    **dict.fromkeys(
        ("sliding_window", "attention_window_size", "attention_chunk_size", "local_attention", "window_size"), 4
    ),
    **dict.fromkeys(("state_size", "mamba_d_state", "ssm_state_size"), 4),
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads", "n_mamba_heads"), 4),
    **dict.fromkeys(("mamba_d_head", "mamba_head_dim"), 16),
    **dict.fromkeys(("mamba_d_ssm",), 64),
    **dict.fromkeys(("linear_num_key_heads", "linear_num_value_heads"), 2),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim"), 8),
    **dict.fromkeys(("chunk_size", "mamba_chunk_size"), 8),
    # what logits are multiplied by or squeezed into must show
    "logits_scaling": 2.0, "logit_scale": 0.5, "lm_head_multiplier": 0.5, "final_logit_softcapping": 5.0,
    "time_step_rank": 4, "mamba_dt_rank": 4, "index_n_heads": 2, "index_head_dim": 8, "index_topk": 4,
    "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCABULARY, "initial_context_length": LONGEST,
    "partial_rotary_factor_": 1, "num_buckets": 8, "type_vocab_size": 2, "axial_pos_embds_dim_": 0,
    "num_hash_layers": 0, "query_pre_attn_scalar": 8, "cross_layer_interval": 1, "embedding_dim": WIDTH,
}  # fmt: skip
"""Small values by the names that configurations give to sizes."""
ALWAYS = (
    "intermediate_size", "n_inner", "final_logit_softcapping", "head_dim", "num_experts_per_tok", "n_routed_experts",
    "n_shared_experts", "num_key_value_heads",
)  # fmt: skip
"""Given also where the default is null."""

OWN: dict[str, dict[str, Any]] = {
    "mamba2": {"num_heads": 8},
    "zaya": {"num_experts_per_tok": 1},
    "dots3_note_text": {"num_key_value_heads": 4},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
}
"""Sizes of types that ask for a relation between them."""


def tiny_config(config_class: Any, **more: Any) -> Any:
    """Return a configuration of the class with every size small; `more` are keys that go before."""
    names = {item.name for item in dataclasses.fields(config_class)}
    ids = {"vocab_size": VOCABULARY, "pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS}
    own = {name: value for name, value in ids.items() if name in names}
    return config_class(**{**tiny_keys(config_class), **own, **more})


def tiny_keys(config_class: Any) -> dict[str, Any]:
    """Return the keys that make a type's model small, without those that follow from a tokenizer; no dropout."""
    fields = {item.name: item for item in dataclasses.fields(config_class)}
    keys: dict[str, Any] = {}
    for name, item in fields.items():
        if name in SIZES and (item.default is not None or name in ALWAYS):
            keys[name] = SIZES[name]
    if "qk_rope_head_dim" in fields:
        keys.pop("head_dim", None)  # follows from it
        keys["num_key_value_heads"] = HEADS  # latent keys are those of every head
    keys |= {name: 0.0 for name, item in fields.items() if "drop" in name and isinstance(item.default, float)}
    return keys | _layer_kinds(config_class, fields) | OWN.get(config_class.model_type, {})


def _layer_kinds(config_class: Any, fields: dict[str, Any]) -> dict[str, Any]:
    """One layer of each kind that the type mixes, so that a small model has all of them."""
    if "layer_types" not in fields:
        return {}
    try:
        kinds = list(dict.fromkeys(config_class().layer_types or ()))
    except (TypeError, ValueError, AttributeError):
        return {}
    if len(kinds) < 2:
        return {}
    names = ("num_hidden_layers", "num_layers", "n_layer")
    count = next((name for name in names if name in fields), names[0])
    return {"layer_types": kinds, count: len(kinds)}


def tiny_model(
    model_type: str,
    record: TypeRecord,
    kind: ModelKind = "language_model",
    attention: str = "eager",
    keys: Any = None,
    **more: Any,
) -> Any:
    """Return a tiny model whose weights are wide enough that every part of it shows in the outputs."""
    import transformers

    model_class = getattr(transformers, record.classes[kind])
    if MODEL_KINDS[kind].reads_targets:
        more.setdefault("decoder_start_token_id", PAD)
    config = tiny_config(transformers.CONFIG_MAPPING[model_type], **{**(keys or {}), **more})
    with torch.device("meta"):
        count = sum(parameter.numel() for parameter in model_class(config).parameters())
    if count > MOST_PARAMETERS:
        raise ValueError(f"it was not tried: its smallest model has {count:,} parameters")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = model_class._from_config(config, attn_implementation=attention).float()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.normal_(std=parameter.shape[-1] ** -0.5)
    return model.eval()


def close(ours: Tensor, theirs: Tensor) -> bool:
    """Tell whether two ways to compute a tensor agree."""
    scale = float(theirs.abs().max()) or 1.0
    return bool(torch.isfinite(ours).all()) and float((ours - theirs).abs().max()) < CLOSE * scale


def demand_checkpointing(make: Callable[[], Any], loss: Callable[[Any], Tensor]) -> None:
    """Raise ValueError if a model's gradients differ where its activations are computed again in the backward pass."""
    gradients: list[list[Tensor]] = []
    for checkpointed in (False, True):
        model = make().train()
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        loss(model).backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    if not all(close(a, b) for a, b in zip(*gradients, strict=True)):
        raise ValueError("with it gradients differ")


def said(error: Exception) -> str:
    """Return what an error says, shortened."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:160]}" if not isinstance(error, ValueError) else text[:160]
