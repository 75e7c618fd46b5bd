"""scikit-learn's handwritten digits."""

import gzip
import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from recipes.data.images import Digits
from recipes.problem_codes import Code
from trainers.data.demo.digit_captions import caption_of
from trainers.data.sources.local_files import files_digest
from trainers.data.sources.reader import Part, RawRow, SourceError


@dataclass(frozen=True, slots=True)
class DigitsReader:
    """Reads the digits: columns image, label and caption."""

    source: Digits
    is_remote = False

    def parts(self) -> Iterator[Part]:
        """Yield the one file."""
        yield Part("source", _read)

    def digest(self) -> str:
        """Hash scikit-learn's file."""
        return files_digest([_digits_file()])

    def files(self) -> None:
        """Every installation has them."""


def _digits_file() -> Path:
    found = importlib.util.find_spec("sklearn")
    places = [] if found is None else [Path(place) for place in found.submodule_search_locations or []]
    for place in places:
        file = place / "datasets" / "data" / "digits.csv.gz"
        if file.is_file():
            return file
    raise SourceError(Code.MISSING_FILE, "source digits: scikit-learn is not installed", "pip install scikit-learn")


def _read(limit: int | None) -> Iterator[RawRow]:
    path = _digits_file()
    with gzip.open(path, "rt") as file:
        table = np.loadtxt(file, delimiter=",", dtype=np.float64, max_rows=limit, ndmin=2)
    for number, row in enumerate(table):
        pixels = np.rint(row[:-1].reshape(8, 8) * (255 / 16)).astype(np.uint8)
        columns = {"image": pixels, "label": int(row[-1]), "caption": caption_of(pixels, int(row[-1]))}
        yield RawRow(f"digits:{number}", f"digits: row {number}", columns, path.parent)
