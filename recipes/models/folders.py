"""What a local model or tokenizer folder tells without torch: kind, type, lengths, tokens, and what is missing."""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from recipes.artifact_kinds import OutputKind
from recipes.errors import Finding
from recipes.models.architecture import MODEL_TYPES
from recipes.models.folder_classes import ModelClass, find_class
from recipes.models.folder_tensors import missing_layers
from recipes.models.images.architecture import IMAGE_FAMILIES
from recipes.models.images.base import SETTINGS
from recipes.models.images.folders import TEXT_ENCODER, ImageModelFolder, read_image_model_folder
from recipes.models.model_kinds import has_images
from recipes.models.safetensors_headers import read_shapes
from recipes.models.type_table import find_record, ties_head
from recipes.models.vision_language import VisionFacts, read_vision
from recipes.problem_codes import Code
from recipes.tokenizers.token_contract import (
    TokenizerFacts,
    configured_ends,
    find_end_token,
    find_named_tokens,
    find_pad_token,
    find_template,
    missing_token,
    token_problems,
    token_text,
)

MAX_JSON_BYTES = 64 << 20
POSITION_KEYS = ("max_position_embeddings", "n_positions")


@dataclass(frozen=True)
class FolderFacts:
    """A folder in the Hugging Face layout: its findings and, where they could be read, its facts."""

    problems: list[Finding] = field(default_factory=list)
    type: str | None = None
    positions: int | None = None
    tokenizer: TokenizerFacts | None = None
    vision: VisionFacts | None = None
    model_class: ModelClass | None = None
    configured_ends: frozenset[int] = frozenset()
    """End tokens that config.json and generation_config.json name."""
    kind: OutputKind | None = None
    """What the folder's model is as an input of a stage."""
    images: ImageModelFolder | None = None
    is_tied: bool = False
    """Whether head and embedding of its language model are one tensor."""


@lru_cache(maxsize=32)
def read_folder(path: Path, wants: str) -> FolderFacts:
    """Read a folder that should hold a model of the wanted kind, or a `tokenizer`; all that is wrong is found."""
    if not path.is_dir():
        message = f"there is no folder {path}" if not path.exists() else f"{path} is not a folder"
        return FolderFacts([Finding(Code.MISSING_FOLDER, message)])
    problems: list[Finding] = []
    if wants == "tokenizer":
        tokenizer = _read_tokenizer(path, problems)
        return FolderFacts(problems, tokenizer=tokenizer)
    if (path / SETTINGS).exists() or wants in IMAGE_FAMILIES:
        return _read_images(path)
    if (path / "adapter_config.json").is_file() and not (path / "config.json").exists():
        advice = f"take its merged model into the store: trainwright store import {path} --merge --name NAME"
        message = f"{path} holds an adapter, not a whole model"
        return FolderFacts([Finding(Code.NOT_A_MODEL_FOLDER, message, advice)])
    return _read_language_model(path)


def _read_images(path: Path) -> FolderFacts:
    found, problems = read_image_model_folder(path)
    for name in () if found is None else found.weights:
        if (path / name).is_file():
            _note_shapes(path / Path(name).parent, Path(name).name, problems)
    if found is not None and found.reads_captions:
        _note_shapes(path / TEXT_ENCODER, "model.safetensors", problems)
    return FolderFacts(problems, kind=None if found is None else found.architecture.kind(), images=found)


def _read_language_model(path: Path) -> FolderFacts:
    problems: list[Finding] = []
    tokenizer = _read_tokenizer(path, problems)
    missing = None if tokenizer is None else missing_token(tokenizer.eos_token, tokenizer.pad_token)
    if missing is not None:
        problems.append(missing.in_file(path))
    config = _read_json(path / "config.json", problems)
    kind, model_class = None, None
    if config is not None:
        kind = config.get("model_type") if config.get("model_type") in MODEL_TYPES else None
        try:
            model_class = find_class(config)
            if kind is None:
                known = ", ".join(MODEL_TYPES)
                problems.append(
                    Finding(
                        Code.UNSUPPORTED_MODEL,
                        f"{path / 'config.json'}: model_type {config['model_type']!r} is not one of {known}",
                    )
                )
        except ValueError as error:
            problems.append(Finding(Code.UNSUPPORTED_MODEL, f"{path / 'config.json'}: {error}"))
        if "auto_map" in config:
            problems.append(
                Finding(
                    Code.REMOTE_CODE,
                    f"{path / 'config.json'}: it asks for its own code (auto_map), which is never run",
                )
            )
    configured: frozenset[int] = frozenset()
    if tokenizer is not None:
        generation = (
            _read_json(path / "generation_config.json", problems)
            if (path / "generation_config.json").is_file()
            else None
        )
        configured = configured_ends(config or {}, generation or {})
        problems += [
            found._replace(message=f"{path}: {found.message}")
            for found in token_problems(tokenizer, config, generation)
        ]
    shapes = _read_weights(path, problems)
    if shapes is not None and config is not None and kind is not None:
        problems += [Finding(Code.LAYER_MISMATCH, f"{path}: {message}") for message in missing_layers(config, shapes)]
    vision: VisionFacts | None = None
    if config is not None and kind is not None and MODEL_TYPES[kind].reads_images:
        vision, findings = read_vision(path, config, tokenizer.vocabulary if tokenizer is not None else None)
        problems += findings
    positions = None if config is None else config_positions(config)
    found = None if model_class is None else model_class.kind
    is_tied = config is not None and ties_head(config)
    facts = (kind, positions, tokenizer, vision, model_class, configured, found)
    return FolderFacts(problems, *facts, is_tied=is_tied)


