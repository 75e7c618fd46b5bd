"""Log-likelihoods of texts after contexts, many at once: what several texts start with is read once.

B rows, T tokens of a row, N tokens whose likelihood is taken, D width, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from recipes.stages.benchmarks.case import Likelihood
from trainers.data.tokenizer import Tokenization
from trainers.models.forward_forms import has_windows, head_logits, record_of
from trainers.models.token_losses import hidden_states, is_recurrent

ROW_TOKENS = 4096
"""Of a forward pass, padding included."""
HEAD_TOKENS = 256
"""Positions whose logits are there at once."""


@dataclass(frozen=True, slots=True)
class Scored:
    """Tokens of a context and of the text after it, whose likelihood is taken."""

    tokens: tuple[int, ...]
    start: int
    """Where the text starts, at least 1."""


def tokenized(context: str, text: str, tokenization: Tokenization) -> Scored:
    """Tokenize a text after its context as lm-eval does: both together, split where the context alone ends.

    Space at the context's end goes to the text. After an empty context stands the tokenizer's beginning token, or its
    end token where it has none.
    """
    if not context:
        first = tokenization.bos_id if tokenization.bos_id is not None else tokenization.eos_id
        return Scored((first, *tokenization.encode(text)), 1)
    bare = context.rstrip()
    whole, before = tokenization.encode_openings([context + text, bare])
    return Scored(tuple(whole), max(1, min(len(before), len(whole) - 1)))


@dataclass(frozen=True, slots=True)
class _Row:
    """One row of a forward pass: what texts share, then what each has for itself."""

    case: int
    tokens: list[int]
    positions: list[int]
    branches: list[int]
    """0 where texts share a token, else the number of the branch that alone sees it."""
    wanted: list[tuple[int, int, int]]
    """Position of a hidden state, the token that it should predict, and the text that this counts for."""


def log_likelihoods(model: nn.Module, cases: Sequence[Sequence[Scored]]) -> Iterator[dict[int, list[Likelihood]]]:
    """Yield the log-likelihoods of each case's texts, by the case's place, the longest cases first.

    `model` is a bare, whole causal language model in evaluation mode. Where its attention takes any mask, texts of a
    case are branches of one row, which share the beginning; elsewhere each text is a row, and equal rows are read once.
    """
    shares = _takes_masks(model)
    rows = [
        row for place, texts in enumerate(cases) for row in (_tree(place, texts) if shares else _apart(place, texts))
    ]
    open_rows = [0] * len(cases)
    for row in rows:
        open_rows[row.case] += 1
    sums = [[Likelihood(0.0, is_greedy=True)] * len(texts) for texts in cases]
    for batch in _batches(rows):
        done: dict[int, list[Likelihood]] = {}
        for row, values in zip(batch, _scored(model, batch, shares), strict=True):
            for (_, _, text), value in zip(row.wanted, values, strict=True):
                known = sums[row.case][text]
                sums[row.case][text] = Likelihood(known.nats + value.nats, known.is_greedy and value.is_greedy)
            open_rows[row.case] -= 1
            if open_rows[row.case] == 0:
                done[row.case] = sums[row.case]
        if done:
            yield done


def _takes_masks(model: Any) -> bool:
    """Whether one additive mask says what each token sees, as was measured for the model's type."""
    return not is_recurrent(model) and record_of(model).packing == "bias" and not has_windows(model)


def _tree(case: int, texts: Sequence[Scored]) -> list[_Row]:
    """One row: the common beginning, and each text's own tokens; the last token of a text predicts nothing."""
    read = [text.tokens[:-1] for text in texts]
    shared = _common(read)
    row = _Row(case, list(read[0][:shared]), list(range(shared)), [0] * shared, [])
    known: dict[tuple[int, ...], int] = {(): 0}
    for number, (text, tokens) in enumerate(zip(texts, read, strict=True)):
        own = tokens[shared:]
        if own not in known:
            known[own] = len(row.tokens)
            row.tokens.extend(own)
            row.positions.extend(range(shared, shared + len(own)))
            row.branches.extend([len(known) - 1] * len(own))
        first = known[own] - shared
        places = (place if place < shared else place + first for place in range(text.start - 1, len(tokens)))
        row.wanted.extend((place, text.tokens[at], number) for at, place in enumerate(places, start=text.start))
    return [row]


