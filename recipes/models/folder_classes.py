"""What a folder's model of text is, by the class that its `config.json` names (pure)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from recipes.artifact_kinds import OutputKind
from recipes.models.architecture import MODEL_TYPES


@dataclass(frozen=True, slots=True)
class ModelClass:
    """A model as its configuration file describes it."""

    name: str
    """transformers' class."""
    kind: OutputKind
    is_headless: bool = False
    """Whether its files hold no head: who trains it makes a new one."""
    has_extras: bool = False
    """Whether its files may hold a pooler and a head of sentence pairs, which a masked language model has not."""


def find_class(config: Mapping[str, Any]) -> ModelClass:
    """The class of a `config.json`; raises ValueError for one that is not supported."""
    kind = config.get("model_type")
    if not isinstance(kind, str):
        raise ValueError("it has no model_type")
    names = config.get("architectures")
    name = names[0] if isinstance(names, list) and names and isinstance(names[0], str) else ""
    family = MODEL_TYPES.get(kind)
    if family is None:
        if name.endswith(("ForCausalLM", "LMHeadModel")):
            return ModelClass(name, "model")
        raise ValueError(f"model_type {kind!r} is not one of {', '.join(MODEL_TYPES)}")
    known = family.types[kind]
    if name not in known.classes:
        fitting = ", ".join(known.classes)
        raise ValueError(f"architectures {name or 'no class'} is not supported with model_type {kind!r}; {fitting} is")
    found = known.classes[name]
    labels = count_labels(config)
    if found == "reward_model" and labels != 1:
        raise ValueError(f"a reward model has one label, this classifier has {labels}")
    if found == "text_classifier" and labels < 2:
        raise ValueError("a classifier of texts tells at least two labels apart, this one has 1")
    return ModelClass(name, found, name == known.headless, name in known.with_extras)


def count_labels(config: Mapping[str, Any]) -> int:
    """Labels of a classifier's configuration; transformers' default is two."""
    labels = config.get("id2label")
    found = config.get("num_labels", len(labels) if isinstance(labels, dict) else 2)
    return found if type(found) is int else 0
