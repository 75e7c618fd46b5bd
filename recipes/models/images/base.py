"""What the families of image models share: what a configuration answers, and what is said of a family (pure)."""

from abc import abstractmethod
from collections.abc import Iterator
from typing import Annotated, ClassVar, Self, get_args

from pydantic import Field

from recipes.artifact_kinds import ImageKind
from recipes.data.images import ImageSetFacts, Shape
from recipes.errors import FieldFinding, Finding
from recipes.fields import Strict
from recipes.models.images.tally import Tally, TextSizes
from recipes.problem_codes import Code

VENDI_IMAGES = 16
"""Fewest drawn images whose diversity is meaningful."""

SETTINGS = "image.json"
"""The settings of a model folder: family, configuration, images, classes."""
STOCK_WEIGHTS = "diffusion_pytorch_model.safetensors"
"""diffusers' name of a network's weights."""

Names = tuple[str, ...]
EmaDecay = Annotated[float, Field(gt=0, lt=1)]


def halving_rule(levels: int, height: int, width: int, what: str = "images") -> Finding | None:
    """diffusers' networks halve the size by convolutions that need even numbers; None: they fit."""
    factor = 2 ** (levels - 1)
    if height % factor == 0 and width % factor == 0:
        return None
    message = (
        f"{levels} levels halve the size {levels - 1} times, but the {what} are {height}x{width}, not a multiple of "
        f"{factor}"
    )
    return Finding(Code.SIZE_NOT_DIVISIBLE, message, "fewer levels, or set the source's size")


class ImageModel(Strict):
    """The keys of a family of image models, network and objective together, and what follows from them."""

    noun: ClassVar[str]
    """As messages name one."""
    draws: ClassVar[bool] = False
    """Whether it draws images."""
    classifies: ClassVar[bool] = False
    """Whether it tells classes apart, so that metrics and rewards can be taken from it."""
    has_latents: ClassVar[bool] = False
    """Whether it encodes images, so that others can work in its latents."""
    keys: ClassVar[tuple[str, ...]] = ()
    """Keys of pretraining that are for it alone."""
    size_key: ClassVar[str] = "depth"
    """The key whose value `size_rule` looks at."""
    largest_zero: ClassVar[int] = 3
    """The most that ZeRO may shard."""

    @classmethod
    def kind(cls) -> ImageKind:
        """The kind of artifact that it makes: the family's name."""
        (family,) = get_args(cls.model_fields["family"].annotation)
        return ImageKind(family)

    @abstractmethod
    def tally(
        self, facts: ImageSetFacts, autoencoder: "ImageModel | None" = None, text: TextSizes | None = None
    ) -> Tally:
        """The networks, counted layer by layer; in an autoencoder's latents, and conditioned on captions."""

    @abstractmethod
    def files(self, *, is_latent: bool) -> tuple[Names, Names]:
        """Weights and configurations of its folder."""

    @abstractmethod
    def shrunk(self) -> Self:
        """The smoke form."""

    @property
    def label_reader(self) -> str | None:
        """What reads the images' labels, as a message names it; None: nothing does."""
        return None

    @property
    def averaging(self) -> float | None:
        """Decay of the moving average of the weights, which is what is kept; None: the last weights are."""
        return None

    def training_rules(self, *, steps: int | None, grid: int) -> Iterator[FieldFinding]:
        """What does not fit a stage of so many steps that draws `grid` images."""
        yield from ()

    def condition_rules(self, *, reads_captions: bool) -> Iterator[Finding]:
        """What does not fit a stage with, or without, a text encoder."""
        yield from ()

    def size_rule(self, height: int, width: int, what: str = "images") -> Finding | None:
        """Why it cannot take images or latents of a size; None: it can."""
        return None

    def latents_rule(self) -> Finding | None:
        """Why no diffusion can run in its latents; None: one can."""
        return Finding(Code.UNSUPPORTED_AUTOENCODER, f"{self.noun} has no latents")

    def latent_shape(self, height: int, width: int) -> Shape:
        """Channels, height and width of the latents of images of a size; for those that `latents_rule` allows."""
        raise TypeError(f"{self.noun} has no latents")
