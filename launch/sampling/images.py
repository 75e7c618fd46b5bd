"""What trained models of images do on request: draw grids, reconstruct, interpolate, score; in this process."""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.records.artifacts import find_artifact
from recipes.data.images import Digits, Idx, ImageArrays, ImageFolder, ImageParquet, ImageSource
from recipes.errors import RequestError
from recipes.models.images.architecture import IMAGE_FAMILIES
from trainers.data.sources.image_folder import IMAGE_SUFFIXES
from trainers.store.store import Store

if TYPE_CHECKING:
    from torch import Tensor

    from trainers.models.images.protocol import ImageFacts, ImageFamily

BATCH = 256


@contextlib.contextmanager
def image_model(text: str, store: str | None = None) -> Iterator["ImageFamily"]:
    """The model of images that RUN/STAGE, a store address, a name or a folder means."""
    from trainers.models.images.build import open_family

    if "://" not in text and Path(text).is_dir():
        yield open_family(Path(text))
        return
    opened = Store.open(store)
    manifest = find_artifact(opened, text)
    if manifest.kind not in IMAGE_FAMILIES:
        raise RequestError(f"{text} is of kind {manifest.kind}; a model of images is needed here")
    yield open_family(opened.folder(manifest, "model"))


def draw_grid(
    model: str,
    output: Path,
    *,
    store: str | None = None,
    num_samples: int = 64,
    seed: int = 0,
    label: str | None = None,
    prompts: Sequence[str] = (),
) -> dict[str, Any]:
    """Draw images into a PNG.

    Without `label` a class-conditional model draws each class in turn, without `prompts` one that reads captions those
    of its data; several prompts make a row each.
    """
    from trainers.inference.image_grid import encode_grid
    from trainers.models.images.protocol import grid_seeds

    with image_model(model, store) as family:
        if not family.settings.draws:
            raise RequestError(f"{model} is {family.settings.noun}; it draws no images")
        classes, labels = family.facts.classes, family.turns(num_samples)
        if label is not None and labels is None:
            raise RequestError(f"{model} is not class-conditional; leave --label out")
        if label is not None:
            labels = [_class_number(classes, label)] * num_samples
        seeds = grid_seeds(num_samples, seed)
        columns = len(classes) if labels is not None and label is None and len(classes) <= 32 else None
        if prompts:
            if not family.is_captioned:
                raise RequestError(f"{model} reads no captions; leave --prompt out")
            per_prompt = -(-num_samples // len(prompts))
            captions = [prompts[number // per_prompt] for number in range(num_samples)]
            if len(prompts) * per_prompt - num_samples >= per_prompt:
                message = f"{num_samples} images, {per_prompt} of each prompt, leave none for {prompts[-1]!r}"
                raise RequestError(f"{message}; set --num-samples to a multiple of {len(prompts)}")
            columns = None if len(prompts) == 1 else per_prompt
            images = family.sample(seeds, captions=captions)
        else:
            images = family.sample(seeds, labels)
    _write(output, encode_grid(images, columns))
    return {"file": str(output), "images": num_samples}


def reconstruct(model: str, path: str, output: Path, *, store: str | None = None, count: int = 32) -> dict[str, Any]:
    """Draw a PNG with rows of images and, below each row, what a VAE makes of them."""
    import torch

    from trainers.inference.image_grid import encode_grid

    with image_model(model, store) as family:
        _demand_latents(family, model)
        _, originals = _read(path, family.facts, count)
        rebuilt = family.decode(family.encode(originals)[0])
    columns = min(8, len(originals))
    rows = [
        part[start : start + columns] for start in range(0, len(originals), columns) for part in (originals, rebuilt)
    ]
    filled = [torch.cat([row, torch.zeros(columns - len(row), *row.shape[1:])]) for row in rows]
    _write(output, encode_grid(torch.cat(filled), columns))
    return {"file": str(output), "images": len(originals)}


def interpolate(
    model: str, first: str, second: str, output: Path, *, store: str | None = None, steps: int = 10
) -> dict[str, Any]:
    """Draw a PNG with a row of images from one input to another, through a VAE's latents."""
    from trainers.inference.image_grid import encode_grid

    with image_model(model, store) as family:
        _demand_latents(family, model)
        (_, start), (_, end) = (_read(path, family.facts, 1) for path in (first, second))
        images = family.interpolate(start[0], end[0], steps)
    _write(output, encode_grid(images, steps))
    return {"file": str(output), "images": steps}


def score(model: str, path: str, *, store: str | None = None, seed: int = 0) -> list[dict[str, Any]]:
    """Rank images: by a VAE's bound (nats, lowest first: the least like its data), or by a classifier's confidence.

    The bound is the mean over draws that follow from the seed and the image's place.
    """
    import torch

    with image_model(model, store) as family:
        ranked_by = family.score_name
        if ranked_by is None:
            raise RequestError(f"{model} is {family.settings.noun}; it gives no score of a single image")
        names, images = _read(path, family.facts, None)
        rows: list[dict[str, Any]] = []
        for start in range(0, len(images), BATCH):
            part = images[start : start + BATCH]
            with torch.inference_mode():
                rows += family.scores(part, names[start : start + BATCH], seed)
    return sorted(rows, key=lambda row: float(row[ranked_by]))


def _demand_latents(family: "ImageFamily", model: str) -> None:
    if not family.settings.has_latents:
        raise RequestError(f"{model} is {family.settings.noun}; an autoencoder is needed here")


def _class_number(classes: Sequence[str], label: str) -> int:
    if label not in classes:
        raise RequestError(f"--label {label}: the model knows {', '.join(classes[:32])}")
    return list(classes).index(label)


def _read(path: str, facts: "ImageFacts", limit: int | None) -> tuple[list[str], "Tensor"]:
    """Ids and pixels in [0, 1] of an image, a folder or a file of images, brought to the model's form."""
    import numpy as np
    import torch

    from trainers.data.images import decode_image, read_images

    source = _source(path, facts, limit)
    names: list[str] = []
    arrays: list[np.ndarray] = []
    if Path(path).suffix.lower() in IMAGE_SUFFIXES:
        names, arrays = [Path(path).name], [decode_image(_bytes(path), path, source)]
    else:
        for image in read_images(source, Path.cwd(), seed=0):
            names.append(image.id)
            arrays.append(image.pixels_HWC)
    for name, array in zip(names, arrays, strict=True):
        if array.shape != (facts.height, facts.width, facts.channels):
            raise RequestError(
                f"{name} is {array.shape}; the model takes {(facts.height, facts.width, facts.channels)}"
            )
    if not arrays:
        raise RequestError(f"{path}: no images")
    pixels = np.stack(arrays).transpose(0, 3, 1, 2).astype(np.float32) / 255
    return names, torch.from_numpy(np.ascontiguousarray(pixels))


def _source(path: str, facts: "ImageFacts", limit: int | None) -> ImageSource:
    """The source that a path means, by its kind or the end of its name; `digits` means scikit-learn's."""
    form: dict[str, Any] = {"channels": facts.channels, "limit": limit}
    if facts.height == facts.width:
        form["size"] = facts.height
    if path == "digits":
        return Digits(source="digits", **form)
    name = path.lower()
    if Path(path).is_dir() or Path(path).suffix.lower() in IMAGE_SUFFIXES:
        return ImageFolder(source="image-folder", path=path, labels="none", **form)
    if name.endswith((".npy", ".npz")):
        return ImageArrays(source="arrays", files=[path], **form)
    if name.endswith(".parquet"):
        return ImageParquet(source="parquet", files=[path], **form)
    if name.removesuffix(".gz").endswith(("idx3-ubyte", ".idx")):
        return Idx(source="idx", files=[path], **form)
    raise RequestError(f"{path} is no folder, image, .npy, .npz, .parquet or IDX file, nor the word digits")


def _bytes(path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise RequestError(f"{path}: {error.strerror}") from None


def _write(output: Path, data: bytes) -> None:
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_bytes(data)
    except OSError as error:
        raise RequestError(f"{output}: {error.strerror}") from None
