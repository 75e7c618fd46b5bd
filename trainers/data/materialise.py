"""Turns rows into an indexed, memory-mapped data set that is built once and kept in the store under its digest."""

import hashlib
import io
import json
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np

from recipes.data.images import ImageSource
from recipes.data.text import Mix, Source
from recipes.data.tokenizers import TrainTokenizer
from recipes.errors import RequestError, StoreDamaged
from recipes.planning.fingerprint import LOCATION_KEYS, left_out
from recipes.stages.answers import ROLES
from trainers.data.dataset import BuildReport, Chunks, Contents, DataLayout, Dataset, Fate
from trainers.data.filters.judge import Filtering
from trainers.data.image_text_digest import image_text_digest
from trainers.data.images import DecodedImage, read_images
from trainers.data.layouts.prompts import Prompts
from trainers.data.layouts.registry import LAYOUTS
from trainers.data.mixture import Mixture, SourceCounts
from trainers.data.row_forms import ROW_FORMS, RowRole
from trainers.data.rows import Row, read_rows, unread_parts
from trainers.data.source_digest import source_digest
from trainers.data.tokenizer import Tokenization, tokenization_from_files, train_tokenizer
from trainers.store.manifest import DatasetManifest, FileEntry, canonical_json
from trainers.store.store import Store

log = logging.getLogger(__name__)

FILES_FORMAT = 3
"""Of a set's files; raised where they change and their digests do not, so that older ones are built again."""
TOKENIZER_FORMAT = 1
NO_CONTENT = {*LOCATION_KEYS, "max_dropped", "alias"}
"""Keys of a source that do not say which rows it has: their digest does."""
ROWS_A_BEAT = 256
OnRows = Callable[[int], None]
"""Hears how many rows are read, every `ROWS_A_BEAT` of them."""
R = TypeVar("R")


@dataclass(frozen=True)
class DataRequest:
    """Everything that decides the arrays of a data set; `base_dir` only says where relative paths start."""

    source: Source | ImageSource
    base_dir: Path
    layout: DataLayout
    """What becomes of the rows, which its role names."""
    seed: int
    """Draws the rows that `limit` keeps."""
    held_out: bool = False
    """Read the rows that the source's `hold_out` keeps away from training, instead of the others."""
    source_digest: str | None = None
    """What `content_digest` gave when the run started; None computes it. Files that changed since then are an error."""
    field_path: str = "data"
    """Where the stage names the source, for messages."""

    def digest(self) -> str:
        """Return the data set's identity: 64 hex digits over content, selection, and the layout's settings."""
        selection = _selection(self.source)
        if any(member.source.limit is not None for member in self.source.members()):
            selection["seed"] = self.seed
        identity = {
            "format": self.layout.version,
            "content": self.source_digest or content_digest(self),
            "selection": selection,
            "held_out": self.held_out,
            **self.layout.identity(),
        }
        return hashlib.sha256(canonical_json(identity)).hexdigest()

    @property
    def name(self) -> str:
        """The source, for messages."""
        return f"source '{self.source.source}'"


def content_digest(request: DataRequest) -> str:
    """Return the digest of the rows that a request reads, and of the image files that they name."""
    source = request.source
    if ROLES[request.layout.role].is_images:
        return source_digest(source, request.base_dir)
    role = cast(RowRole, request.layout.role)
    if ROW_FORMS[role].opens_images:
        return image_text_digest(cast(Source, source), request.base_dir)
    return source_digest(source, request.base_dir, role)


def _selection(source: Source | ImageSource) -> dict[str, Any]:
    """Return what a source's keys say of which of its rows there are."""
    found = source.model_dump(mode="json", exclude=NO_CONTENT | left_out(source))
    for item in found.get("filter") or ():
        item.pop("against", None)
    if isinstance(source, Mix):
        found["mix"] = [_selection(member.source) for member in source.members()]
    return found


def materialise(request: DataRequest, store: Store, on_rows: OnRows | None = None) -> Dataset:
    """Open the data set from the store, or build and commit it; of concurrent builders the first commit wins.

    Building holds the set in memory, images twice. Raises RequestError for unreadable rows (naming file and row), for
    no rows, for images of several shapes, and for a set of text without supervised tokens (naming rows).
    """
    digest = request.digest()
    key = stored_as(digest)
    found = _open(digest, find_set(key, store) or _build(request, key, store, on_rows), store)
    return found.with_names([member.name for member in request.source.members()])


