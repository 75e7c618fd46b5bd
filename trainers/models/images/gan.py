"""Generative adversarial networks (Goodfellow et al. 2014): two networks with an engine each, trained in turn.

B samples, Z noise values, C, H, W pixels. No norm looks at a whole batch.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from recipes.models.images.gan import Gan
from trainers.data.dataset import Dataset
from trainers.models.images.networks import build_decoder, build_encoder
from trainers.models.images.protocol import ImageFacts, ImageFamily, Part, PhaseModule, demand_classes
from trainers.objectives.images import ImageObjective
from trainers.runtime.randomness import normals, uniforms

DISCRIMINATOR_NOISE, GENERATOR_NOISE, MIXING, DRAWN = 1, 2, 3, 4
"""Streams of a sample's noise."""


class Generator(nn.Module):
    """From noise, and a class where there is one, to images in [-1, 1]."""

    def __init__(self, architecture: Gan, facts: ImageFacts) -> None:
        super().__init__()
        self.embedding: nn.Embedding | None = None
        inputs = architecture.latent
        if architecture.class_conditional:
            self.embedding = nn.Embedding(len(facts.classes), architecture.latent)
            inputs *= 2
        self.body = build_decoder(architecture.type, facts.shape, architecture.width, architecture.depth, inputs)

    def forward(self, noise_BZ: Tensor, labels_B: Tensor | None) -> Tensor:
        """Return images [B, C, H, W]."""
        inputs = noise_BZ.to(next(self.body.parameters()).dtype)
        if self.embedding is not None:
            inputs = torch.cat([inputs, self.embedding(labels_B)], dim=1)
        images: Tensor = self.body(inputs)
        return images.float().tanh()


class Discriminator(nn.Module):
    """From images in [-1, 1] to a score; a class adds its projection (Miyato & Koyama 2018)."""

    def __init__(self, architecture: Gan, facts: ImageFacts) -> None:
        super().__init__()
        features = 4 * architecture.width
        self.body = build_encoder(architecture.type, facts.shape, architecture.width, architecture.depth, features)
        self.head = nn.Linear(features, 1)
        self.embedding: nn.Embedding | None = None
        if architecture.class_conditional:
            self.embedding = nn.Embedding(len(facts.classes), features)
        if architecture.spectral_norm:
            for module in list(self.modules()):
                if isinstance(module, nn.Conv2d | nn.Linear):
                    nn.utils.parametrize.register_parametrization(module, "weight", SpectralNorm())

    def forward(self, images_BCHW: Tensor, labels_B: Tensor | None) -> Tensor:
        """Return scores [B]."""
        hidden = functional.silu(self.body(images_BCHW.to(next(self.parameters()).dtype)))
        score = self.head(hidden)[:, 0]
        if self.embedding is not None:
            score = score + (self.embedding(labels_B) * hidden).sum(1)
        return score.float()


class SpectralNorm(nn.Module):
    """Divide a weight by its largest singular value, exactly: no vector is carried from step to step."""

    def forward(self, weight: Tensor) -> Tensor:
        """Return the weight over its largest singular value."""
        matrix = weight.flatten(1)
        with torch.no_grad():
            wide = matrix.shape[0] <= matrix.shape[1]
            gram = (matrix @ matrix.T if wide else matrix.T @ matrix).float()
            top = torch.linalg.eigh(gram)[1][:, -1].to(matrix.dtype)
            other = (matrix.T if wide else matrix) @ top
            other = other / other.norm().clamp(min=1e-12)
            left, right = (top, other) if wide else (other, top)
        return weight / (left @ matrix @ right).clamp(min=1e-12)


class DiscriminatorPhase(nn.Module):
    """The discriminator's loss on real images and on as many drawn ones."""

    def __init__(self, family: "GanFamily") -> None:
        super().__init__()
        self.discriminator = family.discriminator
        self._generator = (family.generator,)  # in a tuple: it is no part of this module
        self.settings = family.settings

    def forward(self, images_BCHW: Tensor, labels_B: Tensor, noise_seeds_B: Tensor, step: int) -> dict[str, Tensor]:
        """Return `loss`, the scores of both kinds, and the discriminator's accuracy; penalties in training alone."""
        settings = self.settings
        labels = labels_B if settings.class_conditional else None
        real = 2 * images_BCHW.float() - 1
        (generator,) = self._generator
        with torch.no_grad():
            noise = normals(noise_seeds_B, DISCRIMINATOR_NOISE, (settings.latent,), real)
            drawn = generator(noise, labels)
        is_penalised = self.training and settings.r1_gamma > 0
        real.requires_grad_(is_penalised)
        real_score, drawn_score = self.discriminator(real, labels), self.discriminator(drawn, labels)
        loss = discriminator_loss(settings.loss, real_score, drawn_score)
        if is_penalised:
            loss = loss + settings.r1_gamma / 2 * _gradient(real_score, real).square().sum(1)
        if self.training and settings.loss == "wasserstein_gp":
            share = uniforms(noise_seeds_B, MIXING, (1, 1, 1), real)
            mixed = (share * real.detach() + (1 - share) * drawn).requires_grad_(True)
            slope = _gradient(self.discriminator(mixed, labels), mixed).norm(dim=1)
            loss = loss + settings.gradient_penalty * (slope - 1).square()
        return {
            "loss": loss,
            "real_score": real_score.detach(),
            "drawn_score": drawn_score.detach(),
            "told_right": 0.5 * ((real_score > 0).float() + (drawn_score < 0).float()).detach(),
        }