def _read_weights(path: Path, problems: list[Finding]) -> dict[str, tuple[int, ...]] | None:
    if any((path / name).is_file() for name in ("model.safetensors", "model.safetensors.index.json")):
        return _note_shapes(path, "model.safetensors", problems)
    is_pickle = (path / "pytorch_model.bin").exists()
    reason = " (pytorch_model.bin is pickle, which is never read; convert it to safetensors)" if is_pickle else ""
    problems.append(Finding(Code.MISSING_MODEL_FILE, f"{path}: no model.safetensors{reason}"))
    return None


def _note_shapes(folder: Path, weights: str, problems: list[Finding]) -> dict[str, tuple[int, ...]] | None:
    try:
        return read_shapes(folder, weights)
    except ValueError as error:
        problems.append(Finding(Code.UNREADABLE_MODEL_FILE, str(error)))
        return None


def config_positions(config: Mapping[str, Any]) -> int | None:
    """Most tokens that the model of a `config.json` is made for; None where that is not given."""
    text = config.get("text_config")
    part = text if isinstance(text, dict) else config
    record = find_record(part.get("model_type"))
    record = None if record is not None and has_images(record.classes) else record  # keys of its text in one
    own = None if record is None else record.shape.get("positions")
    keys = POSITION_KEYS if record is None else () if own is None else (own, *POSITION_KEYS)
    found: int | None = next((part[key] for key in keys if isinstance(part.get(key), int)), None)
    if found is not None and record is not None and record.first_position == "after_pad":
        pad = part.get("pad_token_id")
        return found - 1 - (pad if isinstance(pad, int) else 1)  # positions are numbered from there
    return found


def _read_json(path: Path, problems: list[Finding]) -> dict[str, Any] | None:
    try:
        if not path.is_file():
            problems.append(Finding(Code.MISSING_MODEL_FILE, f"{path.parent}: no {path.name}"))
            return None
        if path.stat().st_size > MAX_JSON_BYTES:
            problems.append(Finding(Code.UNREADABLE_MODEL_FILE, f"{path}: larger than {MAX_JSON_BYTES} bytes"))
            return None
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        problems.append(Finding(Code.UNREADABLE_MODEL_FILE, f"{path}: not readable as JSON ({error})"))
        return None
    if not isinstance(value, dict):
        problems.append(Finding(Code.UNREADABLE_MODEL_FILE, f"{path}: not a JSON object"))
        return None
    return value


def sentencepiece_conversion(path: Path) -> str:
    """How a tokenizer of sentencepiece becomes a tokenizer.json; empty where there is none."""
    if find_sentencepiece(path) is None:
        return ""
    return f"take the folder in, which converts its sentencepiece model: trainwright store import {path} --name NAME"


def find_sentencepiece(path: Path) -> str | None:
    """The name of the sentencepiece model of a folder that has no tokenizer.json."""
    names = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model")
    found = next((name for name in names if os.path.isfile(path / name)), None)  # False for a path that is too long
    return None if os.path.isfile(path / "tokenizer.json") else found


def _read_tokenizer(path: Path, problems: list[Finding]) -> TokenizerFacts | None:
    file = path / "tokenizer.json"
    if not file.is_file():
        problems.append(Finding(Code.MISSING_MODEL_FILE, f"{path}: no tokenizer.json", sentencepiece_conversion(path)))
        return None
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises a bare Exception for every malformed file
        problems.append(Finding(Code.UNREADABLE_MODEL_FILE, f"{file}: not readable by tokenizers ({str(error)[:160]})"))
        return None
    config: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if (path / name).is_file():
            config |= _read_json(path / name, problems) or {}
    eos_token, vocabulary = find_end_token(config), tokenizer.get_vocab(with_added_tokens=True)
    special = frozenset(token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special)
    return TokenizerFacts(
        eos_token=eos_token,
        pad_token=find_pad_token(token_text(config.get("pad_token")), eos_token, vocabulary),
        special_tokens=special,
        vocabulary=vocabulary,
        chat_template=find_template(config, _read_text(path / "chat_template.jinja", problems)),
        bos_token=token_text(config.get("bos_token")),
        named_tokens=find_named_tokens(config),
    )


def _read_text(path: Path, problems: list[Finding]) -> str | None:
    try:
        return path.read_text(encoding="utf-8") if path.is_file() else None
    except (OSError, UnicodeDecodeError) as error:
        problems.append(Finding(Code.UNREADABLE_MODEL_FILE, f"{path}: not readable as text ({error})"))
        return None
