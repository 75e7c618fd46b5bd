"""Sizes from a configuration file against transformers' own models, and against the files of real ones."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import transformers

from recipes.models.known_models import known_model
from recipes.models.safetensors_headers import read_shapes

WIDE = {"vocab_size": 100, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
BART = {"d_model": 32, "encoder_attention_heads": 4, "decoder_attention_heads": 4, "max_position_embeddings": 64}
TOWER = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
LLAMA = transformers.LlamaConfig(**WIDE, num_key_value_heads=2, tie_word_embeddings=True)
QWEN2 = transformers.Qwen2Config(**WIDE, num_key_value_heads=2)
CLIP = transformers.CLIPVisionConfig(**TOWER, image_size=16, patch_size=4)
SIGLIP = transformers.SiglipVisionConfig(**TOWER, image_size=16, patch_size=4)
CASES: dict[str, tuple[str, Any]] = {
    "llama": ("LlamaForCausalLM", LLAMA),
    "llama, biases": ("LlamaForCausalLM", transformers.LlamaConfig(**WIDE, attention_bias=True, mlp_bias=True)),
    "qwen3": ("Qwen3ForCausalLM", transformers.Qwen3Config(**WIDE, num_key_value_heads=2, head_dim=16)),
    "gpt2": (
        "GPT2LMHeadModel",
        transformers.GPT2Config(vocab_size=100, n_embd=32, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=1),
    ),
    "bert": ("BertForMaskedLM", transformers.BertConfig(**WIDE)),
    "t5": (
        "T5ForConditionalGeneration",
        transformers.T5Config(
            vocab_size=100, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_decoder_layers=3, num_heads=4,
            feed_forward_proj="gated-gelu",
        ),
    ),
    "bart": (
        "BartForConditionalGeneration",
        transformers.BartConfig(
            vocab_size=100, encoder_layers=1, decoder_layers=2, encoder_ffn_dim=48, decoder_ffn_dim=40, **BART
        ),
    ),
    "llava": ("LlavaForConditionalGeneration", transformers.LlavaConfig(vision_config=CLIP, text_config=LLAMA)),
    "siglip": ("LlavaForConditionalGeneration", transformers.LlavaConfig(vision_config=SIGLIP, text_config=QWEN2)),
}  # fmt: skip

LEFT_OUT = ("pooler.", "embeddings.position_ids")


def counted(config: dict[str, Any]) -> int:
    known = known_model(config)
    assert known is not None
    return known.architecture.num_parameters(known.vocab_size) + known.further_parameters


@pytest.mark.parametrize("name", CASES)
def test_parameters_are_transformers_own(name: str, tmp_path: Path) -> None:
    class_name, config = CASES[name]
    model = getattr(transformers, class_name)(config)
    model.save_pretrained(tmp_path)
    assert counted(json.loads((tmp_path / "config.json").read_text())) == model.num_parameters()


def test_real_models_are_counted_exactly(smollm2: Path, minilm: Path) -> None:
    """MiniLM's files hold a pooler and no head; the count is that of the masked language model made from it."""
    config = json.loads((smollm2 / "config.json").read_text())
    assert counted(config) == sum(math.prod(shape) for shape in read_shapes(smollm2).values())
    config = json.loads((minilm / "config.json").read_text())
    width = config["hidden_size"]
    body = sum(math.prod(shape) for name, shape in read_shapes(minilm).items() if not name.startswith(LEFT_OUT))
    assert counted(config) == body + width * width + 3 * width + config["vocab_size"]


@pytest.mark.parametrize("config", [{}, {"model_type": "mamba"}, {"model_type": "llama", "hidden_size": "x"}])
def test_what_is_not_known_is_not_guessed(config: dict[str, Any]) -> None:
    assert known_model(config) is None
