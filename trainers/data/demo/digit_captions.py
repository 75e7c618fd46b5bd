"""Captions of handwritten digits, measured on their pixels: "a thick narrow seven leaning right" (pure)."""

import numpy as np

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
THIN, THICK = 1.41, 1.55
"""Below and above them lies a third of scikit-learn's digits each, in pixels."""
NARROW, WIDE = 0.52, 0.60
"""The same of the spread of the ink across over that down."""
LEFT, RIGHT = -0.13, 0.06
"""Below and above them lies about a quarter of the digits each, in columns a row upwards."""


def caption_of(pixels_HW: np.ndarray, digit: int) -> str:
    """Return a caption that depends on the image alone; `pixels_HW` are grey values of 8 bits."""
    thickness, width, slant = measure(pixels_HW)
    words = ["a"]
    words += ["thin"] if thickness < THIN else ["thick"] if thickness > THICK else []
    words += ["narrow"] if width < NARROW else ["wide"] if width > WIDE else []
    words.append(NAMES[digit])
    words += ["leaning", "left"] if slant < LEFT else ["leaning", "right"] if slant > RIGHT else []
    if words[1] == "eight":
        words[0] = "an"
    return " ".join(words)


def measure(pixels_HW: np.ndarray) -> tuple[float, float, float]:
    """Return stroke thickness, width over height, and slant of an image.

    Thickness is twice the ink over the length of its outline (the sum of gradients), in pixels; width over height is
    the ratio of the ink's standard deviations across and down; slant is how many columns it moves right a row upwards.
    """
    ink = np.pad(pixels_HW.astype(np.float64) / 255, 1)
    total = ink.sum()
    if total == 0:
        return 0.0, 0.0, 0.0
    across = np.diff(ink, axis=1, append=0.0)
    down = np.diff(ink, axis=0, append=0.0)
    outline = np.sqrt(across**2 + down**2).sum()
    rows, columns = np.mgrid[: ink.shape[0], : ink.shape[1]]
    rows, columns = rows - (ink * rows).sum() / total, columns - (ink * columns).sum() / total
    high, wide = (ink * rows**2).sum(), (ink * columns**2).sum()
    shear = (ink * rows * columns).sum()
    if high == 0:
        return float(2 * total / outline), 0.0, 0.0
    return float(2 * total / outline), float(np.sqrt(wide / high)), float(-shear / high)
