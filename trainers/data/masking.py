"""Hidden tokens for an encoder to restore (Devlin et al. 2019): which ones follow from a key alone.

B rows, T tokens, N hidden tokens.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from recipes.models.encoder import Corruption
from trainers.data.batches import TokenBatch
from trainers.data.tokenizer import Tokenization
from trainers.runtime.randomness import stream_seed

MASKED, RANDOM = 0.8, 0.1
"""Shares of the hidden tokens that the mask token or a random one stands for; the others stay as they are."""


@dataclass(frozen=True)
class MaskedBatch:
    """Packed sequences with hidden tokens."""

    input_ids_BT: Tensor
    segment_ids_BT: Tensor
    position_ids_BT: Tensor
    hidden_mask_BT: Tensor
    """True where the token has to be restored."""
    target_ids_BT: Tensor
    """The tokens as they were."""
    sample_ids_B: Tensor

    def to(self, device: torch.device | str) -> "MaskedBatch":
        """Copy to a device."""
        return MaskedBatch(**{name: value.to(device) for name, value in vars(self).items()})


class Masker:
    """Hides tokens of a batch."""

    def __init__(self, corruption: Corruption, tokenization: Tokenization, seed: int) -> None:
        """Raise RequestError where the tokenizer has no mask token."""
        self._corruption, self._seed = corruption, seed
        self._mask_id, self._vocab_size = tokenization.mask_id, tokenization.vocab_size
        self._starts_word_V = tokenization.starts_word_V
        self._is_special_V = np.zeros(self._vocab_size, dtype=bool)
        self._is_special_V[list(tokenization.special_ids)] = True

    def batch(self, batch: TokenBatch, step: int) -> MaskedBatch:
        """Hide tokens of each row by the key (seed, step, sample id)."""
        ids_BT, segments_BT = batch.input_ids_BT.numpy(), batch.segment_ids_BT.numpy()
        hidden_BT = np.zeros(ids_BT.shape, dtype=bool)
        shown_BT = ids_BT.copy()
        for row, sample in enumerate(batch.sample_ids_B.tolist()):
            if sample >= 0:
                rng = np.random.default_rng(stream_seed(self._seed, "hidden", step, sample))
                shown_BT[row], hidden_BT[row] = self.hide(ids_BT[row], segments_BT[row], rng)
        return MaskedBatch(
            torch.from_numpy(shown_BT),
            batch.segment_ids_BT,
            batch.position_ids_BT,
            torch.from_numpy(hidden_BT),
            batch.input_ids_BT,
            batch.sample_ids_B,
        )

    def hide(
        self, ids_T: np.ndarray, segments_T: np.ndarray, rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return what is shown of a right-padded sequence, and where tokens are hidden; special tokens never are.

        How much padding follows changes nothing.
        """
        shown_T, hidden_T = ids_T.copy(), np.zeros(len(ids_T), dtype=bool)
        length = int((segments_T > 0).sum())
        ids, segments = ids_T[:length], segments_T[:length]
        draws, kinds = rng.random((2, length))
        others = rng.integers(0, self._vocab_size, length)
        if self._corruption.whole_words:
            begins = self._starts_word_V[ids]
            begins[0] = True
            begins[1:] |= self._is_special_V[ids[:-1]] | (segments[1:] != segments[:-1])
            draws = draws[np.maximum.accumulate(np.where(begins, np.arange(length), 0))]
        hidden = (draws < self._corruption.share) & ~self._is_special_V[ids]
        shown = np.where(hidden & (kinds < MASKED), self._mask_id, ids)
        is_random = hidden & (kinds >= MASKED) & (kinds < MASKED + RANDOM)
        shown_T[:length] = np.where(is_random, others, shown)
        hidden_T[:length] = hidden
        return shown_T, hidden_T
