"""Materialised sets: response masks by position, packing borders, counts, one build per request."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import TypeAdapter

from recipes.data.text import Source
from recipes.data.tokenizers import TrainTokenizer
from recipes.errors import RequestError
from trainers.data import materialise as module
from trainers.data.batches import BatchPlan, Seq2SeqBatch, build_batch
from trainers.data.dataset import Dataset
from trainers.data.encoding import TextSettings
from trainers.data.layouts.registry import text_layout
from trainers.data.layouts.seq2seq import target_text
from trainers.data.materialise import DataRequest, build_tokenization, materialise
from trainers.data.row_forms import RowRole
from trainers.data.tokenizer import Tokenization
from trainers.store.store import Store

ADAPTER: TypeAdapter[Any] = TypeAdapter(Source)
USER = {"role": "user", "content": "Return the sum?"}
ANSWER = {"role": "assistant", "content": "Open a file."}


@pytest.fixture
def build(tmp_path: Path, store: Store, tokenization: Tokenization) -> Any:
    def build(role: RowRole, rows: list[Any], length: int = 64, **changes: Any) -> Dataset:
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        source = ADAPTER.validate_python({"source": "jsonl", "files": ["rows.jsonl"]})
        keys: dict[str, Any] = {"tokenization": tokenization, **changes}
        layout = text_layout(role, TextSettings(sequence_length=length, **keys))
        return materialise(DataRequest(source, tmp_path, layout, 0), store)

    return build


def learned(dataset: Dataset, tokenization: Tokenization, row: int = 0) -> str:
    """Return the text of a packed sequence's targets."""
    ids = np.asarray(dataset.arrays["input_ids"][row])[np.asarray(dataset.arrays["loss_mask"][row])]
    return tokenization.decode(ids, skip_special=False)


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"messages": [USER, ANSWER]}, "Open a file.<|end|>"),
        ({"messages": [USER, ANSWER, USER, ANSWER]}, "Open a file.<|end|>Open a file.<|end|>"),
        ({"prompt": [USER], "completion": [ANSWER]}, "Open a file.<|end|>"),
        ({"prompt": [USER, ANSWER, USER], "completion": [ANSWER]}, "Open a file.<|end|>"),
        ({"prompt": "Return the", "completion": " sum of two."}, " sum of two.<|end|>"),
        ({"prompt": "Return t", "completion": "he sum."}, "he sum.<|end|>"),
    ],
)
def test_only_responses_are_targets(build: Any, tokenization: Tokenization, row: Any, expected: str) -> None:
    dataset = build("instructions", [row], 128)
    assert learned(dataset, tokenization) == expected
    assert dataset.report.holds["supervised_tokens"] == dataset.arrays["loss_mask"].sum()


def test_sources_and_targets_end_and_long_ones_are_left_out(build: Any, tokenization: Tokenization) -> None:
    rows = [
        {"prompt": "Return the sum?", "completion": "número  "},
        {"prompt": "Return the sum?", "completion": "Return the sum " * 9},
        {"messages": [USER, ANSWER]},
        {"prompt": "Return", "completion": ""},
    ]
    dataset = build("seq2seq", rows, 30)
    assert len(dataset) == 2
    assert dataset.report.fate.dropped == {"empty": 1, "too_long": 1}
    for side, text in (("source", "Return the sum?"), ("target", "número  ")):
        ids = dataset.cut(f"{side}_ids", 0)
        assert tokenization.decode(ids[:-1]) == text
        assert ids[-1] == tokenization.eos_id
    assert target_text(dataset, 0) == "número  "
    assert target_text(dataset, 1) == "Open a file."
    rendered = tokenization.render([USER], add_generation_prompt=True)
    assert tokenization.decode(dataset.cut("source_ids", 1), skip_special=False) == rendered + "<|end|>"
    assert dataset.lengths([0, 1]) == [
        max(len(dataset.cut("source_ids", row)), len(dataset.cut("target_ids", row))) for row in (0, 1)
    ]
    batch = build_batch(dataset, [1, -1])
    assert isinstance(batch, Seq2SeqBatch)
    assert batch.target_mask_BT.sum(dim=1).tolist() == [len(dataset.cut("target_ids", 1)), 0]
    assert torch.equal(batch.source_mask_BS[0], batch.source_ids_BS[0] != tokenization.pad_id)


