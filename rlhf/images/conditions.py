"""What the images of an iteration are asked for: classes in turn, or captions that the seed draws; a pure function of
the images' numbers, so that there is nothing to resume.

N images, B some of them, T tokens of a caption.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from recipes.errors import RequestError
from recipes.stages.ddpo import ImageRollout
from recipes.stages.rl_images import RlImages
from trainers.data.batches import Texts, pad_texts
from trainers.data.dataset import Dataset
from trainers.data.layouts.images import Images
from trainers.data.order import global_sample
from trainers.models.images.ddpm import DdpmFamily
from trainers.models.images.text_encoder import TextEncoder, read_captions
from trainers.training.context import StageContext, data_request, open_dataset


@dataclass(frozen=True)
class Asked:
    """What images are asked for."""

    labels_B: Tensor
    """Places of classes; -1 for none."""
    groups_B: Tensor
    """Images of one class or caption share a number."""
    captions: Texts | None = None

    def rows(self, index: slice) -> "Asked":
        """These images."""
        texts = self.captions
        captions = None if texts is None else Texts(texts.input_ids_BT[index], texts.attention_mask_BT[index])
        return Asked(self.labels_B[index], self.groups_B[index], captions)

    def to(self, device: torch.device) -> "Asked":
        """Copy to a device."""
        captions = None if self.captions is None else self.captions.to(device)
        return Asked(self.labels_B.to(device), self.groups_B.to(device), captions)


class ImagePrompts(Protocol):
    """What a policy is asked to draw."""

    @property
    def classes(self) -> tuple[str, ...]:
        """Classes that labels are places in; none: no class is asked for."""

    @property
    def columns(self) -> int | None:
        """Columns of a grid of what is shown; None: no matter how many."""

    def asked(self, iteration: int) -> Asked:
        """Give what all images [N] of an iteration are asked for, in the order of their numbers."""

    def shown(self, count: int) -> Asked:
        """Give what the images of the report's grid are asked for, the same ones every time."""


class ClassPrompts:
    """Classes in turn; `places` of [-1] where the actor knows none."""

    def __init__(self, places: Sequence[int], classes: tuple[str, ...], images: int) -> None:
        self._places = tuple(places)
        self._images = images
        self.classes = classes
        self.columns = len(places) if len(places) > 1 else None

    def asked(self, iteration: int) -> Asked:
        """Give the class of every number."""
        return self.shown(self._images)

    def shown(self, count: int) -> Asked:
        """Give the class of every number."""
        labels_B = torch.tensor([self._places[number % len(self._places)] for number in range(count)])
        return Asked(labels_B, labels_B)


class CaptionPrompts:
    """Captions of a set's images, drawn by the seed, each for `samples` neighbouring images.

    A caption's label is that of the image that it was drawn with. Captions of one text are one group.
    """

    columns = None

    def __init__(self, dataset: Dataset, text: TextEncoder, *, images: int, samples: int, seed: int) -> None:
        self._dataset, self._seed = read_captions(text, dataset), seed
        self._rows = [row for row, caption in enumerate(dataset.captions) if caption]
        self._images, self._samples = images, samples
        self.classes = dataset.classes

    def asked(self, iteration: int) -> Asked:
        """Give the captions at the iteration's positions of an endless sequence of epochs."""
        drawn = self._images // self._samples
        rows = [self._row(iteration * drawn + place) for place in range(drawn)]
        return self._asked([row for row in rows for _ in range(self._samples)])

    def shown(self, count: int) -> Asked:
        """Give the first captions of the sequence, each once."""
        return self._asked([self._row(position) for position in range(count)])

    def _row(self, position: int) -> int:
        return self._rows[global_sample(self._dataset.digest, self._seed, position, len(self._rows))]

    def _asked(self, rows: Sequence[int]) -> Asked:
        captions = [self._dataset.captions[row] for row in rows]
        numbers = {caption: number for number, caption in enumerate(dict.fromkeys(captions))}
        labels_B = torch.from_numpy(self._dataset.labels_N[rows])
        groups_B = torch.tensor([numbers[caption] for caption in captions])
        texts = pad_texts([self._dataset.cut("caption_ids", row) for row in rows], self._dataset.pad_id)
        return Asked(labels_B, groups_B, texts)


def open_prompts(spec: RlImages, context: StageContext, actor: DdpmFamily) -> ImagePrompts:
    """Return what the actor is asked for, which `RlImages.actor_rules` allow. Collective."""
    rollout = spec.rollout
    images, samples = rollout.images_per_iteration, rollout.samples_per_prompt
    if actor.text is None:
        places = asked_labels(actor, rollout)
        return ClassPrompts(places, actor.facts.classes if actor.is_conditional else (), images)
    request = data_request(context, spec.get_source("prompts"), Images())
    try:
        return CaptionPrompts(
            open_dataset(context, request), actor.text, images=images, samples=samples, seed=context.seed
        )
    except RequestError as error:
        raise RequestError(f"prompts: {error}") from None


def asked_labels(actor: DdpmFamily, rollout: ImageRollout) -> list[int]:
    """Places of the classes that are asked for in turn; [-1] where the actor knows none."""
    known = actor.facts.classes
    return [known.index(name) for name in rollout.classes or known] if actor.is_conditional else [-1]
