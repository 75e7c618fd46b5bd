"""Every family of models by name, and what is said of every kind of artifact, read off the families."""

from typing import Any, get_args

from recipes.artifact_kinds import ArtifactKind, OutputKind
from recipes.models.architecture import Architecture
from recipes.models.images.architecture import IMAGE_FAMILIES


def _text_families(union: Any) -> dict[str, tuple[type, ...]]:
    by_family: dict[str, tuple[type, ...]] = {}
    for model in get_args(get_args(union)[0]):
        (family,) = get_args(model.model_fields["family"].annotation)
        by_family[family] = (*by_family.get(family, ()), model)
    return by_family


BUILT_FAMILIES: dict[str, tuple[type, ...]] = _text_families(Architecture)
"""Families of language models that a stage can build -> the configuration classes of their members."""

FAMILIES: dict[str, tuple[type, ...]] = BUILT_FAMILIES | {kind: (family,) for kind, family in IMAGE_FAMILIES.items()}
"""Every family that a stage can build -> the configuration classes of its members."""

NOUNS: dict[OutputKind, str] = {
    "model": "a language model",
    "adapter": "an adapter",
    "reward_model": "a reward model",
    "critic": "a critic",
    "report": "a report",
    "preferences": "a set of preferences",
    "tokenizer": "a tokenizer",
    "text_classifier": "a text classifier",
    **{kind: family.noun for kind, family in IMAGE_FAMILIES.items()},
}

HOLDERS: dict[OutputKind, tuple[ArtifactKind, ...]] = {
    "model": ("model", "adapter", "actor_critic"),
    "tokenizer": ("tokenizer", "model", "adapter", "actor_critic", "reward_model"),
    "reward_model": ("reward_model",),
    "critic": ("actor_critic",),
    "adapter": ("adapter", "actor_critic"),
    "report": ("report",),
    "preferences": ("preferences",),
    "text_classifier": ("text_classifier",),
    **{kind: (kind,) for kind in IMAGE_FAMILIES},
}
"""Kinds of artifact that can hold an output of a kind."""

ARTIFACT_KINDS: frozenset[ArtifactKind] = frozenset(kind for kinds in HOLDERS.values() for kind in kinds) | {"dataset"}
"""Every kind of artifact."""