def test_unpacked_sequences_can_be_dealt_by_length(build: Any) -> None:
    dataset = build("text", [{"text": "Return the sum " * number} for number in range(1, 9)], 64, packing=False)
    plan = BatchPlan(dataset, 0, 8, 2, 0, 2, by_length=True)
    widths = [batch.input_ids_BT.shape[1] for batch in plan.micro_batches(0)]
    assert widths == sorted(widths, reverse=True)
    rows = {row for batch in plan.micro_batches(0) for row in batch.sample_ids_B.tolist()}
    other = {
        row
        for batch in BatchPlan(dataset, 0, 8, 2, 1, 2, by_length=True).micro_batches(0)
        for row in batch.sample_ids_B.tolist()
    }
    assert rows | other == set(range(8))


def test_the_mask_goes_by_position_where_the_pad_token_stands_in_the_text(
    build: Any, tokenization: Tokenization
) -> None:
    row = {"prompt": "a<|end|>b<|pad|>", "completion": "<|pad|>x<|end|>"}
    dataset = build("instructions", [row])
    assert learned(dataset, tokenization) == "<|pad|>x<|end|>"


def test_loss_on_all_counts_everything_but_the_first_token(build: Any, tokenization: Tokenization) -> None:
    dataset = build("instructions", [{"messages": [USER, ANSWER]}], loss_on="all")
    whole = tokenization.encode(tokenization.render([USER, ANSWER]))
    assert dataset.report.holds["supervised_tokens"] == len(whole) - 1


def test_prompt_tokens_are_those_of_generation(build: Any, tokenization: Tokenization) -> None:
    training = build("instructions", [{"messages": [USER, ANSWER]}])
    generation = build("prompts", [{"prompt": [USER]}])
    prompt = list(generation.cut("prompt_ids", 0))
    assert prompt == tokenization.encode_prompt([USER])
    assert list(training.arrays["input_ids"][0][: len(prompt)]) == prompt
    assert not training.arrays["loss_mask"][0][: len(prompt)].any()
    assert training.arrays["loss_mask"][0][len(prompt)]


def test_packed_rows_keep_their_borders(build: Any, tokenization: Tokenization) -> None:
    texts = ["Open a file.", "Return the sum of two numbers.", "Read its lines."]
    dataset = build("text", [{"text": text} for text in texts], 64)
    assert len(dataset) == 1
    ids, segments = dataset.arrays["input_ids"][0], dataset.arrays["segment_ids"][0]
    mask = dataset.arrays["loss_mask"][0]
    for segment in (1, 2, 3):
        where = np.flatnonzero(segments == segment)
        assert (np.diff(where) == 1).all()
        text = tokenization.decode(ids[where], skip_special=False)
        assert text.removesuffix("<|end|>") in texts
        assert text.endswith("<|end|>")
        assert not mask[where[0]]
        assert mask[where[1:]].all()
    padding = segments == 0
    assert (ids[padding] == tokenization.pad_id).all()
    assert not mask[padding].any()
    assert dataset.row_ids == ["rows.jsonl:1", "rows.jsonl:2", "rows.jsonl:3"]


def test_long_texts_are_split_without_loss(build: Any, tokenization: Tokenization) -> None:
    text = "Return the sum of two numbers. " * 20
    dataset = build("text", [{"text": text}], 32)
    whole = [*tokenization.encode(text), tokenization.eos_id]
    assert dataset.report.fate.split == 1
    assert dataset.report.holds["tokens"] in (len(whole), len(whole) - 1)
    pieces = sorted(
        tokenization.decode(ids[segments == number])
        for ids, segments in zip(dataset.arrays["input_ids"], dataset.arrays["segment_ids"], strict=True)
        for number in range(1, int(segments.max()) + 1)
    )
    assert pieces == sorted(tokenization.decode(whole[i : i + 32]) for i in range(0, len(whole), 32))


def test_without_packing_each_row_has_a_sequence(build: Any) -> None:
    dataset = build("text", [{"text": "Open a file."}, {"text": "Read its lines."}], packing=False)
    assert len(dataset) == 2
    assert dataset.arrays["segment_ids"].max() == 1


