"""Model folders become artifacts: those of others and those that `export` wrote; safetensors and JSON, never code."""

import json
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from recipes.artifact_kinds import ArtifactKind, OutputKind
from recipes.errors import RequestError
from recipes.models.families import HOLDERS
from recipes.models.folder_classes import find_class
from recipes.models.folders import sentencepiece_conversion
from recipes.models.images.base import SETTINGS
from recipes.models.images.folders import TEXT_ENCODER, TEXT_TOKENIZER, read_image_model_folder
from recipes.models.vision_language import PROCESSOR_FILES
from recipes.tokenizers.token_contract import CONFIG_FILES
from trainers.data.tokenizer import TOKENIZER_FILES, tokenization_from_files
from trainers.store.export import export
from trainers.store.foreign_checkpoints import refuse_shards
from trainers.store.hf_loaders import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from trainers.store.import_records import note_origin
from trainers.store.manifest import (
    ArtifactManifest,
    FileEntry,
    Parent,
    Verification,
    canonical_json,
    files_digest,
    sha256_hex,
)
from trainers.store.place import hash_buffers, hash_file
from trainers.store.store import Store
from trainers.store.untrusted_files import (
    MAX_TEXT_BYTES,
    file_inside,
    is_gguf,
    read_json,
    read_safetensors_header,
    refuse_code,
    weight_files,
)

BASE = "base"
"""Where the folder of an adapter keeps the model that it belongs to."""
TEXT_FILES = (
    "config.json",
    "generation_config.json",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    *TOKENIZER_FILES,
    *PROCESSOR_FILES,
)
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Starts of an adapter that peft takes away from the weights below."""
_BINDING = f"adapter/{ADAPTER_CONFIG}"
"""The file of an adapter's artifact that names the base."""
_HOW = "headers, names and sizes of the tensors; files hashed"


@dataclass(frozen=True)
class _Found:
    """A folder whose files were looked at: the artifact that it is, but for the bytes."""

    kind: ArtifactKind
    files: dict[str, Path]
    """By their names in the artifact."""
    contract: str | None = None
    architecture: dict[str, Any] | None = None
    base: "_Found | None" = None
    """What an adapter belongs to."""


Keep = Callable[[Path | bytes], FileEntry]
"""What is done with each file: stored, or hashed alone."""


def import_folder(
    store: Store, folder: Path, *, source: str | None = None, name: str | None = None
) -> ArtifactManifest:
    """Commit a folder's model as an artifact, the same files as the same one. Raises RequestError naming the file.

    Of an adapter's folder the model in `base/` is committed first. `source` is where it came from (a hub id with its
    revision) and is recorded, without it the folder's own name; the folder's path never is.
    """
    found = _look(folder.absolute())

    def keep(file: Path | bytes) -> FileEntry:
        if isinstance(file, Path):
            return store.objects.put_file(file)
        return FileEntry(sha256=store.objects.put_bytes(file), bytes=len(file))

    committed: list[ArtifactManifest] = []
    for manifest in _manifests(found, source, keep):
        committed.append(store.put_artifact(manifest).manifest)
        note_origin(store.files, committed[-1].fingerprint, source or folder.absolute().name)
    if name is not None:
        store.name_artifact(name, committed[-1].fingerprint)
    return committed[-1]


def describe_folder(folder: Path, *, source: str | None = None) -> ArtifactManifest:
    """Return what `import_folder` would commit; every file is read, nothing is written."""
    return _manifests(_look(folder.absolute()), source, _hash)[-1]


def import_merged(store: Store, adapter: ArtifactManifest, source: str) -> ArtifactManifest:
    """Commit what an imported adapter and its base make together; raises RequestError for another kind of artifact.

    The artifact holds the adapter too, as those of stages do: stages open it unmerged, or let it learn on. What is no
    language model is committed by itself.
    """
    if adapter.kind != "adapter":
        raise RequestError(f"--merge: the folder holds an artifact of kind {adapter.kind}, not an adapter")
    with tempfile.TemporaryDirectory(prefix="trainwright-merge-") as place:
        folder = export(store, adapter, Path(place) / "merged", merge=True)
        found, source = _look(folder), f"{source}, merged"
        if adapter.kind not in HOLDERS.get(cast(OutputKind, found.kind), ()):
            return import_folder(store, folder, source=source)
        files = {**adapter.files, **{name: store.objects.put_file(path) for name, path in found.files.items()}}
    digest = files_digest(files)
    named = {"fingerprint": sha256_hex(canonical_json({"import": digest})), "digest": digest, "files": files}
    told = {"contract": found.contract, "architecture": found.architecture, "source": source}
    committed = store.put_artifact(adapter.model_copy(update=named | told)).manifest
    note_origin(store.files, committed.fingerprint, source)
    return committed


