"""The size of a model of images with what it works with: an autoencoder, a reader of captions (pure)."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from recipes.data.images import ImageSetFacts
from recipes.models.base import Head, Linear
from recipes.models.images.base import ImageModel
from recipes.models.images.tally import Tally, TextSizes


@dataclass(frozen=True)
class KnownImageModel:
    """What sizes are predicted from: a `SizedModel`."""

    architecture: ImageModel
    facts: ImageSetFacts
    autoencoder: ImageModel | None = None
    """In whose latents it works."""
    text: TextSizes | None = None
    """What reads captions for it."""
    net: Tally = field(init=False)
    """Its networks, counted."""

    vocab_size: ClassVar[int] = 0
    largest_tensor: ClassVar[int] = 0
    width: ClassVar[int] = 0
    end: ClassVar[Linear | None] = None
    is_tied: ClassVar[bool] = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "net", self.architecture.tally(self.facts, self.autoencoder, self.text))

    @property
    def fixed_parameters(self) -> int:
        """Of the autoencoder, and of the whole model that reads captions."""
        reader = 0 if self.text is None else self.text.parameters
        return reader + (0 if self.autoencoder is None else self.autoencoder.tally(self.facts).parameters)

    @property
    def keeps_average(self) -> bool:
        """Whether its family's keys say so."""
        return self.architecture.averaging is not None

    def num_parameters(self, head: Head = "lm") -> int:
        """Parameters of its networks."""
        return self.net.parameters

    def linears(self) -> Sequence[Linear]:
        """The attention's linear modules."""
        return self.net.projections

    def experts(self) -> Sequence[Linear]:
        """It has none."""
        return []

    def positions(self, length: int) -> int:
        """Pixels: an upper limit, since attention lies where the network is smaller."""
        return self.facts.height * self.facts.width

    def sample_values(self, length: int) -> int:
        """Pixels of all channels."""
        return self.facts.channels * self.facts.height * self.facts.width

    def kept(self, length: int, *, keeps_scores: bool, recomputes: bool) -> int:
        """What layers keep of an image; its encoding keeps a layer's input, its output and what is between."""
        return self.net.kept + (0 if self.autoencoder is None else 3 * self.autoencoder.tally(self.facts).largest)

    def cached(self, length: int) -> int:
        """Nothing: images are not written token by token."""
        return 0
