"""How a tuned model answers: end-token rate and length of greedy responses to a few held-out prompts."""

from typing import Any

import torch
from torch import nn

from recipes.errors import RequestError
from trainers.data.batches import PromptBatch, build_batch
from trainers.data.dataset import Dataset
from trainers.data.materialise import DataRequest, materialise
from trainers.data.tokenizer import Tokenization
from trainers.inference.generation import generate, sampling_settings
from trainers.store.store import Store

NUM_PROMPTS = 32
MAX_NEW_TOKENS = 64


def open_prompts(request: DataRequest, store: Store) -> Dataset | None:
    """Open the prompts of a set; None where its rows have none that fit (plain text)."""
    try:
        return materialise(request, store)
    except RequestError:
        return None


def response_report(
    model: nn.Module, prompts: Dataset, tokenization: Tokenization, *, max_new_tokens: int
) -> dict[str, Any]:
    """Answer the first prompts with a bare, whole model; its mode is restored."""
    batch = build_batch(prompts, list(range(min(NUM_PROMPTS, len(prompts)))))
    assert isinstance(batch, PromptBatch)
    batch = batch.to(next(iter(model.parameters())).device)
    settings = sampling_settings(tokenization, max_new_tokens)
    was_training = model.training
    model.eval()
    with torch.no_grad():
        found = generate(model, batch.input_ids_BP, batch.attention_mask_BP, settings, None)
    model.train(was_training)
    lengths = found.response_mask_BR.sum(dim=1).double()
    return {
        "prompts": len(lengths),
        "eos_rate": float(found.ended_B.double().mean()),
        "mean_length": float(lengths.mean()),
        "max_new_tokens": max_new_tokens,
    }