def find_dataset(digest: str, store: Store) -> Dataset | None:
    """Open a set by its digest; None where the store has let it go."""
    found = find_set(stored_as(digest), store)
    return None if found is None else _open(digest, found, store)


def stored_as(digest: str) -> str:
    """Return the digest under which the store keeps a set's files."""
    return hashlib.sha256(f"{digest} {FILES_FORMAT}".encode()).hexdigest()


def build_tokenization(
    spec: TrainTokenizer, source: Source, base_dir: Path, seed: int, store: Store, on_rows: OnRows | None = None
) -> Tokenization:
    """Train a tokenizer on a source's text, or take it from the store where the same was trained before."""
    content = source_digest(source, base_dir)
    identity = ["tokenizer", TOKENIZER_FORMAT, spec.model_dump(mode="json"), content, _selection(source), seed]
    digest = hashlib.sha256(canonical_json(identity)).hexdigest()
    found = find_set(digest, store)
    if found is None:
        rows = _heard(read_rows(source, base_dir, "text", seed, store=store), on_rows)
        trained = train_tokenizer(spec, (row.columns["text"] for row in rows))
        if trained.vocab_size < spec.vocab_size:
            log.warning("the text gives %d tokenizer entries, fewer than %d", trained.vocab_size, spec.vocab_size)
        entries = {name: _put(content, store) for name, content in trained.files().items()}
        found = store.put_dataset(DatasetManifest(digest=digest, files=entries))
    return tokenization_from_files({name: store.objects.get_bytes(entry.sha256) for name, entry in found.files.items()})


def find_set(digest: str, store: Store) -> DatasetManifest | None:
    """Find a whole data set; a damaged one is made again, since it follows from its request."""
    try:
        return store.find_dataset(digest)
    except StoreDamaged as error:
        log.warning("data set %s is made again: %s", digest[:12], error)
        return None


def lay_out(
    layout: DataLayout, rows: Iterable[Row | DecodedImage], source: Source | ImageSource | None = None
) -> tuple[Contents, BuildReport]:
    """Bring rows into a layout, of a mixture with what is whose; says what became of them."""
    fate, seen = Fate(), _Seen()
    contents = layout.arrays(layout.encode(seen.kept(rows, layout, fate)), fate)
    sources: dict[str, dict[str, Any]] = {}
    if isinstance(source, Mix):
        contents.mixture = seen.sources.mixture(source, contents)
        sources = seen.sources.report(contents.mixture, contents)
        sources = {name: {**counts, **contents.drawn.get(name, {})} for name, counts in sources.items()}
    return contents, BuildReport(
        seen.rows,
        contents.holds,
        None if layout.text is None else fate.sorted(),
        dict(sorted(seen.forms.items())),
        dict(sorted(seen.unread.items())),
        sources=sources,
    )


class _Seen:
    """What rows were when they came in, counted as they pass."""

    def __init__(self) -> None:
        self.rows = 0
        self.forms: Counter[str] = Counter()
        self.unread: Counter[str] = Counter()
        self.sources = SourceCounts()

    def kept(self, rows: Iterable[Row | DecodedImage], layout: DataLayout, fate: Fate) -> Iterator[Row | DecodedImage]:
        """Yield the rows that are not to be left out."""
        template = None if layout.text is None else layout.text.tokenization.chat_template
        carried = layout.carried if isinstance(layout, Prompts) else ()
        for row in rows:
            self.rows += 1
            if isinstance(row, Row):
                if row.source:
                    self.sources.note(row.id, row.source)
                self.unread.update(name for name in unread_parts(row, layout.role, template) if name not in carried)
                if row.reading.form:
                    self.forms[row.reading.form] += 1
                if row.reading.drop:
                    fate.drop(row.reading.drop, row)
                    continue
            else:
                self.unread.update(row.unread)
            yield row


