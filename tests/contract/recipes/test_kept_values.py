"""Values that a language model keeps for the backward pass, as memory is predicted with, against what torch saves."""

from typing import Any

import pytest
import torch

from recipes.models.decoder import Gpt2, Llama, Qwen3
from recipes.models.known_models import KnownModel
from recipes.stages.lora import Lora
from trainers.data.batches import TokenBatch
from trainers.models.decoder import build_decoder
from trainers.models.lora import add_adapter
from trainers.models.protocol import TokenizerFacts
from trainers.models.token_losses import TokenLosses
from trainers.objectives.language_model import LanguageModelObjective

VOCABULARY, ROWS, LENGTH = 512, 4, 64
SIZES: dict[str, Any] = {
    "hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 4, "num_attention_heads": 4,
}  # fmt: skip
CASES: dict[str, Any] = {
    "llama": Llama(family="decoder", type="llama", **SIZES),
    "qwen3": Qwen3(family="decoder", type="qwen3", **SIZES),
    "gpt2": Gpt2(family="decoder", type="gpt2", n_embd=128, n_layer=4, n_head=4, n_inner=352),
}


def saved_values(architecture: Any, lora: Lora | None) -> int:
    """Values that autograd saves of a batch in a forward pass, parameters not counted."""
    keys = architecture.model_dump(exclude_none=True)
    model: Any = build_decoder(keys, TokenizerFacts(VOCABULARY, 0, 1), seed=0, device=torch.device("cpu"))
    if lora is not None:
        add_adapter(model, lora, seed=0)
    module = TokenLosses(model).train()
    own = {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    ids = torch.randint(2, VOCABULARY, (ROWS, LENGTH))
    ones, places = torch.ones_like(ids), torch.arange(LENGTH).expand_as(ids)
    batch = TokenBatch(ids, ones, places, ones.bool(), torch.arange(ROWS))
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        assert LanguageModelObjective().loss(module, batch).loss_sum.requires_grad
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values()) // 4


@pytest.mark.parametrize("lora", [None, Lora(r=8)], ids=["full", "lora"])
@pytest.mark.parametrize("name", CASES)
def test_kept_values_are_near(name: str, lora: Lora | None) -> None:
    model = KnownModel(CASES[name], VOCABULARY)
    layers = CASES[name].shape().layers
    predicted = model.kept(LENGTH, keeps_scores=True, recomputes=False) * layers // (layers + 1)
    if lora is not None:
        predicted += LENGTH * lora.inner_values(model.linears())
    assert ROWS * predicted == pytest.approx(saved_values(CASES[name], lora), rel=0.2)
