"""Hidden spans for an encoder-decoder to write (Raffel et al. 2020, section 3.1.4): which ones follow from a key alone.

T tokens.
"""

import numpy as np

from recipes.models.encoder_decoder import SpanCorruption
from trainers.data.batches import Seq2SeqBatch, TokenBatch, build_seq2seq_batch
from trainers.data.tokenizer import Tokenization
from trainers.runtime.randomness import stream_seed


class SpanCorrupter:
    """Turns texts into sources with hidden spans and targets that hold them."""

    def __init__(self, corruption: SpanCorruption, tokenization: Tokenization, seed: int) -> None:
        """Raise RequestError where the tokenizer has no sentinels."""
        self._corruption, self._seed = corruption, seed
        self._sentinels = np.array(tokenization.sentinel_ids)
        self._eos_id, self._pad_id = tokenization.eos_id, tokenization.pad_id

    def batch(self, batch: TokenBatch, step: int) -> Seq2SeqBatch:
        """Hide spans of each row by the key (seed, step, sample id); rows hold one text each."""
        sources, targets = [], []
        for ids_T, segments_T, sample in zip(
            batch.input_ids_BT.numpy(), batch.segment_ids_BT.numpy(), batch.sample_ids_B.tolist(), strict=True
        ):
            rng = np.random.default_rng(stream_seed(self._seed, "spans", step, sample))
            source, target = self.hide(ids_T[segments_T > 0], rng)
            sources.append(source)
            targets.append(target)
        return build_seq2seq_batch(sources, targets, self._pad_id, batch.sample_ids_B)

    def hide(self, ids_T: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Return source and target of a text: a sentinel in the place of each span, and each sentinel with its span.

        Both end with the end token, which is never hidden; a text of one token has no spans and an empty target.
        """
        ids = ids_T[:-1] if len(ids_T) and ids_T[-1] == self._eos_id else ids_T
        spans = hidden_spans(len(ids), self._corruption, len(self._sentinels), rng)
        end = np.array([self._eos_id])
        source: list[np.ndarray] = []
        target: list[np.ndarray] = []
        shown_from = 0
        for number, (start, stop) in enumerate(spans):
            sentinel = self._sentinels[number : number + 1]
            source += [ids[shown_from:start], sentinel]
            target += [sentinel, ids[start:stop]]
            shown_from = stop
        source += [ids[shown_from:], end]
        return np.concatenate(source), np.concatenate([*target, end]) if spans else end[:0]


def hidden_spans(
    length: int, corruption: SpanCorruption, num_sentinels: int, rng: np.random.Generator
) -> list[tuple[int, int]]:
    """Return start and end of each hidden span: tokens before and in the spans are divided up at random.

    A sequence starts with tokens that are shown and ends with a span, as in the paper's code.
    """
    num_hidden = corruption.num_noise_tokens(length)
    num_spans = min(corruption.num_spans(length), num_sentinels)
    if num_spans == 0:
        return []
    ends = np.cumsum(random_division(num_hidden, num_spans, rng))
    shown = np.cumsum(random_division(length - num_hidden, num_spans, rng))
    starts = shown + np.concatenate([[0], ends[:-1]])
    return [(int(start), int(stop)) for start, stop in zip(starts, shown + ends, strict=True)]


def random_division(total: int, parts: int, rng: np.random.Generator) -> np.ndarray:
    """Divide a count into parts of at least one, every division being equally likely."""
    borders = np.sort(rng.choice(total - 1, parts - 1, replace=False)) + 1
    return np.diff(np.concatenate([[0], borders, [total]]))