def test_long_conversations_are_truncated_and_counted(build: Any) -> None:
    rows = [
        {"messages": [USER, ANSWER]},
        {"messages": [USER, {"role": "assistant", "content": "Open a file. " * 40}]},
        {"messages": [{"role": "user", "content": "Return the sum? " * 40}, ANSWER]},
    ]
    report = build("instructions", rows, 64).report
    assert (report.rows_in, report.fate.kept, report.fate.truncated, report.fate.dropped) == (
        3,
        2,
        2,
        {"no_response": 1},
    )
    assert report.fate.examples == {"truncated": ["rows.jsonl:2", "rows.jsonl:3"], "no_response": ["rows.jsonl:3"]}


def test_nothing_to_learn_is_an_error_that_names_rows(build: Any) -> None:
    with pytest.raises(RequestError, match=r"2 rows at sequence_length 8: no_response: rows.jsonl:1, rows.jsonl:2"):
        build("instructions", [{"messages": [USER, ANSWER]}] * 2, 8)
    with pytest.raises(RequestError, match=r"no_response: rows.jsonl:1"):
        build("instructions", [{"messages": [USER]}])
    with pytest.raises(RequestError, match="no rows"):
        build("text", [])
    with pytest.raises(RequestError, match=r"too_long: rows.jsonl:1"):
        build("prompts", [{"prompt": "Return the sum of two numbers. " * 9}], 8)


def test_pairs(build: Any, tokenization: Tokenization) -> None:
    rows = [
        {"prompt": [USER], "chosen": [ANSWER], "rejected": [{"role": "assistant", "content": "Read"}]},
        {"chosen": "Open a file. Return", "rejected": "Open a file. Read"},
        {"prompt": "Q", "chosen": "same", "rejected": "same"},
        {"prompt": "Q", "chosen": "Return the sum of two numbers. " * 20, "rejected": "a"},
    ]
    dataset = build("preferences", rows)
    assert dataset.report.fate.dropped == {"equal_pair": 1, "too_long": 1}
    found = []
    for row in range(len(dataset)):
        for side in ("chosen", "rejected"):
            offsets = dataset.arrays[f"{side}_offsets"]
            span = slice(int(offsets[row]), int(offsets[row + 1]))
            ids, response = dataset.arrays[f"{side}_ids"][span], dataset.arrays[f"{side}_response"][span]
            found.append(tokenization.decode(ids[response], skip_special=False))
    assert found == ["Open a file.<|end|>", "Read<|end|>", "turn<|end|>", "ad<|end|>"]
    assert dataset.row_ids[1] == "rows.jsonl:2"


def test_prompts_keep_text_and_reference(build: Any, tokenization: Tokenization) -> None:
    dataset = build("prompts", [{"messages": [USER, ANSWER]}, {"prompt": "Open a"}])
    assert [record["reference"] for record in dataset.records] == ["Open a file.", None]
    assert dataset.records[0]["text"] == tokenization.render([USER], add_generation_prompt=True)
    assert dataset.records[0]["prompt"] == [USER]
    assert tokenization.decode(dataset.cut("prompt_ids", 1)) == "Open a"


def test_whatever_decides_the_tokens_is_in_the_digest(build: Any, tokenization: Tokenization) -> None:
    from trainers.data.tokenizer import train_tokenizer

    rows = [{"messages": [USER, ANSWER]}, {"messages": [ANSWER, USER, ANSWER]}]
    other = train_tokenizer(TrainTokenizer(train="bpe", vocab_size=320, eos_token="<stop>"), ["Return"] * 9)
    digests = [
        build("instructions", rows).digest,
        build("instructions", rows, 65).digest,
        build("instructions", rows, packing=False).digest,
        build("instructions", rows, loss_on="all").digest,
        build("instructions", rows, tokenization=other).digest,
        build("prompts", rows[:1]).digest,
        build("instructions", rows[:1]).digest,
    ]
    assert len(set(digests)) == len(digests)


def test_tokenizer_is_trained_once(tmp_path: Path, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "t.txt").write_text("Return the sum of two numbers.\n\n" * 3)
    source = ADAPTER.validate_python({"source": "text", "files": ["t.txt"], "documents": "paragraph"})
    spec = TrainTokenizer(train="bpe", vocab_size=300)
    first = build_tokenization(spec, source, tmp_path, 0, store)
    monkeypatch.setattr(module, "train_tokenizer", lambda *_: pytest.fail("trained again"))
    assert build_tokenization(spec, source, tmp_path, 0, store).files() == first.files()
