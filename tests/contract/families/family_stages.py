"""A small stage of every family, by the family's name."""

from typing import Any

from recipes.models.families import FAMILIES as BUILT

STEPS = 6
TRAIN: dict[str, Any] = {
    "steps": STEPS,
    "global_batch": 8,
    "optimizer": {"lr": 1e-2},
    "save_every": 100,
    "evaluate_every": 4,
    "evaluation_rows": 16,
}
DIFFUSED = {**TRAIN, "evaluation_rows": 8}
"""A diffusion's bound takes a dozen forwards a row."""
DIGITS: dict[str, Any] = {"source": "digits", "hold_out": 0.2, "limit": 96}


def image_stage(**architecture: Any) -> dict[str, Any]:
    """Give a small stage on the digits."""
    return {"kind": "pretrain", "architecture": architecture, "data": DIGITS, "train": {**TRAIN, "grid": 4}}


def gan_stage() -> dict[str, Any]:
    """Give a small adversarial stage; its penalty differentiates twice, so a large step soon magnifies rounding."""
    stage = image_stage(
        family="gan", width=4, latent=4, spectral_norm=True, r1_gamma=0.5, ema_decay=0.9, class_conditional=True
    )
    return {**stage, "train": {**stage["train"], "optimizer": {"lr": 1e-3}}}


def text_stage(length: int = 32, evaluation_rows: int = 16, **architecture: Any) -> dict[str, Any]:
    """Give a small stage on the folder's text."""
    marks: dict[str, Any] = {
        "encoder": {"cls_token": "<|cls|>", "mask_token": "<|mask|>"},
        "encoder_decoder": {"num_sentinels": 8},
    }.get(architecture["family"], {})
    return {
        "kind": "pretrain",
        "architecture": architecture,
        "tokenizer": {"train": "bpe", "vocab_size": 320, **marks},
        "data": {"source": "text", "files": ["text.txt"], "documents": "paragraph", "hold_out": 0.2},
        "train": {**TRAIN, "sequence_length": length, "evaluation_rows": evaluation_rows},
    }


DDPM: dict[str, Any] = {
    "family": "ddpm",
    "block_out_channels": [8, 16],
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "attention_levels": [1],
    "timesteps": 50,
    "sampling_steps": 5,
    "guidance": 2.0,
}
VISION_LANGUAGE: dict[str, Any] = {
    "kind": "finetune",
    "init_from": "store://small-llava",
    "data": {"source": "jsonl", "files": ["images.jsonl"], "hold_out": 0.2},
    "train": {**TRAIN, "sequence_length": 64},
}
"""Starts from a model that the kit writes; no recipe builds one."""

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
STAGES: dict[str, dict[str, Any]] = {
    "vision_language": VISION_LANGUAGE,
    "decoder": text_stage(family="decoder", type="llama", **SIZES),
    "rnn": text_stage(
        16, 999, family="rnn", type="lstm", hidden_size=32, embedding_size=24, num_hidden_layers=2, dropout=0.0
    ),
    "encoder": text_stage(
        family="encoder", type="bert", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **SIZES
    ),
    "encoder_decoder": text_stage(
        family="encoder_decoder",
        type="t5",
        d_model=32,
        d_kv=8,
        d_ff=64,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
    ),
    "classifier": image_stage(family="classifier", type="convnet", width=8, features=8),
    "vae": image_stage(family="vae", type="convnet", width=8, depth=2, latent=4, binarize=True, kl_warmup_steps=4),
    "gan": gan_stage(),
    "ddpm": {
        **image_stage(**DDPM, class_conditional=True, min_snr_gamma=5.0, ema_decay=0.9),
        "train": {**DIFFUSED, "grid": 4},
    },
}
KINDS: dict[str, Any] = {
    "kind": "finetune",
    "init_from": "encoder",
    "data": {"source": "csv", "files": ["labelled.csv"], "hold_out": 0.2},
    "train": {**TRAIN, "sequence_length": 32},
}
CROSSINGS: dict[str, tuple[dict[str, Any], dict[str, str]]] = {
    "classified": (KINDS, {"init_from": "encoder"}),
    "classified-few": (
        {
            **KINDS,
            "lora": {"r": 2},
            "labelled_share": 0.5,
            "pseudo_labels": {"threshold": 0.5, "ratio": 2, "warmup_steps": 1},
        },
        {"init_from": "encoder"},
    ),
    "captioned": (
        {**image_stage(**DDPM, label_dropout=0.3), "text_encoder": "encoder", "train": {**DIFFUSED, "grid": 0}},
        {"text_encoder": "encoder"},
    ),
    "adapted": (
        {
            "kind": "finetune",
            "family": "ddpm",
            "init_from": "captioned",
            "lora": {"r": 2},
            "data": DIGITS,
            "train": {**DIFFUSED, "grid": 0},
        },
        {"init_from": "captioned"},
    ),
}
"""Stages that take other stages' models, with their inputs by field path; each after those that it takes."""

DDPO: dict[str, Any] = {
    "kind": "rl",
    "reward": {"classifier": "classifier"},
    "algorithm": {
        "name": "ddpo",
        "iterations": 3,
        "mini_batches": 2,
        "kl_coef": 0.1,
        "kl_in": "loss",
        "kl_limit": 1000,
        "optimizer": {"lr": 1e-3},
        "save_every": 1,
        "grid": 4,
    },
}
TUNED: dict[str, tuple[dict[str, Any], dict[str, str]]] = {
    "tuned": (
        {**DDPO, "actor": "ddpm", "rollout": {"images_per_iteration": 8, "guidance": 1.5, "classes": ["1", "8"]}},
        {"actor": "ddpm", "reward.classifier": "classifier"},
    ),
    "tuned-captions": (
        {
            **DDPO,
            "actor": "captioned",
            "lora": {"r": 2},
            "prompts": DIGITS,
            "rollout": {"images_per_iteration": 8, "guidance": 1.5, "samples_per_prompt": 2},
        },
        {"actor": "captioned", "reward.classifier": "classifier"},
    ),
}
"""Reward-tuned diffusions of the stages above, rewarded by the small `classifier`, with their inputs by field path."""

FAMILIES = (*BUILT, "vision_language")
LANGUAGE = ("decoder", "encoder", "encoder_decoder", "rnn", "vision_language")
IMAGES = sorted(set(BUILT) - set(LANGUAGE))
DRAWING = [family for family in IMAGES if family != "classifier"]
CLASSIFIED = [name for name in CROSSINGS if name.startswith("classified")]
KIT = [*FAMILIES, *CROSSINGS]
"""Every family, and the stages that build on several."""


def artifact_kind(name: str) -> str:
    """Return the kind of the artifact that a stage of the kit makes."""
    if name in CLASSIFIED:
        return "text_classifier"
    return "model" if name in LANGUAGE else "ddpm" if name in CROSSINGS else name
