"""The recipes whose memory is predicted and measured: families, engines, adapters, preferences, RL, images."""

import json
import random
from pathlib import Path
from typing import Any

Stage = dict[str, Any]

VOCABULARY = 2048
LLAMA = {
    "family": "decoder",
    "type": "llama",
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "max_position_embeddings": 1024,
}
GPT2 = {"family": "decoder", "type": "gpt2", "n_embd": 512, "n_layer": 4, "n_head": 8}
GEMMA = {
    "family": "decoder",
    "type": "gemma3_text",
    "hidden_size": 384,
    "intermediate_size": 1536,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 96,
    "max_position_embeddings": 1024,
}
QWEN = {**LLAMA, "type": "qwen3", "num_key_value_heads": 4, "tie_word_embeddings": True}
LSTM = {"family": "rnn", "type": "lstm", "hidden_size": 1024, "embedding_size": 512, "num_hidden_layers": 2}
BERT = {
    "family": "encoder",
    "type": "bert",
    "hidden_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "intermediate_size": 2048,
    "max_position_embeddings": 512,
}
BART = {
    "family": "encoder_decoder",
    "type": "bart",
    "d_model": 512,
    "encoder_layers": 3,
    "decoder_layers": 3,
    "encoder_ffn_dim": 1536,
    "decoder_ffn_dim": 1536,
    "encoder_attention_heads": 8,
    "decoder_attention_heads": 8,
    "max_position_embeddings": 512,
}
T5 = {
    "family": "encoder_decoder",
    "type": "t5",
    "d_model": 384,
    "d_kv": 64,
    "d_ff": 1024,
    "num_layers": 3,
    "num_heads": 6,
}

TEXTS = {"source": "jsonl", "files": ["texts.jsonl"]}
ANSWERS = {"source": "jsonl", "files": ["answers.jsonl"]}
LABELS = {"source": "jsonl", "files": ["labels.jsonl"], "hold_out": 0.1}
PAIRS = {"source": "jsonl", "files": ["pairs.jsonl"], "hold_out": 0.1}
PROMPTS = {"source": "jsonl", "files": ["prompts.jsonl"]}
IMAGES = {"source": "arrays", "files": ["images.npz"], "labels": "labels", "hold_out": 0.1}
CAPTIONED = {"source": "arrays", "files": ["images.npz"], "caption_files": ["captions.csv"], "hold_out": 0.1}

PLAIN = {"engine": "plain"}
WIDE = {**PLAIN, "micro_batch": 8}
RECOMPUTED = {**WIDE, "gradient_checkpointing": True}
BF16 = {**PLAIN, "precision": "bf16"}
LORA = {"r": 16, "alpha": 32}


def zero(stage: int, **more: Any) -> Stage:
    """DeepSpeed with a ZeRO stage."""
    return {"engine": "deepspeed", "zero": stage, **more}


def train(batch: int, length: int | None = None) -> Stage:
    """A few steps."""
    found: Stage = {"steps": 2, "global_batch": batch, "optimizer": {"lr": 1e-4}, "save_every": 2, "evaluate_every": 2}
    return found | ({"evaluation_rows": 8} if length is None else {"sequence_length": length, "evaluation_rows": 8})


def pretrain(architecture: Stage, batch: int = 8, length: int = 64, shard: Stage = PLAIN, **tokens: Any) -> Stage:
    """A model of text from random weights."""
    return {
        "kind": "pretrain",
        "architecture": architecture,
        "tokenizer": {"train": "bpe", "vocab_size": VOCABULARY, **tokens},
        "data": TEXTS,
        "train": train(batch, length),
        "shard": {"precision": "fp32", **shard},
    }


def tuned(
    data: Stage, batch: int = 8, length: int = 64, shard: Stage = PLAIN, kind: str = "finetune", **more: Any
) -> Stage:
    """Learning from rows."""
    return {
        "kind": kind,
        "init_from": "base",
        "data": data,
        "train": train(batch, length),
        "shard": {"precision": "fp32", **shard},
        **more,
    }


def policy(algorithm: str, shard: Stage = PLAIN, micro_batch: int = 4, **more: Any) -> Stage:
    """Reinforcement learning."""
    return {
        "kind": "rl",
        "actor": "base",
        "prompts": PROMPTS,
        "template": "chat" if algorithm == "ppo" else "none",
        "rewards": {"judge": {"model": "reward"}} if algorithm == "ppo" else {"right": {"rule": "number"}},
        "rollout": {
            "prompts_per_iteration": 8,
            "samples_per_prompt": 2,
            "max_prompt_tokens": 32,
            "max_new_tokens": 32,
        },
        "algorithm": {"name": algorithm, "iterations": 2, "epochs": 1, "mini_batches": 2, "optimizer": {"lr": 1e-5}},
        "shard": {"precision": "fp32", "micro_batch": micro_batch, **shard},
        **more,
    }


