"""How an encoder-decoder writes held-out targets, greedily or by beam search, and how near they come to the data's.

B rows, S source tokens.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from trainers.data.batches import FILLER
from trainers.data.dataset import Dataset
from trainers.data.layouts.seq2seq import target_text
from trainers.data.packing import scattered
from trainers.data.tokenizer import Tokenization
from trainers.inference.generation import SamplingSettings, generate, sampling_settings
from trainers.models.encoder_decoder import start_token
from trainers.runtime import distributed

NUM_EXAMPLES = 8


@dataclass(frozen=True)
class Written:
    """One target as the model wrote it."""

    row: int
    """Of the data set."""
    source: str
    target: str
    """As the data has it."""
    written: str
    tokens: int
    """The end token included."""
    ended: bool
    """Whether the end token came before the longest length."""


@dataclass(frozen=True)
class Translations:
    """What a model wrote of held-out targets at one point of its training, in an order that follows from the rows."""

    written: list[Written]
    num_beams: int
    max_new_tokens: int

    def scores(self) -> dict[str, float]:
        """Return BLEU and chrF."""
        return corpus_scores([one.written for one in self.written], [one.target for one in self.written])

    def report(self) -> dict[str, Any]:
        """Return what an artifact says of them besides the scores."""
        count = len(self.written)
        return {
            "rows": count,
            "num_beams": self.num_beams,
            "eos_rate": sum(one.ended for one in self.written) / count,
            "mean_length": sum(one.tokens for one in self.written) / count,
            "max_new_tokens": self.max_new_tokens,
            "examples": [
                {"source": one.source, "target": one.target, "written": one.written}
                for one in self.written[:NUM_EXAMPLES]
            ],
        }


@torch.no_grad()
def write_targets(
    model: Any,
    source_ids_BS: Tensor,
    source_mask_BS: Tensor,
    tokenization: Tokenization,
    *,
    num_beams: int,
    max_new_tokens: int,
) -> list[list[int]]:
    """Return the tokens of each target, its end token included: the likeliest word by word, or by beam search.

    `model` is a bare, whole encoder-decoder in evaluation mode. The beams are transformers' own search, scored by the
    mean log-likelihood of a token.
    """
    settings = sampling_settings(tokenization, max_new_tokens)
    if num_beams == 1:
        found = generate(model, source_ids_BS, source_mask_BS, settings, None)
        pairs = zip(found.tokens_BR, found.response_mask_BR, strict=True)
        return [tokens[mask].tolist() for tokens, mask in pairs]
    from transformers import DynamicCache, EncoderDecoderCache

    # transformers' own search makes a cache of as many layers as T5's encoder has, too few for a deeper decoder.
    config = model.get_decoder().config
    with _known_tokens(model, settings.num_tokens):
        searched = model.generate(
            past_key_values=EncoderDecoderCache(DynamicCache(config=config), DynamicCache(config=config)),
            input_ids=source_ids_BS,
            attention_mask=source_mask_BS.long(),
            num_beams=num_beams,
            do_sample=False,
            max_new_tokens=max_new_tokens,
            eos_token_id=list(settings.stop_ids),
            pad_token_id=settings.pad_id,
            decoder_start_token_id=start_token(model),
            forced_eos_token_id=None,
        )
    return [_until_end(row[1:].tolist(), settings) for row in searched]


@contextmanager
def _known_tokens(model: Any, num_tokens: int) -> Iterator[None]:
    """Give rows of the head without a token no share of the probabilities while transformers searches."""
    head = model.get_output_embeddings()
    hook = head.register_forward_hook(
        lambda module, given, logits: logits.index_fill(
            -1, torch.arange(num_tokens, logits.shape[-1], device=logits.device), -torch.inf
        )
    )
    try:
        yield
    finally:
        hook.remove()


def _until_end(tokens: list[int], settings: SamplingSettings) -> list[int]:
    ends = [place for place, token in enumerate(tokens) if token in settings.stop_ids]
    if ends:
        return tokens[: ends[0] + 1]
    while tokens and tokens[-1] == settings.pad_id:
        tokens = tokens[:-1]
    return tokens


def translate(
    model: Any,
    dataset: Dataset,
    batches: Iterable[Any],
    tokenization: Tokenization,
    *,
    num_beams: int,
    max_new_tokens: int,
) -> Translations:
    """Write the targets of this rank's `Seq2SeqBatch`es; gives those of all ranks, on each. Collective.

    `model` is bare and whole; its mode is restored.
    """
    device = next(iter(model.parameters())).device
    found: list[Written] = []
    was_training = model.training
    model.eval()
    for batch in batches:
        rows = batch.sample_ids_B.tolist()
        kept = [place for place, row in enumerate(rows) if row != FILLER]
        if not kept:
            continue
        sources = (batch.source_ids_BS[kept].to(device), batch.source_mask_BS[kept].to(device))
        written = write_targets(model, *sources, tokenization, num_beams=num_beams, max_new_tokens=max_new_tokens)
        for place, tokens in zip(kept, written, strict=True):
            found.append(
                Written(
                    row=rows[place],
                    source=tokenization.decode(dataset.cut("source_ids", rows[place]).tolist()),
                    target=target_text(dataset, rows[place]),
                    written=tokenization.decode(tokens).strip(),
                    tokens=len(tokens),
                    ended=bool(tokens) and tokens[-1] in tokenization.end_ids,
                )
            )
    model.train(was_training)
    lines = [line for part in distributed.gather_json([asdict(one) for one in found]) for line in part]
    lines.sort(key=lambda line: scattered(line["row"]))
    return Translations([Written(**line) for line in lines], num_beams, max_new_tokens)


def corpus_scores(written: Sequence[str], targets: Sequence[str]) -> dict[str, float]:
    """Return BLEU (Papineni et al. 2002) and chrF (Popovic 2015) of a corpus, 0 to 100, by sacrebleu's defaults."""
    from sacrebleu.metrics.bleu import BLEU
    from sacrebleu.metrics.chrf import CHRF

    return {
        "bleu": float(BLEU().corpus_score(list(written), [list(targets)]).score),
        "chrf": float(CHRF().corpus_score(list(written), [list(targets)]).score),
    }
