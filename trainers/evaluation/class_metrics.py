"""How well a classifier tells classes apart, and whether it knows how sure it may be.

N rows, C classes.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

BINS = 15


@dataclass(frozen=True)
class Predictions:
    """What a classifier said of rows whose class is known."""

    labels_N: np.ndarray
    guesses_N: np.ndarray
    confidence_N: np.ndarray
    losses_N: np.ndarray
    classes: Sequence[str]

    def scalars(self) -> dict[str, float]:
        """Return loss, accuracy, F1 as the plain mean over the classes, and the expected calibration error."""
        return {
            "loss": float(self.losses_N.mean()),
            "accuracy": float((self.labels_N == self.guesses_N).mean()),
            "f1": float(self._f1_C().mean()),
            "calibration_error": calibration_error(self.confidence_N, self.labels_N == self.guesses_N),
            "targets": float(len(self.labels_N)),
        }

    def tables(self) -> dict[str, object]:
        """Return the F1 of each class and the confusion matrix, a row for each true class."""
        return {
            "classes": list(self.classes),
            "f1_of_class": {name: float(value) for name, value in zip(self.classes, self._f1_C(), strict=True)},
            "confusion": self._confusion_CC().tolist(),
        }

    def commonest_share(self) -> float:
        """Return the accuracy of always naming the commonest class."""
        return float(np.bincount(self.labels_N).max() / len(self.labels_N))

    def _confusion_CC(self) -> np.ndarray:
        """Count rows by true class and guess; importing scikit-learn for it takes every worker most of a second."""
        num_classes = len(self.classes)
        counts = np.bincount(self.labels_N * num_classes + self.guesses_N, minlength=num_classes**2)
        return counts.reshape(num_classes, num_classes)

    def _f1_C(self) -> np.ndarray:
        """Return 2 TP / (2 TP + FP + FN) of each class; 0 for a class that is neither there nor guessed."""
        confusion_CC = self._confusion_CC()
        places_C = confusion_CC.sum(0) + confusion_CC.sum(1)
        return 2.0 * confusion_CC.diagonal() / np.maximum(places_C, 1)


def calibration_error(confidence_N: np.ndarray, is_right_N: np.ndarray) -> float:
    """Return the mean distance of confidence to accuracy over bins of equal width (Guo et al. 2017, equation 3)."""
    bins_N = np.minimum((confidence_N * BINS).astype(int), BINS - 1)
    counts = np.bincount(bins_N, minlength=BINS)
    gaps = np.abs(
        np.bincount(bins_N, weights=confidence_N, minlength=BINS)
        - np.bincount(bins_N, weights=is_right_N.astype(float), minlength=BINS)
    )
    return float(gaps[counts > 0].sum() / len(confidence_N))
