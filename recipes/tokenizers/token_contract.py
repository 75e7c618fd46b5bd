"""A model's tokenizer, chat template and configuration together: its end tokens, and what does not fit (pure).

The one rule for `check`, for a stage that loads a model, and for the verification of what a stage commits.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from recipes.errors import Finding, RequestError
from recipes.problem_codes import Code

PAD_NAMES = ("<|pad|>", "<pad>", "[PAD]", "<|finetune_right_pad_id|>", "<|endoftext|>", "<unk>", "\u0100", "<0x00>")
"""Entries that serve as pad token, in this order, where a tokenizer names none or its end token.

The last two are byte 0 in byte-level vocabularies (GPT-2's), and in those with byte fallback.
"""
CONFIG_FILES = ("config.json", "generation_config.json")
"""Files that name special ids besides the tokenizer's own."""
DEFAULT_ROWS = {
    "llama": 32000, "qwen2": 151936, "qwen3": 151936, "gpt2": 50257, "bert": 30522, "t5": 32128, "bart": 50265,
}  # fmt: skip
"""Rows of the embedding where a configuration does not say: transformers' defaults."""
_ID_KEYS = (
    "eos_token_id", "bos_token_id", "pad_token_id", "sep_token_id", "decoder_start_token_id", "forced_bos_token_id",
    "forced_eos_token_id",
)  # fmt: skip


@dataclass(frozen=True)
class TokenizerFacts:
    """What a tokenizer knows; `vocabulary` maps token to id (None where it is trained later)."""

    eos_token: str | None
    pad_token: str | None
    special_tokens: frozenset[str]
    vocabulary: Mapping[str, int] | None = None
    chat_template: str | None = None
    bos_token: str | None = None
    named_tokens: frozenset[str] = frozenset()
    """Further special tokens that its configuration names; stock classes add those that the vocabulary lacks."""

    @property
    def has_chat_template(self) -> bool:
        """Whether it renders conversations."""
        return self.chat_template is not None

    @property
    def turn_end(self) -> str | None:
        """The special token that the chat template writes after an assistant's message, if it writes one."""
        if self.chat_template is None:
            return None
        from recipes.tokenizers.chat_template import end_of_turn

        known = self.special_tokens | ({self.eos_token} if self.eos_token else set())
        return end_of_turn(self.chat_template, self._template_tokens, known)

    @property
    def _template_tokens(self) -> dict[str, str]:
        tokens = {"eos_token": self.eos_token, "pad_token": self.pad_token, "bos_token": self.bos_token}
        return {key: token or "" for key, token in tokens.items()}

    def conversation_problem(self, role: str) -> str:
        """Why the chat template continues no conversation by a turn of a role; empty: it does, or there is none."""
        from recipes.tokenizers.chat_template import after_answer

        try:
            if self.chat_template is not None:
                after_answer(self.chat_template, role, "4", self._template_tokens)
        except RequestError as error:
            return str(error)
        return ""

    def has_token(self, token: str) -> bool:
        """Whether the text is one token for certain."""
        if token in self.special_tokens:
            return True
        if self.vocabulary is not None:
            return token in self.vocabulary or _byte_level(token) in self.vocabulary
        return len(token.encode()) == 1


def end_tokens(facts: TokenizerFacts, configured: Iterable[int] = ()) -> tuple[int, ...]:
    """Ids that end a response: the template's end of turn, the tokenizer's end token, then what `configured_ends` gave.

    The first one closes an answer that has no end. The tokenizer must have a vocabulary with its end token.
    """
    assert facts.vocabulary is not None
    own = [facts.vocabulary.get(token or "") for token in (facts.turn_end, facts.eos_token)]
    return tuple(dict.fromkeys([*(number for number in own if number is not None), *sorted(configured)]))


def configured_ends(config: Mapping[str, Any], generation: Mapping[str, Any]) -> frozenset[int]:
    """End tokens that `config.json` and `generation_config.json` name."""
    return frozenset(
        number for _, key, number in _named_ids(config, generation) if key == "eos_token_id" and _is_id(number)
    )


def token_problems(
    facts: TokenizerFacts,
    config: Mapping[str, Any] | None = None,
    generation: Mapping[str, Any] | None = None,
) -> Iterator[Finding]:
    """What does not fit: tokens that are in no vocabulary, ids without a row or a token, a template that is no Jinja.

    `config` and `generation` are a model's `config.json` and `generation_config.json`; None: there is none.
    """
    vocabulary = facts.vocabulary
    if vocabulary is not None:
        for key in ("eos_token", "pad_token", "bos_token"):
            token = getattr(facts, key)
            if token is not None and token not in vocabulary:
                lacking = unknown_token(token, _size(vocabulary))
                yield lacking._replace(message=f"{key}: {lacking.message}")
    if facts.chat_template is not None:
        from recipes.tokenizers.chat_template import template_problem

        if (found := template_problem(facts.chat_template)) is not None:
            yield Finding(Code.INVALID_CHAT_TEMPLATE, f"chat template: {found}")
    if config is not None and vocabulary is not None:
        yield from _id_problems(facts, vocabulary, config, generation or {})


def _id_problems(
    facts: TokenizerFacts, vocabulary: Mapping[str, int], config: Mapping[str, Any], generation: Mapping[str, Any]
) -> Iterator[Finding]:
    rows = embedding_rows(config)
    added = sorted(facts.named_tokens - vocabulary.keys())
    entries = _size(vocabulary) + len(added)
    if rows is not None and entries > rows:
        last = added[-1] if added else max(vocabulary, key=lambda token: vocabulary[token])
        yield Finding(
            Code.TOKEN_ID_MISMATCH,
            f"the tokenizer has {entries} entries (the last is {last!r}), the model's embedding {rows} rows "
            "(vocab_size in config.json); resize the embedding, or remove the tokens that were added",
        )
        return
    by_id = {number: token for token, number in vocabulary.items()}
    ordinary: dict[int, str] = {}
    for file, key, number in _named_ids(config, generation):
        if key == "pad_token_id" and number == -1:  # some old configurations mean that there is none
            continue
        if not _is_id(number) or (rows is not None and number >= rows):
            message = f"{file}: {key} is {number!r}, and the model's embedding has {rows} rows"
            yield Finding(Code.TOKEN_ID_MISMATCH, message)
        elif key == "eos_token_id" and number not in by_id:
            message = f"{file}: {key} is {number}, and the tokenizer has no token with this id"
            yield Finding(Code.TOKEN_ID_MISMATCH, message)
        elif key == "eos_token_id" and by_id[number] not in facts.special_tokens:
            ordinary[number] = file
    own = vocabulary.get(facts.eos_token or "")
    if own is not None and ordinary and own not in configured_ends(config, generation):
        number, file = next(iter(ordinary.items()))
        yield Finding(
            Code.TOKEN_ID_MISMATCH,
            f"{file}: eos_token_id is {number}, which is the ordinary token {by_id[number]!r} here; the tokenizer's "
            f"end token {facts.eos_token!r} is {own}: the tokenizer is not this model's",
        )


def find_end_token(config: Mapping[str, Any]) -> str | None:
    """The token that ends a text: the tokenizer's eos_token, or where it names none (BERT) its sep_token."""
    return token_text(config.get("eos_token")) or token_text(config.get("sep_token"))


def find_pad_token(named: str | None, eos_token: str | None, vocabulary: Mapping[str, int]) -> str | None:
    """The pad token that is used: the named one, else a usual one of the vocabulary; never the end token."""
    if named is not None and named != eos_token:
        return named
    return next((name for name in PAD_NAMES if name != eos_token and name in vocabulary), None)


def find_template(config: Mapping[str, Any], file: str | None) -> str | None:
    """The chat template: that of chat_template.jinja, else tokenizer_config.json's (of several the default)."""
    found = config.get("chat_template") if file is None else file
    if isinstance(found, list):
        named = {entry.get("name"): entry.get("template") for entry in found if isinstance(entry, Mapping)}
        found = named.get("default")
    return found if isinstance(found, str) else None


def unknown_token(token: str, entries: int) -> Finding:
    """A token is none of a vocabulary of so many entries."""
    return Finding(Code.UNKNOWN_TOKEN, f"token {token!r} is not in the vocabulary of {entries} entries")


def missing_token(eos_token: str | None, pad_token: str | None) -> Finding | None:
    """Which of the tokens that end a text and fill a batch a tokenizer lacks; None: it has both."""
    if eos_token is None:
        message = "the tokenizer names neither an eos_token nor a sep_token"
        return Finding(Code.MISSING_SPECIAL_TOKEN, message, "set tokenizer.eos_token to one of its tokens")
    if pad_token is None:
        message = f"the tokenizer has no pad token that differs from its end token {eos_token!r}"
        return Finding(Code.MISSING_SPECIAL_TOKEN, message, "set tokenizer.pad_token to one of its tokens")
    return None


def pad_token_rule(eos_token: str | None, pad_token: str | None) -> Finding | None:
    """Why a pad token cannot be used; None: it can."""
    if pad_token is None or pad_token != eos_token:
        return None
    message = "pad_token must differ from eos_token; the end of a response is found by it"
    return Finding(Code.PAD_TOKEN_CONFLICT, message, "name another token of the vocabulary as pad_token")


def find_named_tokens(config: Mapping[str, Any]) -> frozenset[str]:
    """Special tokens that a tokenizer_config.json names besides end, pad and beginning."""
    found = [config.get(f"{name}_token") for name in ("unk", "cls", "sep", "mask")]
    for key in ("additional_special_tokens", "extra_special_tokens"):
        more = config.get(key) or []
        found += more.values() if isinstance(more, Mapping) else more if isinstance(more, list) else []
    return frozenset(token for value in found if (token := token_text(value)) is not None)


def token_text(value: Any) -> str | None:
    """A special token as a configuration writes it: text, or a mapping with its content."""
    if isinstance(value, Mapping):
        value = value.get("content")
    return value if isinstance(value, str) and value else None


def embedding_rows(config: Mapping[str, Any]) -> int | None:
    """Rows of the embedding of a `config.json`'s text model; None: it does not say."""
    text = _text_config(config)
    found = text.get("vocab_size", DEFAULT_ROWS.get(str(text.get("model_type"))))
    return found if _is_id(found) else None


def _named_ids(config: Mapping[str, Any], generation: Mapping[str, Any]) -> Iterator[tuple[str, str, Any]]:
    """Every special id with its file and key."""
    for file, part in zip(CONFIG_FILES, ({**config, **_text_config(config)}, generation), strict=True):
        for key in _ID_KEYS:
            value = part.get(key)
            for number in value if isinstance(value, list) else [value]:
                if number is not None:
                    yield file, key, number


def _text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    text = config.get("text_config")
    return text if isinstance(text, Mapping) else config


def _is_id(value: Any) -> bool:
    return type(value) is int and value >= 0


def _size(vocabulary: Mapping[str, int]) -> int:
    """The smallest embedding that holds every id."""
    return max(vocabulary.values(), default=-1) + 1


def _byte_level(token: str) -> str:
    """The token as byte-level BPE writes it in its vocabulary (GPT-2's table of printable bytes)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    table = {byte: chr(byte) for byte in printable} | {byte: chr(256 + place) for place, byte in enumerate(others)}
    return "".join(table[byte] for byte in token.encode())
