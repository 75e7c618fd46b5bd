"""Every layout: a data set is built once, opened memory-mapped, rebuilt when damaged, and split into batches that do
not depend on the number of ranks.
"""

import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import pytest
from pydantic import TypeAdapter

from recipes.data.text import Source
from recipes.errors import RequestError
from recipes.stages.benchmarks.union import AnyBenchmark
from trainers.data import materialise as module
from trainers.data.batches import BatchPlan, evaluation_batches
from trainers.data.dataset import Contents, DataLayout, Dataset, Fate
from trainers.data.encoding import Encoded, TextSettings
from trainers.data.image_processor import load_image_processor
from trainers.data.layouts.arrays import cut_up
from trainers.data.layouts.image_text import ImageText
from trainers.data.layouts.images import Images
from trainers.data.layouts.judged import mismatched
from trainers.data.layouts.registry import LAYOUTS, text_layout
from trainers.data.layouts.stream import Stream
from trainers.data.materialise import DataRequest, find_dataset, materialise, stored_as
from trainers.data.rows import Row
from trainers.data.tokenizer import Tokenization, load_tokenization
from trainers.models.small_llava import write_small_llava
from trainers.store.store import Store

sys.path.insert(0, str(Path(__file__).parent))
from image_files import array_file, image_folder, source

sys.path.pop(0)

NUM_ROWS = 9
ROWS: dict[str, Callable[[int], dict[str, Any]]] = {
    "packed": lambda n: {"text": f"Open file {n}. " * (n + 1)},
    "stream": lambda n: {"text": f"Open file {n}. " * (n + 1)},
    "labelled": lambda n: {"text": f"Open file {n}. " * (n + 1), "label": n % 2},
    "seq2seq": lambda n: {"prompt": f"Return {n}? " * (n % 3 + 1), "completion": f"the sum {n}"},
    "pairs": lambda n: {"prompt": "Return? ", "chosen": f"a file {n}", "rejected": "nothing " * (n % 4 + 1)},
    "judged": lambda n: {
        "prompt": f"Return {n // 2}? ", "completion": f"the sum {n} " * (n % 3 + 1), "label": n % 2 == 0,
    },
    "prompts": lambda n: {"prompt": f"Return {n}? " * (n % 3 + 1)},
    "cases": lambda n: {"query": f"Return {n}? " * (n % 3 + 1), "choices": ["a sum", "nothing"], "gold": n % 2},
    "image_text": lambda n: {
        "images": [f"images/{n % 3}/{n}.png"], "prompt": "Which? ", "completion": f"Number {n}." * (n % 3 + 1),
    },
}  # fmt: skip
"""A row of each layout of text by its number."""
FORM = TypeAdapter[Any](AnyBenchmark).validate_python(
    {"suite": "multiple_choice", "layout": "query", "data": {"source": "jsonl", "files": ["rows.jsonl"]}}
)
"""The benchmark of `cases`."""
BATCHED = sorted({*LAYOUTS} - {"stream", "labelled"})
"""Layouts whose batches `BatchPlan` deals out; streams have lanes, and labelled rows a plan of their own."""


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("llava")
    write_small_llava(place, ["Which? Number 1."], image_size=8, patch_size=4, width=8, layers=1)
    return place


@pytest.fixture
def request_of(tmp_path: Path, tokenization: Tokenization, llava: Path) -> Callable[[str], DataRequest]:
    """Nine rows for a layout, and the request for them without any packing."""

    def request_of(name: str) -> DataRequest:
        if name == "images":
            return DataRequest(source(**array_file(tmp_path)), tmp_path, Images(), 0)
        layout: DataLayout
        settings = TextSettings(tokenization, 128, packing=False)
        if name == "image_text":
            image_folder(tmp_path)
            layout = ImageText(replace(settings, tokenization=load_tokenization(llava)), load_image_processor(llava))
        elif name == "stream":
            layout = Stream(settings)
        else:
            layout = text_layout(
                {"packed": "text", "labelled": "labels", "pairs": "preferences"}.get(name, name), settings, form=FORM
            )  # type: ignore[arg-type]
        rows = "".join(json.dumps(ROWS[name](number)) + "\n" for number in range(NUM_ROWS))
        (tmp_path / "rows.jsonl").write_text(rows)
        found = TypeAdapter[Any](Source).validate_python({"source": "jsonl", "files": ["rows.jsonl"], "hold_out": 0.0})
        return DataRequest(found, tmp_path, layout, 0)

    return request_of


