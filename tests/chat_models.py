"""Tiny chat models in the Hugging Face layout, made with stock libraries: tokenizer, template, config, safetensors."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

END = "<|im_end|>"
DOCUMENT_END = "<|endoftext|>"
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def chat_tokenizer(eos: str = END, template: str | None = CHATML) -> PreTrainedTokenizerFast:
    """Byte-level BPE of about 300 entries with ChatML's marks and <|endoftext|>; `eos` ends documents."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|pad|>", "<|im_start|>", END, DOCUMENT_END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["the quick brown fox jumps over the lazy dog"] * 5, trainer)
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=eos, pad_token="<|pad|>")
    made.chat_template = template
    return made


def write_chat_model(
    folder: Path,
    tokenizer: PreTrainedTokenizerFast,
    *,
    rows: int | None = None,
    ends: list[int] | None = None,
    scores: bool = False,
    **config: Any,
) -> Path:
    """Write a llama of width 32 with random weights and `rows` rows in its embedding (None: the tokenizer's).

    `ends` are the end tokens of a generation_config.json; None: what the stock class writes. With `scores` it is a
    reward model.
    """
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    settings = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None}
    settings |= {"vocab_size": rows or len(tokenizer), "max_position_embeddings": 256, **sizes, **config}
    torch.manual_seed(0)
    model: PreTrainedModel
    if scores:
        model = LlamaForSequenceClassification(LlamaConfig(**settings, num_labels=1))
    else:
        model = LlamaForCausalLM(LlamaConfig(**settings))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if ends is not None:
        content = {"eos_token_id": ends, "pad_token_id": tokenizer.pad_token_id}
        (folder / "generation_config.json").write_text(json.dumps(content))
    return folder


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def chat(question: str, answer: str) -> list[dict[str, str]]:
    """A conversation of two turns."""
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
