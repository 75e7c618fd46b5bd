"""The text side of a model: tokenizer, special tokens and chat template as one record that travels with every artifact."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from recipes.data import ExistingTokenizer, TrainTokenizer

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")


@dataclass(frozen=True)
class Tokenization:
    """Tokenizer, special tokens and template; equal `contract_hash` means interchangeable."""

    tokenizer_json: bytes
    eos_token: str
    pad_token: str
    """Always differs from eos_token."""
    bos_token: str | None
    chat_template: str | None
    config: Mapping[str, Any]
    """Further keys of tokenizer_config.json, kept as they were found."""

    @property
    def vocab_size(self) -> int:
        """Number of ids, added tokens included: the smallest embedding that fits."""
        raise NotImplementedError

    @property
    def eos_id(self) -> int:
        """Id of the token that ends a document or a response."""
        raise NotImplementedError

    @property
    def pad_id(self) -> int:
        """Id that fills batches."""
        raise NotImplementedError

    @property
    def bos_id(self) -> int | None:
        """Id of the beginning token, where the tokenizer has one."""
        raise NotImplementedError

    @property
    def contract_hash(self) -> str:
        """64 hex digits over vocabulary, merges, special ids and template."""
        raise NotImplementedError

    def token_id(self, token: str) -> int:
        """Return the id of exactly this token; raises RequestError when it is not one of the vocabulary."""
        raise NotImplementedError

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        """Tokenize; `special` adds what the tokenizer's post-processor adds (a beginning token)."""
        raise NotImplementedError

    def encode_batch(self, texts: Sequence[str], *, special: bool = False) -> list[list[int]]:
        """Tokenize many texts at once."""
        raise NotImplementedError

    def decode(self, ids: Sequence[int] | np.ndarray, *, skip_special: bool = True) -> str:
        """Turn ids into text."""
        raise NotImplementedError

    def render(self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = False) -> str:
        """Render messages by the chat template; raises RequestError when there is none."""
        raise NotImplementedError

    def encode_prompt(self, prompt: str | Sequence[Mapping[str, Any]]) -> list[int]:
        """Tokenize what a response follows: plain text as it is, messages by the template with the generation prompt."""
        raise NotImplementedError

    def files(self) -> dict[str, bytes]:
        """Return the files of the Hugging Face layout, the same bytes for the same record."""
        raise NotImplementedError


def train_tokenizer(spec: TrainTokenizer, texts: Iterable[str]) -> Tokenization:
    """Train byte-level BPE; the same texts give the same bytes."""
    raise NotImplementedError


def tokenization_from_files(files: Mapping[str, bytes], overrides: ExistingTokenizer | None = None) -> Tokenization:
    """Read a tokenizer of the Hugging Face layout; raises RequestError when it lacks an end token or a pad token of its own."""
    raise NotImplementedError


def load_tokenization(folder: Path, overrides: ExistingTokenizer | None = None) -> Tokenization:
    """Read a tokenizer from a local folder."""
    raise NotImplementedError
