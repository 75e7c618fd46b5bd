"""Distances between two sets of images by features of a classifier (fp64); FID and KID are torchmetrics'.

FID and KID are of one process: no other is asked. N real, M drawn images, F features, K classes.
"""

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

NEIGHBOURS = 5
VENDI_WIDTH = 0.1
ROWS = 256
"""Images whose distances to all training images are held at once."""
STUDENT_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
"""97.5 % quantiles of Student's t for 1 to 9 degrees of freedom."""


@dataclass(frozen=True)
class Interval:
    """A figure and its 95 % interval."""

    value: float
    low: float
    high: float


def fid(real_NF: np.ndarray, drawn_MF: np.ndarray) -> float:
    """Return torchmetrics' Frechet distance of two Gaussians fitted to the features (Heusel et al. 2017)."""
    from torchmetrics.image.fid import FrechetInceptionDistance

    measure = FrechetInceptionDistance(feature=GivenFeatures(real_NF.shape[1]), sync_on_compute=False)
    return float(_compute(measure, real_NF, drawn_MF))


def kid(real_NF: np.ndarray, drawn_MF: np.ndarray) -> float:
    """Return torchmetrics' unbiased kernel distance, kernel (x.y / F + 1)^3 (Binkowski et al. 2018).

    Of sets of unequal size, the larger gives as many at random as the smaller has.
    """
    from torchmetrics.image.kid import KernelInceptionDistance

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Metric `Kernel Inception Distance` will save all extracted features")
        size = min(len(real_NF), len(drawn_MF))
        measure = KernelInceptionDistance(
            feature=GivenFeatures(real_NF.shape[1]), subsets=1, subset_size=size, sync_on_compute=False
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return float(_compute(measure, real_NF, drawn_MF)[0])


class GivenFeatures(nn.Module):
    """The feature network that torchmetrics asks for, where a classifier has made the features already."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.num_features = width

    def forward(self, features_NF: Tensor) -> Tensor:
        """Return the features."""
        return features_NF


def _compute(measure: Any, real_NF: np.ndarray, drawn_MF: np.ndarray) -> Any:
    measure.update(torch.from_numpy(real_NF.astype(np.float64)), real=True)
    measure.update(torch.from_numpy(drawn_MF.astype(np.float64)), real=False)
    return measure.compute()


def precision_recall(real_NF: np.ndarray, drawn_MF: np.ndarray, neighbours: int = NEIGHBOURS) -> tuple[float, float]:
    """Return the shares of drawn images inside the real manifold and of real ones inside the drawn manifold.

    A manifold is the union of balls to each point's k-th neighbour (Kynkaanniemi et al. 2019, equation 1).
    """
    between = distances(real_NF, drawn_MF)
    real_radius, drawn_radius = radii(real_NF, neighbours), radii(drawn_MF, neighbours)
    precision = (between <= real_radius[:, None]).any(axis=0).mean()
    recall = (between <= drawn_radius[None, :]).any(axis=1).mean()
    return float(precision), float(recall)


def coverage(real_NF: np.ndarray, drawn_MF: np.ndarray, neighbours: int = NEIGHBOURS) -> float:
    """Return the share of real images with a drawn one within their k-th neighbour (Naeem et al. 2020, eq. 4)."""
    return float((distances(real_NF, drawn_MF).min(axis=1) <= radii(real_NF, neighbours)).mean())


def distances(left_NF: np.ndarray, right_MF: np.ndarray) -> np.ndarray:
    """Return Euclidean distances [N, M]."""
    left, right = left_NF.astype(np.float64), right_MF.astype(np.float64)
    squares = (left**2).sum(1)[:, None] + (right**2).sum(1)[None] - 2 * left @ right.T
    found: np.ndarray = np.sqrt(np.clip(squares, 0, None))
    return found


def radii(points_NF: np.ndarray, neighbours: int) -> np.ndarray:
    """Return each point's distance to its k-th neighbour, itself not counted."""
    among = distances(points_NF, points_NF)
    np.fill_diagonal(among, 0.0)
    place = min(neighbours, len(points_NF) - 1)
    found: np.ndarray = np.partition(among, place, axis=1)[:, place]
    return found


def interval(values: Sequence[float]) -> Interval:
    """Return the mean of 2 to 10 independent figures and its 95 % interval by Student's t."""
    margin = STUDENT_T[len(values) - 2] * float(np.std(values, ddof=1)) / math.sqrt(len(values))
    mean = float(np.mean(values))
    return Interval(mean, mean - margin, mean + margin)


def vendi_score(images: np.ndarray) -> float:
    """Return the effective number of different images (Friedman & Dieng 2023, definition 3.1).

    The exponential of the entropy of the eigenvalues of K / n; K is a Gaussian kernel of pixel distances whose width is
    a tenth of a pixel's range in root mean square.
    """
    flat = images.reshape(len(images), -1)
    kernel = np.exp(-(distances(flat, flat) ** 2) / flat.shape[1] / (2 * VENDI_WIDTH**2))
    values = np.linalg.eigvalsh(kernel / len(flat))
    positive = values[values > 1e-12]
    return float(np.exp(-(positive * np.log(positive)).sum()))


def class_figures(probabilities_MK: np.ndarray, wanted_M: np.ndarray | None) -> dict[str, float]:
    """Return mean confidence, classes present (at least 1 % of images), and accuracy where classes were asked for."""
    chosen = probabilities_MK.argmax(1)
    shares = np.bincount(chosen, minlength=probabilities_MK.shape[1]) / len(chosen)
    found = {
        "confidence": float(probabilities_MK.max(1).mean()),
        "classes_present": float((shares >= 0.01).sum()),
        "smallest_class_share": float(shares.min()),
    }
    if wanted_M is not None:
        found["class_accuracy"] = float((chosen == wanted_M).mean())
    return found


def copies(training: np.ndarray, held_out: np.ndarray, drawn: np.ndarray) -> dict[str, float]:
    """Compare distances to the nearest training image, in pixels: of drawn images and of held-out real ones.

    `copy_share`: drawn images nearer to a training image than 99 % of the held-out ones are; 0.01 is no copying.
    """
    real, made = (nearest(part, training) for part in (held_out, drawn))
    return {
        "nearest_training": float(np.median(made)),
        "nearest_training_real": float(np.median(real)),
        "copy_share": float((made < np.quantile(real, 0.01)).mean()),
    }


def nearest(images: np.ndarray, training: np.ndarray) -> np.ndarray:
    """Return each image's distance to the nearest training image."""
    flat, among = images.reshape(len(images), -1), training.reshape(len(training), -1)
    return np.concatenate(
        [distances(flat[start : start + ROWS], among).min(axis=1) for start in range(0, len(flat), ROWS)]
    )
