"""Kinds of what a stage makes or takes: the one vocabulary of outputs, inputs and artifacts."""

from typing import Literal

ArtifactKind = Literal[
    "model",
    "adapter",
    "reward_model",
    "critic",
    "report",
    "tokenizer",
    "text_classifier",
    "classifier",
    "vae",
    "gan",
    "ddpm",
]

NOUNS: dict[ArtifactKind, str] = {
    "model": "a language model",
    "adapter": "an adapter",
    "reward_model": "a reward model",
    "critic": "a critic",
    "report": "a report",
    "tokenizer": "a tokenizer",
    "text_classifier": "a text classifier",
    "classifier": "an image classifier",
    "vae": "a variational autoencoder",
    "gan": "generative adversarial networks",
    "ddpm": "a diffusion model",
}

DRAWING_KINDS: tuple[ArtifactKind, ...] = ("vae", "gan", "ddpm")
"""Models that draw images."""
