"""Files of others: what could be code, or is not what it says it is, is refused by name."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from recipes.errors import RequestError
from recipes.models.safetensors_headers import no_duplicates, read_header

WEIGHTS = "model.safetensors"
_GGUF = b"GGUF"
_CODE_SUFFIXES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".msgpack", ".h5", ".npz")
MAX_TEXT_BYTES = 256 << 20
_CODE_KEYS = ("auto_map", "custom_pipelines", "trust_remote_code")
_FILE_KEYS = ("transformers_weights", "configuration_files")
"""Of config.json: transformers opens what they name instead of the files that were checked."""
_MODULE_KEYS = ("megatron_config",)
"""Of adapter_config.json: with it, peft imports the module that `megatron_core` names."""


def is_gguf(path: Path) -> bool:
    """Tell whether a path is a GGUF file, by its first bytes."""
    if not os.path.isfile(path):  # unlike is_file, no error for a path that cannot be
        return False
    with path.open("rb") as file:
        return file.read(len(_GGUF)) == _GGUF


def read_safetensors_header(path: Path, place: Path | None = None) -> dict[str, Any]:
    """Return the tensors of a safetensors file by name; raises RequestError unless the file is exactly that.

    Demanded: a JSON header of sane length, known dtypes, sizes that fit shapes, and data without gap, overlap or rest.
    Errors name `place`, where the user knows the file.
    """
    try:
        return read_header(path)
    except ValueError as error:
        raise RequestError(f"{place or path} {error}") from None


Find = Callable[[Path, str], Path]
"""From a folder and a name in it to the file's real path; raises RequestError where there is none."""


def file_inside(folder: Path, name: str) -> Path:
    """Return the file's real path; a link may only lead to a place inside the folder (or a hub cache's own blobs)."""
    real = _real(folder / name)
    allowed = [folder.resolve()]
    if folder.parent.name == "snapshots":
        allowed.append(folder.parent.parent.resolve() / "blobs")
    if not any(real.is_relative_to(place) for place in allowed):
        raise RequestError(f"{folder / name} is a link that leads out of the folder")
    return linked_file(folder, name)


def linked_file(folder: Path, name: str) -> Path:
    """Return the file's real path, wherever a link leads."""
    real = _real(folder / name)
    if not real.is_file():
        raise RequestError(f"{folder / name} is not a file")
    return real


def _real(path: Path) -> Path:
    """Return where a path's links lead; one in a circle leads nowhere, and is no error as it is with `resolve`."""
    return Path(os.path.realpath(path))


def weight_files(folder: Path, find: Find, weights: str = WEIGHTS) -> dict[str, Path]:
    """Return the weight files (shards with their index) by name after comparing them with their headers.

    Nothing but safetensors counts; raises RequestError naming the file.
    """
    names = sorted(path.name for path in folder.iterdir())
    index = f"{weights}.index.json"
    if weights in names:
        path = find(folder, weights)
        read_safetensors_header(path, folder / weights)
        return {weights: path}
    if index in names:
        weight_map = read_json(folder, index, find).get("weight_map")
        if (
            not isinstance(weight_map, dict)
            or not weight_map
            or not all(isinstance(v, str) for v in weight_map.values())
        ):
            raise RequestError(f"{folder}/{index} has no weight_map")
        shards = sorted(set(weight_map.values()))
        for shard in shards:
            if "/" in shard or "\\" in shard or not shard.endswith(".safetensors"):
                raise RequestError(f"{folder}/{index} names {shard!r}, which is not a safetensors file of this folder")
            if shard not in names:
                raise RequestError(f"{folder}/{index} names {shard}, which is missing")
        paths = {shard: find(folder, shard) for shard in shards}
        for shard in shards:
            found = set(read_safetensors_header(paths[shard], folder / shard))
            wanted = {tensor for tensor, file in weight_map.items() if file == shard}
            if found != wanted:
                differing = ", ".join(sorted(found ^ wanted)[:3])
                raise RequestError(f"{folder}/{shard} and {index} disagree about {differing}")
        return {index: find(folder, index), **paths}
    code = [name for name in names if name.endswith(_CODE_SUFFIXES)]
    if code:
        raise RequestError(
            f"{folder} has its weights only as {', '.join(code[:3])}, a format that can run code when it is opened; "
            f"save the model with safe_serialization=True ({weights})"
        )
    raise RequestError(f"{folder} has no {weights}")


def read_json(folder: Path, name: str, find: Find) -> dict[str, Any]:
    """Return the JSON object that a folder's file holds; raises RequestError naming it."""
    if not (folder / name).exists():
        raise RequestError(f"{folder} has no {name}")
    path = find(folder, name)
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
    """Refuse settings that make a library fetch, import or run code, or open files of their choice."""
    if isinstance(value, dict):
        for key, item in value.items():
            if key in _CODE_KEYS:
                raise RequestError(
                    f"{folder}/{file} has {key}: code of its own is not run; use a type that transformers has"
                )
            if key in _FILE_KEYS or (key in _MODULE_KEYS and item):
                raise RequestError(f"{folder}/{file} has {key}: it makes a library open or import what the file says")
            if key.endswith("_implementation") and isinstance(item, str) and "/" in item:
                raise RequestError(f"{folder}/{file}: {key} is {item!r}, code from a hub")
            refuse_code(folder, item, file)
    elif isinstance(value, list):
        for item in value:
            refuse_code(folder, item, file)
