"""Our reading of rows, templates and tokenizers is that of trl and transformers."""

from pathlib import Path
from typing import Any

import pytest

from recipes.data.tokenizers import TrainTokenizer
from trainers.data.row_forms import extract_prompt, is_conversational
from trainers.data.tokenizer import Tokenization, load_tokenization, train_tokenizer

USER = {"role": "user", "content": "Q"}
GOOD = {"role": "assistant", "content": "good"}
BAD = {"role": "assistant", "content": "bad"}
SAMPLES: list[dict[str, Any]] = [
    {"chosen": "Human: hi Assistant: yes", "rejected": "Human: hi Assistant: no"},
    {"chosen": "Human: hi Assistant: I am", "rejected": "Human: hi Assistant: It is"},
    {"chosen": "same start", "rejected": "same start and more"},
    {"chosen": [USER, GOOD], "rejected": [USER, BAD]},
    {"chosen": [USER, GOOD, USER, GOOD], "rejected": [USER, GOOD, USER, BAD]},
    {"chosen": "ab", "rejected": "xb"},
]
TEMPLATES = [
    "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content }}{% if m.role == 'assistant' %}{{ eos_token }}"
    "{% endif %}{% endfor %}",
    "{%- for m in messages %}\n    {%- if m.role == 'user' %}\n        {{- 'U: ' ~ m.content | trim }}\n"
    "    {%- else %}\n"
    "        {% generation %}{{ m | tojson }}{% endgeneration %}\n    {%- endif %}\n{%- endfor %}",
    "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}"
    "{% if loop.last %}{% break %}{% endif %}"
    "{{ ns.n }}{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}>{% endif %}",
]
TEXT = "Return the sum of two numbers, é and 中.\n\n    def add(a, b):\n        return a + b  # naïve\n"


@pytest.fixture(scope="module")
def tokenization() -> Tokenization:
    return train_tokenizer(TrainTokenizer(train="bpe", vocab_size=330), [TEXT] * 3)


@pytest.fixture(scope="module")
def stock(tokenization: Tokenization, tmp_path_factory: pytest.TempPathFactory) -> Any:
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("tokenizer")
    for name, content in tokenization.files().items():
        (folder / name).write_bytes(content)
    return transformers.AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("sample", SAMPLES)
def test_prompt_extraction_and_detection_are_those_of_trl(sample: dict[str, Any]) -> None:
    trl = pytest.importorskip("trl.data_utils", reason="trl is installed with the dev extra")
    prompt, chosen, rejected = extract_prompt(sample["chosen"], sample["rejected"])
    assert trl.extract_prompt(sample) == {"prompt": prompt, "chosen": chosen, "rejected": rejected}
    assert trl.is_conversational(sample) == is_conversational(sample["chosen"])


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("add_generation_prompt", [False, True])
def test_templates_render_as_in_transformers(stock: Any, template: str, add_generation_prompt: bool) -> None:
    from recipes.tokenizers.chat_template import render

    messages = [USER, GOOD, {"role": "user", "content": ' <b> "é" '}]
    tokens = {"eos_token": stock.eos_token, "pad_token": stock.pad_token, "bos_token": ""}
    expected = stock.apply_chat_template(
        messages, chat_template=template, tokenize=False, add_generation_prompt=add_generation_prompt
    )
    assert render(template, messages, tokens, add_generation_prompt=add_generation_prompt) == expected


def test_stock_tokenizer_of_our_files_agrees(stock: Any, tokenization: Tokenization) -> None:
    assert stock(TEXT)["input_ids"] == tokenization.encode(TEXT, special=True)
    assert stock.decode(tokenization.encode(TEXT)) == TEXT == tokenization.decode(tokenization.encode(TEXT))
    assert (stock.eos_token_id, stock.pad_token_id) == (tokenization.eos_id, tokenization.pad_id)
    messages = [USER, GOOD]
    assert stock.apply_chat_template(messages, tokenize=False) == tokenization.render(messages)
    ids = tokenization.encode(tokenization.render(messages))
    assert stock.decode(ids, skip_special_tokens=True) == tokenization.decode(ids)


def test_what_transformers_saves_is_read_back(stock: Any, tokenization: Tokenization, tmp_path: Path) -> None:
    stock.save_pretrained(tmp_path)
    again = load_tokenization(tmp_path)
    assert (again.eos_token, again.pad_token, again.chat_template) == (
        tokenization.eos_token,
        tokenization.pad_token,
        tokenization.chat_template,
    )
    assert again.encode(TEXT) == tokenization.encode(TEXT)
