"""The text side of a model: tokenizer, special tokens and chat template as one record that every artifact carries."""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from recipes.data.tokenizers import ExistingTokenizer, TrainTokenizer
from recipes.errors import RequestError
from recipes.tokenizers.chat_template import Message, after_answer, render
from recipes.tokenizers.sentinels import SENTINEL, count_sentinels
from recipes.tokenizers.token_contract import (
    CONFIG_FILES,
    TokenizerFacts,
    configured_ends,
    end_tokens,
    find_end_token,
    find_named_tokens,
    find_pad_token,
    find_template,
    missing_token,
    pad_token_rule,
    token_problems,
    token_text,
    unknown_token,
)
from trainers.data.template import Span, Tools, response_spans, turn_end

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
    configured_ends: frozenset[int] = frozenset()
    """End tokens that the configuration files of the tokenizer's model name."""

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer, without truncation and padding."""
        try:
            tokenizer = Tokenizer.from_buffer(self.tokenizer_json)
        except Exception as error:  # the library raises bare Exception
            raise RequestError(f"tokenizer.json: {error}") from None
        tokenizer.no_truncation()
        tokenizer.no_padding()
        return tokenizer

    def __getstate__(self) -> dict[str, Any]:
        """Leave the cached tokenizer behind."""
        return {name: getattr(self, name) for name in self.__dataclass_fields__}

    @cached_property
    def vocab_size(self) -> int:
        """Number of ids, added tokens included: the smallest embedding that fits."""
        return max(self.tokenizer.get_vocab(with_added_tokens=True).values()) + 1

    @property
    def eos_id(self) -> int:
        """Id of the token that ends a document or a response."""
        return self.token_id(self.eos_token)

    @cached_property
    def facts(self) -> TokenizerFacts:
        """What the recipe's check knows of the tokenizer."""
        return TokenizerFacts(
            eos_token=self.eos_token,
            pad_token=self.pad_token,
            special_tokens=frozenset(self.special_tokens),
            vocabulary=self.tokenizer.get_vocab(with_added_tokens=True),
            chat_template=self.chat_template,
            bos_token=self.bos_token,
            named_tokens=find_named_tokens(self.config),
        )

    @cached_property
    def end_ids(self) -> tuple[int, ...]:
        """Ids that end a response; the first closes an answer of a conversation. See `end_tokens`."""
        return end_tokens(self.facts, self.configured_ends)

    @property
    def pad_id(self) -> int:
        """Id that fills batches."""
        return self.token_id(self.pad_token)

    @property
    def bos_id(self) -> int | None:
        """Id of the beginning token, where the tokenizer has one."""
        return None if self.bos_token is None else self.token_id(self.bos_token)

    @property
    def mask_id(self) -> int:
        """Id of the token that hides another; raises RequestError where the tokenizer has none."""
        found = token_text(self.config.get("mask_token"))
        if found is None:
            raise RequestError("the tokenizer names no mask_token; an encoder's pretraining needs one")
        return self.token_id(found)

    @cached_property
    def sentinel_ids(self) -> list[int]:
        """Ids of the tokens that stand for hidden spans, in their order; raises RequestError where there are none."""
        vocabulary = self.tokenizer.get_vocab(with_added_tokens=True)
        found = [vocabulary[SENTINEL.format(number)] for number in range(count_sentinels(vocabulary))]
        if not found:
            first = SENTINEL.format(0)
            raise RequestError(
                f"the tokenizer has no token {first}; an encoder-decoder's pretraining hides spans by it"
            )
        return found

    @cached_property
    def special_tokens(self) -> tuple[str, ...]:
        """All special tokens, in the order of their ids."""
        decoder = self.tokenizer.get_added_tokens_decoder()
        return tuple(token.content for _, token in sorted(decoder.items()) if token.special)

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """Ids of all special tokens."""
        return frozenset(number for number, token in self.tokenizer.get_added_tokens_decoder().items() if token.special)

    @cached_property
    def starts_word_V(self) -> np.ndarray:
        """True at tokens that begin a word: by the space in front, or where none continues one (WordPiece's `##`)."""
        vocabulary = self.tokenizer.get_vocab(with_added_tokens=True)
        continues = any(token.startswith("##") for token in vocabulary)
        found = np.zeros(self.vocab_size, dtype=bool)
        for token, number in vocabulary.items():
            begins = not token.startswith("##") if continues else token[:1] in "\u0120\u010a\u2581"
            found[number] = begins or number in self.special_ids
        return found

    @property
    def _pipeline(self) -> dict[str, Any]:
        """What turns text into tokens."""
        found: dict[str, Any] = json.loads(self.tokenizer_json)
        return {key: value for key, value in found.items() if key not in ("truncation", "padding")}

    @cached_property
    def tokens_hash(self) -> str:
        """64 hex digits over vocabulary and merges: equal ones turn text into equal tokens."""
        return _hash_of(self._pipeline)

    @cached_property
    def contract_hash(self) -> str:
        """64 hex digits over vocabulary, merges, special ids and template."""
        contract = {
            "tokenizer": self._pipeline,
            "eos": [self.eos_token, self.eos_id],
            "pad": [self.pad_token, self.pad_id],
            "bos": [self.bos_token, self.bos_id],
            "template": self.chat_template,
        }
        return _hash_of(contract)

    def with_tokens(self, tokens: Sequence[str]) -> "Tokenization":
        """Return it with further tokens, which no text splits; those that it has stay what they are."""
        if not tokens:
            return self
        tokenizer = Tokenizer.from_buffer(self.tokenizer_json)
        tokenizer.add_tokens([AddedToken(token, normalized=False) for token in tokens])
        return replace(self, tokenizer_json=tokenizer.to_str().encode())

    def token_id(self, token: str) -> int:
        """Return the id of exactly this token; raises RequestError when it is not one of the vocabulary."""
        found: int | None = self.tokenizer.token_to_id(token)
        if found is None:
            raise RequestError(str(unknown_token(token, self.vocab_size)))
        return found

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        """Tokenize; `special` adds what the tokenizer's post-processor adds (a beginning token)."""
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=special).ids
        return ids

    def encode_batch(self, texts: Sequence[str], *, special: bool = False) -> list[list[int]]:
        """Tokenize many texts at once."""
        return [found.ids for found in self.tokenizer.encode_batch_fast(list(texts), add_special_tokens=special)]

    def encode_openings(self, texts: Sequence[str]) -> list[list[int]]:
        """Tokenize texts that something follows: what the post-processor adds, but for an end token after them."""
        encoded = self.encode_batch(texts, special=True)
        return [ids[:-1] for ids in encoded] if self._adds_end else encoded

    @cached_property
    def _adds_end(self) -> bool:
        """Whether the post-processor puts an end token after every text (`add_eos_token`)."""
        return self.encode("", special=True)[-1:] == [self.eos_id]

    def decode(self, ids: Sequence[int] | np.ndarray, *, skip_special: bool = True) -> str:
        """Turn ids into text."""
        text: str = self.tokenizer.decode([int(token) for token in ids], skip_special_tokens=skip_special)
        return text

    def render(self, messages: Sequence[Message], tools: Tools = None, *, add_generation_prompt: bool = False) -> str:
        """Render messages by the chat template; raises RequestError when there is none."""
        tokens = self._template_tokens()
        return render(self._template(), messages, tokens, tools, add_generation_prompt=add_generation_prompt)

    def after_answer(self, role: str, text: str) -> str:
        """What the chat template writes between an answer and the next one, where a turn of a role says a text."""
        return after_answer(self._template(), role, text, self._template_tokens())

    def response_spans(self, messages: Sequence[Message], tools: Tools = None) -> tuple[str, list[Span]]:
        """Return the rendered conversation and the character spans of the assistant's turns."""
        return response_spans(self._template(), messages, self._template_tokens(), self.special_tokens, tools)

    def turn_end(self, text: str, start: int) -> int:
        """Return where a rendered conversation ends whose last turn starts there; see `template.turn_end`."""
        return turn_end(text, start, len(text), self.special_tokens)

    def encode_prompt(self, prompt: str | Sequence[Message]) -> list[int]:
        """Tokenize what a response follows: plain text as it is, messages by the template with generation prompt."""
        if isinstance(prompt, str):
            return self.encode_openings([prompt])[0]
        return self.encode(self.render(prompt, add_generation_prompt=True))

    def files(self) -> dict[str, bytes]:
        """Return the files of the Hugging Face layout, the same bytes for the same record."""
        tokens = {"eos_token": self.eos_token, "pad_token": self.pad_token}
        if self.bos_token is not None:
            tokens["bos_token"] = self.bos_token
        files = {
            "tokenizer.json": self.tokenizer_json,
            "tokenizer_config.json": _json_bytes({**self.config, **tokens}),
            "special_tokens_map.json": _json_bytes(tokens),
        }
        if self.chat_template is not None:
            files["chat_template.jinja"] = self.chat_template.encode()
        return files

    def _template(self) -> str:
        if self.chat_template is None:
            raise RequestError(
                "rows of messages need a template, and there is no chat template; put chat_template.jinja into the "
                "model's folder, or give `chat_template` to the tokenizer of the stage that pretrains it"
            )
        return self.chat_template

    def _template_tokens(self) -> dict[str, str]:
        return {"eos_token": self.eos_token, "pad_token": self.pad_token, "bos_token": self.bos_token or ""}


