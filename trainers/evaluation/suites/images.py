"""Suite `images`: drawn images against held-out real ones by a classifier's features, and against copying."""

import base64
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from recipes.data.images import missing_captions, shape_rule
from recipes.errors import RequestError
from recipes.stages.evaluate import Evaluate, compared_images
from trainers.data.dataset import Dataset
from trainers.data.layouts.images import Images, scaled
from trainers.data.order import drawn_rows
from trainers.evaluation.image_metrics import (
    Interval,
    class_figures,
    copies,
    coverage,
    fid,
    interval,
    kid,
    precision_recall,
)
from trainers.evaluation.suite import Measured, Parts
from trainers.inference.image_grid import encode_grid
from trainers.models.images.build import open_family
from trainers.models.images.protocol import ImageFamily
from trainers.runtime.observer import Observer
from trainers.runtime.randomness import stream_seed
from trainers.training.context import StageContext, data_request, model_folder, open_dataset

BATCH = 256
REAL_DRAWS = 5
"""Disjoint real sets whose distance to the held-out one says what a distance of real images is."""


def measure_images(spec: Evaluate, context: StageContext, labels: Sequence[str], parts: Parts) -> Measured:
    """Return metrics by `model.metric` and one grid for each model; rank 0 computes, the others return nothing.

    The distances compare as many drawn images as real ones, the smaller of `num_images` and the held-out images,
    and are means over `num_draws` independent draws.
    """
    use = spec.get_source("images")
    training, real = (
        open_dataset(context, data_request(context, replace(use, held_out=held_out), Images()))
        for held_out in (False, True)
    )
    if (finding := compared_images(len(real), len(training))) is not None:
        raise RequestError(f"images: {finding}")
    if context.ranks.rank != 0:
        return Measured({})
    context.observer.phase("features")
    judge = open_family(model_folder(context, "features"))
    _require_shape("features", judge.facts.shape, real)
    count = min(spec.num_images, len(real))
    rows = drawn_rows(real.digest, context.seed, count, len(real))
    kept = _pixels(real, rows)
    _, real_features = judge_images(judge, kept)
    baseline = real_baseline(judge, training, real_features, context.seed)
    metrics: dict[str, float] = {"images": float(count), "draws": float(spec.num_draws)}
    samples: list[dict[str, Any]] = []
    for index, label in enumerate(labels):
        model = open_family(model_folder(context, f"of.{index}"))
        _require_shape(f"of.{index}", model.facts.shape, real)
        wanted = model.turns(count)
        captions = _captions_of(model, real, rows)
        if captions is not None:
            wanted = [int(label) for label in real.labels_N[np.asarray(rows)]] if real.classes else None
        drawn = []
        for draw in range(spec.num_draws):
            place = parts.place(index, draw, spec.num_draws)
            # The stream keeps its first name: by another, the same recipe would draw other images.
            seeds = [stream_seed(context.seed, "exam", draw, place) for place in range(count)]
            drawn.append(_draw(model, seeds, wanted, captions, context.observer, place))
        context.observer.phase("features")
        classes = model.facts.classes if captions is None else real.classes
        found = compare(judge, real_features, drawn, _named(classes, judge, wanted), baseline)
        found |= copies(scaled(training.images_NCHW), kept.numpy(), torch.cat(drawn).numpy())
        metrics |= {f"{label}.{name}": value for name, value in found.items()}
        grid = base64.b64encode(encode_grid(drawn[0][: max(spec.num_samples, 1) * 8])).decode()
        samples.append({"model": label, "step": 0, "image": f"data:image/png;base64,{grid}", "caption": label})
    return Measured(metrics, samples)


def compare(
    judge: ImageFamily,
    real_features: np.ndarray,
    drawn: Sequence[Tensor],
    wanted: np.ndarray | None,
    baseline: Interval,
) -> dict[str, float]:
    """Return distances, shares and class figures of independent draws [M, C, H, W] from one model."""
    judged = [judge_images(judge, images) for images in drawn]
    distance = interval([fid(real_features, features) for _, features in judged])
    kernel = interval([kid(real_features, features) for _, features in judged])
    shares = np.array([precision_recall(real_features, features) for _, features in judged]).mean(0)
    everything = np.concatenate([probabilities for probabilities, _ in judged])
    return {
        "fid": distance.value,
        "fid_low": distance.low,
        "fid_high": distance.high,
        "fid_real": baseline.value,
        "fid_real_low": baseline.low,
        "fid_real_high": baseline.high,
        "fid_ratio": distance.value / baseline.value,
        "kid": kernel.value,
        "kid_low": kernel.low,
        "kid_high": kernel.high,
        "precision": float(shares[0]),
        "recall": float(shares[1]),
        "coverage": float(np.mean([coverage(real_features, features) for _, features in judged])),
        **class_figures(everything, None if wanted is None else np.tile(wanted, len(drawn))),
    }


@torch.no_grad()
def judge_images(judge: ImageFamily, images: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Return (probabilities [M, K], features [M, F])."""
    parts = [judge.predict(part) for part in images.split(BATCH)]
    return tuple(torch.cat([part[place] for part in parts]).numpy() for place in range(2))  # type: ignore[return-value]


def real_baseline(judge: ImageFamily, training: Dataset, real_features: np.ndarray, seed: int) -> Interval:
    """Return the distance of the held-out images to as many training images, over `REAL_DRAWS` draws."""
    count = min(len(real_features), len(training))
    found = []
    for draw in range(REAL_DRAWS):
        rows = drawn_rows(training.digest, stream_seed(seed, "real", draw), count, len(training))
        found.append(fid(real_features, judge_images(judge, _pixels(training, rows))[1]))
    return interval(found)


def _draw(
    model: ImageFamily,
    seeds: Sequence[int],
    wanted: Sequence[int] | None,
    captions: Sequence[str] | None,
    observer: Observer,
    place: Mapping[str, float],
) -> Tensor:
    """Draw by captions where the model reads them, else by classes or without any."""
    parts = []
    for start in range(0, len(seeds), BATCH):
        observer.phase("draw", rows=start, rows_planned=len(seeds), **place)
        part = slice(start, start + BATCH)
        if captions is None:
            parts.append(model.sample(seeds[part], wanted and wanted[part]))
        else:
            parts.append(model.sample(seeds[part], captions=captions[part]))
    return torch.cat(parts)


def _captions_of(model: ImageFamily, real: Dataset, rows: Sequence[int]) -> list[str] | None:
    """Give the captions of the real images that drawn ones are compared with; None: the model reads none."""
    if not model.is_captioned:
        return None
    if not real.captions:
        raise RequestError(f"images: {missing_captions('the model')}")
    return [real.captions[row] for row in rows]


def _named(classes: Sequence[str], judge: ImageFamily, wanted: list[int] | None) -> np.ndarray | None:
    """Give the wanted classes by the judge's numbers; None where nothing was asked for or the names differ."""
    if wanted is None or not set(classes) <= set(judge.facts.classes):
        return None
    places = [judge.facts.classes.index(name) for name in classes]
    return np.array([places[place] for place in wanted])


def _pixels(dataset: Dataset, rows: Sequence[int]) -> Tensor:
    return torch.from_numpy(scaled(dataset.images_NCHW[np.asarray(rows)]))


def _require_shape(field: str, shape: tuple[int, int, int], real: Dataset) -> None:
    if (finding := shape_rule(shape, real.shape, "images")) is not None:
        raise RequestError(f"{field}: {finding}")