def _apart(case: int, texts: Sequence[Scored]) -> list[_Row]:
    """A row for each different input."""
    rows: dict[tuple[int, ...], _Row] = {}
    for number, text in enumerate(texts):
        read = text.tokens[:-1]
        row = rows.setdefault(read, _Row(case, list(read), list(range(len(read))), [1] * len(read), []))
        row.wanted.extend((place - 1, text.tokens[place], number) for place in range(text.start, len(text.tokens)))
    return list(rows.values())


def _common(texts: Sequence[Sequence[int]]) -> int:
    """The number of tokens that all texts start with."""
    shortest = min(map(len, texts))
    return next((place for place in range(shortest) if len({text[place] for text in texts}) > 1), shortest)


def _batches(rows: Sequence[_Row]) -> Iterator[list[_Row]]:
    """Yield rows of about the same length, the longest first; at least one at a time."""
    batch: list[_Row] = []
    for row in sorted(rows, key=lambda row: (-len(row.tokens), row.case)):
        if batch and (len(batch) + 1) * len(batch[0].tokens) > ROW_TOKENS:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


@torch.no_grad()
def _scored(model: Any, batch: Sequence[_Row], shares: bool) -> list[list[Likelihood]]:
    """Return the log-likelihood of each wanted token of each row, and whether it is the likeliest."""
    device = next(model.parameters()).device
    ids_BT, positions_BT = _padded(batch, "tokens", device), _padded(batch, "positions", device)
    if shares:
        bias = _tree_bias(_padded(batch, "branches", device, fill=-1), model.dtype)
        given = {"attention_mask": bias, "position_ids": positions_BT, "use_cache": False}
        hidden_BTD = model.base_model(input_ids=ids_BT, **given).last_hidden_state
    else:
        hidden_BTD = hidden_states(model, ids_BT, _padded(batch, "branches", device), positions_BT)
    rows = [number for number, row in enumerate(batch) for _ in row.wanted]
    places = [place for row in batch for place, _, _ in row.wanted]
    targets_N = torch.tensor([token for row in batch for _, token, _ in row.wanted], device=device)
    hidden_ND = hidden_BTD[rows, places]
    found: list[Likelihood] = []
    for start in range(0, len(rows), HEAD_TOKENS):
        logits = head_logits(model, hidden_ND[start : start + HEAD_TOKENS]).float()
        targets = targets_N[start : start + HEAD_TOKENS]
        chosen = logits.gather(1, targets[:, None])[:, 0]
        nats, greedy = (chosen - logits.logsumexp(dim=1)).double(), logits.argmax(dim=1) == targets
        found += map(Likelihood, nats.tolist(), greedy.tolist())
    values = iter(found)
    return [[next(values) for _ in row.wanted] for row in batch]


def _padded(batch: Sequence[_Row], name: str, device: torch.device, fill: int = 0) -> Tensor:
    """Return one number a token, filled on the right."""
    width = max(len(row.tokens) for row in batch)
    return torch.tensor([[*(own := getattr(row, name)), *[fill] * (width - len(own))] for row in batch], device=device)


def _tree_bias(branches_BT: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the additive B1TT mask: a token sees what came before it of the shared part and of its own branch."""
    length = branches_BT.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=branches_BT.device).tril()
    own_BTT = branches_BT[:, :, None] == branches_BT[:, None, :]
    allowed = causal & (own_BTT | (branches_BT[:, None, :] == 0))
    bias = torch.zeros(allowed.shape, dtype=dtype, device=branches_BT.device)
    return bias.masked_fill_(~allowed, torch.finfo(dtype).min)[:, None]
