"""Decoders with a vision tower, which come from outside: what their folders tell without torch, and their size."""

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recipes.errors import Finding
from recipes.models.base import ModelType, TextFamily
from recipes.models.decoder import ROTARY_MODULES
from recipes.models.model_kinds import has_images, trained_kind
from recipes.models.type_table import find_record, type_records
from recipes.problem_codes import Code

CLIP = "clip_vision_model"
TOWER_TYPES = (CLIP, "siglip_vision_model")
TEXT_TYPES = tuple(
    name
    for name, record in type_records().items()
    if trained_kind(record.classes) == "language_model"
    and record.packing == record.decoding == "bias"
    and record.cpu_attention == "block_causal"
)
"""Decoders that one additive mask does for, as the forward with images has it."""
COMPOSED = {"llava": {"text_config": TEXT_TYPES, "vision_config": TOWER_TYPES}, "idefics3": {"text_config": TEXT_TYPES}}
"""Types that are made of models of other types, and which of these they may be."""
SIZED = ("llava",)
"""Types whose tower gives every image as many features, by its own configuration."""
PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json")
"""How images become pixel values and tokens; the second one where the first does not hold the image processor."""


@dataclass(frozen=True)
class VisionFacts:
    """What is known of a model's images; None: its files leave it to defaults."""

    image_token: str
    tokens_per_image: int | None = None
    """Of any image; None: it depends on the image, or is not known."""
    grid: "Grid | None" = None

    def tokens(self, height: int, width: int) -> int | None:
        """Tokens of an image of a size in pixels; None: only the processor itself knows."""
        return self.tokens_per_image if self.grid is None else self.grid.tokens(height, width)


@dataclass(frozen=True)
class Grid:
    """How a processor cuts an image into squares of one token each, whose number it keeps within bounds (Qwen2-VL)."""

    side: int
    """Of a square, in pixels."""
    least: int
    most: int
    """Bounds of the pixels of the resized image."""

    def tokens(self, height: int, width: int) -> int:
        """Tokens of an image of a size in pixels, as transformers' `smart_resize` of Qwen2-VL makes them."""
        rows, columns = max(round(height / self.side), 0), max(round(width / self.side), 0)
        area = rows * columns * self.side**2
        if area > self.most:
            shrink = math.sqrt(height * width / self.most)
            rows, columns = (max(1, math.floor(size / shrink / self.side)) for size in (height, width))
        elif area < self.least:
            grow = math.sqrt(self.least / (height * width))
            rows, columns = (math.ceil(size * grow / self.side) for size in (height, width))
        return rows * columns


def read_vision(
    path: Path, config: dict[str, Any], vocabulary: Mapping[str, int] | None
) -> tuple[VisionFacts, list[Finding]]:
    """The facts of a vision-language model's folder by its `config.json`, and what is wrong with it."""
    kind = str(config["model_type"])
    problems = [*_unknown_parts(path, config)]
    processor = _read(path / "processor_config.json")
    images = _part(processor, "image_processor") or _read(path / "preprocessor_config.json")
    if not images:
        message = f"{path}: neither processor_config.json nor preprocessor_config.json holds an image processor"
        problems.append(Finding(Code.MISSING_MODEL_FILE, message))
    elif not (processor if kind in SIZED else read_processor_class(path)):
        message = f"{path}: no readable processor_config.json, which defines how images become tokens"
        problems.append(Finding(Code.MISSING_MODEL_FILE, message))
    for name, part in (("processor_config.json", processor), ("preprocessor_config.json", images)):
        if "auto_map" in part:
            problems.append(
                Finding(Code.REMOTE_CODE, f"{path / name}: it asks for its own code (auto_map), which is never run")
            )
    number = config.get("image_token_index", config.get("image_token_id"))
    if number is None and (record := find_record(kind)) is not None and "image_token_id" in record.keys:
        number = record.keys["image_token_id"][1]
    named = next((token for token, known in (vocabulary or {}).items() if known == number), "<image>")
    token = processor.get("image_token", "<image>" if kind in SIZED else named)
    findings = [] if vocabulary is None else [image_token_rule(token, vocabulary.get(token), number)]
    tokens = None
    if kind in SIZED:
        drops_first = config.get("vision_feature_select_strategy", "default") == "default"
        written, made = _written_tokens(processor, images), _made_tokens(_part(config, "vision_config"), drops_first)
        findings.append(image_size_rule(written, made))
        tokens = made if written is None else written
    problems += [found.in_file(path) for found in findings if found is not None]
    return VisionFacts(token, tokens, _grid(images)), problems


def read_processor_class(path: Path) -> str:
    """The processor's class as a folder's files name it; empty where none does."""
    for name in ("processor_config.json", "preprocessor_config.json", "tokenizer_config.json"):
        found = _read(path / name).get("processor_class")
        if isinstance(found, str):
            return found
    return ""


def _unknown_parts(path: Path, config: dict[str, Any]) -> Iterator[Finding]:
    for key, known in COMPOSED.get(str(config["model_type"]), {}).items():
        if (found := _part(config, key).get("model_type")) not in known:
            message = f"{path / 'config.json'}: {key}.model_type {found!r} is not one of {', '.join(known)}"
            yield Finding(Code.UNSUPPORTED_MODEL, message)


