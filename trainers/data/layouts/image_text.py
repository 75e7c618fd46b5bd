"""Packed sequences whose rows have images."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar, Literal

import numpy as np

from recipes.errors import RequestError
from trainers.data.dataset import Chunks, Contents, Dataset, Fate
from trainers.data.encoding import Encoded, Marked, TextSettings, encode_instructions, mark_instruction
from trainers.data.image_inputs import image_inputs
from trainers.data.image_processor import ImageTokens
from trainers.data.image_text import expand, place_images, template_takes_parts
from trainers.data.layouts.arrays import offsets
from trainers.data.layouts.packed import pack
from trainers.data.row_images import RowImage
from trainers.data.rows import Row


@dataclass(frozen=True)
class ImageText:
    """The arrays of `Packed`, and images, each once, as `ImageProcessor.stored` keeps them.

    A sequence has those in image_numbers between two of image_offsets [N + 1], in the order of its image tokens.
    """

    name: ClassVar[str] = "image_text"
    version: ClassVar[int] = 2
    sides: ClassVar[tuple[str, ...]] = ()
    role: ClassVar[Literal["image_text"]] = "image_text"
    text: TextSettings
    processor: ImageTokens

    def identity(self) -> dict[str, Any]:
        """Tokens, packing, targets, and how the model takes its images."""
        text = self.text
        named = text.identity("pictured")  # the role as digests, and so the orders of training, have always named it
        return {**named, "packing": text.packing, "loss_on": text.loss_on, "processor": self.processor.digest}

    def mark(self, row: Row) -> Marked:
        """Return a row's text, an image's place as one token, with its targets."""
        token = self.processor.image_token
        takes_parts = template_takes_parts(self.text.tokenization, token)
        return mark_instruction(place_images(row, token, takes_parts=takes_parts), self.text.tokenization)

    def encode(self, rows: Iterable[Row]) -> Iterator[tuple[Row, Encoded]]:
        """Tokenize rows whose images have their tokens in the text; image tokens are never part of a response."""
        token = self.processor.image_token
        takes_parts = template_takes_parts(self.text.tokenization, token)
        placed = (place_images(self.text.ask(row), token, takes_parts=takes_parts) for row in rows)
        for row, item in encode_instructions(placed, self.text):
            yield row, expand(row.id, item, row.columns["images"], self.processor)

    def arrays(self, encoded: Iterable[tuple[Row, Encoded]], fate: Fate) -> Contents:
        """Pack rows with the numbers of their images.

        A row that is too long loses its end, and is left out where that would cut an image. Raises RequestError where
        no row has an image.
        """
        length = self.text.sequence_length
        pieces: list[Encoded] = []
        rows: list[Row] = []
        images: dict[str, RowImage] = {}
        for row, item in encoded:
            if len(item) > length:
                if (item.ids[length:] == self.processor.image_id).any():
                    fate.drop("too_long", row)
                    continue
                fate.truncate(row)
                item = item.part(0, length)
            if self.text.loss_on == "all":
                item = Encoded(item.ids, item.ids != self.processor.image_id)
            if not item.response[1:].any():
                fate.drop("no_response", row)
                continue
            pieces.append(item)
            rows.append(row)
            for image in row.columns["images"]:
                images.setdefault(image.digest, image)
        fate.kept = len(rows)
        ids, sources = [row.id for row in rows], [row.source for row in rows]
        contents = pack(pieces, list(range(len(rows))), ids, self.text, sources)
        if rows and not images:
            raise RequestError("no row has an image; fine-tune a language model on text alone")
        contents.arrays |= self._image_arrays(rows, images, contents.arrays)
        return contents

    def _image_arrays(
        self, rows: list[Row], images: dict[str, RowImage], packed: dict[str, Any]
    ) -> dict[str, np.ndarray | Chunks]:
        """Number the images by sequence; they are processed while they are stored, one in memory at a time."""
        places = {digest: place for place, digest in enumerate(images)}
        by_sequence = [
            [places[image.digest] for row in packed["rows"][start:end] for image in rows[row].columns["images"]]
            for start, end in pairwise(packed["row_offsets"])
        ]
        return {
            "image_numbers": np.asarray([place for numbers in by_sequence for place in numbers], dtype=np.int64),
            "image_offsets": offsets([len(numbers) for numbers in by_sequence]),
            **self.processor.stored(images),
        }

    @staticmethod
    def collate(dataset: Dataset, rows: Sequence[int]) -> Any:
        """Return an `ImageTextBatch`."""
        from trainers.data.batches import ImageTextBatch, token_batch

        numbers = np.concatenate([dataset.cut("image_numbers", max(row, 0)) for row in rows])
        images = image_inputs(dataset, numbers if len(numbers) else [0])
        return ImageTextBatch(token_batch(dataset, rows), images, has_images=len(numbers) > 0)
