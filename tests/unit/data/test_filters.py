"""Filters: which rows they leave out, by hand and against a slow reference; what the build report and the set keep."""

import itertools
import json
import random
from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter, ValidationError

from launch.inputs.data_files import location_keys, places
from recipes.data.text import Source
from trainers.data.check_source import check_text
from trainers.data.encoding import TextSettings
from trainers.data.filters.judge import KEPT_EXAMPLES, Filtering
from trainers.data.filters.texts import runs, words_of
from trainers.data.layouts.registry import text_layout
from trainers.data.materialise import DataRequest, materialise, stored_as
from trainers.data.rows import read_rows
from trainers.data.source_digest import source_digest
from trainers.data.source_files import source_files
from trainers.data.sources.reader import SourceError
from trainers.data.tokenizer import Tokenization
from trainers.store.store import Store

ADAPTER: TypeAdapter[Any] = TypeAdapter(Source)
ROWS = [
    {"prompt": "What is two and two?", "completion": "It is four, of course."},
    {"prompt": "What is two and two?", "completion": "It is four, of course."},
    {"prompt": "Quelle est la capitale de la France ?", "completion": "La capitale de la France est Paris, bien sûr."},
    {"prompt": "Say it.", "completion": "As an AI model I cannot."},
    {"prompt": "Why?", "completion": "Because."},
    {"prompt": "Natalia sold clips to 48 of her friends in April, and then she sold half as many.", "completion": "72"},
]


def source(*filters: dict[str, Any], **keys: Any) -> Any:
    return ADAPTER.validate_python({"source": "jsonl", "files": ["rows.jsonl"], "filter": list(filters), **keys})


def left(folder: Path, *filters: dict[str, Any], rows: list[dict[str, Any]] | None = None) -> list[int]:
    """Return the numbers of the rows that are kept."""
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows or ROWS))
    kept = read_rows(source(*filters), folder, "instructions", 0)
    return [int(row.id.rpartition(":")[2]) - 1 for row in kept]


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        ({"by": "length", "least": 20}, [0, 1, 2, 3, 5]),
        ({"by": "length", "unit": "words", "least": 4, "most": 10}, [0, 1, 3]),
        ({"by": "length", "most": 8, "of": "answer"}, [4, 5]),
        ({"by": "pattern", "drop": "as an ai", "ignore_case": True}, [0, 1, 2, 4, 5]),
        ({"by": "pattern", "keep": r"\?$", "of": "prompt"}, [0, 1, 2, 4]),
        ({"by": "duplicate"}, [0, 2, 3, 4, 5]),
        ({"by": "duplicate", "of": "prompt"}, [0, 2, 3, 4, 5]),
    ],
)
def test_rows_by_length_pattern_and_text(tmp_path: Path, settings: dict[str, Any], kept: list[int]) -> None:
    assert left(tmp_path, settings) == kept


def test_rows_in_other_languages(tmp_path: Path) -> None:
    pytest.importorskip("py3langid", reason="py3langid is not installed")
    french = left(tmp_path, {"by": "language", "keep": ["fr"]})
    assert 2 in french
    assert 5 not in french
    assert left(tmp_path, {"by": "language", "keep": ["fr"], "probability": 0.9}) == [2]
    with pytest.raises(SourceError, match="xx"):
        left(tmp_path, {"by": "language", "keep": ["xx"]})


def test_near_duplicates_are_those_of_comparing_every_pair(tmp_path: Path) -> None:
    pytest.importorskip("rensa", reason="rensa is not installed")
    draw = random.Random(0)
    vocabulary = [f"w{number}" for number in range(60)]
    texts: list[list[str]] = []
    for _ in range(25):
        text = draw.choices(vocabulary, k=40)
        texts.append(text)
        for changed in (1, 2, 4, 8):  # near copies on both sides of the threshold
            near = list(text)
            for place in draw.sample(range(40), changed):
                near[place] = draw.choice(vocabulary)
            texts.append(near)
    rows = [{"prompt": "Go on:", "completion": " ".join(text)} for text in texts]
    settings = {"by": "near_duplicate", "threshold": 0.6, "ngram": 3, "of": "answer"}

    sets = [set(runs(words_of(row["completion"]), 3)) for row in rows]
    expected: list[int] = []
    for number, own in enumerate(sets):
        if not any(len(own & sets[other]) >= 0.6 * len(own | sets[other]) for other in expected):
            expected.append(number)
    assert left(tmp_path, settings, rows=rows) == expected
    assert 25 < len(expected) < len(rows)


def test_rows_that_hold_text_of_evaluation_sets(tmp_path: Path) -> None:
    evaluation = {"question": ROWS[5]["prompt"], "meta": {"answers": ["it is four of COURSE", "Because"]}}
    (tmp_path / "test.jsonl").write_text(json.dumps(evaluation) + "\n")
    settings = {"by": "contamination", "against": ["test.jsonl"], "ngram": 8}
    assert left(tmp_path, settings) == [2, 3, 4]  # one word is no evidence, five words are
    assert left(tmp_path, {**settings, "of": "prompt"}) == [0, 1, 2, 3, 4]
    before = source_digest(source(settings), tmp_path)
    (tmp_path / "test.jsonl").write_text('{"question": "something else"}\n')
    assert source_digest(source(settings), tmp_path) != before


