"""Distances between two sets of pictures by features of a classifier (pure; fp64).

N real, M drawn pictures, F features, K classes.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

NEIGHBOURS = 5
RESAMPLES = 100
VENDI_WIDTH = 0.1


@dataclass(frozen=True)
class Interval:
    """A figure and its 95 % interval."""

    value: float
    low: float
    high: float


def fid(real_NF: np.ndarray, drawn_MF: np.ndarray) -> float:
    """Return the Frechet distance of two Gaussians fitted to the features (Heusel et al. 2017, equation 6).

    |m - n|^2 + tr(C + D - 2 (C D)^(1/2)); the trace of the root is the sum of the roots of the eigenvalues of C D.
    """
    real, drawn = real_NF.astype(np.float64), drawn_MF.astype(np.float64)
    first, second = np.cov(real, rowvar=False), np.cov(drawn, rowvar=False)
    roots = np.sqrt(np.clip(np.linalg.eigvals(first @ second).real, 0, None))
    gap = real.mean(0) - drawn.mean(0)
    return float(max(0.0, gap @ gap + np.trace(first) + np.trace(second) - 2 * roots.sum()))


def kid(real_NF: np.ndarray, drawn_MF: np.ndarray) -> float:
    """Return the unbiased squared maximum mean discrepancy with the kernel (x.y / F + 1)^3 (Binkowski et al. 2018)."""
    real, drawn = real_NF.astype(np.float64), drawn_MF.astype(np.float64)
    count, others = len(real), len(drawn)

    def kernel(left: np.ndarray, right: np.ndarray) -> np.ndarray:
        found: np.ndarray = (left @ right.T / left.shape[1] + 1) ** 3
        return found

    among_real, among_drawn = kernel(real, real), kernel(drawn, drawn)
    within = (among_real.sum() - np.trace(among_real)) / (count * (count - 1))
    within += (among_drawn.sum() - np.trace(among_drawn)) / (others * (others - 1))
    return float(within - 2 * kernel(real, drawn).mean())


def precision_recall(real_NF: np.ndarray, drawn_MF: np.ndarray, neighbours: int = NEIGHBOURS) -> tuple[float, float]:
    """Return the shares of drawn pictures inside the real manifold and of real ones inside the drawn manifold.

    A manifold is the union of balls to each point's k-th neighbour (Kynkaanniemi et al. 2019, equation 1).
    """
    between = distances(real_NF, drawn_MF)
    real_radius, drawn_radius = radii(real_NF, neighbours), radii(drawn_MF, neighbours)
    precision = (between <= real_radius[:, None]).any(axis=0).mean()
    recall = (between <= drawn_radius[None, :]).any(axis=1).mean()
    return float(precision), float(recall)


def coverage(real_NF: np.ndarray, drawn_MF: np.ndarray, neighbours: int = NEIGHBOURS) -> float:
    """Return the share of real pictures with a drawn one within their k-th neighbour (Naeem et al. 2020, eq. 4)."""
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


def bootstrap(
    measure: Callable[[np.ndarray, np.ndarray], float], real_NF: np.ndarray, drawn_MF: np.ndarray, seed: int
) -> Interval:
    """Return a measure with the 95 % interval of `RESAMPLES` resamplings of both sets, shifted to the figure.

    Resampling repeats pictures, which moves distances upwards: the interval is that of the deviations from their mean.
    """
    value = measure(real_NF, drawn_MF)
    rng = np.random.default_rng(seed)
    found = np.array(
        [
            measure(
                real_NF[rng.integers(0, len(real_NF), len(real_NF))],
                drawn_MF[rng.integers(0, len(drawn_MF), len(drawn_MF))],
            )
            for _ in range(RESAMPLES)
        ]
    )
    low, high = np.quantile(found - found.mean(), [0.025, 0.975])
    return Interval(value, float(max(0.0, value + low)), float(value + high))


def vendi_score(pictures: np.ndarray) -> float:
    """Return the effective number of different pictures (Friedman & Dieng 2023, definition 3.1).

    The exponential of the entropy of the eigenvalues of K / n; K is a Gaussian kernel of pixel distances whose width is
    a tenth of a pixel's range in root mean square.
    """
    flat = pictures.reshape(len(pictures), -1)
    kernel = np.exp(-(distances(flat, flat) ** 2) / flat.shape[1] / (2 * VENDI_WIDTH**2))
    values = np.linalg.eigvalsh(kernel / len(flat))
    positive = values[values > 1e-12]
    return float(np.exp(-(positive * np.log(positive)).sum()))


def class_figures(probabilities_MK: np.ndarray, wanted_M: np.ndarray | None) -> dict[str, float]:
    """Return mean confidence, classes present (at least 1 % of pictures), and accuracy where classes were asked for."""
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
    """Compare distances to the nearest training picture, in pixels: of drawn pictures and of held-out real ones.

    `copy_share`: drawn pictures nearer to a training picture than 99 % of the held-out ones are; 0.01 is no copying.
    """
    flat = [pictures.reshape(len(pictures), -1) for pictures in (training, held_out, drawn)]
    real, made = (distances(part, flat[0]).min(axis=1) for part in flat[1:])
    return {
        "nearest_training": float(np.median(made)),
        "nearest_training_real": float(np.median(real)),
        "copy_share": float((made < np.quantile(real, 0.01)).mean()),
    }
