"""Reading documentation without importing it, and the installation's own: split by module, no near copies."""

import json
from pathlib import Path
from typing import Any

import pytest

from trainers.data.demo.prose import is_near_copy, shingles, words
from trainers.data.demo.python_docs import Entry, python_docs_digest, read_entries, source_files
from trainers.data.demo.python_docs_sets import SPLITS, DocumentSets, build_sets, group, prompt, split_of
from trainers.data.demo.python_docs_summaries import MAX_WORDS, MIN_WORDS, build_summaries

MODULE = '''
"""Tools for shapes."""
raise SystemExit("never imported")

class Shape:
    """A shape."""

    @property
    def area(self):
        """The covered area."""

    if True:
        def scale(self, factor, *rest, keep=True, **more):
            """Scale by a factor."""

            def inner(x):
                """Do the inner work."""

    @staticmethod
    def make(kind): "Make a shape of a kind."

    @area.setter
    def area(self, value):
        """Never read, the name is taken."""

async def load(path, /, mode="r"):
    r"""Load \\d shapes."""

def undocumented(): ...
'''


@pytest.fixture
def library(tmp_path: Path) -> Path:
    root = tmp_path / "lib"
    for name, text in {
        "shapes.py": MODULE,
        "pack/__init__.py": '"""A package."""',
        "pack/broken.py": "def (:",
        "pack/test/test_it.py": '"""Not documentation."""',
        "site-packages/other.py": '"""Not the library\'s."""',
        "pydoc_data/topics.py": "topics = {'b': 'Second.', 'a': 'First.'}",
        "latin.py": "# -*- coding: latin-1 -*-\n'''Caf\xe9.'''\n",
    }.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text.encode("latin-1"))
    return root


def test_entries_of_a_module(library: Path) -> None:
    found = [(entry.kind, entry.name, entry.parameters, entry.doc) for entry in read_entries(library)]
    assert found == [
        ("module", "latin", (), "Café."),
        ("module", "pack", (), "A package."),
        ("module", "shapes", (), "Tools for shapes."),
        ("class", "shapes.Shape", (), "A shape."),
        ("attribute", "shapes.Shape.area", (), "The covered area."),
        ("method", "shapes.Shape.scale", ("factor", "*rest", "keep", "**more"), "Scale by a factor."),
        ("function", "shapes.Shape.scale.inner", ("x",), "Do the inner work."),
        ("method", "shapes.Shape.make", ("kind",), "Make a shape of a kind."),
        ("function", "shapes.load", ("path", "mode"), "Load \\d shapes."),
        ("topic", "topics.a", (), "First."),
        ("topic", "topics.b", (), "Second."),
    ]


@pytest.mark.parametrize("topics", [None, "raise SystemExit", "topics: dict = {'a': 'One.'}", "topics = dict(a=open)"])
def test_other_forms_of_the_topics_file_are_no_error(library: Path, topics: str | None) -> None:
    file = library / "pydoc_data" / "topics.py"
    file.unlink()
    if topics is not None:
        file.write_text(topics)
    found = [entry.doc for entry in read_entries(library) if entry.kind == "topic"]
    assert found == (["One."] if topics and topics.startswith("topics:") else [])


def test_digest_follows_documented_files_only(library: Path) -> None:
    before = python_docs_digest.__wrapped__(library)
    (library / "site-packages" / "new.py").write_text("'''New.'''")
    (library / "notes.txt").write_text("new")
    assert python_docs_digest.__wrapped__(library) == before
    (library / "shapes.py").write_text("'''Other.'''")
    assert python_docs_digest.__wrapped__(library) != before


@pytest.fixture(scope="module")
def entries() -> list[Entry]:
    return read_entries()


@pytest.fixture(scope="module")
def sets(entries: list[Entry]) -> DocumentSets:
    return build_sets(entries)


def test_a_group_has_one_split(entries: list[Entry]) -> None:
    splits: dict[str, set[str]] = {}
    for entry in entries:
        splits.setdefault(entry.module.split(".")[0] if entry.kind != "topic" else entry.name, set()).add(
            split_of(entry)
        )
    assert all(len(found) == 1 for found in splits.values())
    assert group(Entry("module", "_pyio", "", (), "x")) == group(Entry("module", "io", "", (), "x"))


def test_every_set_of_every_split_has_rows_of_its_modules(entries: list[Entry], sets: DocumentSets) -> None:
    split_by_name = {entry.name: split_of(entry) for entry in entries}
    for name, splits in sets.rows.items():
        for split in SPLITS:
            assert splits[split], (name, split)
            for row in splits[split]:
                assert split_by_name[row["id"].partition(":")[0]] == split


def test_sizes_suffice_for_the_default_chain(sets: DocumentSets) -> None:
    """A full installation has about 5,600 training pairs and 750 held-out prompts; without Tk somewhat fewer."""
    assert len(sets.rows["instructions"]["train"]) >= 4000
    assert len(sets.rows["preferences"]["train"]) >= 12_000
    assert len({row["prompt"][0]["content"] for row in sets.rows["prompts"]["test"]}) >= 300
    assert len(sets.rows["instructions"]["validation"]) >= 150
    assert sum(len(row["text"]) for row in sets.rows["text"]["train"]) >= 1_000_000


