"""A small vision-language model of random weights in transformers' layout, to try a recipe or for a test.

Usage: python -m trainers.models.small_llava FOLDER
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from recipes.data.tokenizers import TrainTokenizer
from recipes.models.vision_language import has_class_embedding
from trainers.data.tokenizer import train_tokenizer
from trainers.models.folders import write_json, write_model

IMAGE = "<image>"
DIGIT_TEXTS = ["Which digit? zero one two three four five six seven eight nine"] * 3
"""Words of the shipped recipe's questions; often enough to become tokens of their own."""
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>\\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '" + IMAGE + "\\n' }}{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% else %}{{ '\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)
"""Messages whose contents are text or parts."""


def write_small_llava(
    folder: Path,
    texts: Sequence[str],
    *,
    seed: int = 0,
    image_size: int = 16,
    patch_size: int = 4,
    width: int = 64,
    layers: int = 2,
    tower: str = "clip_vision_model",
    text_type: str = "llama",
    feature_layer: int = -1,
) -> None:
    """Write a Llava whose weights follow from the seed, with a tokenizer trained on the texts and a processor."""
    from transformers import AutoConfig, LlavaConfig, LlavaForConditionalGeneration

    names = ["<|system|>", "<|user|>", "<|assistant|>", IMAGE]
    spec = TrainTokenizer(train="bpe", vocab_size=400, special_tokens=names, chat_template=CHAT_TEMPLATE)
    tokenization = train_tokenizer(spec, texts)
    sizes: dict[str, Any] = {
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
    }
    has_class = has_class_embedding(tower)
    config = LlavaConfig(
        vision_config=AutoConfig.for_model(tower, image_size=image_size, patch_size=patch_size, **sizes),
        text_config=AutoConfig.for_model(
            text_type,
            vocab_size=tokenization.vocab_size,
            max_position_embeddings=256,
            num_key_value_heads=4,
            head_dim=width // 4,
            pad_token_id=tokenization.pad_id,
            eos_token_id=tokenization.eos_id,
            bos_token_id=None,
            **sizes,
        ),
        image_token_index=tokenization.token_id(IMAGE),
        image_seq_length=(image_size // patch_size) ** 2,
        vision_feature_layer=feature_layer,
        vision_feature_select_strategy="default" if has_class else "full",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlavaForConditionalGeneration(config).float()
    tensors = list(model.named_parameters())
    write_model(folder, "vision_language_model", config, tensors, tokenization.files(), dtype=torch.float32)
    write_json(folder / "processor_config.json", _processor(config, image_size, patch_size))


def _processor(config: Any, image_size: int, patch_size: int) -> dict[str, Any]:
    has_class = has_class_embedding(config.vision_config.model_type)
    side = {"height": image_size, "width": image_size}
    return {
        "processor_class": "LlavaProcessor",
        "patch_size": patch_size,
        "image_token": IMAGE,
        "num_additional_image_tokens": int(has_class),
        "vision_feature_select_strategy": config.vision_feature_select_strategy,
        "image_processor": {
            "image_processor_type": "CLIPImageProcessor" if has_class else "SiglipImageProcessor",
            "size": side,
            "crop_size": side,
            "do_resize": True,
            "do_center_crop": False,
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "do_convert_rgb": True,
            "image_mean": [0.5, 0.5, 0.5],
            "image_std": [0.5, 0.5, 0.5],
            "resample": 3,
        },
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="folder to write")
    write_small_llava(parser.parse_args().folder, DIGIT_TEXTS)