def _grid(images: dict[str, Any]) -> Grid | None:
    """The grid of an image processor that merges patches; None for another one."""
    patch, merge, size = images.get("patch_size"), images.get("merge_size"), _part(images, "size")
    least = images.get("min_pixels", size.get("shortest_edge", 56 * 56))
    most = images.get("max_pixels", size.get("longest_edge", 28 * 28 * 1280))
    if not all(isinstance(number, int) and number > 0 for number in (patch, merge, least, most)):
        return None
    return Grid(int(patch) * int(merge), int(least), int(most))  # type: ignore[arg-type]


def image_token_rule(token: str, known: int | None, number: int | None) -> Finding | None:
    """What is wrong with an image's token: `known` is its id for the tokenizer, `number` in config.json."""
    if known == number:
        return None
    found = "has no such token" if known is None else f"numbers it {known}"
    message = f"config.json marks images by token {number}; the tokenizer {found}: {token}"
    return Finding(Code.IMAGE_TOKEN_MISMATCH, message)


def image_size_rule(written: int | None, made: int | None) -> Finding | None:
    """What is wrong with the tokens that the processor writes for an image and the features that the tower gives."""
    if written is None or made is None or written == made:
        return None
    message = f"the processor writes {written} tokens for an image, the vision tower gives {made}"
    return Finding(Code.IMAGE_TOKEN_MISMATCH, message)


def has_class_embedding(model_type: object) -> bool:
    """Whether a tower of the type has one feature more than patches: CLIP's has, SigLIP's has not."""
    return model_type == CLIP


def _made_tokens(tower: dict[str, Any], drops_first: bool) -> int | None:
    """Features that the tower gives for an image: one a patch; CLIP's class embedding precedes them."""
    size, patch = tower.get("image_size"), tower.get("patch_size")
    if not isinstance(size, int) or not isinstance(patch, int) or patch < 1:
        return None
    return int((size // patch) ** 2 + (has_class_embedding(tower.get("model_type"))) - drops_first)


def _written_tokens(processor: dict[str, Any], images: dict[str, Any]) -> int | None:
    """Tokens that transformers' LlavaProcessor writes for an image."""
    size = images.get("crop_size" if images.get("do_center_crop", False) else "size")
    size = {"height": size, "width": size} if isinstance(size, int) else size
    patch = processor.get("patch_size")
    if not isinstance(size, dict) or not isinstance(patch, int) or patch < 1:
        return None
    height, width = size.get("height"), size.get("width")
    if not isinstance(height, int) or not isinstance(width, int):
        return None
    drops_first = processor.get("vision_feature_select_strategy") == "default"
    return int((height // patch) * (width // patch) + processor.get("num_additional_image_tokens", 0) - drops_first)


def _part(value: dict[str, Any], key: str) -> dict[str, Any]:
    found = value.get(key)
    return found if isinstance(found, dict) else {}


def _read(path: Path) -> dict[str, Any]:
    """The file's object; nothing where it is missing or none: whoever loads it reports what is wrong."""
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def tower_parameters(config: Mapping[str, Any]) -> int:
    """Parameters of a CLIP or SigLIP tower and of the projector, two linear modules, of a `config.json`."""
    tower = config["vision_config"]
    width, inner, layers = (int(tower[key]) for key in ("hidden_size", "intermediate_size", "num_hidden_layers"))
    patch, is_clip = int(tower["patch_size"]), has_class_embedding(tower["model_type"])
    places = (int(tower["image_size"]) // patch) ** 2 + is_clip
    block = 4 * (width * width + width) + 2 * width * inner + inner + width + 4 * width
    embedding = width * int(tower.get("num_channels", 3)) * patch * patch + places * width + width
    norms = 4 * width if is_clip else 2 * width
    count = layers * block + embedding + norms
    if not is_clip and tower.get("vision_use_head", True):  # attention pooling: a probe, an attention, a norm, an MLP
        count += width + 4 * (width * width + width) + 2 * width + 2 * width * inner + inner + width
    chosen = config.get("vision_feature_layer", -2)
    read = width * (len(chosen) if isinstance(chosen, list) else 1)
    made = int(config["text_config"]["hidden_size"])
    bias = bool(config.get("multimodal_projector_bias", True))
    return int(count + read * made + made * made + 2 * made * bias)


VISION_LANGUAGE = TextFamily(
    name="vision_language",
    noun="a vision-language model",
    types={
        "llava": ModelType(
            {"LlavaForConditionalGeneration": "model"},
            None,
            (*ROTARY_MODULES, "out_proj", "fc1", "fc2", "linear_1", "linear_2"),
        ),
        **{
            name: ModelType(
                {record.classes[trained_kind(record.classes)]: "model"}, None, record.linears, lacks=record.lacks
            )
            for name, record in type_records().items()
            if has_images(record.classes)
        },
    },
    auto_class="AutoModelForImageTextToText",
    tuning_role="image_text",
    keys=("parts",),
    continues=True,
)
