"""Sources: which rows are read, and errors that name file and row."""

import gzip
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter

from recipes.data.text import PythonDocs, Source
from recipes.errors import RequestError
from recipes.problem_codes import Code
from trainers.data.row_forms import RowRole
from trainers.data.rows import Row, read_rows
from trainers.data.sources.open import open_source
from trainers.data.sources.reader import SourceError

ADAPTER: TypeAdapter[Any] = TypeAdapter(Source)


def source(**keys: Any) -> Any:
    return ADAPTER.validate_python(keys)


def write_lines(path: Path, rows: list[Any]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def ids(rows: Any) -> list[str]:
    return [row.id for row in rows]


@pytest.fixture
def base(tmp_path: Path) -> Path:
    write_lines(tmp_path / "a.jsonl", [{"prompt": f"Q{i // 2}", "completion": f"A{i}"} for i in range(200)])
    (tmp_path / "t.txt").write_text("One\nline.\n\n\nTwo.\n\n")
    (tmp_path / "c.csv").write_text('\ufefftext,n\n"a, ""b""\nc",1\nd,2\n')
    (tmp_path / "c.tsv").write_text("text\tn\na\t1\n")
    (tmp_path / "z.jsonl.gz").write_bytes(gzip.compress(b'{"text": "packed"}\n\n{"text": "twice"}\n'))
    return tmp_path


def texts(given: Any, base: Path) -> list[tuple[str, str]]:
    return [(row.id, row.columns["text"]) for row in read_rows(given, base, "text", 0)]


def test_forms_of_files(base: Path) -> None:
    assert texts(source(source="text", files=["t.txt"]), base) == [("t.txt", "One\nline.\n\n\nTwo.\n\n")]
    assert texts(source(source="text", files=["t.txt"], documents="paragraph"), base) == [
        ("t.txt:1", "One\nline."),
        ("t.txt:2", "Two."),
    ]
    assert texts(source(source="csv", files=["c.csv"]), base) == [("c.csv:1", 'a, "b"\nc'), ("c.csv:2", "d")]
    assert texts(source(source="csv", files=["c.tsv"]), base) == [("c.tsv:1", "a")]
    assert texts(source(source="jsonl", files=["z.jsonl.gz"]), base) == [
        ("z.jsonl.gz:1", "packed"),
        ("z.jsonl.gz:3", "twice"),
    ]


def test_tables_without_a_header_line_or_with_quotes_as_characters(base: Path) -> None:
    (base / "plain.txt").write_text('go;"ve"\n', encoding="utf-8")
    (base / "pairs.tsv").write_text('"Go," he said.\tsí\n', encoding="utf-8")
    columns = {"prompt": "en", "completion": "es"}

    def read(file: str, role: Any = "seq2seq", **more: Any) -> list[dict[str, Any]]:
        given = source(source="csv", files=[file], header=["en", "es"], columns=columns, **more)
        return [row.columns for row in read_rows(given, base, role, 0)]

    assert read("plain.txt", delimiter=";") == [{"prompt": "go", "completion": "ve"}]
    assert read("plain.txt", delimiter=";", quotes=False) == [{"prompt": "go", "completion": '"ve"'}]
    assert read("pairs.tsv", quotes=False) == [{"prompt": '"Go," he said.', "completion": "sí"}]
    with pytest.raises(RequestError, match=r"row 1 \(line 1\) has 1 cells, the header 2"):
        read("plain.txt")


def test_a_text_of_a_prompt_and_its_completion_is_held_out_as_the_prompt_is(base: Path) -> None:
    rows = "".join(f"source {number}\ttarget {number}\n" for number in range(200))
    (base / "pairs.tsv").write_text(rows)
    columns = {"prompt": "en", "completion": "es"}
    given = source(source="csv", files=["pairs.tsv"], header=["en", "es"], columns=columns, hold_out=0.3)
    roles: tuple[Any, ...] = ("text", "seq2seq")
    text, pairs = ([row.id for row in read_rows(given, base, role, 0, held_out=True)] for role in roles)
    assert text == pairs
    assert 30 < len(text) < 90


def test_parquet(base: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    messages = [[{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]] * 3
    pyarrow.parquet.write_table(pyarrow.table({"messages": messages}), base / "p.parquet")
    rows = list(read_rows(source(source="parquet", files=["p.parquet"]), base, "instructions", 0))
    assert [row.id for row in rows] == ["p.parquet:1", "p.parquet:2", "p.parquet:3"]
    assert rows[0].columns == {"messages": messages[0]}


def test_datasets_folder(base: Path) -> None:
    datasets = pytest.importorskip("datasets")
    datasets.DatasetDict({"train": datasets.Dataset.from_dict({"text": ["a", "b"]})}).save_to_disk(str(base / "d"))
    given = source(source="datasets", path="d")
    assert [row.columns["text"] for row in read_rows(given, base, "text", 0)] == ["a", "b"]
    assert len(open_source(given, base).digest()) == 64
    with pytest.raises(RequestError, match=r"split: test; .* train"):
        list(read_rows(source(source="datasets", path="d", split="test"), base, "text", 0))
    with pytest.raises(RequestError, match="needs its `revision`"):
        open_source(source(source="datasets", path="org/name"), base).digest()


@pytest.mark.parametrize(
    ("name", "content", "kind", "complaint"),
    [
        ("b.jsonl", b'{"text": "a"}\n{"text": \n', "jsonl", r"b\.jsonl:2: not JSON"),
        ("b.jsonl", b'{"text": "\\ud83d"}\n', "jsonl", r"b\.jsonl:1: not JSON .*surrogates not allowed"),
        ("b.jsonl", b"[1]\n", "jsonl", r"b\.jsonl:1: not a JSON object but list"),
        ("b.jsonl", b'{"text": "a"}\n{"body": "b"}\n', "jsonl", r"b\.jsonl:2: needs text .* body"),
        ("b.jsonl", b'{"text": "\xff"}\n', "jsonl", r"b\.jsonl:1 \(byte 0xff\) is not UTF-8 text"),
        ("b.jsonl.gz", b"no gzip", "jsonl", r"b\.jsonl\.gz cannot be read"),
        ("b.csv", b"text,n\na\n", "csv", r"b\.csv: row 1 \(line 2\) has 1 cells, the header 2"),
        ("b.csv", b'text\n"a\n', "csv", r"b\.csv: row 1"),
        ("b.csv", b"text,text\na,b\n", "csv", "the header names 'text' twice"),
        ("b.csv", b"", "csv", "no header line"),
        ("b.parquet", b"PAR1nothing", "parquet", r"b\.parquet .*Parquet"),
    ],
)
def test_bad_files_are_named_with_the_row(tmp_path: Path, name: str, content: bytes, kind: str, complaint: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(RequestError, match=complaint):
        list(read_rows(source(source=kind, files=[name]), tmp_path, "text", 0))


def test_an_error_of_a_source_crosses_processes(tmp_path: Path) -> None:
    (tmp_path / "b.csv").write_bytes(b"text,n\na\n")
    with pytest.raises(SourceError) as refusal:
        list(read_rows(source(source="csv", files=["b.csv"]), tmp_path, "text", 0))
    there = pickle.loads(pickle.dumps(refusal.value))
    assert (there.code, there.field, str(there)) == (Code.CELL_COUNT_MISMATCH, "files.0", str(refusal.value))


def test_missing_files_are_named(base: Path) -> None:
    for pattern, said in (("nothing.txt", "no such file"), ("*.nothing", "no file matches"), (".", "is a folder")):
        with pytest.raises(SourceError, match=said):
            open_source(source(source="text", files=[pattern]), base).digest()


def test_patterns_give_each_file_once_in_sorted_order(base: Path) -> None:
    for name in ("b", "a", "c"):
        (base / f"{name}.part").write_text(name)
    given = source(source="text", files=["c.part", "*.part", str(base / "a.part")])
    assert [text for _, text in texts(given, base)] == ["a", "b", "c"]


def test_a_folder_named_like_a_pattern_is_no_pattern(tmp_path: Path) -> None:
    base = tmp_path / "run[1]"
    (base / "data").mkdir(parents=True)
    (base / "data" / "a.txt").write_text("here")
    assert texts(source(source="text", files=["data/*.txt"]), base) == [("a.txt", "here")]
    assert texts(source(source="text", files=["../run*/data/*.txt"]), base) == [("a.txt", "here")]


def test_digest_follows_bytes_not_names(base: Path) -> None:
    given = source(source="text", files=["t.txt"])
    before = open_source(given, base).digest()
    (base / "t.txt").rename(base / "u.txt")
    assert open_source(source(source="text", files=["u.txt"]), base).digest() == before
    (base / "u.txt").write_text("Other.")
    assert open_source(source(source="text", files=["u.txt"]), base).digest() != before


def prompts(rows: Any) -> set[str]:
    return {row.columns["prompt"] for row in rows}


def read(base: Path, *, seed: int = 0, held_out: bool = False, **keys: Any) -> list[Row]:
    given = source(source="jsonl", files=["a.jsonl"], **keys)
    return list(read_rows(given, base, "instructions", seed, held_out=held_out))


def test_parts_are_disjoint_by_prompt_and_together_everything(base: Path) -> None:
    parts = [read(base, part=f"{index}/3") for index in (1, 2, 3)]
    assert sum(map(len, parts)) == 200
    assert len(set.union(*map(prompts, parts))) == sum(len(prompts(part)) for part in parts) == 100
    assert all(len(part) > 30 for part in parts)


def test_hold_out_keeps_prompts_together(base: Path) -> None:
    training, held_out = read(base, hold_out=0.2), read(base, hold_out=0.2, held_out=True)
    assert len(training) + len(held_out) == 200
    assert not prompts(training) & prompts(held_out)
    assert 20 <= len(held_out) <= 60
    assert read(base, held_out=True) == []


def test_hold_out_does_not_change_when_rows_are_added(base: Path) -> None:
    before = prompts(read(base, hold_out=0.2, held_out=True))
    with open(base / "a.jsonl", "a") as file:
        file.write('{"prompt": "New", "completion": "A"}\n')
    assert prompts(read(base, hold_out=0.2, held_out=True)) - {"New"} == before


def test_the_same_texts_are_held_out_with_and_without_their_labels(tmp_path: Path) -> None:
    lines = [f"sentence {number},{number % 3}" for number in range(100)]
    (tmp_path / "rows.csv").write_text("\n".join(["text,label", *lines]))
    given = source(source="csv", files=["rows.csv"], hold_out=0.3)
    roles: tuple[RowRole, ...] = ("text", "labels")
    kept = [{row.columns["text"] for row in read_rows(given, tmp_path, role, seed=0, held_out=True)} for role in roles]
    assert kept[0] == kept[1]
    assert 15 < len(kept[0]) < 45


def test_part_and_hold_out_are_independent(base: Path) -> None:
    shares = [len(read(base, part=f"{index}/2", hold_out=0.5)) for index in (1, 2)]
    assert all(25 <= share <= 75 for share in shares)


def test_limit_is_drawn_by_the_seed_in_source_order(base: Path) -> None:
    drawn = ids(read(base, limit=20))
    assert len(drawn) == 20
    assert drawn == [name for name in ids(read(base)) if name in drawn]
    assert drawn == ids(read(base, limit=20))
    assert drawn != ids(read(base, limit=20, seed=1))
    assert len(read(base, limit=1000)) == 200


def test_python_docs_rows_are_kept_in_the_store(store: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from trainers.data.demo.python_docs import Entry
    from trainers.data.sources import documentation

    calls = []

    def fake() -> list[Entry]:
        calls.append(1)
        return [
            Entry("function", "shutil", f"copy{i}", ("src",), f"Copy file number {i} to another place.")
            for i in range(9)
        ]

    monkeypatch.setattr(documentation, "read_entries", fake)
    documentation._extract.cache_clear()
    first = [row.id for row in read_rows(PythonDocs(source="python-docs"), Path(), "prompts", 0, store=store)]
    documentation._extract.cache_clear()
    again = [row.id for row in read_rows(PythonDocs(source="python-docs"), Path(), "prompts", 0, store=store)]
    documentation._extract.cache_clear()
    assert first == again
    assert len(first) == 9
    assert calls == [1]