def training_texts(sets: DocumentSets) -> list[str]:
    texts = [block for row in sets.rows["text"]["train"] for block in row["text"].split("\n\n")[1:]]
    texts += [row["messages"][1]["content"] for row in sets.rows["instructions"]["train"]]
    texts += [row["reference"] for row in sets.rows["prompts"]["train"]]
    for side in ("chosen", "rejected"):
        texts += [row[side][0]["content"] for row in sets.rows["preferences"]["train"]]
    return texts


def test_no_held_out_text_stands_in_a_training_set(sets: DocumentSets) -> None:
    """Compared word by word, in a way of its own: no held-out paragraph or summary, and no run of 20 of its words."""
    training = training_texts(sets)
    whole = {words(text) for text in training}
    runs = {found[i : i + 20] for found in whole for i in range(len(found) - 19)}
    for split in ("validation", "test"):
        for row in sets.rows["text"][split]:
            for block in row["text"].split("\n\n")[1:]:
                found = words(block)
                assert not found or found not in whole, (row["id"], block)
        for row in sets.rows["prompts"][split]:
            found = words(row["reference"])
            assert found not in whole, row["id"]
            assert all(found[i : i + 20] not in runs for i in range(len(found) - 19)), row["id"]


def test_no_held_out_summary_has_a_near_copy_in_training(sets: DocumentSets) -> None:
    """Every pair of a sample is compared, without the index that the sets are built with."""
    training = {shingles(text) for text in training_texts(sets)}
    held_out = [row["reference"] for split in ("validation", "test") for row in sets.rows["prompts"][split]]
    for text in held_out[::40]:
        runs = shingles(text)
        assert not any(is_near_copy(runs, other) for other in training), text
    assert sets.counts["train.copied_paragraphs_left_out"] > 100, "nothing was compared"


def test_no_training_prompt_is_a_held_out_one(sets: DocumentSets) -> None:
    prompts = {split: {row["prompt"][0]["content"] for row in sets.rows["prompts"][split]} for split in SPLITS}
    assert not prompts["train"] & (prompts["test"] | prompts["validation"])
    assert not prompts["validation"] & prompts["test"]


@pytest.fixture(scope="module")
def summaries(entries: list[Entry]) -> dict[str, list[dict[str, Any]]]:
    files = build_summaries(entries)
    return {split: [json.loads(line) for line in files[f"summaries.{split}.jsonl"].splitlines()] for split in SPLITS}


def test_summaries_are_split_by_module_and_lack_their_target(
    entries: list[Entry], summaries: dict[str, list[dict[str, Any]]]
) -> None:
    split_by_name = {entry.name: split_of(entry) for entry in entries}
    assert len(summaries["train"]) >= 1500
    assert len(summaries["validation"]) >= 80
    for split, rows in summaries.items():
        assert all(split_by_name[row["id"]] == split for row in rows)
        for row in rows:
            signature, _, text = row["prompt"].partition("\n\n")
            assert signature.startswith(row["id"])
            assert MIN_WORDS <= len(text.split()) <= MAX_WORDS
            assert row["completion"] not in text, row["id"]


def test_no_held_out_summary_or_text_of_one_stands_in_training(
    sets: DocumentSets, summaries: dict[str, list[dict[str, Any]]]
) -> None:
    """Neither in the training rows nor in what such a model is pretrained on; compared word by word."""
    rows = summaries["train"]
    texts = [*training_texts(sets), *(row["completion"] for row in rows)]
    texts += [block for row in rows for block in row["prompt"].split("\n\n")[1:]]
    whole = {words(text) for text in texts}
    for split in ("validation", "test"):
        for row in summaries[split]:
            for text in (row["completion"], *row["prompt"].split("\n\n")[1:]):
                assert words(text) not in whole, (row["id"], text)


def test_answers_are_short_sentences(sets: DocumentSets) -> None:
    for row in sets.rows["instructions"]["train"]:
        answer = row["messages"][1]["content"]
        assert answer == " ".join(answer.split())
        assert 3 <= len(answer.split()) <= 24, answer
        assert answer.rstrip('")').endswith((".", "!", "?")), answer


def test_length_does_not_tell_the_rejected_answer(sets: DocumentSets) -> None:
    rows = sets.rows["preferences"]["train"]
    differences = [
        len(row["rejected"][0]["content"].split()) - len(row["chosen"][0]["content"].split()) for row in rows
    ]
    longer = sum(difference > 0 for difference in differences) / len(rows)
    shorter = sum(difference < 0 for difference in differences) / len(rows)
    assert shorter < 0.5
    assert longer > 0.2
    assert all(row["chosen"] != row["rejected"] for row in rows)
    flaws = {row["id"].partition(":")[2] for row in rows}
    assert flaws == {"wrong", "garbled", "truncated", "rambling"}


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        (Entry("function", "shutil", "copy", ("src", "dst"), ""), "What does shutil.copy(src, dst) do?"),
        (Entry("method", "a", "B.c", tuple("uvwxyz"), ""), "What does a.B.c(u, v, w, x, y, ...) do?"),
        (Entry("class", "queue", "Queue", (), ""), "What is the class queue.Queue?"),
        (Entry("module", "queue", "", (), ""), "What is the module queue?"),
    ],
)
def test_prompts(entry: Entry, expected: str) -> None:
    assert prompt(entry) == expected


def test_files_are_found_in_one_order() -> None:
    from trainers.data.demo.python_docs import library_folder

    found = source_files(library_folder())
    assert found == sorted(found, key=lambda path: path.parts)
    assert not any(part in ("test", "site-packages") for path in found for part in path.parts)
