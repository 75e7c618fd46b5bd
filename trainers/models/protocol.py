"""What a family of language models is at run time: how its models are built, opened and taught."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn

from recipes.errors import StageError
from recipes.models.model_kinds import ModelKind
from recipes.models.type_table import type_records
from recipes.stages.finetune import Finetune
from recipes.stages.pretrain import Pretrain
from trainers.objectives.protocol import Learning

if TYPE_CHECKING:
    from trainers.data.image_processor import ImageProcessor
    from trainers.data.tokenizer import Tokenization


@dataclass(frozen=True)
class TokenizerFacts:
    """What a model's configuration takes from its tokenizer."""

    vocab_size: int
    eos_id: int
    pad_id: int
    bos_id: int | None = None

    def config_keys(self) -> dict[str, int | None]:
        """Return them by the names of transformers' configurations."""
        return {
            "vocab_size": self.vocab_size,
            "bos_token_id": self.bos_id,
            "eos_token_id": self.eos_id,
            "pad_token_id": self.pad_id,
        }


class FamilyRuntime(ABC):
    """A family of language models; `trainers/models/families.py` finds one by name."""

    kinds: ClassVar[tuple[ModelKind, ...]]
    """What its stock classes make; the first is what is pretrained and tuned."""

    @property
    def kind(self) -> ModelKind:
        """What is pretrained and tuned."""
        return self.kinds[0]

    @abstractmethod
    def build(
        self, architecture: Mapping[str, Any], facts: TokenizerFacts, *, seed: int, device: torch.device
    ) -> nn.Module:
        """Build with fp32 weights that depend on the seed alone; see `build_language_model`."""

    @abstractmethod
    def stock_class(self, model_type: str, kind: ModelKind) -> Any:
        """Return the class that opens a type's files as one of `kinds`.

        Each import takes a second, so only the wanted one is made.
        """

    @abstractmethod
    def attention(self, device: torch.device, model_type: str) -> str | dict[str, str]:
        """Return the attention that suits the device and the type, of the model or of each of its parts."""

    @abstractmethod
    def learning(
        self, spec: Pretrain | Finetune, model: nn.Module, tokenization: "Tokenization", seed: int
    ) -> Learning:
        """Return the objective that follows from the kind of stage."""

    def open_images(self, folder: Path) -> "ImageProcessor | None":
        """Open what a model's folder says of images; None where it takes none."""
        return None

    def freeze(self, spec: Finetune, model: nn.Module, images: "ImageProcessor | None") -> str | tuple[()]:
        """Freeze what a fine-tuning leaves as it is; returns peft's pattern of the modules that get no adapter."""
        return ()


def initialised(model_class: Any, config: Any, seed: int) -> nn.Module:
    """Return a model of a class with random fp32 weights that depend on the seed alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: nn.Module = model_class(config)
    return model.float()


def library_class(model_type: str, kind: ModelKind) -> Any:
    """Return transformers' class for a kind of model of a type; raises StageError where there is none."""
    import transformers

    name = type_records()[model_type].classes.get(kind)
    if name is None:
        raise StageError(f"transformers has no class that makes a {kind.replace('_', ' ')} of type {model_type!r}")
    return getattr(transformers, name)


def _further_ids(facts: TokenizerFacts) -> dict[str, int | None]:
    """Return ids that a few types have beside the others; nothing is forced, so that text ends where the model says."""
    first = facts.eos_id if facts.bos_id is None else facts.bos_id
    return {
        "sep_token_id": facts.eos_id,
        "cls_token_id": first,
        "forced_eos_token_id": None,
        "forced_bos_token_id": None,
    }


def library_config(model_type: str, keys: Mapping[str, Any], facts: TokenizerFacts, attention: Any) -> Any:
    """Return the configuration of a type; raises StageError with what transformers says against its keys."""
    import transformers

    config_class = transformers.CONFIG_MAPPING[model_type]
    known = {item.name for item in fields(config_class)}
    ids = {**facts.config_keys(), **_further_ids(facts)}
    given = {**keys, **{name: value for name, value in ids.items() if name in known}}
    try:
        return config_class(**given, attn_implementation=attention)
    except Exception as error:  # strict configurations raise errors of their own
        raise StageError(f"architecture of type {model_type!r}: {error}") from None


def library_keys(architecture: Mapping[str, Any]) -> dict[str, Any]:
    """Return a recipe's architecture without what only recipes know."""
    return {name: value for name, value in architecture.items() if name not in ("family", "type")}
