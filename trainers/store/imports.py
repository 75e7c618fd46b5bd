"""Foreign model folders in the Hugging Face layout become artifacts: safetensors and JSON only, never code."""

import json
import logging
from pathlib import Path
from typing import Any

from recipes.errors import RequestError
from recipes.vision_folders import PROCESSOR_FILES
from trainers.data.tokenizer import TOKENIZER_FILES, tokenization_from_files
from trainers.store.headers import MAX_HEADER_BYTES, no_duplicates, parse_header
from trainers.store.manifest import (
    ArtifactManifest,
    FileEntry,
    Kind,
    Verification,
    canonical_json,
    files_digest,
    sha256_hex,
)
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
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
CODE_SUFFIXES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".msgpack", ".h5", ".npz")
MAX_TEXT_BYTES = 256 << 20


def import_folder(
    store: Store, folder: Path, *, source: str | None = None, name: str | None = None
) -> ArtifactManifest:
    """Commit a folder's model as an artifact, the same files as the same one. Raises RequestError naming the file.

    `source` is where it came from (a hub id with its revision) and is recorded; a folder's path never is.
    """
    folder = folder.absolute()
    if not folder.is_dir():
        raise RequestError(f"{folder} is not a folder")
    config = _read_json(folder, "config.json")
    refuse_code(folder, config)
    if not (folder / "tokenizer.json").is_file():
        raise RequestError(f"{folder} has no tokenizer.json; only tokenizers of the `tokenizers` library are read")
    weights = _weight_files(folder)
    texts = [text for text in TEXT_FILES if (folder / text).exists()]
    paths = {file: _inside(folder, file) for file in sorted({*texts, *weights})}
    for file in texts:
        if paths[file].stat().st_size > MAX_TEXT_BYTES:
            raise RequestError(f"{folder}/{file} is larger than {MAX_TEXT_BYTES} bytes")
    for file in ("generation_config.json", "tokenizer_config.json", *PROCESSOR_FILES):
        if file in texts:
            refuse_code(folder, _read_json(folder, file), file)
    try:
        tokenization = tokenization_from_files(
            {file: paths[file].read_bytes() for file in TOKENIZER_FILES if file in paths}
        )
    except RequestError as error:
        raise RequestError(f"{folder}: {error}") from None

    files: dict[str, FileEntry] = {f"model/{file}": store.objects.put_file(path) for file, path in paths.items()}
    digest = files_digest(files)
    manifest = ArtifactManifest(
        fingerprint=sha256_hex(canonical_json({"import": digest})),
        digest=digest,
        kind=_kind(folder, config),
        stage="import",
        files=files,
        contract=tokenization.contract_hash,
        architecture=config,
        verification=Verification(how="headers, names and sizes of the tensors; files hashed"),
        source=source,
    )
    committed = store.put_artifact(manifest).manifest
    if name is not None:
        store.name_artifact(name, committed.fingerprint)
    return committed


def import_tokenizer(store: Store, folder: Path, *, source: str | None = None) -> ArtifactManifest:
    """Commit a folder's tokenizer alone, whatever else is there; raises RequestError naming the file.

    Its end and pad token may be missing: whoever takes it may name them.
    """
    folder = folder.absolute()
    if not folder.is_dir():
        raise RequestError(f"{folder} is not a folder")
    if not (folder / "tokenizer.json").is_file():
        raise RequestError(f"{folder} has no tokenizer.json; only tokenizers of the `tokenizers` library are read")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        if (folder / file).exists():
            refuse_code(folder, _read_json(folder, file), file)
    paths = {file: _inside(folder, file) for file in TOKENIZER_FILES if (folder / file).exists()}
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
    return store.put_artifact(manifest).manifest


