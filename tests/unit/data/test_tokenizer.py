"""Trained and existing tokenizers: the same bytes for the same text, special tokens that differ, a contract hash."""

import json
import os
import pickle
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from tokenizers import processors

from recipes.data.tokenizers import ExistingTokenizer, TrainTokenizer
from recipes.errors import RequestError
from trainers.data.encoding import TextSettings, encode_instructions
from trainers.data.layouts.prompts import Prompts
from trainers.data.rows import Row
from trainers.data.tokenizer import Tokenization, load_tokenization, tokenization_from_files, train_tokenizer

TEXT = "Return the sum of two numbers.\n\tdéjà vu 中文 🙂  end"
TRAIN = """
from recipes.data.tokenizers import TrainTokenizer
from trainers.data.tokenizer import train_tokenizer
texts = [f"word{i % 7} other{i % 11} and {i % 13} more" for i in range(2000)]
print(train_tokenizer(TrainTokenizer(train="bpe", vocab_size=400), texts).contract_hash)
"""


def with_files(tokenization: Tokenization, **changes: object) -> dict[str, bytes]:
    """Return the files with keys of tokenizer_config.json changed; None removes one."""
    files = tokenization.files()
    del files["special_tokens_map.json"]
    config = {**json.loads(files["tokenizer_config.json"]), **changes}
    config = {key: value for key, value in config.items() if value is not None}
    return {**files, "tokenizer_config.json": json.dumps(config).encode()}


def existing(**changes: str) -> ExistingTokenizer:
    return ExistingTokenizer.model_validate({"from": "./model", **changes})


def test_every_text_comes_back(tokenization: Tokenization) -> None:
    assert tokenization.decode(tokenization.encode(TEXT)) == TEXT
    assert tokenization.encode_batch([TEXT, "a"]) == [tokenization.encode(TEXT), tokenization.encode("a")]


def test_special_tokens_come_first_and_are_never_split(tokenization: Tokenization) -> None:
    assert (tokenization.pad_id, tokenization.eos_id) == (0, 1)
    assert tokenization.encode("a<|user|>b<|end|>")[1::2] == [tokenization.token_id("<|user|>"), 1]
    assert tokenization.decode(tokenization.encode("a<|end|>")) == "a"
    assert tokenization.vocab_size <= 320


