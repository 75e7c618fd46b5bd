"""The recipe's architectures are transformers' own: keys, defaults, and parameter counts of the pinned version."""

import dataclasses
from typing import Any

import pytest
import torch
import transformers
from pydantic import TypeAdapter

from recipes.models.architecture import Architecture
from recipes.models.decoder import Gpt2, Llama, Qwen3
from recipes.models.encoder import Bert
from recipes.models.encoder_decoder import T5, Bart
from recipes.stages.lora import Lora

ARCHITECTURE: TypeAdapter[Any] = TypeAdapter(Architecture)

FROM_TOKENIZER = {"vocab_size", "pad_token_id", "bos_token_id", "eos_token_id"}
NO_EFFECT = {
    "transformers_version", "architectures", "output_hidden_states", "return_dict", "dtype", "chunk_size_feed_forward",
    "is_encoder_decoder", "id2label", "label2id", "problem_type", "use_cache", "pretraining_tp",
    "reorder_and_upcast_attn", "add_cross_attention", "summary_type", "summary_use_proj", "summary_activation",
    "summary_proj_to_labels", "summary_first_dropout", "is_decoder", "classifier_dropout",
    "decoder_start_token_id", "forced_eos_token_id",
}  # fmt: skip
NOT_OFFERED = {
    "use_sliding_window", "sliding_window", "max_window_layers", "layer_types", "encoder_layerdrop",
    "decoder_layerdrop",
}  # fmt: skip
"""Layer drop draws on each worker by itself, so that workers would run other layers."""
OTHER_DEFAULT = {
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
    "max_position_embeddings", "rope_parameters", "n_embd", "n_layer", "n_head", "resid_pdrop", "embd_pdrop",
    "attn_pdrop", "d_model", "d_kv", "d_ff", "num_layers", "num_heads", "encoder_layers", "decoder_layers",
    "encoder_attention_heads", "decoder_attention_heads", "encoder_ffn_dim", "decoder_ffn_dim",
}  # fmt: skip
"""Required here, derived from the width here, or (gpt2's dropout) off here."""

SMALL: list[dict[str, Any]] = [
    {"type": "llama", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4},
    {"type": "llama", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4,
     "num_key_value_heads": 2, "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    {"type": "llama", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4,
     "head_dim": 6, "attention_dropout": 0.1,
     "rope_parameters": {"rope_type": "llama3", "factor": 8, "low_freq_factor": 1, "high_freq_factor": 4,
                         "original_max_position_embeddings": 64}},
    {"type": "qwen3", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
     "num_key_value_heads": 2, "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e6}},
    {"type": "qwen3", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4,
     "attention_bias": True, "tie_word_embeddings": True},
    {"type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 16},
    {"type": "gpt2", "n_embd": 32, "n_layer": 1, "n_head": 4, "n_inner": 40, "tie_word_embeddings": False},
]  # fmt: skip


def _config(architecture: Any, **more: Any) -> Any:
    return transformers.AutoConfig.for_model(architecture.type, vocab_size=97, **architecture.config_keys(), **more)


def _count(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("model", [Llama, Qwen3, Gpt2, Bert, T5, Bart], ids=lambda model: model.__name__)
def test_keys_and_defaults_are_the_library_s(model: Any) -> None:
    kind = model.model_fields["type"].annotation.__args__[0]
    theirs = {item.name: item.default for item in dataclasses.fields(transformers.CONFIG_MAPPING[kind])}
    ours = {name: info for name, info in model.model_fields.items() if name not in ("family", "type")}
    assert set(ours) - set(theirs) == set(), "the library does not know these keys"
    unexplained = set(theirs) - set(ours) - FROM_TOKENIZER - NO_EFFECT - NOT_OFFERED
    assert unexplained == set(), "the library has further keys: offer them, or list them with a reason"
    defaults = {name: info.default for name, info in ours.items() if name not in OTHER_DEFAULT}
    assert defaults == {name: theirs[name] for name in defaults}


SEQ2SEQ: list[dict[str, Any]] = [
    {"type": "t5", "d_model": 32, "d_kv": 6, "d_ff": 48, "num_layers": 2, "num_heads": 4},
    {"type": "t5", "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_decoder_layers": 3, "num_heads": 4,
     "feed_forward_proj": "gated-gelu", "relative_attention_num_buckets": 16},
    {"type": "bart", "d_model": 32, "encoder_layers": 2, "decoder_layers": 1, "encoder_ffn_dim": 40,
     "decoder_ffn_dim": 48, "encoder_attention_heads": 4, "decoder_attention_heads": 2, "max_position_embeddings": 16},
]  # fmt: skip


@pytest.mark.parametrize("keys", SEQ2SEQ, ids=lambda keys: f"{keys['type']}-{len(keys)}")
def test_an_encoder_decoder_builds_and_counts_right(keys: dict[str, Any]) -> None:
    import peft

    architecture = ARCHITECTURE.validate_python({"family": "encoder_decoder", **keys})
    config = _config(architecture)
    for key, value in architecture.config_keys().items():
        assert getattr(config, key) == (value if key != "num_decoder_layers" else architecture.decoder_layers)
    with torch.device("meta"):
        model = transformers.AutoModelForSeq2SeqLM.from_config(config)
    assert _count(model) == architecture.num_parameters(97)
    names = sorted({linear.name for linear in architecture.linears()})
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=names, task_type="SEQ_2_SEQ_LM"))
    trainable = sum(parameter.numel() for parameter in adapted.parameters() if parameter.requires_grad)
    assert trainable == Lora(r=4).num_parameters(architecture.linears())


@pytest.mark.parametrize("keys", SMALL, ids=lambda keys: f"{keys['type']}-{len(keys)}")
def test_a_recipe_s_architecture_builds_and_counts_right(keys: dict[str, Any]) -> None:
    architecture = ARCHITECTURE.validate_python({"family": "decoder", **keys})
    config = _config(architecture)
    for key, value in architecture.config_keys().items():
        if key != "rope_parameters":
            assert getattr(config, key) == value
    with torch.device("meta"):
        assert _count(transformers.AutoModelForCausalLM.from_config(config)) == architecture.num_parameters(97)
        labelled = _config(architecture, num_labels=1)
        score = transformers.AutoModelForSequenceClassification.from_config(labelled)
        value = transformers.AutoModelForTokenClassification.from_config(labelled)
    assert _count(score) == architecture.num_parameters(97, "score")
    assert _count(value) == architecture.num_parameters(97, "value")


@pytest.mark.parametrize("keys", [SMALL[0], SMALL[3], SMALL[5]], ids=lambda keys: keys["type"])
@pytest.mark.parametrize("dora", [False, True])
def test_adapters_count_right(keys: dict[str, Any], dora: bool) -> None:
    import peft

    architecture = ARCHITECTURE.validate_python({"family": "decoder", **keys})
    model = transformers.AutoModelForCausalLM.from_config(_config(architecture))
    names = sorted({linear.name for linear in architecture.linears()})
    lora = Lora(r=4, dora=dora)
    config = peft.LoraConfig(r=4, target_modules=names, use_dora=dora, fan_in_fan_out=isinstance(architecture, Gpt2))
    adapted = peft.get_peft_model(model, config)
    trainable = sum(parameter.numel() for parameter in adapted.parameters() if parameter.requires_grad)
    assert trainable == lora.num_parameters(architecture.linears())