def _hash_of(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _json_bytes(value: Any) -> bytes:
    return json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False).encode() + b"\n"


def train_tokenizer(spec: TrainTokenizer, texts: Iterable[str]) -> Tokenization:
    """Train byte-level BPE; the same texts give the same bytes."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.decoder = decoders.ByteLevel()
    names = spec.names
    trainer = trainers.BpeTrainer(
        vocab_size=spec.vocab_size,
        min_frequency=2,
        special_tokens=[AddedToken(name, special=True, normalized=False) for name in names],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    optional = {"cls_token": spec.cls_token, "mask_token": spec.mask_token}
    if spec.cls_token is not None:
        ends = [(token, tokenizer.token_to_id(token)) for token in (spec.cls_token, spec.eos_token)]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{spec.cls_token} $A {spec.eos_token}", special_tokens=ends
        )
    return Tokenization(
        tokenizer_json=tokenizer.to_str(pretty=False).encode(),
        eos_token=spec.eos_token,
        pad_token=spec.pad_token,
        bos_token=None,
        chat_template=spec.chat_template,
        config={
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
            "extra_special_tokens": spec.names[2 + sum(token is not None for token in optional.values()) :],
            **{key: token for key, token in optional.items() if token is not None},
        },
    )


def tokenization_from_files(files: Mapping[str, bytes], overrides: ExistingTokenizer | None = None) -> Tokenization:
    """Read a tokenizer of the Hugging Face layout; raises RequestError without an end token and a pad token.

    Where it names no eos_token (BERT) its sep_token ends a text. With a model's `config.json` among the files the
    tokenizer must fit it, unless `overrides` take the tokenizer for another model; see `token_problems`.
    """
    if "tokenizer.json" not in files:
        raise RequestError("no tokenizer.json; only tokenizers of the `tokenizers` library are read")
    config = _read_json(files, "tokenizer_config.json")
    tokens = {**_read_json(files, "special_tokens_map.json"), **config}
    template = find_template(tokens, files["chat_template.jinja"].decode() if "chat_template.jinja" in files else None)
    eos = (overrides and overrides.eos_token) or find_end_token(tokens)
    if eos is None:
        raise RequestError(str(missing_token(eos, None)))
    dropped = {"eos_token", "pad_token", "bos_token", "chat_template", "added_tokens_decoder"}
    dropped |= {"name_or_path", "auto_map"}
    found = Tokenization(
        tokenizer_json=files["tokenizer.json"],
        eos_token=eos,
        pad_token="",
        bos_token=token_text(tokens.get("bos_token")),
        chat_template=(overrides and overrides.chat_template) or template,
        config={key: value for key, value in config.items() if key not in dropped},
    )
    vocabulary = found.tokenizer.get_vocab(with_added_tokens=True)
    named = token_text(tokens.get("pad_token"))
    pad = (overrides and overrides.pad_token) or find_pad_token(named, eos, vocabulary)
    if (finding := missing_token(eos, pad) or pad_token_rule(eos, pad)) is not None:
        raise RequestError.of(finding)
    assert pad is not None
    is_models = overrides is None and "config.json" in files
    settings, generation = (_read_json(files, name) if is_models else {} for name in CONFIG_FILES)
    ends = configured_ends(settings, generation)
    complete = Tokenization(**{**found.__getstate__(), "pad_token": pad, "configured_ends": ends})
    complete.__dict__["tokenizer"] = found.tokenizer  # a large one takes long to read
    if problems := list(token_problems(complete.facts, settings if is_models else None, generation)):
        raise RequestError("; ".join(map(str, problems)))
    return complete


def load_tokenization(folder: Path, overrides: ExistingTokenizer | None = None) -> Tokenization:
    """Read a tokenizer from a local folder, which may be a model's."""
    names = (*TOKENIZER_FILES, *CONFIG_FILES)
    files = {name: (folder / name).read_bytes() for name in names if (folder / name).is_file()}
    try:
        return tokenization_from_files(files, overrides)
    except RequestError as error:
        raise RequestError(f"{folder}: {error}") from None


def _read_json(files: Mapping[str, bytes], name: str) -> dict[str, Any]:
    try:
        value = json.loads(files.get(name, b"{}"))
    except ValueError as error:
        raise RequestError(f"{name}: {error}") from None
    if not isinstance(value, dict):
        raise RequestError(f"{name}: not an object")
    return value
