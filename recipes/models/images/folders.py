"""What the folder of a model of images tells without torch: its family, which files it needs, and what is missing."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from recipes.errors import Finding
from recipes.models.images.architecture import ImageArchitecture
from recipes.models.images.base import SETTINGS
from recipes.problem_codes import Code

FORMAT = 1
TEXT_ENCODER, TEXT_TOKENIZER = "text_encoder", "tokenizer"
"""Where diffusers' pipelines keep what reads captions."""
_MAX_BYTES = 64 << 20
_ARCHITECTURE: TypeAdapter[ImageArchitecture] = TypeAdapter(ImageArchitecture)


@dataclass(frozen=True)
class ImageModelFolder:
    """A model of images in a folder: what it is, and the files that it consists of."""

    architecture: ImageArchitecture
    channels: int
    height: int
    width: int
    classes: tuple[str, ...]
    weights: tuple[str, ...]
    """safetensors files, relative to the folder; a text encoder's, which may be sharded, are not among them."""
    configs: tuple[str, ...]
    """JSON files."""
    reads_captions: bool
    """Whether there is a text encoder, a language model in `text_encoder/` with its tokenizer in `tokenizer/`."""


def read_image_model_folder(path: Path) -> tuple[ImageModelFolder | None, list[Finding]]:
    """Read the folder of a model of images: what it holds, and everything that is wrong with it."""
    if not (path / SETTINGS).is_file():
        message = f"{path} is not the folder of an image model: it has no {SETTINGS}"
        return None, [Finding(Code.NOT_A_MODEL_FOLDER, message)]
    try:
        found = _parse(json.loads(_read(path / SETTINGS)), (path / TEXT_ENCODER).is_dir())
    except (OSError, ValueError, RecursionError) as error:
        return None, [Finding(Code.UNREADABLE_MODEL_FILE, f"{path / SETTINGS}: {error}")]
    missing = [name for name in (*found.weights, *found.configs) if not (path / name).is_file()]
    family = found.architecture.family
    return found, [
        Finding(Code.MISSING_MODEL_FILE, f"{path}: no {name}, which a model of family {family} has") for name in missing
    ]


def _read(path: Path) -> bytes:
    if path.stat().st_size > _MAX_BYTES:
        raise ValueError(f"larger than {_MAX_BYTES} bytes")
    return path.read_bytes()


def _parse(settings: Any, reads_captions: bool) -> ImageModelFolder:
    """Make sense of the settings; raises ValueError saying what is wrong."""
    if not isinstance(settings, dict):
        raise ValueError("not a JSON object")
    if settings.get("format") != FORMAT:
        raise ValueError(f"format is {settings.get('format')!r}; this version reads {FORMAT}")
    try:
        architecture = _ARCHITECTURE.validate_python(settings.get("architecture"))
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in ("architecture", *first["loc"]))
        raise ValueError(f"{place}: {first['msg']}") from None
    sides: dict[str, Any] = {name: settings.get(name) for name in ("channels", "height", "width")}
    for name, side in sides.items():
        if type(side) is not int or side < 1:
            raise ValueError(f"{name} is {side!r}; a whole number above 0 is needed")
    classes = settings.get("classes")
    if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
        raise ValueError("classes is not a list of names")
    if "latent_scale" in settings and type(settings["latent_scale"]) is not float:
        raise ValueError("latent_scale is not a number")
    weights, configs = architecture.files(is_latent="latent_scale" in settings)
    if reads_captions:
        configs = (*configs, f"{TEXT_ENCODER}/config.json", f"{TEXT_TOKENIZER}/tokenizer.json")
    return ImageModelFolder(
        architecture, **sides, classes=tuple(classes), weights=weights, configs=configs, reads_captions=reads_captions
    )