class GeneratorPhase(nn.Module):
    """The generator's loss: how its images score with the discriminator, whose parameters stay."""

    def __init__(self, family: "GanFamily") -> None:
        super().__init__()
        self.generator = family.generator
        self._discriminator = (family.discriminator,)
        self.settings = family.settings

    def forward(self, images_BCHW: Tensor, labels_B: Tensor, noise_seeds_B: Tensor, step: int) -> dict[str, Tensor]:
        """Return `loss`, under the name that the objective gives it."""
        settings = self.settings
        labels = labels_B if settings.class_conditional else None
        noise = normals(noise_seeds_B, GENERATOR_NOISE, (settings.latent,), images_BCHW)
        (discriminator,) = self._discriminator
        fixed = {name: parameter.detach() for name, parameter in discriminator.named_parameters()}
        score = functional_call(discriminator, fixed, (self.generator(noise, labels), labels))
        return {"loss": functional.softplus(-score) if settings.loss == "non_saturating" else -score}


def discriminator_loss(name: str, real_B: Tensor, drawn_B: Tensor) -> Tensor:
    """Return the discriminator's loss of each pair of scores, without penalties."""
    match name:
        case "non_saturating":
            return functional.softplus(-real_B) + functional.softplus(drawn_B)
        case "hinge":
            return (1 - real_B).clamp(min=0) + (1 + drawn_B).clamp(min=0)
        case "wasserstein_gp":
            return drawn_B - real_B
    raise ValueError(f"unknown loss {name!r}")


def _gradient(score_B: Tensor, images_BCHW: Tensor) -> Tensor:
    """Return the gradient of each score by its own image [B, C H W], differentiable."""
    (found,) = torch.autograd.grad(score_B.sum(), images_BCHW, create_graph=True)
    return found.flatten(1)


class BothNetworks(nn.Module):
    """The two networks under one roof, for files and sampling; forward is the discriminator's evaluation."""

    def __init__(self, family: "GanFamily") -> None:
        super().__init__()
        self.generator = family.generator
        self.discriminator = family.discriminator
        self._phase = (DiscriminatorPhase(family),)

    def forward(self, images_BCHW: Tensor, labels_B: Tensor, noise_seeds_B: Tensor, step: int) -> dict[str, Tensor]:
        """Return the discriminator's figures."""
        (phase,) = self._phase
        found: dict[str, Tensor] = phase.eval()(images_BCHW, labels_B, noise_seeds_B, step)
        return found


class GanFamily(ImageFamily):
    """Generator and discriminator as a family."""

    settings: Gan
    averaged = "generator."

    def __init__(self, architecture: Gan, facts: ImageFacts) -> None:
        if architecture.class_conditional:
            demand_classes(facts.classes, "class_conditional")
        self.facts = facts
        self.settings = architecture
        self.generator = Generator(architecture, facts)
        self.discriminator = Discriminator(architecture, facts)
        self.module = BothNetworks(self)

    @property
    def is_conditional(self) -> bool:
        """Whether an image's class can be asked for."""
        return self.settings.class_conditional

    def phases(self) -> list[PhaseModule]:
        """First the discriminator learns to tell, then the generator to pass."""
        ratio = self.settings.discriminator_lr_ratio
        return [
            PhaseModule("discriminator", DiscriminatorPhase(self), lr_ratio=ratio),
            PhaseModule("generator", GeneratorPhase(self), objective=ImageObjective("generator_loss")),
        ]

    def parts(self) -> list[Part]:
        """Two networks of our own classes."""
        return [
            Part("", "generator.", "generator.safetensors", None),
            Part("", "discriminator.", "discriminator.safetensors", None),
        ]

    @torch.no_grad()
    def outputs(self, images_BCHW: Tensor, labels_B: Tensor) -> Tensor:
        """Return the discriminator's scores of the images, beside images of fixed noise."""
        labels = labels_B if self.settings.class_conditional else None
        score = self.discriminator(2 * images_BCHW - 1, labels)
        noise = normals(torch.arange(len(images_BCHW)), DRAWN, (self.settings.latent,), images_BCHW)
        return torch.cat([score[:, None], self.generator(noise, labels).flatten(1)], dim=1)

    @torch.no_grad()
    def sample(
        self, seeds: Sequence[int], labels: Sequence[int] | None = None, captions: Sequence[str] | None = None
    ) -> Tensor:
        """Draw one image for each seed; without labels a conditional generator takes one by the seed."""
        self.demand_known(labels, captions)
        classes = None
        device = next(self.generator.parameters()).device
        if self.settings.class_conditional:
            chosen = [seed % len(self.facts.classes) for seed in seeds] if labels is None else list(labels)
            classes = torch.tensor(chosen, device=device)
        like = torch.empty(0, device=device)
        noise = normals(torch.tensor(list(seeds)), DRAWN, (self.settings.latent,), like)
        drawn: Tensor = self.generator(noise, classes)
        return (drawn + 1) / 2

    def gate_reasons(self, metrics: Mapping[str, float], dataset: Dataset) -> list[str]:
        """Drawn images must not all be alike."""
        share = metrics.get("vendi_share")
        if share is None or share >= self.settings.collapse_below:
            return []
        return [
            f"mode collapse: the Vendi score of drawn images is {share:.2f} of real ones', "
            f"below collapse_below ({self.settings.collapse_below})"
        ]
