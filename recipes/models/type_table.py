"""What the pinned transformers has: a record of every type of language model, written by `trainers.models.describe`.

Each record says which keys a configuration takes, which classes there are, and what was measured on a tiny model of
random weights: how rows are kept apart in a packed sequence, how it is sampled from, what the logits are made of.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal

FILE = Path(__file__).with_name("types.json")

Capability = Literal[
    "training", "packing", "adapters", "generation", "checkpointing", "reward_model", "critic", "classes", "vllm"
]
"""What a type may lack, and then says why."""

WORDS: dict[Capability, str] = {
    "training": "training",
    "packing": "several rows in a sequence",
    "adapters": "adapters",
    "generation": "sampling",
    "checkpointing": "gradient checkpointing",
    "reward_model": "a head for scores",
    "critic": "a head for values",
    "classes": "a head for classes of texts",
    "vllm": "rollouts by vLLM",
}
"""As messages name them."""


@dataclass(frozen=True, slots=True)
class TypeRecord:
    """A `model_type` of the pinned transformers."""

    family: str
    classes: Mapping[str, str]
    """transformers' classes: of a kind of model in a worker, and of the `base`, which has no head."""
    keys: Mapping[str, tuple[tuple[str, ...], Any]] = field(default_factory=dict)
    """Keys of its configuration: kinds of value, and the default; those that follow from the tokenizer are left out."""
    required: tuple[str, ...] = ()
    """Keys that have to be given: their default makes no model."""
    shape: Mapping[str, str] = field(default_factory=dict)
    """Which key is its width, its layers, its longest sequence, ..."""
    linears: tuple[str, ...] = ()
    """Names of the linear modules that an adapter can be put on."""
    attention: Literal["sdpa", "eager"] = "sdpa"
    """Of transformers, for outputs as the type defines them."""
    cpu_attention: Literal["block_causal", "sdpa", "eager"] = "block_causal"
    packing: Literal["bias", "positions", "kinds"] | None = None
    """How rows of a sequence are kept apart: an additive mask, positions that start again, or an additive mask for each
    kind of layer; None: they are not."""
    first_position: Literal["zero", "after_pad"] = "zero"
    """What a row's positions count from, where they are given."""
    decoding: Literal["bias", "mask", "positions", "no_cache"] | None = None
    """How left-padded prompts are continued: with a cache and an additive mask, with a cache and a mask of the padding,
    with those and the positions that the type gives tokens of images, or without a cache, by a forward over the whole
    sequence for each token."""
    scale: tuple[str, int] | None = None
    """The key whose value the logits are multiplied by, and the power that it is raised to."""
    softcap: str | None = None
    """The key of the bound that logits are squeezed into."""
    head: tuple[str, ...] = ()
    """Modules that a classifier of texts has beyond the backbone."""
    embedding: str = "embed_tokens"
    """Name of the module that embeds tokens."""
    output: str = "lm_head"
    """Name of the module that predicts tokens."""
    start: Literal["pad", "eos"] = "pad"
    """What the targets of an encoder-decoder start with."""
    lacks: Mapping[Capability, str] = field(default_factory=dict)
    """What does not work, and why."""


TRANSPOSED = ("gpt2", "gpt-sw3")
"""Types whose files store matrices in another layout than vLLM keeps them in."""


@cache
def type_records() -> dict[str, TypeRecord]:
    """The records by `model_type`."""
    return {name: _record(content) for name, content in json.loads(FILE.read_text(encoding="utf-8")).items()}


@cache
def vllm_classes() -> tuple[str, frozenset[str]]:
    """vLLM's version, and the classes of transformers whose models it opens."""
    content = json.loads(FILE.with_name("vllm_classes.json").read_text(encoding="utf-8"))
    return content["version"], frozenset(content["classes"])


def vllm_lack(name: str, classes: Mapping[str, str]) -> str | None:
    """Why vLLM does not support a type; None: its list of classes has it."""
    version, known = vllm_classes()
    if name in TRANSPOSED:
        return "its matrices are kept transposed there, so that they cannot be compared with the learner's"
    return None if classes["language_model"] in known else f"vLLM {version} has no class for it"


def find_record(model_type: object) -> TypeRecord | None:
    """The record of a type; None for one that transformers does not have."""
    return type_records().get(model_type) if isinstance(model_type, str) else None


def ties_head(config: Mapping[str, Any]) -> bool:
    """Whether head and embedding of a `config.json`'s model are one tensor."""
    text = config.get("text_config")
    for keys in (text, config) if isinstance(text, Mapping) else (config,):
        if isinstance(found := keys.get("tie_word_embeddings"), bool):
            return found
        record = find_record(keys.get("model_type"))
        if record is not None and "tie_word_embeddings" in record.keys:
            return bool(record.keys["tie_word_embeddings"][1])
    return False


def _record(content: Mapping[str, Any]) -> TypeRecord:
    keys = {name: (tuple(kinds), default) for name, (kinds, default) in content.get("keys", {}).items()}
    lists = {
        name: tuple(content[name]) for name in ("linears", "scale", "head", "required") if content.get(name) is not None
    }
    return TypeRecord(**{**content, "keys": keys, **lists})
