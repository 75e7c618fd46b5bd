"""Values that a language model keeps for the backward pass, as memory is predicted with, against what torch saves."""

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from recipes.models.decoder import Gpt2, Llama, Qwen3
from recipes.models.encoder import Bert
from recipes.models.encoder_decoder import T5, Bart
from recipes.models.known_models import KnownModel
from recipes.stages.lora import Lora
from trainers.data.batches import TokenBatch
from trainers.models.decoder import build_decoder
from trainers.models.lora import add_adapter
from trainers.models.protocol import TokenizerFacts
from trainers.models.token_losses import TokenLosses
from trainers.objectives.language_model import LanguageModelObjective

VOCABULARY, ROWS, LENGTH = 512, 4, 64
DECODER: dict[str, Any] = {"family": "decoder"}
SIZES: dict[str, Any] = {
    "hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 4, "num_attention_heads": 4,
}  # fmt: skip
BART: dict[str, Any] = {
    "family": "encoder_decoder", "type": "bart", "d_model": 128, "encoder_layers": 2, "decoder_layers": 2,
    "encoder_ffn_dim": 352, "decoder_ffn_dim": 352, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
}  # fmt: skip
T5_SIZES: dict[str, Any] = {
    "family": "encoder_decoder", "type": "t5", "d_model": 128, "d_kv": 32, "d_ff": 352, "num_layers": 2, "num_heads": 4,
}  # fmt: skip
WITHOUT_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
CASES: dict[str, Any] = {
    "llama": Llama(**DECODER, type="llama", **SIZES),
    "qwen3": Qwen3(**DECODER, type="qwen3", **SIZES),
    "gpt2": Gpt2(**DECODER, type="gpt2", n_embd=128, n_layer=4, n_head=4, n_inner=352),
    "gpt2-dropout": Gpt2(**DECODER, type="gpt2", n_embd=128, n_layer=4, n_head=4, n_inner=352, attn_pdrop=0.1),
    "bert": Bert(family="encoder", type="bert", **SIZES, **WITHOUT_DROPOUT),
    "bert-dropout": Bert(family="encoder", type="bert", **SIZES),
    "bart": Bart(**BART, dropout=0.0),
    "t5": T5(**T5_SIZES, dropout_rate=0.0),
}


def decoder_loss(architecture: Any, lora: Lora | None) -> tuple[Any, Any]:
    """A decoder's module, and what gives its loss of a batch."""
    keys = architecture.model_dump(exclude_none=True)
    model: Any = build_decoder(keys, TokenizerFacts(VOCABULARY, 0, 1), seed=0, device=torch.device("cpu"))
    if lora is not None:
        add_adapter(model, lora, seed=0)
    module = TokenLosses(model)
    ids = torch.randint(2, VOCABULARY, (ROWS, LENGTH))
    ones, places = torch.ones_like(ids), torch.arange(LENGTH).expand_as(ids)
    batch = TokenBatch(ids, ones, places, ones.bool(), torch.arange(ROWS))
    return module, lambda: LanguageModelObjective().loss(module, batch).loss_sum


def stock_loss(architecture: Any) -> tuple[Any, Any]:
    """The stock body of another family, and what gives a number that depends on all of it."""
    config = transformers.AutoConfig.for_model(architecture.type, vocab_size=VOCABULARY, **architecture.config_keys())
    model = transformers.AutoModel.from_config(config)
    ids = torch.randint(2, VOCABULARY, (ROWS, LENGTH))
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if architecture.family == "encoder_decoder":
        given["decoder_input_ids"] = ids
    return model, lambda: model(**given).last_hidden_state.sum()


def saved_values(module: Any, loss: Any) -> int:
    """Values that autograd saves in a forward pass, parameters not counted."""
    module.train()
    own = {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}
    kept: dict[int, Tensor] = {}

    def note(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        assert loss().requires_grad
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values()) // 4


@pytest.mark.parametrize(
    ("name", "lora"),
    [*((name, None) for name in CASES), ("llama", Lora(r=8)), ("llama", Lora(r=8, dora=True))],
    ids=lambda value: str(value)[:12],
)
def test_kept_values_are_near(name: str, lora: Lora | None) -> None:
    architecture = CASES[name]
    layers = architecture.shape().layers
    model = KnownModel(architecture, VOCABULARY)
    predicted = model.kept(LENGTH, keeps_scores=True, recomputes=False) * layers // (layers + 1)
    if lora is not None:
        predicted += LENGTH * lora.inner_values(model.linears())
    found = decoder_loss(architecture, lora) if architecture.family == "decoder" else stock_loss(architecture)
    assert ROWS * predicted == pytest.approx(saved_values(*found), rel=0.2)