def images(architecture: Stage, batch: int = 32, shard: Stage = PLAIN, data: Stage = IMAGES, **more: Any) -> Stage:
    """A model of images from random weights."""
    return {
        "kind": "pretrain",
        "architecture": architecture,
        "data": data,
        "train": {**train(batch), "grid": 0},
        "shard": {"precision": "fp32", "micro_batch": batch, **shard},
        **more,
    }


BASE = pretrain(LLAMA)
ENCODER = pretrain(BERT, cls_token="<|cls|>", mask_token="<|mask|>")
SEQ2SEQ = pretrain(BART, num_sentinels=32)
REWARD = tuned(PAIRS, kind="reward", gate="ignore")
UNET = {
    "family": "ddpm",
    "block_out_channels": [64, 128, 128],
    "layers_per_block": 1,
    "attention_levels": [2],
    "sampling_steps": 5,
}
CLASSES = {**UNET, "class_conditional": True, "sampler": "ddpm", "guidance": 1.0}
KL_VAE = {"family": "vae", "type": "autoencoder_kl", "width": 32, "depth": 2, "latent": 4, "likelihood": "gaussian"}

RECIPES: dict[str, tuple[int, dict[str, Stage]]] = {
    "pretrain": (1, {"base": BASE}),
    "pretrain-2": (2, {"base": pretrain(LLAMA)}),
    "pretrain-long": (1, {"base": pretrain(LLAMA, 1, 1024)}),
    "pretrain-wide-batch": (1, {"base": pretrain(LLAMA, 8, 256, WIDE)}),
    "pretrain-checkpointing": (1, {"base": pretrain(LLAMA, 8, 256, RECOMPUTED)}),
    "pretrain-bf16": (1, {"base": pretrain(LLAMA, shard=BF16)}),
    **{f"pretrain-zero{stage}": (2, {"base": pretrain(LLAMA, shard=zero(stage))}) for stage in (0, 1, 2, 3)},
    **{
        f"pretrain-zero{stage}-bf16": (2, {"base": pretrain(LLAMA, shard=zero(stage, precision="bf16"))})
        for stage in (0, 1, 2, 3)
    },
    "gpt2": (1, {"base": pretrain(GPT2)}),
    "qwen3": (1, {"base": pretrain(QWEN)}),
    "gemma3": (1, {"base": pretrain(GEMMA)}),
    "lstm": (1, {"base": pretrain(LSTM)}),
    "bert": (1, {"base": ENCODER}),
    "bert-zero2": (2, {"base": {**ENCODER, "shard": {"precision": "fp32", **zero(2)}}}),
    "bert-classifier": (1, {"base": ENCODER, "classes": tuned(LABELS)}),
    "bart": (1, {"base": SEQ2SEQ}),
    "bart-tuned": (1, {"base": SEQ2SEQ, "answers": tuned(ANSWERS)}),
    "t5": (1, {"base": pretrain(T5, num_sentinels=32)}),
    "finetune": (1, {"base": BASE, "sft": tuned(ANSWERS)}),
    "finetune-zero3": (2, {"base": BASE, "sft": tuned(ANSWERS, shard=zero(3))}),
    "lora": (1, {"base": BASE, "sft": tuned(ANSWERS, lora=LORA)}),
    "lora-bf16": (1, {"base": BASE, "sft": tuned(ANSWERS, lora=LORA, shard=BF16)}),
    "lora-zero2": (2, {"base": BASE, "sft": tuned(ANSWERS, lora=LORA, shard=zero(2))}),
    "lora-zero3": (2, {"base": BASE, "sft": tuned(ANSWERS, lora=LORA, shard=zero(3))}),
    "dora": (1, {"base": BASE, "sft": tuned(ANSWERS, lora={**LORA, "dora": True})}),
    "reward": (1, {"base": BASE, "reward": REWARD}),
    "reward-lora": (1, {"base": BASE, "reward": {**REWARD, "lora": LORA}}),
    "reward-zero2": (2, {"base": BASE, "reward": {**REWARD, "shard": {"precision": "fp32", **zero(2)}}}),
    "dpo": (1, {"base": BASE, "policy": tuned(PAIRS, 4, kind="preference", gate="ignore")}),
    "dpo-lora": (1, {"base": BASE, "policy": tuned(PAIRS, 4, kind="preference", lora=LORA)}),
    "simpo-zero2": (
        2,
        {"base": BASE, "policy": tuned(PAIRS, 4, kind="preference", loss={"name": "simpo"}, shard=zero(2))},
    ),
    "ppo": (1, {"base": BASE, "reward": REWARD, "policy": policy("ppo", gate="ignore")}),
    "ppo-lora": (
        1,
        {"base": BASE, "reward": {**REWARD, "lora": LORA}, "policy": policy("ppo", gate="ignore", lora=LORA)},
    ),
    "ppo-zero3": (2, {"base": BASE, "reward": REWARD, "policy": policy("ppo", zero(3), gate="ignore")}),
    "grpo": (1, {"base": BASE, "policy": policy("grpo")}),
    "grpo-lora-zero2": (2, {"base": BASE, "policy": policy("grpo", zero(2), lora=LORA)}),
    "classifier": (
        1,
        {"net": images({"family": "classifier", "type": "convnet", "width": 64, "depth": 3, "features": 128})},
    ),
    "vae": (1, {"net": images({"family": "vae", "type": "mlp", "width": 2048, "depth": 2, "latent": 16})}),
    "vae-kl": (1, {"net": images(KL_VAE)}),
    "gan": (
        1,
        {"net": images({"family": "gan", "type": "convnet", "width": 64, "depth": 3, "latent": 32, "r1_gamma": 0.1})},
    ),
    "ddpm": (1, {"net": images(UNET, 16)}),
    "ddpm-ema-zero2": (2, {"net": images({**UNET, "ema_decay": 0.99}, 32, {**zero(2), "micro_batch": 16})}),
    "latent": (1, {"vae": images(KL_VAE), "net": images(UNET, 32, autoencoder="vae")}),
    "captions": (1, {"words": ENCODER, "net": images(UNET, 16, data=CAPTIONED, text_encoder="words")}),
    "ddpm-lora": (
        1,
        {
            "net": images(CLASSES, 16),
            "tuned": {
                "kind": "finetune",
                "family": "ddpm",
                "init_from": "net",
                "lora": LORA,
                "data": IMAGES,
                "train": {**train(16), "grid": 0},
                "shard": {"precision": "fp32", **PLAIN, "micro_batch": 16},
            },
        },
    ),
    "ddpo": (
        1,
        {
            "net": images(CLASSES, 16),
            "policy": {
                "kind": "rl",
                "actor": "net",
                "reward": {"rule": "ink"},
                "rollout": {"images_per_iteration": 16},
                "algorithm": {
                    "name": "ddpo",
                    "iterations": 2,
                    "epochs": 1,
                    "mini_batches": 2,
                    "optimizer": {"lr": 1e-4},
                },
                "shard": {"precision": "fp32", **PLAIN, "micro_batch": 4},
            },
        },
    ),
}
"""By name: workers, and stages of which the last one is measured; stages with equal settings are computed once."""


