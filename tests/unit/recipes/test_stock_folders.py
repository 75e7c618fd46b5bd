"""Folders that transformers itself writes, in common configurations: check, plan, import and stages take them alike."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models

from recipes.models.architecture import MODEL_TYPES
from recipes.models.folders import read_folder
from recipes.models.known_models import known_model
from recipes.models.model_kinds import ModelKind
from trainers.models.imports import describe_folder
from trainers.models.load import load_model

CLASSES: dict[str, tuple[str, dict[str, Any]]] = {
    "t5": (
        "T5ForConditionalGeneration",
        {"num_layers": 2, "num_decoder_layers": 3, "d_model": 8, "d_ff": 8, "d_kv": 4},
    ),
    "t5-gated": ("T5ForConditionalGeneration", {"num_layers": 1, "feed_forward_proj": "gated-gelu", "d_model": 8}),
    "bart": (
        "BartForConditionalGeneration",
        {
            "encoder_layers": 3,
            "decoder_layers": 1,
            "d_model": 8,
            "encoder_attention_heads": 2,
            "decoder_attention_heads": 2,
            "encoder_ffn_dim": 8,
            "decoder_ffn_dim": 8,
        },
    ),
    "gpt2": ("GPT2LMHeadModel", {"n_layer": 2, "n_embd": 8, "n_head": 2}),
    "llama": ("LlamaForCausalLM", {"num_hidden_layers": 2, "hidden_size": 8, "num_attention_heads": 2}),
    "bert": ("BertModel", {"num_hidden_layers": 2, "hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2}),
}


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("shard", ["5GB", "1KB"])
def test_a_stock_folder_is_right(tmp_path: Path, name: str, shard: str) -> None:
    import transformers

    class_name, keys = CLASSES[name]
    model_class = getattr(transformers, class_name)
    config = model_class.config_class(vocab_size=16, pad_token_id=0, eos_token_id=1, bos_token_id=0, **keys)
    model = model_class(config).to(torch.bfloat16 if shard == "1KB" else torch.float32)
    model.save_pretrained(tmp_path, max_shard_size=shard)
    Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1, "a": 2}, unk_token="<pad>")).save(
        str(tmp_path / "tokenizer.json")
    )
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<eos>", "pad_token": "<pad>"}')
    assert read_folder(tmp_path, "model").problems == []
    assert describe_folder(tmp_path).kind == "model"
    assert known_model(json.loads((tmp_path / "config.json").read_text())) is not None
    family = MODEL_TYPES[config.model_type].name
    kinds: dict[str, ModelKind] = {"encoder": "masked_model", "encoder_decoder": "seq2seq_model"}
    seed = 0 if family == "encoder" else None
    kind = kinds.get(family, "language_model")
    loaded: Any = load_model(tmp_path, kind, device=torch.device("cpu"), new_head_seed=seed)
    kept = {key.removeprefix("bert."): tensor for key, tensor in loaded.state_dict().items()}
    assert all(torch.equal(kept[key], tensor.float()) for key, tensor in model.state_dict().items() if key in kept)
