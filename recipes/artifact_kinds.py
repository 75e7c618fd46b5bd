"""The one vocabulary of kinds: of what a stage makes or takes, and of the artifacts that hold it."""

from typing import Literal, get_args

ImageKind = Literal["classifier", "vae", "gan", "ddpm"]
"""Models of images, by their family."""
IMAGE_KINDS: tuple[ImageKind, ...] = get_args(ImageKind)
OutputKind = Literal["model", "adapter", "reward_model", "critic", "report", "tokenizer", "text_classifier", ImageKind]
"""What an input can be: an output of a stage, or something from outside the recipe. `model`: a language model."""
ArtifactKind = Literal[
    "model", "adapter", "reward_model", "actor_critic", "report", "tokenizer", "dataset", "text_classifier", ImageKind
]
"""What a manifest says that its artifact is; `actor_critic` holds all outputs of a PPO stage."""

NOUNS: dict[OutputKind, str] = {
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

HOLDERS: dict[OutputKind, tuple[ArtifactKind, ...]] = {
    "model": ("model", "adapter", "actor_critic"),
    "tokenizer": ("tokenizer", "model", "adapter", "actor_critic", "reward_model"),
    "reward_model": ("reward_model",),
    "critic": ("actor_critic",),
    "adapter": ("adapter", "actor_critic"),
    "report": ("report",),
    "text_classifier": ("text_classifier",),
    **{kind: (kind,) for kind in IMAGE_KINDS},
}
"""Kinds of artifact that can hold an output of a kind."""

DRAWING_KINDS: tuple[OutputKind, ...] = ("vae", "gan", "ddpm")
"""Models that draw images."""