def import_tokenizer(store: Store, folder: Path, *, source: str | None = None) -> ArtifactManifest:
    """Commit a folder's tokenizer alone, whatever else is there; raises RequestError naming the file.

    Its end and pad token may be missing: whoever takes it may name them.
    """
    paths = _tokenizer_files(folder.absolute())
    files = {file: store.objects.put_file(path) for file, path in paths.items()}
    committed = store.put_artifact(_tokenizer_manifest(files, _num_ids(paths["tokenizer.json"]), source)).manifest
    note_origin(store.files, committed.fingerprint, source or folder.absolute().name)
    return committed


def describe_tokenizer(folder: Path, *, source: str | None = None) -> ArtifactManifest:
    """Return what `import_tokenizer` would commit; nothing is written."""
    paths = _tokenizer_files(folder.absolute())
    files = {file: hash_file(path) for file, path in paths.items()}
    return _tokenizer_manifest(files, _num_ids(paths["tokenizer.json"]), source)


def _num_ids(path: Path) -> int:
    """Count a tokenizer's ids; raises RequestError for a file that is none."""
    from tokenizers import Tokenizer

    try:
        vocabulary = Tokenizer.from_file(str(path)).get_vocab(with_added_tokens=True)
    except Exception as error:  # the library raises a bare Exception for every malformed file
        raise RequestError(f"{path}: not readable by tokenizers ({str(error)[:160]})") from None
    return max(vocabulary.values(), default=-1) + 1


def _hash(file: Path | bytes) -> FileEntry:
    return hash_file(file) if isinstance(file, Path) else hash_buffers([file])


def _manifests(found: _Found, source: str | None, keep: Keep) -> list[ArtifactManifest]:
    """Return the folder's artifact, after that of its base."""
    before = [] if found.base is None else _manifests(found.base, source, keep)
    base = before[-1] if before else None
    contents: dict[str, Path | bytes] = dict(sorted(found.files.items()))
    if base is not None:
        contents[_BINDING] = _bound(found.files[_BINDING], base.digest)
    files = {name: keep(content) for name, content in contents.items()}
    digest = files_digest(files)
    manifest = ArtifactManifest(
        fingerprint=sha256_hex(canonical_json({"import": digest})),
        digest=digest,
        kind=found.kind,
        stage="import",
        files=files,
        parents={} if base is None else {"init_from": Parent(fingerprint=base.fingerprint, digest=base.digest)},
        base=None if base is None else base.digest,
        contract=found.contract,
        architecture=found.architecture,
        verification=Verification(how=_HOW),
        source=source,
    )
    return [*before, manifest]


