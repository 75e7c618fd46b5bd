"""The tokenizer of a GGUF file, and a tokenizer as the metadata of one.

A file names its pre-tokenizer by a word of llama.cpp where tokenizer.json spells it out.
"""

import json
from pathlib import Path
from typing import Any

from recipes.errors import RequestError
from trainers.data.tokenizer import Tokenization, tokenization_from_files

_GPT2 = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
_DIGITS = {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, _GPT2]}
_WRITTEN_OUT: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("gpt-2", "mpt", "olmo", "phi-2", "jais"), _GPT2),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone"), _DIGITS),
}
"""Pre-tokenizers that transformers' reader does not know (llama.cpp: `llama_vocab::impl::load`)."""
_TOKEN_IDS = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
SPACE = "\u2581"
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
"""Types of tokens in a file."""


def read_tokenizer(file: Path) -> Tokenization:
    """Return a file's tokenizer with its template; raises RequestError for one that cannot be said exactly."""
    from transformers.integrations.gguf import convert_gguf_tokenizer, get_gguf_tokenizer
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

    try:
        architecture, fields, config = get_gguf_tokenizer(str(file))
        backend, _ = convert_gguf_tokenizer(architecture, fields)
    except ValueError as error:
        raise RequestError(f"{file}: {error}") from None
    content = json.loads(backend.to_str())
    # The stock classes add their own default tokens, as <|endoftext|>, to a vocabulary that has them not.
    content["added_tokens"] = [token for token in content["added_tokens"] if token["id"] < len(fields["tokens"])]
    written = fields.get("pre_tokenizer_type")
    if fields["tokenizer_type"] == "gpt2" and written not in GGUF_PRE_TOKENIZER_SPLITS:
        if written not in _WRITTEN_OUT:
            raise RequestError(
                f"{file}: tokenizer.ggml.pre is {written!r}, and how it splits text is not known here; known are "
                f"{', '.join(sorted({*_WRITTEN_OUT, *GGUF_PRE_TOKENIZER_SPLITS}))}"
            )
        content["pre_tokenizer"] = _WRITTEN_OUT[written]
    if fields.get("add_prefix_space") is False and (content["pre_tokenizer"] or {}).get("type") == "Metaspace":
        content["pre_tokenizer"]["prepend_scheme"] = "never"
    tokens = {name: config[name] for name in _TOKEN_IDS if config.get(name) is not None}
    content["post_processor"] = _around(tokens, fields["tokens"], config)
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **tokens}
    if config.get("chat_template"):
        settings["chat_template"] = config["chat_template"]
    files = {"tokenizer.json": json.dumps(content, ensure_ascii=False), "tokenizer_config.json": json.dumps(settings)}
    return tokenization_from_files({name: text.encode() for name, text in files.items()})


def _around(tokens: dict[str, str], vocabulary: list[str], config: dict[str, Any]) -> dict[str, Any] | None:
    """Return the post-processor that puts a beginning and an end token around a text, as the file has it."""
    flags = {"bos_token": "add_bos_token", "eos_token": "add_eos_token"}
    added = [name for name, flag in flags.items() if config.get(flag) and name in tokens]
    if not added:
        return None
    text = {"Sequence": {"id": "A", "type_id": 0}}
    special = {name: {"SpecialToken": {"id": tokens[name], "type_id": 0}} for name in added}
    single = [*([special["bos_token"]] if "bos_token" in added else []), text]
    single += [special["eos_token"]] if "eos_token" in added else []
    second = [part if part is not text else {"Sequence": {"id": "B", "type_id": 0}} for part in single]
    ids = {tokens[name]: vocabulary.index(tokens[name]) for name in added}
    named = {token: {"id": token, "ids": [number], "tokens": [token]} for token, number in ids.items()}
    return {"type": "TemplateProcessing", "single": single, "pair": [*single, *second], "special_tokens": named}