def same(one: Dataset, other: Dataset) -> None:
    assert one.digest == other.digest
    assert one.layout is other.layout
    assert one.report == other.report
    assert (one.pad_id, one.classes, one.records, one.captions) == (
        other.pad_id, other.classes, other.records, other.captions,
    )  # fmt: skip
    assert one.row_ids == other.row_ids
    assert one.arrays.keys() == other.arrays.keys()
    for name, array in one.arrays.items():
        np.testing.assert_array_equal(array, other.arrays[name])


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_set_is_built_once_and_memory_mapped(
    request_of: Any, store: Store, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = request_of(name)
    first = materialise(request, store)
    assert first.layout is type(request.layout)
    assert first.report.rows_in == NUM_ROWS
    assert len(first) == (NUM_ROWS if name != "stream" else first.report.holds["sequences"])
    monkeypatch.setattr(type(request.layout), "encode", lambda *_: pytest.fail("built again"))
    again = materialise(request, store)
    same(first, again)
    for array in again.arrays.values():
        assert isinstance(array, np.memmap)
        assert not array.flags.writeable


@pytest.mark.parametrize("name", LAYOUTS)
def test_concurrent_builders_agree(request_of: Any, store: Store, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    request = request_of(name)
    first = materialise(request, store)
    monkeypatch.setattr(module, "find_set", lambda *_: None)
    same(first, materialise(request, store))


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_damaged_set_is_made_again(request_of: Any, store: Store, name: str) -> None:
    request = request_of(name)
    first = materialise(request, store)
    wanted = {name: np.array(array) for name, array in first.arrays.items()}
    manifest = store.find_dataset(stored_as(first.digest))
    assert manifest is not None
    damaged = max((entry for name, entry in manifest.files.items() if name.endswith(".npy")), key=lambda e: e.bytes)
    path = store.objects.local_path(damaged.sha256)
    path.chmod(0o644)
    path.write_bytes(path.read_bytes()[:-1])
    again = materialise(request, store)
    for array, values in wanted.items():
        np.testing.assert_array_equal(again.arrays[array], values)


@pytest.mark.parametrize("name", LAYOUTS)
def test_what_cannot_be_built_is_refused(request_of: Any, store: Store, name: str) -> None:
    request = request_of(name)
    with pytest.raises(RequestError, match="changed"):
        materialise(replace(request, source_digest="0" * 64), store)
    with pytest.raises(RequestError, match="no rows"):
        materialise(replace(request, held_out=True), store)


@pytest.mark.parametrize("name", BATCHED)
def test_the_rows_of_a_step_do_not_depend_on_the_ranks(request_of: Any, store: Store, name: str) -> None:
    dataset = materialise(request_of(name), store)

    def taken(workers: int, micro_batch: int, step: int) -> list[int]:
        plans = [BatchPlan(dataset, 3, 4, workers, rank, micro_batch) for rank in range(workers)]
        batches = [batch for plan in plans for batch in plan.micro_batches(step)]
        return sorted(sample for batch in batches for sample in batch.sample_ids_B.tolist())

    for step in range(3):
        assert taken(1, 4, step) == taken(2, 1, step) == taken(4, 1, step)


@pytest.mark.parametrize("name", BATCHED)
def test_evaluations_take_every_row_once_and_fill_up(request_of: Any, store: Store, name: str) -> None:
    dataset = materialise(request_of(name), store)
    batches = [batch for rank in range(2) for batch in evaluation_batches(dataset, NUM_ROWS, 2, rank, 4)]
    rows = [row for batch in batches for row in batch.sample_ids_B.tolist()]
    assert sorted(row for row in rows if row >= 0) == list(range(NUM_ROWS))
    assert rows.count(-1) == 7


def test_files_of_an_older_format_are_built_again(
    request_of: Any, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = request_of("packed")
    monkeypatch.setattr(module, "FILES_FORMAT", module.FILES_FORMAT - 1)
    older = materialise(request, store)
    monkeypatch.undo()
    assert find_dataset(older.digest, store) is None
    same(older, materialise(request, store))


@dataclass(frozen=True)
class Characters:
    """A layout that no stage has: the characters of each text."""

    name: ClassVar[str] = "characters"
    version: ClassVar[int] = 1
    sides: ClassVar[tuple[str, ...]] = ()
    role: ClassVar[Literal["text"]] = "text"
    text: ClassVar[None] = None

    def identity(self) -> dict[str, Any]:
        return {"role": "characters"}

    def encode(self, rows: Iterable[Row]) -> Iterator[tuple[Row, np.ndarray]]:
        return ((row, np.frombuffer(row.columns["text"].encode(), dtype=np.uint8)) for row in rows)

    def arrays(self, encoded: Iterable[tuple[Row, np.ndarray]], fate: Fate) -> Contents:
        kept = list(encoded)
        arrays = cut_up("text", [codes for _, codes in kept], np.uint8)
        return Contents({**arrays}, [row.id for row, _ in kept], {"sequences": len(kept)}, learns_nothing=not kept)

    @staticmethod
    def collate(dataset: Dataset, rows: Sequence[int]) -> Any:
        return [bytes(dataset.cut("text_ids", row)).decode() for row in rows]


def test_a_layout_is_one_class_and_its_registration(
    request_of: Any, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(LAYOUTS, Characters.name, Characters)
    request = replace(request_of("packed"), layout=Characters())
    same(materialise(request, store), materialise(request, store))
    plan = BatchPlan(materialise(request, store), 0, NUM_ROWS, 1, 0, 3)
    read = [text for batch in plan.micro_batches(0) for text in batch]  # type: ignore[union-attr]
    assert sorted(read) == sorted(ROWS["packed"](number)["text"] for number in range(NUM_ROWS))


def test_a_prompt_gets_the_next_other_prompt_s_answer(request_of: Any, store: Store) -> None:
    """Rows 2n and 2n + 1 have one prompt; row 8 has its own."""
    dataset = materialise(request_of("judged"), store)

    def parts(side: str, row: int) -> tuple[list[int], list[int]]:
        ids, response = dataset.cut(f"{side}_ids", row), dataset.cut(f"{side}_response", row)
        return ids[~response].tolist(), ids[response].tolist()

    for row in range(NUM_ROWS):
        (prompt, _), (same, other) = parts("answer", row), parts("mismatched", row)
        assert same == prompt
        assert other == parts("answer", (row - row % 2 + 2) % (NUM_ROWS + 1))[1]
    assert dataset.arrays["is_desirable"].tolist() == [row % 2 == 0 for row in range(NUM_ROWS)]


def test_a_mismatched_answer_is_cut_and_one_prompt_alone_takes_its_next_answer() -> None:
    def answer(*ids: int) -> Encoded:
        return Encoded(np.array(ids), np.array([False, False] + [True] * (len(ids) - 2)))

    same = [answer(1, 2, 3), answer(1, 2, 4), answer(1, 2, 5)]
    assert [item.ids.tolist() for item in mismatched(same, 9)] == [[1, 2, 4], [1, 2, 5], [1, 2, 3]]
    cut = mismatched([answer(1, 2, 3), answer(7, 8, 4, 5, 6)], 4)
    assert [item.ids.tolist() for item in cut] == [[1, 2, 4, 5], [7, 8, 3]]
    assert cut[0].response.tolist() == [False, False, True, True]
