"""Image classifiers: the keys of their configuration."""

from typing import ClassVar, Literal, Self

from recipes.data.images import ImageSetFacts
from recipes.fields import meaning
from recipes.models.images.base import SETTINGS, ImageModel, Names
from recipes.models.images.tally import Tally, TextSizes, count_encoder


class Classifier(ImageModel):
    """Image classifier, supervised with the labels of its data; also the feature network of image metrics."""

    noun: ClassVar[str] = "an image classifier"
    classifies: ClassVar[bool] = True
    family: Literal["classifier"] = meaning(description="Image classifier.")
    type: Literal["convnet", "mlp"] = meaning("convnet", description="Strided convolutions, or fully connected layers.")
    width: int = meaning(
        32, ge=1, le=65_536, description="Channels of the first convolution, doubled by each further one; mlp: units."
    )
    depth: int = meaning(2, ge=1, le=12, description="Convolutions (each halves the size) or hidden layers.")
    features: int = meaning(64, ge=2, le=65_536, description="Width of the last hidden layer, the features of metrics.")
    label_smoothing: float = meaning(0.0, ge=0, lt=1, description="Share of the target spread over all classes.")

    def tally(
        self, facts: ImageSetFacts, autoencoder: ImageModel | None = None, text: TextSizes | None = None
    ) -> Tally:
        """The network."""
        net = Tally()
        count_encoder(net, self.type, facts, self.width, self.depth, self.features)
        net.linear(self.features, facts.classes)
        return net

    def files(self, *, is_latent: bool) -> tuple[Names, Names]:
        """Weights and configurations of its folder."""
        return ("model.safetensors",), (SETTINGS,)

    @property
    def label_reader(self) -> str | None:
        """What reads the images' labels, as a message names it; None: nothing does."""
        return "a classifier"

    def shrunk(self) -> Self:
        """The smoke form."""
        return self.changed(width=min(self.width, 16), features=min(self.features, 16))