def tokenizer_fields(tokenization: Tokenization, num_ids: int) -> dict[str, Any]:
    """Return a tokenizer as metadata of a file with `num_ids` tokens, by key behind `tokenizer.`.

    Raises RequestError for one that is no BPE, or whose pre-tokenizer has no name in the format.
    """
    content = json.loads(tokenization.tokenizer_json)
    model = content["model"]
    if model["type"] != "BPE":
        raise RequestError(f"tokenizer.json: a GGUF file takes BPE; this is {model['type']}")
    is_byte_level = '"ByteLevel"' in json.dumps(content["pre_tokenizer"])
    if not is_byte_level and not model.get("byte_fallback"):
        raise RequestError("tokenizer.json: a GGUF file takes BPE over bytes, or with byte_fallback; this is neither")
    texts, kinds = _tokens(tokenization, content, num_ids, is_byte_level)
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    opened = tokenization.encode("a", special=True)
    fields: dict[str, Any] = {
        "ggml.model": "gpt2" if is_byte_level else "llama",
        "ggml.pre": _name_of(content["pre_tokenizer"]) if is_byte_level else "default",
        "ggml.tokens": texts,
        "ggml.token_type": kinds,
        "ggml.merges": merges,
        "ggml.eos_token_id": tokenization.eos_id,
        "ggml.padding_token_id": tokenization.pad_id,
        "ggml.add_bos_token": tokenization.bos_id is not None and opened[0] == tokenization.bos_id,
        "ggml.add_eos_token": opened[-1] == tokenization.eos_id,
        "ggml.add_space_prefix": tokenization.tokenizer.encode("a", add_special_tokens=False).tokens[0][0] == SPACE,
    }
    if not is_byte_level:
        fields["ggml.scores"] = _scores(texts, merges)
    for key, token in (
        ("ggml.bos_token_id", tokenization.bos_token),
        ("ggml.unknown_token_id", model.get("unk_token")),
    ):
        if token is not None:
            fields[key] = tokenization.token_id(token)
    if tokenization.chat_template is not None:
        fields["chat_template"] = tokenization.chat_template
    return fields


def _tokens(
    tokenization: Tokenization, content: dict[str, Any], num_ids: int, is_byte_level: bool
) -> tuple[list[str], list[int]]:
    """Return the text and the type of every id; ids without a token are padding of the embedding."""
    texts = [f"[PAD{number}]" for number in range(num_ids)]
    kinds = [UNUSED] * num_ids
    for token, number in tokenization.tokenizer.get_vocab(with_added_tokens=True).items():
        is_byte = not is_byte_level and len(token) == 6 and token.startswith("<0x") and token.endswith(">")
        texts[number], kinds[number] = token, BYTE if is_byte else NORMAL
    for added in content["added_tokens"]:
        kinds[added["id"]] = CONTROL if added["special"] else USER_DEFINED
        if not is_byte_level and not added["special"]:
            texts[added["id"]] = texts[added["id"]].replace(SPACE, " ")
    unknown = content["model"].get("unk_token")
    if unknown is not None and not is_byte_level:
        kinds[tokenization.token_id(unknown)] = UNKNOWN
    return texts, kinds


def _scores(texts: list[str], merges: list[str]) -> list[float]:
    """Return a score per token by which the order of merges follows: the higher, the earlier it is made."""
    made: dict[str, int] = {}
    for rank, merge in enumerate(merges):
        made.setdefault(merge.replace(" ", ""), rank)
    return [-float(made.get(text.replace(" ", SPACE), len(merges))) for text in texts]


def _name_of(pre_tokenizer: dict[str, Any]) -> str:
    """Return the format's word for a pre-tokenizer over bytes; raises RequestError where it has none."""
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

    steps = pre_tokenizer["pretokenizers"] if pre_tokenizer["type"] == "Sequence" else [pre_tokenizer]
    for name, known in _WRITTEN_OUT.items():
        if [_essence(step) for step in steps] == [_essence(step) for step in known.get("pretokenizers", [known])]:
            return name
    patterns = [step["pattern"].get("Regex") for step in steps if step["type"] == "Split"]
    for name, pattern in GGUF_PRE_TOKENIZER_SPLITS.items():
        if patterns == [pattern]:
            return name
    raise RequestError(f"tokenizer.json: its pre-tokenizer has no name in GGUF: {json.dumps(pre_tokenizer)[:200]}")


def _essence(step: dict[str, Any]) -> dict[str, Any]:
    """Return what of a pre-tokenizer decides the tokens: offsets do not."""
    return {key: value for key, value in step.items() if key != "trim_offsets"}


def differing_text(one: Tokenization, other: Tokenization, texts: list[str]) -> str | None:
    """Return the first text that two tokenizers turn into other tokens; None where they agree on all."""
    for text in texts:
        if one.encode(text, special=True) != other.encode(text, special=True):
            return text
    return None
