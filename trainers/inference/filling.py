"""What fills a text's gaps: an encoder's words behind masks, an encoder-decoder's spans; and an encoder's class of it.

T tokens, V vocabulary.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from recipes.errors import RequestError
from trainers.data.tokenizer import Tokenization
from trainers.inference.generation import draw


@torch.no_grad()
def fill_masks(
    model: Any, tokenization: Tokenization, text: str, *, temperature: float, uniforms_T: np.ndarray | None
) -> str:
    """Return the text with its masks filled from left to right; `uniforms_T` None takes the likeliest words.

    Raises RequestError for a text without a mask, or longer than the model.
    """
    ids_1T = _encode(model, tokenization, text)
    places = (ids_1T[0] == tokenization.mask_id).nonzero()[:, 0].tolist()
    if not places:
        mask = tokenization.tokenizer.id_to_token(tokenization.mask_id)
        raise RequestError(f"an encoder fills gaps; mark them in the prompt by {mask}")
    for number, place in enumerate(places):
        logits_1V = model(input_ids=ids_1T, attention_mask=torch.ones_like(ids_1T)).logits[:, place].float()
        logits_1V[:, list(tokenization.special_ids)] = -torch.inf
        logits_1V[:, tokenization.vocab_size :] = -torch.inf  # rows of the embedding without a token
        uniform = None if uniforms_T is None else torch.tensor([uniforms_T[number % len(uniforms_T)]])
        ids_1T[0, place] = draw(logits_1V.cpu(), temperature, uniform)[0]
    return tokenization.decode(ids_1T[0].tolist())


@torch.no_grad()
def classify(model: Any, tokenization: Tokenization, text: str) -> dict[str, float]:
    """Return the probability of each class, the likeliest first; raises RequestError for a text that is too long."""
    ids_1T = _encode(model, tokenization, text)
    logits = model(input_ids=ids_1T, attention_mask=torch.ones_like(ids_1T)).logits[0].float()
    shares = torch.softmax(logits, dim=0).tolist()
    named = {model.config.id2label[number]: share for number, share in enumerate(shares)}
    return dict(sorted(named.items(), key=lambda item: -item[1]))


def fill_spans(tokenization: Tokenization, text: str, answer_ids: Sequence[int]) -> str:
    """Return the text with each sentinel replaced by the span that the answer has for it, or by nothing."""
    spans: dict[int, list[int]] = {}
    sentinel = None
    for token in answer_ids:
        if token in tokenization.sentinel_ids:
            sentinel = token
            spans.setdefault(sentinel, [])
        elif sentinel is not None:
            spans[sentinel].append(token)
    filled: list[int] = []
    for token in tokenization.encode(text, special=True):
        filled += spans.get(token, []) if token in tokenization.sentinel_ids else [token]
    return tokenization.decode(filled)


def _encode(model: Any, tokenization: Tokenization, text: str) -> torch.Tensor:
    ids = tokenization.encode(text, special=True)
    if len(ids) > model.config.max_position_embeddings:
        raise RequestError(f"the text has {len(ids)} tokens; the model takes {model.config.max_position_embeddings}")
    return torch.tensor([ids], device=next(iter(model.parameters())).device)
