"""Small vision-language models of random weights of several types, in transformers' layout, for trials and tests.

Usage: python -m trainers.models.small_vision TYPE FOLDER
"""

import argparse
import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from recipes.data.tokenizers import TrainTokenizer
from trainers.data.tokenizer import Tokenization, train_tokenizer
from trainers.models.folders import write_json, write_model
from trainers.models.small_llava import DIGIT_TEXTS

LONGEST = 256


@dataclass(frozen=True)
class Small:
    """What makes a type small."""

    image: str
    """The token of an image."""
    around: tuple[str, str]
    """What a template writes around it."""
    tokens: Mapping[str, str]
    """Keys of the configuration -> the token whose number each has."""
    config: Mapping[str, Any]
    text: Mapping[str, Any]
    files: Mapping[str, Mapping[str, Any]]
    """Of its processor."""
    names: tuple[str, ...] = ()
    """Further tokens that its processor writes."""


_QWEN_TOKENS = {
    "image_token_id": "<|image_pad|>", "video_token_id": "<|video_pad|>",
    "vision_start_token_id": "<|vision_start|>", "vision_end_token_id": "<|vision_end|>",
}  # fmt: skip
_GRID = {
    "image_processor_type": "Qwen2VLImageProcessor", "patch_size": 4, "merge_size": 2, "temporal_patch_size": 2,
    "size": {"shortest_edge": 64, "longest_edge": 1024},
}  # fmt: skip
_TOWER = {"depth": 2, "num_heads": 4, "patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2}
_MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}

SMALL: dict[str, Small] = {
    "qwen2_vl": Small(
        image="<|image_pad|>",
        around=("<|vision_start|>", "<|vision_end|>"),
        tokens=_QWEN_TOKENS,
        config={"vision_config": {**_TOWER, "embed_dim": 16, "hidden_size": 32, "mlp_ratio": 2}},
        text={"rope_parameters": _MROPE},
        files={"preprocessor_config.json": {**_GRID, "processor_class": "Qwen2VLProcessor"}},
    ),
    "qwen3_vl": Small(
        image="<|image_pad|>",
        around=("<|vision_start|>", "<|vision_end|>"),
        tokens=_QWEN_TOKENS,
        config={
            "vision_config": {
                **_TOWER, "hidden_size": 16, "intermediate_size": 32, "out_hidden_size": 32,
                "num_position_embeddings": 16, "deepstack_visual_indexes": [0],
            }
        },
        text={"rope_parameters": {**_MROPE, "mrope_interleaved": True}, "head_dim": 8},
        files={"preprocessor_config.json": {**_GRID, "processor_class": "Qwen3VLProcessor"}},
    ),
    "idefics3": Small(
        image="<image>",
        around=("", ""),
        tokens={"image_token_id": "<image>"},
        config={
            "scale_factor": 2,
            "vision_config": {
                "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
                "image_size": 16, "patch_size": 4,
            },
        },
        text={"model_type": "llama", "head_dim": 8},
        files={
            "processor_config.json": {"processor_class": "Idefics3Processor", "image_seq_len": 4},
            "preprocessor_config.json": {
                "image_processor_type": "Idefics3ImageProcessor", "processor_class": "Idefics3Processor",
                "size": {"longest_edge": 32}, "max_image_size": {"longest_edge": 16},
            }
        },
        names=("<fake_token_around_image>", "<end_of_utterance>", "<global-img>",
               *(f"<row_{row}_col_{column}>" for row in (1, 2) for column in (1, 2))),
    ),
}  # fmt: skip
"""By `model_type`."""


def write_small_vision(folder: Path, model_type: str, texts: Sequence[str], *, seed: int = 0) -> None:
    """Write a model whose weights follow from the seed, with a tokenizer trained on the texts and a processor."""
    config = write_small_processor(folder, model_type, texts)
    tensors = list(small_model(config, seed).named_parameters())
    write_model(folder, "vision_language_model", config, tensors, {}, dtype=torch.float32)


def write_small_processor(folder: Path, model_type: str, texts: Sequence[str]) -> Any:
    """Write the tokenizer and the processor; returns the configuration of the model that they are for."""
    small = SMALL[model_type]
    config, tokenization = small_config(model_type, texts)
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in tokenization.files().items():
        (folder / name).write_bytes(content)
    for name, keys in small.files.items():
        write_json(folder / name, keys)
    return config


def small_model(config: Any, seed: int = 0, attention: Any = None) -> Any:
    """Return a model of a configuration with fp32 weights that follow from the seed and are wide enough to show."""
    from transformers import AutoModelForImageTextToText

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForImageTextToText.from_config(copy.deepcopy(config), attn_implementation=attention).float()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.normal_(std=parameter.shape[-1] ** -0.5)
    return model


def small_config(model_type: str, texts: Sequence[str]) -> tuple[Any, Tokenization]:
    """Return a type's small configuration, and the tokenizer that it is for."""
    from transformers import AutoConfig

    small = SMALL[model_type]
    names = [
        "<|system|>",
        "<|user|>",
        "<|assistant|>",
        *{*small.tokens.values(), *filter(None, small.around)},
        *small.names,
    ]
    spec = TrainTokenizer(
        train="bpe", vocab_size=400, special_tokens=sorted(set(names)), chat_template=_template(small)
    )
    tokenization = train_tokenizer(spec, texts)
    text = {
        "vocab_size": tokenization.vocab_size, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": LONGEST,
        "pad_token_id": tokenization.pad_id, "eos_token_id": tokenization.eos_id, "bos_token_id": None, **small.text,
    }  # fmt: skip
    ids = {key: tokenization.token_id(token) for key, token in small.tokens.items()}
    return AutoConfig.for_model(model_type, text_config=text, **small.config, **ids), tokenization


def _template(small: Small) -> str:
    """Messages whose contents are text or parts."""
    image = small.image.join(small.around)
    return (
        "{% for message in messages %}{{ '<|' + message['role'] + '|>\\n' }}"
        "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
        "{% if part['type'] == 'image' %}{{ '" + image + "' }}{% else %}{{ part['text'] }}{% endif %}"
        "{% endfor %}{% endif %}"
        "{% if message['role'] == 'assistant' %}{{ eos_token }}{% else %}{{ '\\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("type", choices=sorted(SMALL))
    parser.add_argument("folder", type=Path, help="folder to write")
    asked = parser.parse_args()
    write_small_vision(asked.folder, asked.type, DIGIT_TEXTS)
