"""Mixtures: whose turn it is, how much is drawn of each source, and which rows a set of several sources holds."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import TypeAdapter, ValidationError

from recipes.data.text import Mix, Source
from recipes.errors import RequestError
from trainers.data.batches import BatchPlan
from trainers.data.dataset import Dataset
from trainers.data.encoding import TextSettings
from trainers.data.layouts.registry import text_layout
from trainers.data.layouts.stream import Stream
from trainers.data.materialise import DataRequest, materialise
from trainers.data.mixed_order import PERIOD, Weighted, turns_of
from trainers.data.mixture import row_tokens
from trainers.data.row_forms import RowRole
from trainers.data.rows import read_rows
from trainers.data.tokenizer import Tokenization
from trainers.store.store import Store

ADAPTER: TypeAdapter[Any] = TypeAdapter(Source)
SHORT = [{"prompt": f"What is {number}?", "completion": f"It is {number}."} for number in range(40)]
LONG = [{"prompt": f"Tell me of {number}.", "completion": f"The number {number} " * 9} for number in range(25)]
PREFERENCES = [{**row, "chosen": row["completion"], "rejected": "No."} for row in SHORT]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, rows in (("short", SHORT), ("long", LONG), ("pairs", PREFERENCES)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def mixture(*weights: float | None, files: tuple[str, ...] = ("short", "long"), **keys: Any) -> Mix:
    sources = [{"source": "jsonl", "files": [f"{name}.jsonl"]} for name in files]
    weighed = [
        source if weight is None else {**source, "weight": weight}
        for source, weight in zip(sources, weights, strict=True)
    ]
    found: Mix = ADAPTER.validate_python({"mix": weighed, **keys})
    return found


@pytest.fixture
def build(folder: Path, store: Store, tokenization: Tokenization) -> Any:
    def build(source: Source, role: RowRole = "instructions", held_out: bool = False, **keys: Any) -> Dataset:
        layout = text_layout(role, TextSettings(tokenization, 256, **keys))
        return materialise(DataRequest(source, folder, layout, 0, held_out=held_out), store)

    return build


@pytest.mark.parametrize("shares", [(0.7, 0.3), (0.5, 0.25, 0.25), (0.9999, 0.0001), (1.0,), (0.1,) * 10])
def test_turns_are_as_many_as_the_shares_say_and_evenly_apart(shares: tuple[float, ...]) -> None:
    turns = turns_of(shares)
    assert sum(turns.counts) == PERIOD == len(turns.source)
    for source, (share, count) in enumerate(zip(shares, turns.counts, strict=True)):
        assert abs(count - share * PERIOD) < 1
        places = np.flatnonzero(turns.source == source)
        assert len(places) == count
        assert np.array_equal(turns.before[places], np.arange(count))
        # of the first n turns a source has its share, to within one turn for each other source
        assert np.abs(np.arange(1, count + 1) - (places + 1) * count / PERIOD).max() <= len(shares)


def test_a_weighted_order_is_what_counting_turn_by_turn_gives() -> None:
    order = Weighted("digest", 3, (range(7), range(7, 30)), (0.25, 0.75), "all")
    rows = [order.row(position) for position in range(400)]
    assert Counter(row < 7 for row in rows[:100]) == {True: 25, False: 75}
    small = [row for row in rows if row < 7]
    assert [sorted(small[start : start + 7]) for start in range(0, 98, 7)] == [list(range(7))] * 14
    assert small[:7] != small[7:14]  # another order in the next epoch
    for positions in (0, 1, 57, 399):
        assert order.times(positions, 30).tolist() == [rows[:positions].count(row) for row in range(30)]
    ends = [max(rows.index(row) for row in group) + 1 for group in (range(7), range(7, 30))]
    assert order.whole == order.epoch == max(ends)
    assert Weighted("digest", 3, order.groups, order.shares, "first").epoch == min(ends)


def test_without_weights_each_row_comes_once_an_epoch(build: Any) -> None:
    dataset = build(mixture(None, None), packing=False)
    plan = BatchPlan(dataset, 0, 5, 1, 0, 5)
    assert plan.order.epoch == len(dataset) == 65
    rows = [row for step in range(13) for row in plan.sample_ids(step)]
    assert sorted(rows) == list(range(65))
    assert {name: (draw.rows, draw.epochs) for name, draw in plan.drawn(13).items()} == {
        "short": (40, 1.0), "long": (25, 1.0),
    }  # fmt: skip


@pytest.mark.parametrize("weigh", ["rows", "tokens"])
def test_what_is_drawn_has_the_shares_and_is_counted_exactly(build: Any, weigh: str) -> None:
    dataset = build(mixture(3, 1, weigh=weigh))
    plan = BatchPlan(dataset, 7, 8, 1, 0, 8)
    rows = [row for step in range(500) for row in plan.sample_ids(step)]
    tokens = row_tokens(dataset.arrays)
    for name, own in dataset.by_source().items():
        drawn = [row for row in rows if row in own]
        found = plan.drawn(500)[name]
        assert found.rows == len(drawn)
        assert found.tokens == sum(int(tokens[row]) for row in drawn)
        assert found.epochs == len(drawn) / len(own)
    held = {name: draw.rows if weigh == "rows" else draw.tokens for name, draw in plan.drawn(500).items()}
    assert held["short"] / sum(held.values()) == pytest.approx(0.75, abs=0.005)


def test_a_sequence_holds_rows_of_one_source(build: Any) -> None:
    dataset = build(mixture(1, 1))
    ids, offsets = dataset.row_ids, dataset.arrays["row_offsets"]
    for name, own in dataset.by_source().items():
        for sequence in own:
            rows = dataset.arrays["rows"][offsets[sequence] : offsets[sequence + 1]]
            assert {ids[row].partition("/")[0] for row in rows} == {name}
    report = dataset.report.sources
    assert {name: (found["rows_in"], found["kept"]) for name, found in report.items()} == {
        "short": (40, 40), "long": (25, 25),
    }  # fmt: skip
    assert sum(int(found["sequences"]) for found in report.values()) == len(dataset)
    assert sum(int(found["tokens"]) for found in report.values()) == dataset.report.holds["tokens"]


@pytest.mark.parametrize("role", ["text", "seq2seq", "preferences", "prompts"])
def test_every_role_of_text_has_mixtures(build: Any, role: RowRole) -> None:
    dataset = build(mixture(1, 2, files=("pairs", "pairs")), role)
    assert list(dataset.by_source()) == ["pairs", "pairs-2"]
    assert dataset.report.rows_in == 80
    again = build(mixture(1, 2, files=("pairs", "pairs")), role)
    assert again.mixture == dataset.mixture


def test_ranks_share_the_rows_of_a_step(build: Any) -> None:
    dataset = build(mixture(1, 3), packing=False)
    whole = BatchPlan(dataset, 0, 8, 1, 0, 8)
    for step in (0, 5):
        parts = [BatchPlan(dataset, 0, 8, 2, rank, 2).micro_batches(step) for rank in range(2)]
        rows = [row for batches in parts for batch in batches for row in batch.sample_ids_B.tolist()]
        assert sorted(rows) == sorted(whole.sample_ids(step))


def test_held_out_rows_are_those_of_the_sources_that_hold_some_out(build: Any, folder: Path) -> None:
    sources = [
        {"source": "jsonl", "files": ["short.jsonl"], "hold_out": 0.3, "weight": 1},
        {"source": "jsonl", "files": ["long.jsonl"], "weight": 9},
    ]
    source: Mix = ADAPTER.validate_python({"mix": sources})
    held_out = source.next_split()
    assert held_out is not None
    trained = {row.id for row in read_rows(source, folder, "instructions", 0)}
    measured = {row.id for row in read_rows(held_out, folder, "instructions", 0, held_out=True)}
    assert not trained & measured
    assert len(trained | measured) == 65
    assert {name.partition("/")[0] for name in measured} == {"short"}
    assert list(build(held_out, held_out=True).by_source()) == ["short"]


def test_a_stream_reads_every_source_once(folder: Path, store: Store, tokenization: Tokenization) -> None:
    layout = Stream(TextSettings(tokenization, 64))
    dataset = materialise(DataRequest(mixture(None, None), folder, layout, 0), store)
    assert {name: found["kept"] for name, found in dataset.report.sources.items()} == {"short": 40, "long": 25}
    assert dataset.by_source() == {}


@pytest.mark.parametrize("until", ["first", "all"])
def test_weights_decide_the_tokens_of_a_stream(
    folder: Path, store: Store, tokenization: Tokenization, until: str
) -> None:
    mix = mixture(3, 1, until=until)
    settings = TextSettings(tokenization, 64)
    once = materialise(DataRequest(mixture(None, None), folder, Stream(settings), 0), store)
    dataset = materialise(DataRequest(mix, folder, Stream(settings, mix), 0), store)
    found = dataset.report.sources
    assert {name: counts["kept"] for name, counts in found.items()} == {"short": 40, "long": 25}
    assert sum(counts["tokens"] for counts in found.values()) == len(dataset.arrays["tokens"])
    text = max(np.diff([*np.flatnonzero(dataset.arrays["is_first"]), len(dataset.arrays["tokens"])]))
    assert abs(found["short"]["tokens"] - 0.75 * len(dataset.arrays["tokens"])) <= text
    reached = [counts["epochs"] for counts in found.values()]
    assert (min if until == "all" else max)(reached) == 1
    assert (max if until == "all" else min)(reached) != 1
    assert once.digest != dataset.digest


def test_a_stream_without_a_text_of_a_weighted_source_is_refused(
    folder: Path, store: Store, tokenization: Tokenization
) -> None:
    mix = mixture(1, 1, filter=[{"by": "pattern", "drop": "The number"}])
    with pytest.raises(RequestError, match="long"):
        materialise(DataRequest(mix, folder, Stream(TextSettings(tokenization, 64), mix), 0), store)


def test_a_weight_without_a_row_is_refused(build: Any, folder: Path) -> None:
    (folder / "long.jsonl").write_text('{"prompt": "a", "completion": ""}\n')
    dataset = build(mixture(1, 1), "seq2seq")
    with pytest.raises(RequestError, match="long"):
        dataset.order(0)


@pytest.mark.parametrize(
    "keys",
    [
        {"weigh": "tokens"},
        {"until": "first"},
        {"mix": []},
        {"mix": [{"source": "jsonl", "files": ["a"], "weight": 1}, {"source": "jsonl", "files": ["b"]}]},
        {"mix": [{"source": "jsonl", "files": ["a"], "weight": 1}, {"source": "csv", "files": ["b"], "weight": 1e6}]},
        {"mix": [{"source": "jsonl", "files": ["a"], "alias": "x"}, {"source": "csv", "files": ["b"], "alias": "x"}]},
    ],
)
def test_mixtures_that_make_no_sense_are_refused(keys: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        ADAPTER.validate_python({"mix": [{"source": "jsonl", "files": ["a"]}], **keys})