def test_files_of_evaluation_sets_move_with_the_source(tmp_path: Path) -> None:
    for name in ("rows.jsonl", "test.jsonl"):
        (tmp_path / name).write_text('{"text": "a"}\n')
    read = source({"by": "contamination", "against": ["test.jsonl"]})
    assert places(read) == ["rows.jsonl", "test.jsonl"]
    assert "filter.0.against" in location_keys(read)
    found = source_files(read, tmp_path, names_images=False)
    assert found is not None
    assert set(found.files.values()) == {tmp_path / "rows.jsonl", tmp_path / "test.jsonl"}
    assert set(found.keys) == {"files", "filter.0.against"}


def test_the_first_filter_counts_a_row_and_some_are_kept_to_look_at(
    tmp_path: Path, store: Store, tokenization: Tokenization
) -> None:
    rows = [
        {"prompt": f"Number {number}?", "completion": "A long answer." if number % 2 else "No"} for number in range(300)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    read = source({"by": "length", "least": 5, "of": "answer"}, {"by": "duplicate", "of": "answer"}, hold_out=0.3)
    layout = text_layout("instructions", TextSettings(tokenization, 64))
    request = DataRequest(read, tmp_path, layout, 0)
    dataset = materialise(request, store)
    assert dataset.report.filtered == {"duplicate": 149, "length": 150}
    assert dataset.report.dropped == 0
    manifest = store.find_dataset(stored_as(request.digest()))
    assert manifest is not None
    lines = store.objects.get_bytes(manifest.files["filtered.jsonl"].sha256).decode().splitlines()
    kept = [json.loads(line) for line in lines]
    assert [line["reason"] for line in kept] == ["duplicate"] * KEPT_EXAMPLES + ["length"] * KEPT_EXAMPLES
    assert kept[-1]["row"] == "rows.jsonl:199"
    assert kept[-1]["completion"] == "No"


def test_tokens_are_counted_once_there_is_a_tokenizer(tmp_path: Path, tokenization: Tokenization) -> None:
    settings = {"by": "length", "unit": "tokens", "most": 10, "of": "prompt"}
    assert len(left(tmp_path, settings)) == len(ROWS)
    filtering = Filtering(lambda text: len(tokenization.encode(text)))
    kept = list(read_rows(source(settings), tmp_path, "instructions", 0, filtering=filtering))
    assert len(kept) == sum(len(tokenization.encode(row["prompt"])) <= 10 for row in ROWS)
    assert 0 < len(kept) < len(ROWS)


def test_a_mixture_filters_across_its_sources(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS[1:4]))
    (tmp_path / "b.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    sources = [{"source": "jsonl", "files": [name]} for name in ("a.jsonl", "b.jsonl")]
    read = ADAPTER.validate_python({"mix": sources, "filter": [{"by": "duplicate"}]})
    filtering = Filtering()
    kept = [row.id for row in read_rows(read, tmp_path, "instructions", 0, filtering=filtering)]
    assert kept == ["a/a.jsonl:1", "a/a.jsonl:2", "a/a.jsonl:3", "b/b.jsonl:5", "b/b.jsonl:6"]
    assert [row["row"] for row in filtering.left_out.examples["duplicate"]] == [f"b/b.jsonl:{n}" for n in range(1, 5)]


def test_what_is_left_out_is_neither_trained_on_nor_held_out(tmp_path: Path) -> None:
    rows = [{"prompt": f"Number {number % 40}?", "completion": "Yes."} for number in range(80)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    read = source({"by": "duplicate"}, hold_out=0.4)
    parts = [
        [row.columns["prompt"] for row in read_rows(read, tmp_path, "instructions", 0, held_out=held_out)]
        for held_out in (True, False)
    ]
    assert sorted(itertools.chain(*parts)) == sorted(f"Number {number}?" for number in range(40))
    limited = read.limited(10)
    assert len(list(read_rows(limited, tmp_path, "instructions", 0))) == 10


@pytest.mark.parametrize(
    "settings",
    [
        {"by": "length"},
        {"by": "length", "least": 5, "most": 4},
        {"by": "pattern"},
        {"by": "pattern", "drop": "("},
        {"by": "pattern", "drop": "a", "keep": "b"},
        {"by": "near_duplicate", "threshold": 0},
        {"by": "language", "keep": ["English"]},
        {"by": "contamination", "against": []},
    ],
)
def test_filters_that_make_no_sense_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        source(settings)


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"by": "language", "keep": ["xx"]}, "filter.0"),
        ({"by": "contamination", "against": ["none.jsonl"]}, "filter.0.against"),
    ],
)
def test_check_refuses_filters_that_cannot_work(tmp_path: Path, settings: dict[str, Any], field: str) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps(ROWS[0]) + "\n")
    (error,) = check_text(source(settings), tmp_path, ["instructions"])
    assert error.field == field
    with pytest.raises(SourceError) as refused:
        list(read_rows(source(settings), tmp_path, "instructions", 0))
    assert str(refused.value) == str(error)


def test_a_missing_package_is_named_with_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainers.data.filters.judge.find_spec", lambda name: None)
    (tmp_path / "rows.jsonl").write_text(json.dumps(ROWS[0]) + "\n")
    (error,) = check_text(source({"by": "near_duplicate"}), tmp_path, ["instructions"])
    assert "rensa" in error.message
    assert "trainwright[filters]" in error.suggestion
