"""Training states whose hashes and marks are right and whose claims are not: refused by name, nothing allocated."""

import json
import resource
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from recipes.errors import StoreDamaged
from trainers.checkpoint.find_state import find_state
from trainers.store.commit_rules import owner_mark
from trainers.store.inspection import verify
from trainers.store.manifest import FileEntry, StateManifest, canonical_json
from trainers.store.state import TensorReader
from trainers.store.store import Store

FINGERPRINT = "ab" * 32
HUGE = 2**60
MEMORY = 1 << 30
"""More than reading a state of four bytes may take."""


def whole(**header: Any) -> dict[str, Any]:
    """The header of an object with one tensor of four bytes; some of it replaced."""
    return {"w": {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]} | header}


def put(store: Store, header: Any, data: bytes = b"abcd") -> FileEntry:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return store.objects.put_chunks([len(text).to_bytes(8, "little"), text, data])


def manifest(step: int, entry: FileEntry, **tensor: Any) -> dict[str, Any]:
    piece = {"start": [0], "shape": [4], "key": "w", "object": entry.model_dump()}
    return {
        "format": 1, "type": "state", "run": "run", "stage": "base", "fingerprint": FINGERPRINT, "step": step,
        "lease": 1, "layout": {"workers": 1, "micro_batch": 1, "accumulation": 1},
        "tensors": {"param": [{"name": "w", "shape": [4], "dtype": "U8", "slices": [piece]} | tensor]},
    }  # fmt: skip


def slices(entry: FileEntry, *pieces: tuple[int, int]) -> list[dict[str, Any]]:
    return [{"start": [at], "shape": [size], "key": "w", "object": entry.model_dump()} for at, size in pieces]


def marked(header: dict[str, Any]) -> dict[str, Any]:
    return {"__metadata__": {"owner": owner_mark("run", "base", 1, 2)}, **header}


HEADERS: dict[str, tuple[Any, bytes]] = {
    "offsets beyond the file": (marked(whole(data_offsets=[0, 99])), b"abcd"),
    "offsets that do not fit the shape": (marked(whole(data_offsets=[0, 3])), b"abc"),
    "negative offsets": (marked(whole(data_offsets=[-4, 0])), b"abcd"),
    "bytes that no tensor has": (marked(whole()), b"abcdXXXX"),
    "a gap": (marked({"v": {"dtype": "U8", "shape": [1], "data_offsets": [5, 6]}, **whole()}), b"abcdef"),
    "another key": (marked({"v": whole()["w"]}), b"abcd"),
    "another type": (marked(whole(dtype="I8")), b"abcd"),
    "a type that there is not": (marked(whole(dtype="PICKLE")), b"abcd"),
    "another shape": (marked(whole(shape=[2, 2])), b"abcd"),
    "a negative shape": (marked(whole(shape=[-2, -2])), b"abcd"),
    "a huge shape": (marked(whole(shape=[HUGE], data_offsets=[0, HUGE])), b"abcd"),
    "no object": (json.dumps(marked(whole())).encode() + b"]", b"abcd"),
    "a key twice": (json.dumps(marked(whole())).encode()[:-1] + b',"w":{}}', b"abcd"),
}
UNTRUE_ALONE = ("a type that torch has not", "negative sides", "a part")
"""Claims that need no look at the object."""
CLAIMS: dict[str, Callable[[FileEntry], dict[str, Any]]] = {
    "a huge tensor of two slices": lambda e: {"shape": [HUGE], "slices": slices(e, (0, 4), (4, HUGE - 4))},
    "a huge tensor of one slice": lambda e: {"shape": [HUGE], "slices": slices(e, (0, HUGE))},
    "the same bytes often": lambda e: {"shape": [400], "slices": slices(e, *((4 * n, 4) for n in range(100)))},
    "a type that torch has not": lambda e: {"dtype": "U64"},
    "negative sides": lambda e: {"shape": [-2, -2]},
    "a part": lambda e: {"shape": [5]},
    "an object of another size": lambda e: {"slices": slices(FileEntry(sha256=e.sha256, bytes=e.bytes + 1), (0, 4))},
}  # fmt: skip


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """A store with one whole state, at step 1."""
    store = Store.open(str(tmp_path / "store"))
    lease = store.take_lease("run", "base")
    mark = {"__metadata__": {"owner": owner_mark("run", "base", lease, 1)}}
    store.commit_state(StateManifest.model_validate(manifest(1, put(store, mark | whole()))), lease)
    return store


@pytest.fixture
def _little_memory() -> Iterator[None]:
    """A gigabyte beyond what the process holds is an error, not a machine that swaps."""
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.mark.usefixtures("_little_memory")
@pytest.mark.parametrize("what", [*HEADERS, *CLAIMS])
def test_a_state_that_lies_is_named_and_the_older_one_used(
    store: Store, refused: Any, what: str, caplog: pytest.LogCaptureFixture
) -> None:
    header, data = HEADERS.get(what, (marked(whole()), b"abcd"))
    entry = put(store, header, data)
    raw = manifest(2, entry, **(CLAIMS[what](entry) if what in CLAIMS else {}))
    text = canonical_json(raw)
    began_at = time.monotonic()
    try:
        forged = StateManifest.model_validate(raw)
    except ValueError:
        assert what in UNTRUE_ALONE
    else:
        with refused(StoreDamaged, None, entry.sha256[2:12]):
            store.commit_state(forged, 1)
    store.states("run", "base")._refs.append({"manifest": store.objects.put_bytes(text), "bytes": len(text)})
    refs = [damage.refs for damage in verify(store).damage]
    assert refs
    assert all(needed == ["refs/states/run/base/000003"] for needed in refs)
    found = find_state(store, "run", "base", FINGERPRINT)
    assert found is not None
    assert found.step == 1
    with TensorReader(store, found) as reader:
        assert bytes(reader.read("param", "w").tolist()) == b"abcd"
    assert "refs/states/run/base/000002 (step 1)" in caplog.text
    assert "refs/states/run/base/000003" in caplog.text
    assert entry.sha256[2:] in caplog.text or what in UNTRUE_ALONE
    assert time.monotonic() - began_at < 1


@pytest.mark.parametrize("what", HEADERS)
def test_a_reader_of_a_state_that_lies_names_the_object(store: Store, refused: Any, what: str) -> None:
    """Even one that nobody has looked at before."""
    header, data = HEADERS[what]
    entry = put(store, header, data)
    forged = StateManifest.model_validate(manifest(2, entry))
    with TensorReader(store, forged) as reader, refused(StoreDamaged, None, entry.sha256[2:]):
        reader.read("param", "w")