def _open(digest: str, manifest: DatasetManifest, store: Store) -> Dataset:
    def read(name: str) -> bytes:
        return store.objects.get_bytes(manifest.files[name].sha256)

    meta = json.loads(read("meta.json"))
    arrays = {
        name.removesuffix(".npy"): np.load(store.objects.local_path(entry.sha256), mmap_mode="r", allow_pickle=False)
        for name, entry in manifest.files.items()
        if name.endswith(".npy")
    }
    has = manifest.files.keys()
    return Dataset(
        digest=digest,
        layout=LAYOUTS[meta["layout"]],
        report=BuildReport.from_json(meta["report"]),
        arrays=arrays,
        pad_id=meta["pad_id"],
        classes=tuple(meta["classes"]),
        records=[json.loads(line) for line in read("records.jsonl").splitlines()] if "records.jsonl" in has else [],
        captions=tuple(json.loads(read("captions.json"))) if "captions.json" in has else (),
        row_ids_path=store.objects.local_path(manifest.files["row_ids.txt"].sha256),
        mixture=Mixture.from_json(meta["mixture"]) if "mixture" in meta else None,
    )


def _build(request: DataRequest, key: str, store: Store, on_rows: OnRows | None) -> DatasetManifest:
    if request.source_digest not in (None, content_digest(request)):
        raise RequestError(f"the data of {request.name} changed since the run started; start a new run")
    layout = request.layout
    tokenization = None if layout.text is None else layout.text.tokenization
    filtering = Filtering(None if tokenization is None else lambda text: len(tokenization.encode(text)), on_rows)
    contents, report = lay_out(layout, _heard(_read(request, store, filtering), on_rows), request.source)
    left_out = filtering.left_out
    report = replace(report, filtered=dict(sorted(left_out.counts.items())))
    _demand_something_to_learn(request, contents, report)
    meta = {
        "layout": layout.name,
        "pad_id": 0 if layout.text is None else layout.text.tokenization.pad_id,
        "classes": list(contents.classes),
        "report": report.to_json(),
        **({} if contents.mixture is None else {"mixture": contents.mixture.to_json()}),
    }
    files = {
        "meta.json": _put(canonical_json(meta), store),
        "row_ids.txt": _put("".join(" ".join(name.splitlines()) + "\n" for name in contents.row_ids).encode(), store),
    }
    for name, array in contents.arrays.items():
        files[f"{name}.npy"] = store.objects.put_chunks(_npy(array))
    if left_out.examples:
        lines = ({"reason": reason, **row} for reason, rows in sorted(left_out.examples.items()) for row in rows)
        written = "".join(json.dumps(line, ensure_ascii=False, default=str) + "\n" for line in lines)
        files["filtered.jsonl"] = _put(written.encode(), store)
    if contents.records:
        files["records.jsonl"] = _put(b"".join(canonical_json(record) + b"\n" for record in contents.records), store)
    if contents.captions:
        files["captions.json"] = _put(canonical_json(contents.captions), store)
    return store.put_dataset(DatasetManifest(digest=key, files=files, report=report.to_json()))


def _read(request: DataRequest, store: Store, filtering: Filtering) -> Iterator[Row] | Iterator[DecodedImage]:
    source, base_dir, seed = request.source, request.base_dir, request.seed
    if ROLES[request.layout.role].is_images:
        return read_images(cast(ImageSource, source), base_dir, seed, held_out=request.held_out)
    text, role = cast(Source, source), cast(RowRole, request.layout.role)
    return read_rows(text, base_dir, role, seed, held_out=request.held_out, store=store, filtering=filtering)


def _heard(rows: Iterator[R], on_rows: OnRows | None) -> Iterator[R]:
    for number, row in enumerate(rows, start=1):
        if on_rows is not None and number % ROWS_A_BEAT == 0:
            on_rows(number)
        yield row


def _demand_something_to_learn(request: DataRequest, contents: Contents, report: BuildReport) -> None:
    what = f"{request.name} as {request.layout.role}"
    if report.rows_in == 0:
        raise RequestError(f"{what}: no rows (files, part, limit, hold_out or split leave nothing)")
    if contents.learns_nothing:
        assert request.layout.text is not None
        raise RequestError(f"{what}: {report.nothing_to_learn(request.layout.text.sequence_length)}")


def _npy(array: np.ndarray | Chunks) -> Iterator[bytes]:
    """Yield a file of numpy's: its header, and the values in C order."""
    header = {"descr": np.lib.format.dtype_to_descr(array.dtype), "fortran_order": False, "shape": array.shape}
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, header)
    yield buffer.getvalue()
    yield from array.chunks if isinstance(array, Chunks) else [array.tobytes()]


def _put(content: bytes, store: Store) -> FileEntry:
    return FileEntry(sha256=store.objects.put_bytes(content), bytes=len(content))
