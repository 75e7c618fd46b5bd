"""Turns rows into an indexed, memory-mapped data set that is built once and kept in the store under its digest."""

import hashlib
import io
import itertools
import json
import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from recipes.data.text import Source, TrainTokenizer
from recipes.errors import RequestError, StoreDamaged
from recipes.stages.answers import Template
from trainers.data.columns import RowRole
from trainers.data.dataset import BuildReport, Dataset, Form
from trainers.data.encoding import (
    conversation_of,
    encode_instructions,
    encode_pairs,
    encode_prompts,
    encode_sources_and_targets,
    encode_texts,
)
from trainers.data.image_processor import ImageProcessor
from trainers.data.image_text import encode_image_text, image_text_arrays, pixel_chunks
from trainers.data.image_text_digest import image_text_digest
from trainers.data.layouts import Count, FormSettings, Parts, labelled, pack, pair, prompts, seq2seq, stream
from trainers.data.row_images import RowImage
from trainers.data.rows import Row, read_rows
from trainers.data.sources.open import open_source
from trainers.data.tokenizer import Tokenization, tokenization_from_files, train_tokenizer
from trainers.store.manifest import DatasetManifest, FileEntry, canonical_json
from trainers.store.store import Store

log = logging.getLogger(__name__)

FORMATS: dict[Form, int] = dict.fromkeys(get_args(Form), 1) | dict.fromkeys(
    ("packed", "image_text", "labelled", "pairs", "prompts"), 2
)
"""Each form's is raised when the same request gives other arrays."""
TOKENIZER_FORMAT = 1
NO_CONTENT = {"files", "path", "revision", "max_dropped"}
"""Keys of a source that do not say which rows it has: their digest does."""
ROWS_A_BEAT = 256
OnRows = Callable[[int], None]
"""Hears how many rows are read, every `ROWS_A_BEAT` of them."""
FORMS: dict[RowRole, Form] = {
    "text": "packed",
    "labels": "labelled",
    "instructions": "packed",
    "seq2seq": "seq2seq",
    "image_text": "image_text",
    "preferences": "pairs",
    "prompts": "prompts",
}


@dataclass(frozen=True)
class DataRequest:
    """Everything that decides the tokens of a data set; `base_dir` only says where relative paths start."""

    source: Source
    base_dir: Path
    role: RowRole
    """text and instructions make a packed set, image-text rows one with images, the others what FORMS says."""
    tokenization: Tokenization
    sequence_length: int
    """Longest sequence in tokens. Text is split, instructions truncated, pairs and prompts dropped; all counted."""
    seed: int
    """Draws the rows that `limit` keeps."""
    packing: bool = True
    """False: one row (or one piece of a longer text) a sequence."""
    is_stream: bool = False
    """Text only: one stream of tokens that recurrent models read on in, instead of sequences."""
    loss_on: Literal["responses", "all"] = "responses"
    """Instructions and image-text rows: which tokens are targets. Rows of plain text have targets everywhere."""
    template: Template = "none"
    """Prompts, completions and answers of plain text: chat makes them turns of the chat template."""
    held_out: bool = False
    """Read the rows that the source's `hold_out` keeps away from training, instead of the others."""
    source_digest: str | None = None
    """What `content_digest` gave when the run started; None computes it. Files that changed since then are an error."""
    processor: ImageProcessor | None = None
    """ImageText rows only: how the model takes images."""
    field_path: str = "data"
    """Where the stage names the source, for messages."""

    @property
    def form(self) -> Form:
        """Form of the data set."""
        return "stream" if self.is_stream else FORMS[self.role]

    def digest(self) -> str:
        """Return the data set's identity: 64 hex digits over content, selection, tokenizer, lengths and FORMATS."""
        selection = self.source.model_dump(mode="json", exclude=NO_CONTENT)
        if selection["limit"] is not None:
            selection["seed"] = self.seed
        identity = {
            "format": FORMATS[self.form],
            "content": self.source_digest or content_digest(self),
            "selection": selection,
            "held_out": self.held_out,
            "role": self.role,
            "tokenizer": self.tokenization.contract_hash,
            "sequence_length": self.sequence_length,
        }
        if self.form in ("packed", "image_text"):
            identity |= {"packing": self.packing}
        if self.processor is not None:
            identity |= {"processor": self.processor.digest}
        if self.is_stream:
            identity |= {"form": "stream"}
        if self.role in ("instructions", "image_text"):
            identity |= {"loss_on": self.loss_on}
        if self.template != "none":
            identity |= {"template": self.template}
        return hashlib.sha256(canonical_json(identity)).hexdigest()


