"""How a reward model reads a response: as the policy's very tokens, or as its text in the reward model's own form.

Shapes: B samples, T tokens of prompt and response.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from recipes.errors import StageError
from rlhf.text.responses import Responses
from trainers.data.batches import SequenceBatch
from trainers.data.dataset import Dataset
from trainers.data.encoding import Encoded, encode_answer
from trainers.data.tokenizer import Tokenization

Reading = Callable[[Responses], SequenceBatch]
"""The rows that a reward model scores."""


def reading_of(prompts: Dataset, writer: Tokenization, reader: Tokenization, longest: int | None) -> Reading:
    """How a model with the tokenizer `reader` reads responses of one with `writer`; `longest` is the reader's limit.

    Equal contracts share their tokens. Otherwise the response is decoded, put after its prompt by the reader's chat
    template, and encoded again; an unfinished response ends like any other turn.
    """
    if reader.contract_hash == writer.contract_hash:
        return same_tokens(closing_ids(prompts, writer))

    def read(responses: Responses) -> SequenceBatch:
        rows = zip(responses.sample_ids_B.tolist(), responses.action_ids, strict=True)
        encoded = [encode_response(prompts.records[row], writer.decode(tokens), reader) for row, tokens in rows]
        most = max(map(len, encoded))
        if longest is not None and most > longest:
            raise StageError(
                f"a prompt and its response take {most} tokens in the reward model's tokenizer, and it reads at most "
                f"{longest}; lower max_prompt_tokens or max_new_tokens"
            )
        return _padded(encoded, reader.pad_id).to(responses.input_ids_BT.device)

    return read


def closing_ids(prompts: Dataset, writer: Tokenization) -> tuple[int, ...]:
    """End tokens, first the one that reward models learned answers to these prompts with.

    Of a conversation that is the chat template's end of turn, after plain text the tokenizer's end token.
    """
    if any(isinstance(record["prompt"], str) for record in prompts.records):
        return tuple(dict.fromkeys([writer.eos_id, *writer.end_ids]))
    return writer.end_ids


def same_tokens(end_ids: Sequence[int]) -> Reading:
    """The policy's own tokens; a response that ends at none of the end tokens gets the first of them."""
    return lambda responses: responses.closed(end_ids)


def encode_response(record: Mapping[str, Any], text: str, reader: Tokenization) -> Encoded:
    """A prompt's record and a response to it in a model's own form."""
    prompt = record["prompt"]
    answer = text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]
    return encode_answer(prompt, answer, reader, record.get("tools"))


def _padded(rows: list[Encoded], pad_id: int) -> SequenceBatch:
    """Rows padded on the right."""

    def column(values: list[Tensor], fill: int | bool) -> Tensor:
        return torch.nn.utils.rnn.pad_sequence(values, batch_first=True, padding_value=fill)

    return SequenceBatch(
        column([torch.from_numpy(row.ids).long() for row in rows], pad_id),
        column([torch.ones(len(row), dtype=torch.bool) for row in rows], False),
        column([torch.from_numpy(row.response) for row in rows], False),
    )