def _bound(config: Path, base: str) -> bytes:
    """Return an adapter's configuration with its base named by digest, as the artifacts of stages have it."""
    content = json.loads(config.read_bytes()) | {"base_model_name_or_path": base}
    return (json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()


def _look(folder: Path) -> _Found:
    """Look at a folder's files; raises RequestError saying what stands against taking them in."""
    if is_gguf(folder):
        raise RequestError(f"{folder} is a GGUF file; take it in first: trainwright store import {folder} --name NAME")
    if not os.path.isdir(folder):  # unlike is_dir, no error for a path that cannot be
        raise RequestError(f"{folder} is not a folder")
    if (folder / SETTINGS).exists():
        return _look_at_images(folder)
    if (folder / ADAPTER_CONFIG).exists() and not (folder / "config.json").exists():
        return _look_at_adapter(folder)
    return _look_at_text(folder)


def _look_at_text(folder: Path) -> _Found:
    config = read_json(folder, "config.json", file_inside)
    refuse_code(folder, config)
    refuse_shards(folder)
    _demand_tokenizer(folder)
    texts = [text for text in TEXT_FILES if (folder / text).exists()]
    paths = {file: file_inside(folder, file) for file in texts} | weight_files(folder, file_inside)
    for file in texts:
        if paths[file].stat().st_size > MAX_TEXT_BYTES:
            raise RequestError(f"{folder}/{file} is larger than {MAX_TEXT_BYTES} bytes")
    for file in ("generation_config.json", "tokenizer_config.json", *PROCESSOR_FILES):
        if file in texts:
            refuse_code(folder, read_json(folder, file, file_inside), file)
    contract = _contract(folder, paths)
    try:
        found = find_class(config).kind
    except ValueError as error:
        raise RequestError(f"{folder}/config.json: {error}") from None
    if found == "critic":
        return _Found("actor_critic", _under("critic", paths), contract, config)
    return _Found(found, _under("model", paths), contract, config)


def _look_at_images(folder: Path) -> _Found:
    """Look at a model of images of any family, with the autoencoder and the text encoder that it brings."""
    refuse_code(folder, read_json(folder, SETTINGS, file_inside), SETTINGS)
    found, problems = read_image_model_folder(folder)
    if found is None or problems:
        raise RequestError("; ".join(map(str, problems)))
    index = ("model_index.json",) if (folder / "model_index.json").exists() else ()
    paths = {name: file_inside(folder, name) for name in (*found.configs, *index)}
    for name in paths:
        refuse_code(folder, read_json(folder, name, file_inside), name)
    for name in found.weights:
        paths[name] = file_inside(folder, name)
        read_safetensors_header(paths[name], folder / name)
    if found.reads_captions:
        paths |= _look_at_reader(folder)
    architecture = {**found.architecture.model_dump(mode="json"), "classes": list(found.classes)}
    return _Found(found.architecture.kind(), _under("model", paths), None, architecture)


def _look_at_reader(folder: Path) -> dict[str, Path]:
    """Look at the language model that reads captions, and its tokenizer."""
    words = folder / TEXT_TOKENIZER
    tokenizer = {file: file_inside(words, file) for file in TOKENIZER_FILES if (words / file).exists()}
    if "tokenizer_config.json" in tokenizer:
        refuse_code(words, read_json(words, "tokenizer_config.json", file_inside), "tokenizer_config.json")
    _contract(words, tokenizer)
    weights = weight_files(folder / TEXT_ENCODER, file_inside)
    return _under(TEXT_TOKENIZER, tokenizer) | _under(TEXT_ENCODER, weights)


def _look_at_adapter(folder: Path) -> _Found:
    """Look at an adapter in peft's layout, and at the model in `base/` that it belongs to."""
    config = read_json(folder, ADAPTER_CONFIG, file_inside)
    refuse_code(folder, config, ADAPTER_CONFIG)
    if config.get("peft_type") != "LORA":
        found = config.get("peft_type")
        raise RequestError(f"{folder}/{ADAPTER_CONFIG}: peft_type is {found!r}; only LORA is taken in")
    start = str(config.get("init_lora_weights"))
    if start.lower().startswith(_CHANGES_BASE):
        raise RequestError(
            f"{folder}/{ADAPTER_CONFIG}: init_lora_weights is {start!r}, so that its base is what this start "
            "left of the model; save it as a plain LoRA: save_pretrained(DIR, path_initial_model_for_weight_conversion="
            "PATH_OF_THE_UNTRAINED_ADAPTER)"
        )
    weights = weight_files(folder, file_inside, ADAPTER_WEIGHTS)
    if not (folder / BASE).is_dir():
        raise RequestError(
            f"{folder} is an adapter without its model; put the folder of {config.get('base_model_name_or_path')} "
            f"at {folder}/{BASE}"
        )
    base = _look(folder / BASE)
    if base.base is not None:
        raise RequestError(f"{folder}/{BASE} is an adapter itself; an adapter belongs to a whole model")
    files = {ADAPTER_CONFIG: file_inside(folder, ADAPTER_CONFIG), **weights}
    return _Found("adapter", _under("adapter", files), base.contract, base.architecture, base)


def _under(part: str, paths: dict[str, Path]) -> dict[str, Path]:
    return {f"{part}/{name}": path for name, path in paths.items()}


def _demand_tokenizer(folder: Path) -> None:
    if not (folder / "tokenizer.json").is_file():
        advice = sentencepiece_conversion(folder)
        message = f"{folder} has no tokenizer.json; only tokenizers of the `tokenizers` library are read"
        raise RequestError(f"{message}: {advice}" if advice else message)


def _contract(folder: Path, paths: dict[str, Path]) -> str:
    files = {file: paths[file].read_bytes() for file in (*TOKENIZER_FILES, *CONFIG_FILES) if file in paths}
    try:
        return tokenization_from_files(files).contract_hash
    except RequestError as error:
        raise RequestError(f"{folder}: {error}") from None


def _tokenizer_files(folder: Path) -> dict[str, Path]:
    if not os.path.isdir(folder):
        raise RequestError(f"{folder} is not a folder")
    _demand_tokenizer(folder)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        if (folder / file).exists():
            refuse_code(folder, read_json(folder, file, file_inside), file)
    return {file: file_inside(folder, file) for file in TOKENIZER_FILES if (folder / file).exists()}


def _tokenizer_manifest(files: dict[str, FileEntry], vocab_size: int, source: str | None) -> ArtifactManifest:
    digest = files_digest(files)
    return ArtifactManifest(
        fingerprint=sha256_hex(canonical_json({"import": digest})),
        digest=digest,
        kind="tokenizer",
        stage="import",
        files=files,
        architecture={"vocab_size": vocab_size},
        verification=Verification(how="files hashed"),
        source=source,
    )
