"""Public data sets in their own form, where a folder `../shared/data` beside the repository holds them."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import TypeAdapter

from recipes.data.text import Source
from recipes.data.tokenizers import TrainTokenizer
from trainers.data.dataset import Dataset
from trainers.data.encoding import TextSettings
from trainers.data.layouts.registry import text_layout
from trainers.data.materialise import DataRequest, build_tokenization, materialise
from trainers.data.tokenizer import Tokenization
from trainers.store.store import Store

DATA = Path(__file__).parents[4] / "shared" / "data"
pytestmark = pytest.mark.skipif(not DATA.is_dir(), reason="no folder ../shared/data beside the repository")

ADAPTER: TypeAdapter[Any] = TypeAdapter(Source)


def source(**keys: Any) -> Any:
    return ADAPTER.validate_python(keys)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return Store.open(str(tmp_path_factory.mktemp("store")))


@pytest.fixture(scope="module")
def tokenization(store: Store) -> Tokenization:
    spec = TrainTokenizer(train="bpe", vocab_size=1024)
    return build_tokenization(spec, source(source="text", files=["lm/tinyshakespeare.txt"]), DATA, 0, store)


def build(given: Any, role: Any, length: int, tokenization: Tokenization, store: Store, **keys: Any) -> Dataset:
    held_out = keys.pop("held_out", False)
    layout = text_layout(role, TextSettings(tokenization, length, **keys))
    return materialise(DataRequest(given, DATA, layout, 0, held_out=held_out), store)


def test_a_whole_file_comes_back_token_by_token(tokenization: Tokenization, store: Store) -> None:
    given = source(source="text", files=["lm/tinyshakespeare.txt"])
    dataset = build(given, "text", 256, tokenization, store)
    text = (DATA / "lm" / "tinyshakespeare.txt").read_text(encoding="utf-8")
    assert dataset.report.fate.split == 1
    assert dataset.report.holds["fill"] > 0.99
    ids = tokenization.encode(text)
    assert sorted(dataset.arrays["input_ids"][dataset.arrays["segment_ids"] > 0].tolist()) == sorted([*ids, 1])


def test_many_novels_in_paragraphs(tokenization: Tokenization, store: Store) -> None:
    given = source(source="text", files=["lm/novels/D*.txt"], documents="paragraph", hold_out=0.1, limit=2000)
    training = build(given, "text", 256, tokenization, store)
    held_out = build(given, "text", 256, tokenization, store, held_out=True)
    assert training.report.rows_in == 2000
    assert 0 < held_out.report.rows_in <= 2000
    assert training.report.holds["fill"] > 0.9
    assert training.digest != held_out.digest


def test_names_one_a_line(tokenization: Tokenization, store: Store) -> None:
    given = source(source="csv", files=["lm/names.txt"], columns={"text": "emma"}, limit=500)
    dataset = build(given, "text", 64, tokenization, store)
    assert dataset.report.fate.kept == 500
    assert (dataset.arrays["segment_ids"].max(axis=1) > 3).any()


@pytest.mark.parametrize(
    ("files", "columns"),
    [
        (["sft/gsm8k_train.jsonl.gz"], {"prompt": "question", "completion": "answer"}),
        (["sft/dolly_open_qa.jsonl"], {"prompt": "instruction", "completion": "output"}),
    ],
)
def test_instructions_learn_the_answers(
    files: list[str], columns: Any, tokenization: Tokenization, store: Store
) -> None:
    given = source(source="jsonl", files=files, columns=columns, limit=300)
    dataset = build(given, "instructions", 512, tokenization, store)
    report = dataset.report
    assert report.fate.kept + sum(report.fate.dropped.values()) == report.rows_in == 300
    assert 0 < report.holds["supervised_tokens"] < report.holds["tokens"]
    ends = dataset.arrays["input_ids"][dataset.arrays["loss_mask"]] == tokenization.eos_id
    assert int(ends.sum()) == report.fate.kept - report.fate.truncated + report.fate.dropped.get("no_response", 0)


@pytest.mark.parametrize("name", ["hh_helpful-base", "hh_harmless-base", "hh_helpful-rejection-sampled"])
def test_preferences_with_an_implicit_prompt(name: str, tokenization: Tokenization, store: Store) -> None:
    given = source(source="jsonl", files=[f"pref/{name}.jsonl.gz"], limit=200)
    dataset = build(given, "preferences", 768, tokenization, store)
    assert dataset.report.fate.kept > 100
    for row in range(20):
        prompts = []
        for side in ("chosen", "rejected"):
            offsets = dataset.arrays[f"{side}_offsets"]
            span = slice(int(offsets[row]), int(offsets[row + 1]))
            ids, response = dataset.arrays[f"{side}_ids"][span], dataset.arrays[f"{side}_response"][span]
            start = int(np.argmax(response))
            assert response[start:].all()
            assert ids[-1] == tokenization.eos_id
            prompts.append(tokenization.decode(ids[:start]))
        assert prompts[0] == prompts[1]
        assert prompts[0].startswith("\n\nHuman:")