def write_data(folder: Path) -> None:
    """Write the rows that all recipes read."""
    import numpy as np

    chance = random.Random(0)
    words = [
        "".join(chance.choice("abcdefghijklmnopqrstuvwxyz") for _ in range(chance.randint(3, 9))) for _ in range(2000)
    ]

    def text(length: int) -> str:
        return " ".join(chance.choice(words) for _ in range(length))

    def rows(name: str, values: list[dict[str, Any]]) -> None:
        (folder / name).write_text("".join(json.dumps(value) + "\n" for value in values))

    rows("texts.jsonl", [{"text": text(200)} for _ in range(60)])
    rows("answers.jsonl", [{"prompt": text(4), "completion": text(8)} for _ in range(100)])
    rows("labels.jsonl", [{"text": text(12), "label": "ab"[number % 2]} for number in range(100)])
    rows("pairs.jsonl", [{"prompt": text(3), "chosen": text(8), "rejected": text(8)} for _ in range(100)])
    rows("prompts.jsonl", [{"prompt": text(4), "answer": "7"} for _ in range(100)])
    pixels = np.random.default_rng(0)
    arrays = {"images": pixels.random((200, 32, 32, 3), dtype=np.float32), "labels": np.arange(200) % 10}
    np.savez(folder / "images.npz", **arrays)
    (folder / "captions.csv").write_text("caption\n" + "".join(f"{text(8)}\n" for _ in range(200)))