def read_safetensors_header(path: Path) -> dict[str, Any]:
    """Return the tensors of a safetensors file by name; raises RequestError unless the file is exactly that.

    Demanded: a JSON header of sane length, known dtypes, sizes that fit shapes, and data without gap, overlap or rest.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or not 2 <= length <= min(size - 8, MAX_HEADER_BYTES):
            raise RequestError(f"{path} is not a safetensors file: header of {length} bytes in a file of {size}")
        text = file.read(length)
    try:
        return parse_header(text, size)
    except ValueError as error:
        raise RequestError(f"{path} {error}") from None


def _weight_files(folder: Path) -> list[str]:
    """Return the names of the weight files (with the index) after comparing them with their headers."""
    names = sorted(path.name for path in folder.iterdir())
    if INDEX in names:
        weight_map = _read_json(folder, INDEX).get("weight_map")
        if (
            not isinstance(weight_map, dict)
            or not weight_map
            or not all(isinstance(v, str) for v in weight_map.values())
        ):
            raise RequestError(f"{folder}/{INDEX} has no weight_map")
        shards = sorted(set(weight_map.values()))
        for shard in shards:
            if "/" in shard or "\\" in shard or not shard.endswith(".safetensors"):
                raise RequestError(f"{folder}/{INDEX} names {shard!r}, which is not a safetensors file of this folder")
            if shard not in names:
                raise RequestError(f"{folder}/{INDEX} names {shard}, which is missing")
        for shard in shards:
            found = set(read_safetensors_header(_inside(folder, shard)))
            wanted = {tensor for tensor, file in weight_map.items() if file == shard}
            if found != wanted:
                differing = ", ".join(sorted(found ^ wanted)[:3])
                raise RequestError(f"{folder}/{shard} and {INDEX} disagree about {differing}")
        return [INDEX, *shards]
    if WEIGHTS in names:
        read_safetensors_header(_inside(folder, WEIGHTS))
        return [WEIGHTS]
    code = [name for name in names if name.endswith(CODE_SUFFIXES)]
    if code:
        raise RequestError(
            f"{folder} has its weights only as {', '.join(code[:3])}, a format that can run code when it is opened; "
            "save the model with safe_serialization=True (model.safetensors)"
        )
    raise RequestError(f"{folder} has no {WEIGHTS}")


def _inside(folder: Path, name: str) -> Path:
    """Return the file's real path; a link may only lead to a place inside the folder (or a hub cache's own blobs)."""
    real = (folder / name).resolve()
    allowed = [folder.resolve()]
    if folder.parent.name == "snapshots":
        allowed.append(folder.parent.parent.resolve() / "blobs")
    if not any(real.is_relative_to(place) for place in allowed):
        raise RequestError(f"{folder / name} is a link that leads out of the folder")
    if not real.is_file():
        raise RequestError(f"{folder / name} is not a file")
    return real


def _read_json(folder: Path, name: str) -> dict[str, Any]:
    if not (folder / name).exists():
        raise RequestError(f"{folder} has no {name}")
    path = _inside(folder, name)
    if path.stat().st_size > MAX_TEXT_BYTES:
        raise RequestError(f"{folder / name} is larger than {MAX_TEXT_BYTES} bytes")
    value = parse_json(path.read_bytes(), folder / name)
    if not isinstance(value, dict):
        raise RequestError(f"{folder / name} is not a JSON object")
    return value


def parse_json(data: bytes, place: Path) -> Any:
    """Parse strict JSON; raises RequestError naming the place."""
    try:
        return json.loads(data, parse_constant=_no_constant, object_pairs_hook=no_duplicates)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"{place}: {error}") from None


def _no_constant(text: str) -> float:
    raise ValueError(f"{text} is not JSON")


def refuse_code(folder: Path, value: Any, file: str = "config.json") -> None:
    """Refuse settings that make a library fetch or run code: auto_map, and kernels named by a hub id."""
    if isinstance(value, dict):
        for key, item in value.items():
            if key in ("auto_map", "custom_pipelines", "trust_remote_code"):
                raise RequestError(
                    f"{folder}/{file} has {key}: code of its own is not run; use a type that transformers has"
                )
            if key.endswith("_implementation") and isinstance(item, str) and "/" in item:
                raise RequestError(f"{folder}/{file}: {key} is {item!r}, code from a hub")
            refuse_code(folder, item, file)
    elif isinstance(value, list):
        for item in value:
            refuse_code(folder, item, file)


def _kind(folder: Path, config: dict[str, Any]) -> Kind:
    """Tell what the model is by the class that wrote it."""
    names = config.get("architectures")
    name = names[0] if isinstance(names, list) and names and isinstance(names[0], str) else ""
    if not isinstance(config.get("model_type"), str):
        raise RequestError(f"{folder}/config.json has no model_type")
    if name.endswith("ForSequenceClassification"):
        labels = config.get("num_labels", len(config.get("id2label") or {}) or 2)
        if labels != 1:
            raise RequestError(f"{folder}/config.json: a reward model has one label, this classifier has {labels}")
        return "reward_model"
    if name.endswith(("ForCausalLM", "LMHeadModel", "ForMaskedLM")) or name == "LlavaForConditionalGeneration":
        return "model"
    raise RequestError(
        f"{folder}/config.json: {name or 'no architecture'} is neither a language model nor a reward model"
    )