def content_digest(request: DataRequest) -> str:
    """Return the digest of the rows that a request reads, and of the image files that they name."""
    if request.role == "image_text":
        return image_text_digest(request.source, request.base_dir)
    return open_source(request.source, request.base_dir, request.role).digest()


def materialise(request: DataRequest, store: Store, on_rows: OnRows | None = None) -> Dataset:
    """Open the data set from the store, or build and commit it; of concurrent builders the first commit wins.

    Building holds the set in memory once. Raises RequestError for unreadable rows (naming file and row), for no rows,
    and for a set without supervised tokens (naming rows).
    """
    digest = request.digest()
    found = find_set(digest, store)
    if found is None:
        found = _build(request, digest, store, on_rows)
    return _open(found, store)


def find_dataset(digest: str, store: Store) -> Dataset | None:
    """Open a set by its digest; None where the store has let it go."""
    found = find_set(digest, store)
    return None if found is None else _open(found, store)


def build_tokenization(
    spec: TrainTokenizer, source: Source, base_dir: Path, seed: int, store: Store, on_rows: OnRows | None = None
) -> Tokenization:
    """Train a tokenizer on a source's text, or take it from the store where the same was trained before."""
    selection = source.model_dump(mode="json", exclude=NO_CONTENT)
    content = open_source(source, base_dir).digest()
    identity = ["tokenizer", TOKENIZER_FORMAT, spec.model_dump(mode="json"), content, selection, seed]
    digest = hashlib.sha256(canonical_json(identity)).hexdigest()
    found = find_set(digest, store)
    if found is None:
        rows = read_rows(source, base_dir, "text", seed, store=store)
        trained = train_tokenizer(spec, _texts(rows, on_rows))
        if trained.vocab_size < spec.vocab_size:
            log.warning("the text gives %d tokenizer entries, fewer than %d", trained.vocab_size, spec.vocab_size)
        entries = {name: _put(content, store) for name, content in trained.files().items()}
        found = store.put_dataset(DatasetManifest(digest=digest, files=entries))
    return tokenization_from_files({name: store.objects.get_bytes(entry.sha256) for name, entry in found.files.items()})


def _texts(rows: Iterable[Row], on_rows: OnRows | None) -> Iterator[str]:
    for number, row in enumerate(rows, start=1):
        if on_rows is not None and number % ROWS_A_BEAT == 0:
            on_rows(number)
        yield row.columns["text"]


def find_set(digest: str, store: Store) -> DatasetManifest | None:
    """Find a whole data set; a damaged one is made again, since it follows from its request."""
    try:
        return store.find_dataset(digest)
    except StoreDamaged as error:
        log.warning("data set %s is made again: %s", digest[:12], error)
        return None


def _open(manifest: DatasetManifest, store: Store) -> Dataset:
    meta = json.loads(store.objects.get_bytes(manifest.files["meta.json"].sha256))
    arrays = {
        name.removesuffix(".npy"): np.load(store.objects.local_path(entry.sha256), mmap_mode="r", allow_pickle=False)
        for name, entry in manifest.files.items()
        if name.endswith(".npy")
    }
    records: list[dict[str, Any]] = []
    if "records.jsonl" in manifest.files:
        lines = store.objects.get_bytes(manifest.files["records.jsonl"].sha256).splitlines()
        records = [json.loads(line) for line in lines]
    return Dataset(
        digest=manifest.digest,
        form=meta["form"],
        report=BuildReport(**meta["report"]),
        arrays=arrays,
        pad_id=meta["pad_id"],
        classes=tuple(meta.get("classes", ())),
        records=records,
        row_ids_path=store.objects.local_path(manifest.files["row_ids.txt"].sha256),
    )


def _build(request: DataRequest, digest: str, store: Store, on_rows: OnRows | None) -> DatasetManifest:
    if request.source_digest is not None and content_digest(request) != request.source_digest:
        raise RequestError(f"the data of {_name(request.source)} changed since the run started; start a new run")
    count = Count()
    parts, images = build_parts(request, _read(request, store, on_rows), count)
    report = build_report(parts, count)
    _demand_something_to_learn(request, report)
    meta: dict[str, Any] = {"form": request.form, "pad_id": request.tokenization.pad_id, "report": asdict(report)}
    if parts.classes:
        meta["classes"] = list(parts.classes)
    files = {
        "meta.json": _put(canonical_json(meta), store),
        "row_ids.txt": _put("".join(" ".join(name.splitlines()) + "\n" for name in parts.row_ids).encode(), store),
    }
    for name, array in parts.arrays.items():
        files[f"{name}.npy"] = store.objects.put_chunks([_npy_header(array), array.tobytes()])
    if request.processor is not None:
        files["images.npy"] = _put_images(request, images, store)
    if request.form == "prompts":
        files["records.jsonl"] = _put(b"".join(canonical_json(record) + b"\n" for record in parts.records), store)
    return store.put_dataset(DatasetManifest(digest=digest, files=files, report=report.to_json()))


