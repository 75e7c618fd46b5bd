"""Foreign model folders in the Hugging Face layout become artifacts: safetensors and JSON only, never code."""

import logging
import os
from pathlib import Path
from typing import Any

from recipes.errors import RequestError
from recipes.model_classes import find_class
from recipes.vision_folders import PROCESSOR_FILES
from trainers.data.tokenizer import TOKENIZER_FILES, tokenization_from_files
from trainers.store.foreign import MAX_TEXT_BYTES, file_inside, read_json, refuse_code, weight_files
from trainers.store.manifest import (
    ArtifactManifest,
    FileEntry,
    Kind,
    Verification,
    canonical_json,
    files_digest,
    sha256_hex,
)
from trainers.store.origins import note_origin
from trainers.store.store import Store

log = logging.getLogger("trainwright.store")

TEXT_FILES = (
    "config.json",
    "generation_config.json",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    *TOKENIZER_FILES,
    *PROCESSOR_FILES,
)


def import_folder(
    store: Store, folder: Path, *, source: str | None = None, name: str | None = None
) -> ArtifactManifest:
    """Commit a folder's model as an artifact, the same files as the same one. Raises RequestError naming the file.

    `source` is where it came from (a hub id with its revision) and is recorded, without it the folder's own name; the
    folder's path never is.
    """
    folder = folder.absolute()
    if not os.path.isdir(folder):  # unlike is_dir, no error for a path that cannot be
        raise RequestError(f"{folder} is not a folder")
    config = read_json(folder, "config.json", file_inside)
    refuse_code(folder, config)
    if not (folder / "tokenizer.json").is_file():
        raise RequestError(f"{folder} has no tokenizer.json; only tokenizers of the `tokenizers` library are read")
    texts = [text for text in TEXT_FILES if (folder / text).exists()]
    paths = {file: file_inside(folder, file) for file in texts} | weight_files(folder, file_inside)
    for file in texts:
        if paths[file].stat().st_size > MAX_TEXT_BYTES:
            raise RequestError(f"{folder}/{file} is larger than {MAX_TEXT_BYTES} bytes")
    for file in ("generation_config.json", "tokenizer_config.json", *PROCESSOR_FILES):
        if file in texts:
            refuse_code(folder, read_json(folder, file, file_inside), file)
    try:
        tokenization = tokenization_from_files(
            {file: paths[file].read_bytes() for file in TOKENIZER_FILES if file in paths}
        )
    except RequestError as error:
        raise RequestError(f"{folder}: {error}") from None

    kind = _kind(folder, config)
    part = "critic" if kind == "actor_critic" else "model"
    files: dict[str, FileEntry] = {
        f"{part}/{file}": store.objects.put_file(path) for file, path in sorted(paths.items())
    }
    digest = files_digest(files)
    manifest = ArtifactManifest(
        fingerprint=sha256_hex(canonical_json({"import": digest})),
        digest=digest,
        kind=kind,
        stage="import",
        files=files,
        contract=tokenization.contract_hash,
        architecture=config,
        verification=Verification(how="headers, names and sizes of the tensors; files hashed"),
        source=source,
    )
    committed = store.put_artifact(manifest).manifest
    note_origin(store.files, committed.fingerprint, source or folder.name)
    if name is not None:
        store.name_artifact(name, committed.fingerprint)
    return committed


def import_tokenizer(store: Store, folder: Path, *, source: str | None = None) -> ArtifactManifest:
    """Commit a folder's tokenizer alone, whatever else is there; raises RequestError naming the file.

    Its end and pad token may be missing: whoever takes it may name them.
    """
    folder = folder.absolute()
    if not os.path.isdir(folder):  # unlike is_dir, no error for a path that cannot be
        raise RequestError(f"{folder} is not a folder")
    if not (folder / "tokenizer.json").is_file():
        raise RequestError(f"{folder} has no tokenizer.json; only tokenizers of the `tokenizers` library are read")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        if (folder / file).exists():
            refuse_code(folder, read_json(folder, file, file_inside), file)
    paths = {file: file_inside(folder, file) for file in TOKENIZER_FILES if (folder / file).exists()}
    files = {file: store.objects.put_file(path) for file, path in paths.items()}
    digest = files_digest(files)
    manifest = ArtifactManifest(
        fingerprint=sha256_hex(canonical_json({"import": digest})),
        digest=digest,
        kind="tokenizer",
        stage="import",
        files=files,
        verification=Verification(how="files hashed"),
        source=source,
    )
    committed = store.put_artifact(manifest).manifest
    note_origin(store.files, committed.fingerprint, source or folder.name)
    return committed


def _kind(folder: Path, config: dict[str, Any]) -> Kind:
    """Tell what the model is by the class that wrote it."""
    try:
        found = find_class(config).kind
    except ValueError as error:
        raise RequestError(f"{folder}/config.json: {error}") from None
    return "actor_critic" if found == "critic" else found