def test_training_does_not_depend_on_threads_or_hash_seed() -> None:
    root = Path(__file__).parents[3]
    hashes = {
        subprocess.run(
            [sys.executable, "-c", TRAIN],
            env={**os.environ, "PYTHONPATH": str(root), "PYTHONHASHSEED": seed, "RAYON_NUM_THREADS": threads},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed, threads in (("0", "1"), ("7", "2"))
    }
    assert len(hashes) == 1


def test_files_are_read_back_as_the_same_record(tokenization: Tokenization, tmp_path: Path) -> None:
    for name, content in tokenization.files().items():
        (tmp_path / name).write_bytes(content)
    again = load_tokenization(tmp_path)
    assert again.contract_hash == tokenization.contract_hash
    assert again.files() == tokenization.files()
    assert pickle.loads(pickle.dumps(again)).contract_hash == again.contract_hash


def test_contract_hash_follows_vocabulary_tokens_and_template(tokenization: Tokenization) -> None:
    spec = TrainTokenizer(train="bpe", vocab_size=320)
    others = [
        train_tokenizer(spec, [TEXT, TEXT]),
        train_tokenizer(spec.model_copy(update={"eos_token": "<stop>"}), ["Return the sum."] * 2),
        tokenization_from_files(tokenization.files(), existing(chat_template="{{ messages }}")),
        tokenization_from_files(tokenization.files(), existing(eos_token="<|user|>")),
    ]
    assert len({tokenization.contract_hash, *(other.contract_hash for other in others)}) == 5
    is_alike = [other.tokens_hash == tokenization.tokens_hash for other in others]
    assert is_alike == [False, False, True, True], "a template and the role of a token change no tokens"
    changed = with_files(tokenization, model_max_length=77)
    assert tokenization_from_files(changed).contract_hash == tokenization.contract_hash


def test_special_tokens_are_read_in_every_form(tokenization: Tokenization) -> None:
    files = with_files(tokenization, eos_token={"content": "<|end|>", "__type": "AddedToken"}, pad_token=None)
    found = tokenization_from_files(files)
    assert (found.eos_token, found.pad_token) == ("<|end|>", "<|pad|>")
    template = [{"name": "tool", "template": "x"}, {"name": "default", "template": "y"}]
    files = with_files(tokenization, chat_template=template)
    del files["chat_template.jinja"]
    assert tokenization_from_files(files).chat_template == "y"


def test_pad_that_equals_eos_is_replaced(tokenization: Tokenization) -> None:
    assert tokenization_from_files(with_files(tokenization, pad_token="<|end|>")).pad_token == "<|pad|>"


def test_a_vocabulary_without_a_pad_token_takes_byte_zero() -> None:
    """GPT-2's tokenizer has an end token only."""
    tokenizer = {"model": {"type": "BPE", "vocab": {"<|endoftext|>": 0, "\u0100": 1, "a": 2}, "merges": []}}
    files = {
        "tokenizer.json": json.dumps(tokenizer).encode(),
        "tokenizer_config.json": b'{"eos_token": "<|endoftext|>", "bos_token": "<|endoftext|>"}',
    }
    found = tokenization_from_files(files)
    assert (found.pad_id, found.eos_id, found.bos_id) == (1, 0, 0)


@pytest.mark.parametrize(
    ("changes", "overrides", "complaint"),
    [
        ({"eos_token": None}, {}, "names neither an eos_token nor a sep_token"),
        ({}, {"pad_token": "<|end|>"}, "pad_token must differ"),
        ({}, {"eos_token": "<nowhere>"}, "eos_token: .*'<nowhere>'"),
        ({"bos_token": "<s>"}, {}, "bos_token: .*'<s>'"),
    ],
)
def test_unusable_tokenizers_are_refused(
    tokenization: Tokenization, changes: dict[str, object], overrides: dict[str, str], complaint: str
) -> None:
    with pytest.raises(RequestError, match=complaint):
        tokenization_from_files(with_files(tokenization, **changes), existing(**overrides))


def test_missing_and_broken_files_are_named(tokenization: Tokenization, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"no tokenizer\.json"):
        load_tokenization(tmp_path)
    with pytest.raises(RequestError, match=r"tokenizer\.json"):
        tokenization_from_files({**tokenization.files(), "tokenizer.json": b"{}"})
    with pytest.raises(RequestError, match=r"tokenizer_config\.json"):
        tokenization_from_files({**tokenization.files(), "tokenizer_config.json": b"{"})


def test_messages_need_a_template(tokenization: Tokenization) -> None:
    files = with_files(tokenization)
    del files["chat_template.jinja"]
    with pytest.raises(RequestError, match="no chat template"):
        tokenization_from_files(files).encode_prompt([{"role": "user", "content": "Q"}])


def test_a_tokenizer_that_ends_every_text_ends_no_prompt(tokenization: Tokenization) -> None:
    """`add_eos_token` puts an end token after what is encoded; an answer is still to follow there."""
    begin, end = "<|user|>", tokenization.eos_token
    own = tokenization.tokenizer.from_str(tokenization.tokenizer_json.decode())
    own.post_processor = processors.TemplateProcessing(
        single=f"{begin} $A {end}", special_tokens=[(token, own.token_to_id(token)) for token in (begin, end)]
    )
    ending = replace(tokenization, tokenizer_json=own.to_str().encode())
    first, last, plain = ending.token_id(begin), ending.eos_id, ending.encode("Q: two A:")
    assert ending.encode("Q: two A:", special=True) == [first, *plain, last]
    assert ending.encode_prompt("Q: two A:") == [first, *plain]
    row = Row("rows.jsonl:1", {"prompt": "Q: two A:", "completion": " sum"})
    ((_, encoded),) = encode_instructions([row], TextSettings(ending, 64))
    assert encoded.ids.tolist() == [first, *plain, *ending.encode(" sum"), last]
    assert encoded.response.tolist() == [place > len(plain) for place in range(len(encoded))]
    ((_, _, prompt),) = Prompts(TextSettings(ending, 64)).encode([row])
    assert prompt.tolist() == [first, *plain]