def build_parts(request: DataRequest, rows: Iterable[Row], count: Count) -> tuple[Parts, list[RowImage]]:
    """Encode rows in the request's form, and count what became of them; images where the form has them."""
    tokenization = request.tokenization
    settings = FormSettings(
        sequence_length=request.sequence_length,
        vocab_size=tokenization.vocab_size,
        pad_id=tokenization.pad_id,
        packing=request.packing,
        loss_on_all=request.loss_on == "all",
    )
    rows = _seen(rows, request, count)
    match request.role:
        case "text" if request.is_stream:
            return stream(encode_texts(rows, tokenization), count, settings), []
        case "text":
            return pack(encode_texts(rows, tokenization), count, settings), []
        case "labels":
            return labelled(encode_texts(rows, tokenization), count, settings), []
        case "instructions":
            return pack(encode_instructions(rows, tokenization), count, settings), []
        case "seq2seq":
            return seq2seq(encode_sources_and_targets(rows, tokenization), count, settings), []
        case "image_text":
            assert request.processor is not None
            encoded = encode_image_text(rows, tokenization, request.processor)
            return image_text_arrays(encoded, count, settings, request.processor)
        case "preferences":
            return pair(encode_pairs(rows, tokenization), count, settings), []
        case "prompts":
            return prompts(encode_prompts(rows, tokenization), count, settings), []


def build_report(parts: Parts, count: Count) -> BuildReport:
    """Say what became of the rows."""
    return BuildReport(
        rows_in=count.rows_in,
        kept=count.kept,
        truncated=count.truncated,
        split=count.split,
        dropped=dict(sorted(count.dropped.items())),
        examples=dict(sorted(count.examples.items())),
        sequences=parts.sequences,
        tokens=parts.tokens,
        supervised_tokens=parts.supervised_tokens,
        fill=parts.tokens / max(parts.positions, 1),
    )


def _seen(rows: Iterable[Row], request: DataRequest, count: Count) -> Iterator[Row]:
    for row in rows:
        count.rows_in += 1
        yield conversation_of(row) if request.template == "chat" else row


def _put_images(request: DataRequest, images: list[RowImage], store: Store) -> FileEntry:
    """Store the pixels of every image once, one image in memory at a time."""
    processor = request.processor
    assert processor is not None
    if not images:
        raise RequestError(f"{_name(request.source)}: no row has an image; fine-tune a language model on text alone")
    shape = (len(images), *processor.shape_CHW)
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": "|u1", "fortran_order": False, "shape": shape})
    return store.objects.put_chunks(itertools.chain([buffer.getvalue()], pixel_chunks(images, processor)))


def _read(request: DataRequest, store: Store, on_rows: OnRows | None) -> Iterator[Row]:
    source, seed = request.source, request.seed
    rows = read_rows(source, request.base_dir, request.role, seed, held_out=request.held_out, store=store)
    for number, row in enumerate(rows, start=1):
        if on_rows is not None and number % ROWS_A_BEAT == 0:
            on_rows(number)
        yield row


def _name(source: Source) -> str:
    return f"source '{source.source}'"


def _demand_something_to_learn(request: DataRequest, report: BuildReport) -> None:
    what = f"{_name(request.source)} as {request.role}"
    if report.rows_in == 0:
        raise RequestError(f"{what}: no rows (files, part, limit, hold_out or split leave nothing)")
    if report.sequences == 0 or (request.form != "prompts" and report.supervised_tokens == 0):
        reasons = "; ".join(f"{reason}: {', '.join(ids)}" for reason, ids in report.examples.items())
        found = f"nothing to learn from in {report.rows_in} rows at sequence_length {request.sequence_length}"
        raise RequestError(f"{what}: {found}: {reasons}")


def _npy_header(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, np.lib.format.header_data_from_array_1_0(array))
    return buffer.getvalue()


def _put(content: bytes, store: Store) -> FileEntry:
    return FileEntry(sha256=store.objects.put_bytes(content), bytes=len(content))
