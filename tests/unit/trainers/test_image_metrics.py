"""Image metrics against numbers worked out by hand and against slow loops."""

import math

import numpy as np
import pytest

from trainers.evaluation.image_metrics import (
    class_figures,
    copies,
    coverage,
    distances,
    fid,
    interval,
    kid,
    precision_recall,
    radii,
    vendi_score,
)


def test_fid_of_diagonal_gaussians_is_the_closed_form() -> None:
    # Four points with variances (4/3)a^2 and (4/3)b^2 and no covariance: tr(C + D - 2 sqrt(CD)) = sum (s - t)^2.
    corners = np.array([[1, 1], [1, -1], [-1, 1], [-1, -1]], dtype=float)
    real, drawn = corners * [1, 2], corners * [3, 2] + [0, 5]
    deviation = math.sqrt(4 / 3)
    assert fid(real, drawn) == pytest.approx(25 + (deviation * 3 - deviation) ** 2)
    assert fid(real, real) == pytest.approx(0, abs=1e-9)


def test_kid_is_the_sum_over_pairs() -> None:
    rng = np.random.default_rng(0)
    real, drawn = rng.normal(size=(5, 3)), rng.normal(size=(5, 3)) + 1

    def kernel(x: np.ndarray, y: np.ndarray) -> float:
        return float((x @ y / 3 + 1) ** 3)

    slow = sum(kernel(real[i], real[j]) for i in range(5) for j in range(5) if i != j) / 20
    slow += sum(kernel(drawn[i], drawn[j]) for i in range(5) for j in range(5) if i != j) / 20
    slow -= 2 * sum(kernel(x, y) for x in real for y in drawn) / 25
    assert kid(real, drawn) == pytest.approx(slow)


def test_neighbours_by_hand() -> None:
    line = np.array([[0.0], [1.0], [3.0], [7.0]])
    np.testing.assert_allclose(distances(line, line)[0], [0, 1, 3, 7], atol=1e-9)
    np.testing.assert_allclose(radii(line, 1), [1, 1, 2, 4], atol=1e-9)
    np.testing.assert_allclose(radii(line, 2), [3, 2, 3, 6], atol=1e-9)


def test_precision_recall_and_coverage_by_hand() -> None:
    real = np.array([[0.0], [1.0], [10.0], [11.0]])
    drawn = np.array([[0.5], [0.6], [100.0], [101.0]])
    # Real balls of radius 1 hold 0.5 and 0.6; drawn balls of radius 0.1 around 0.5 and 0.6 hold no real point.
    assert precision_recall(real, drawn, neighbours=1) == (0.5, 0.0)
    # The real points 0 and 1 have a drawn one within 1; 10 and 11 have none.
    assert coverage(real, drawn, neighbours=1) == 0.5
    assert coverage(real, real, neighbours=1) == 1.0


def test_the_interval_is_student_s() -> None:
    # Mean 3, standard deviation sqrt(2.5), five figures: 2.776 * sqrt(2.5 / 5).
    found = interval([1.0, 2.0, 3.0, 4.0, 5.0])
    assert found.value == 3
    assert found.high - found.value == pytest.approx(2.776 * math.sqrt(0.5))
    assert found.value - found.low == pytest.approx(2.776 * math.sqrt(0.5))
    rng = np.random.default_rng(1)
    held = [interval(rng.normal(size=3).tolist()) for _ in range(400)]
    assert 0.92 < np.mean([one.low < 0 < one.high for one in held]) < 0.98


def test_the_vendi_score_counts_what_differs() -> None:
    far = np.eye(6)[:, None, :, None] * 100
    assert vendi_score(far) == pytest.approx(6)
    assert vendi_score(np.repeat(far[:1], 6, axis=0)) == pytest.approx(1)
    assert vendi_score(np.repeat(far[:2], 3, axis=0)) == pytest.approx(2)


def test_class_figures_by_hand() -> None:
    probabilities = np.array([[0.9, 0.1, 0.0], [0.6, 0.4, 0.0], [0.2, 0.8, 0.0]])
    found = class_figures(probabilities, np.array([0, 1, 1]))
    assert found["confidence"] == pytest.approx((0.9 + 0.6 + 0.8) / 3)
    assert found["classes_present"] == 2
    assert found["smallest_class_share"] == 0
    assert found["class_accuracy"] == pytest.approx(2 / 3)
    assert "class_accuracy" not in class_figures(probabilities, None)


def test_copies_are_found() -> None:
    rng = np.random.default_rng(2)
    training, held_out, fresh = (rng.normal(size=(200, 1, 3, 3)) for _ in range(3))
    assert copies(training, held_out, fresh)["copy_share"] < 0.1
    assert copies(training, held_out, training[:50] + 1e-3)["copy_share"] == 1.0
