"""How a tuned vision-language model answers held-out questions about images: greedily, compared word for word."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import nn

from trainers.data.batches import pad
from trainers.data.dataset import Dataset
from trainers.data.image_inputs import image_inputs, image_token_counts
from trainers.data.tokenizer import Tokenization
from trainers.inference.generation import generate, sampling_settings

NUM_PROMPTS = 256
ROWS_AT_ONCE = 32
MAX_NEW_TOKENS = 64


@dataclass(frozen=True)
class ImageTextPrompt:
    """What stands before a row's first answer, the images in it, and the answer."""

    ids: np.ndarray
    images: np.ndarray
    """Numbers of the set's images."""
    answer: np.ndarray


def image_text_prompts(dataset: Dataset, image_id: int) -> Iterator[ImageTextPrompt]:
    """Yield every row of an image-text set up to its first answer; rows that begin with an answer are passed over."""
    arrays = dataset.arrays
    tokens = image_token_counts(dataset, image_id)
    for sequence in range(len(dataset)):
        images = dataset.cut("image_numbers", sequence)
        segments = np.asarray(arrays["segment_ids"][sequence])
        for segment in range(1, int(segments.max()) + 1):
            places = np.flatnonzero(segments == segment)
            ids = np.asarray(arrays["input_ids"][sequence][places])
            is_target = np.asarray(arrays["loss_mask"][sequence][places])
            own = _shown(images, tokens, ids, image_id)
            images = images[len(own) :]
            start = int(is_target.argmax())
            if start == 0:
                continue
            rest = ~is_target[start:]
            end = start + (int(rest.argmax()) if rest.any() else len(rest))
            yield ImageTextPrompt(ids[:start], _shown(own, tokens, ids[:start], image_id), ids[start:end])


def _shown(images: np.ndarray, tokens: np.ndarray, ids: np.ndarray, image_id: int) -> np.ndarray:
    """Return the first of the images, by their numbers of tokens, whose tokens are all among the ids."""
    ends = np.cumsum(tokens[images])
    return images[: int((ends <= int((ids == image_id).sum())).sum())]


def image_text_response_report(model: nn.Module, dataset: Dataset, tokenization: Tokenization) -> dict[str, Any] | None:
    """Answer the first held-out rows with a bare, whole model; its mode is restored. None where no row asks."""
    config: Any = model.config
    prompts = list(islice(image_text_prompts(dataset, config.image_token_id), NUM_PROMPTS))
    if not prompts:
        return None
    weight = next(iter(model.parameters()))
    longest = max(len(prompt.answer) for prompt in prompts)
    settings = sampling_settings(tokenization, min(longest + 1, MAX_NEW_TOKENS))
    was_training = model.training
    model.eval()
    exact, ended, lengths = 0, 0, 0
    for start in range(0, len(prompts), ROWS_AT_ONCE):
        batch = prompts[start : start + ROWS_AT_ONCE]
        ids, mask = pad([prompt.ids.astype(np.int64) for prompt in batch], dataset.pad_id, left=True)
        numbers = np.concatenate([prompt.images for prompt in batch])
        images = image_inputs(dataset, numbers) if len(numbers) else {}
        given = (torch.from_numpy(ids).to(weight.device), torch.from_numpy(mask).to(weight.device))
        found = generate(model, *given, settings, None, images)
        for row, prompt in enumerate(batch):
            tokens = found.tokens_BR[row][found.response_mask_BR[row]].tolist()
            exact += tokens == prompt.answer.tolist()
            ended += bool(found.ended_B[row])
            lengths += len(tokens)
    model.train(was_training)
    return {
        "prompts": len(prompts),
        "exact": exact / len(prompts),
        "eos_rate": ended / len(prompts),
        "mean_length": lengths / len(prompts),
        "max_new_tokens": settings.max_new_tokens,
    }
