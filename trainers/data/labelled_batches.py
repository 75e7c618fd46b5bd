"""Texts with classes as batches, maybe beside texts without; whose label is used follows from its tokens.

B labelled rows, U rows without a label, T tokens.
"""

import hashlib
from dataclasses import replace

import numpy as np

from recipes.errors import RequestError
from recipes.models.encoder import PseudoLabels
from trainers.data.batches import LabelledBatch, pad_texts
from trainers.data.dataset import Dataset
from trainers.data.masking import Masker
from trainers.data.mixture import Draw
from trainers.data.order import global_sample
from trainers.runtime.randomness import stream_seed


def split_by_label(dataset: Dataset, labelled_share: float) -> tuple[np.ndarray, np.ndarray]:
    """Return the rows whose labels are used and all others; a row's part follows from its tokens.

    Raises RequestError where fewer than two classes are left.
    """
    labels = np.asarray(dataset.arrays["labels"])
    shares = np.array([_share(dataset.cut("text_ids", row)) for row in range(len(dataset))])
    is_used = (labels >= 0) & (shares < labelled_share)
    found = sorted({dataset.classes[label] for label in labels[is_used]})
    if len(found) < 2:
        raise RequestError(
            f"a classifier needs at least two classes; the labels that are used have {', '.join(found) or 'none'} "
            f"({int(is_used.sum())} of {len(dataset)} rows)"
        )
    return np.flatnonzero(is_used), np.flatnonzero(~is_used)


def labelled_rows(dataset: Dataset) -> list[int]:
    """Return the rows with a label."""
    found: list[int] = np.flatnonzero(np.asarray(dataset.labels_N) >= 0).tolist()
    return found


class LabelledPlan:
    """Which labelled rows a rank takes at a step, and which rows of unknown class beside them."""

    def __init__(
        self,
        dataset: Dataset,
        labelled: np.ndarray,
        unlabelled: np.ndarray,
        pseudo_labels: PseudoLabels | None,
        masker: Masker | None,
        *,
        seed: int,
        global_batch: int,
        workers: int,
        rank: int,
        micro_batch: int,
    ) -> None:
        """Raise RequestError where pseudo-labels are asked for and every row has a label."""
        if pseudo_labels is not None and len(unlabelled) == 0:
            raise RequestError(f"pseudo_labels: {pseudo_labels.needs_unlabelled('the data')}")
        self._dataset, self._labelled, self._unlabelled = dataset, labelled, unlabelled
        self._pseudo_labels, self._masker, self._seed, self._global_batch = pseudo_labels, masker, seed, global_batch
        self.order = dataset.order(seed, labelled)
        starts = range(rank * micro_batch, global_batch, workers * micro_batch)
        self._runs = [range(start, start + micro_batch) for start in starts]

    def micro_batches(self, step: int) -> list[LabelledBatch]:
        """Return this rank's share of the step's rows."""
        return [self._batch(step, run) for run in self._runs]

    def drawn(self, steps: int) -> dict[str, Draw]:
        """Return how much was drawn of each source of a mixture in so many steps."""
        return self._dataset.drawn(self.order, steps * self._global_batch)

    def _batch(self, step: int, run: range) -> LabelledBatch:
        dataset, first = self._dataset, step * self._global_batch
        batch: LabelledBatch = dataset.layout.collate(dataset, [self.order.row(first + place) for place in run])
        pseudo = self._pseudo_labels
        if pseudo is None or step < pseudo.warmup_steps:
            return batch
        assert self._masker is not None
        seed = stream_seed(self._seed, "unlabelled")
        positions = [(first + place) * pseudo.ratio + copy for place in run for copy in range(pseudo.ratio)]
        plain, augmented = [], []
        for position in positions:
            row = int(self._unlabelled[global_sample(dataset.digest, seed, position, len(self._unlabelled))])
            ids = dataset.cut("text_ids", row).astype(np.int64)
            plain.append(ids)
            rng = np.random.default_rng(stream_seed(self._seed, "augmented", position))
            augmented.append(self._masker.hide(ids, np.ones_like(ids), rng)[0])
        return replace(
            batch, unlabelled=pad_texts(plain, dataset.pad_id), augmented=pad_texts(augmented, dataset.pad_id)
        )


def _share(ids: np.ndarray) -> float:
    digest = hashlib.blake2b(np.asarray(ids, dtype=np.int64).tobytes(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64
