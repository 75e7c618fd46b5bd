"""Strict loading of a model folder: the files hold every tensor of the class and no other."""

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from recipes.errors import StageError
from recipes.models.architecture import MODEL_TYPES
from recipes.models.base import TextFamily
from recipes.models.folder_classes import find_class
from recipes.models.folders import config_positions
from recipes.models.model_kinds import MODEL_KINDS, KindFacts, ModelKind
from recipes.stages.answers import TextFacts
from recipes.stages.lora import CLASSIFIER_HEAD, NEW_HEADS
from trainers.models.families import runtime_of
from trainers.models.forward_forms import record_of
from trainers.runtime.precision import is_finite
from trainers.store.hf_loaders import open_model

CLASSIFIER_PARTS = (CLASSIFIER_HEAD, "bert.pooler")
"""What a classifier has and a masked language model has not."""
_ENCODER_EXTRAS = ("bert.pooler", "pooler", "cls.seq_relationship")
"""What files of a BertModel and a BertForPreTraining hold beside a masked language model; a bare model's keys have no
prefix."""

HEAD_NAMES = ("lm_head", *NEW_HEADS)
"""Attributes under which stock classes hold their head; which one depends on class and kind."""


def load_model(
    folder: Path,
    kind: ModelKind,
    *,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    rounded_to: torch.dtype | None = None,
    new_head_seed: int | None = None,
    classes: Sequence[str] = (),
    dropout: float | None = None,
) -> nn.Module:
    """Load a model folder on the CPU in `dtype`, with the attention that suits `device`.

    With `rounded_to` the weights are those of the files in that precision, whatever `dtype` then holds them in.

    With `new_head_seed` the folder holds another kind of model: the head is made from the seed, and nothing but the
    head may be missing or left over; `classes` names what a new classifier tells apart. A masked model takes its head
    from the folder where that has one. `dropout` takes the place of an encoder's own, but for its attention's. Raises
    StageError naming the keys otherwise.
    """
    raw = json.loads((folder / "config.json").read_text())
    model_type = raw["model_type"]
    model_class = stock_class(model_type, kind)
    config = model_class.config_class.from_pretrained(folder, local_files_only=True)
    facts = MODEL_KINDS[kind]
    _set_head(config, facts, classes)
    if dropout is not None:
        _set_dropout(config, dropout)
    _quieten()
    with torch.random.fork_rng(devices=[]):
        if new_head_seed is not None:
            torch.manual_seed(new_head_seed)
        model, info = open_model(
            model_class,
            folder,
            config=config,
            dtype=rounded_to or dtype,
            attn_implementation=runtime_of(MODEL_TYPES[model_type].name).attention(device, model_type),
            output_loading_info=True,
        )
    if new_head_seed is not None and facts.has_score:
        deviation = getattr(model.config, "initializer_range", 0.02)
        _make_head(getattr(model, head_name(model)), new_head_seed, deviation)
    has_new_head = new_head_seed is not None
    if facts.reads_both_ways and model_type != "bert":
        made, left = _exceptions_by_class(model, raw) if has_new_head else ((), ())
    else:
        made, left = _exceptions(kind, model, raw, has_new_head=has_new_head)
    _demand_exact(folder, kind, model, info, made, left)
    _note_untied(model)
    if rounded_to is not None:
        for parameter in model.parameters():
            parameter.data = parameter.data.to(dtype)
    model.train()
    loaded: nn.Module = model
    return loaded


def _note_untied(model: Any) -> None:
    """Let the configuration say that head and embedding differ, as in files of T5 1.1; T5Config always denies it."""
    head = model.get_output_embeddings()
    if head is not None and head.weight is not model.get_input_embeddings().weight:
        model.config.tie_word_embeddings = False


def _set_head(config: Any, facts: KindFacts, classes: Sequence[str]) -> None:
    """Set what a configuration says of the head of a kind of model."""
    if facts.has_score:
        config.num_labels = 1
    if classes:
        config.id2label = dict(enumerate(classes))
        config.label2id = {name: number for number, name in enumerate(classes)}
    if facts.scores_tokens:
        config.classifier_dropout = 0.0


def _set_dropout(config: Any, dropout: float) -> None:
    """Set every dropout of an encoder but that of its attention, by the names that its type gives them."""
    for name in [*vars(config), "classifier_dropout"]:
        if "drop" in name and "att" not in name and isinstance(getattr(config, name, None), float | int | None):
            setattr(config, name, dropout)


def stock_class(model_type: str, kind: ModelKind) -> Any:
    """Return the class that opens a type's files as a kind; raises StageError where the type makes none."""
    runtime = runtime_of(MODEL_TYPES[model_type].name)
    if kind not in runtime.kinds:
        known = [name for name, family in MODEL_TYPES.items() if kind in runtime_of(family.name).kinds]
        raise StageError(f"model type {model_type!r} makes no {kind.replace('_', ' ')}; {', '.join(known)} do")
    return runtime.stock_class(model_type, kind)


def text_facts(folder: Path) -> TextFacts:
    """Return what a stage's rules ask of a folder's model; raises StageError for a type that is of no family."""
    return TextFacts(model_family(folder), type=json.loads((folder / "config.json").read_text())["model_type"])


def model_family(folder: Path) -> TextFamily:
    """Return the family of a folder's model; raises StageError for a type that is none of them."""
    found = json.loads((folder / "config.json").read_text()).get("model_type")
    if found not in MODEL_TYPES:
        raise StageError(f"{folder}: model type {found!r} is not one of {', '.join(MODEL_TYPES)}")
    return MODEL_TYPES[found]


def classifier_parts(model: Any) -> tuple[str, ...]:
    """Return the modules that a classifier of texts has and a masked language model has not."""
    return record_of(model).head or CLASSIFIER_PARTS


def lacks_head(folder: Path) -> bool:
    """Tell whether a folder's model was written without a head, by its class."""
    return find_class(json.loads((folder / "config.json").read_text())).is_headless


def longest_input(folder: Path) -> int | None:
    """Return the most tokens that a folder's model is made for; None where its configuration says nothing."""
    return config_positions(json.loads((folder / "config.json").read_text()))


def head_name(model: nn.Module) -> str:
    """Return the attribute that holds a stock model's head."""
    return next(name for name in HEAD_NAMES if hasattr(model, name))


def _quieten() -> None:
    """Keep transformers' progress bars and load reports off the output; what they say is checked and raised here."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()


@torch.no_grad()
def _make_head(head: nn.Linear, seed: int, deviation: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    head.weight.copy_(torch.randn(head.weight.shape, generator=generator) * deviation)
    if head.bias is not None:
        head.bias.zero_()


def _exceptions(
    kind: ModelKind, model: Any, config: dict[str, Any], *, has_new_head: bool
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the modules that are made new where the folder lacks them, and those of the folder that are left out."""
    if MODEL_KINDS[kind].fills_masks:
        try:
            written_by = find_class(config)
        except ValueError as error:
            raise StageError(f"config.json: {error}") from None
        is_headless = has_new_head and written_by.is_headless
        return (("cls",) if is_headless else ()), (_ENCODER_EXTRAS if written_by.has_extras else ())
    if not has_new_head:
        return (), ()
    if MODEL_KINDS[kind].has_classes:
        return CLASSIFIER_PARTS, ("cls",)
    return (head_name(model),), HEAD_NAMES


def _exceptions_by_class(model: Any, raw: dict[str, Any]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the tensors that the class which wrote a folder has not, and those that it has beyond the model's."""
    import transformers

    with torch.device("meta"):
        source: Any = getattr(transformers, find_class(raw).name)(copy.deepcopy(model.config))
    is_bare = source.base_model is source
    prefix = f"{model.base_model_prefix}." if is_bare else ""
    written, own = {f"{prefix}{name}" for name in source.state_dict()}, set(model.state_dict())
    beyond = written - own
    return tuple(own - written), (*beyond, *(name.removeprefix(prefix) for name in beyond))


def _demand_exact(
    folder: Path, kind: ModelKind, model: Any, info: dict[str, Any], made: tuple[str, ...], left: tuple[str, ...]
) -> None:
    def allowed(key: str, names: tuple[str, ...]) -> bool:
        return any(key == name or key.startswith(f"{name}.") for name in names)

    wrong = {
        "missing": [key for key in info["missing_keys"] if not allowed(key, made)],
        "unexpected": [key for key in info["unexpected_keys"] if not allowed(key, left)],
        "of another shape": [str(key) for key in info["mismatched_keys"] if not allowed(str(key[0]), made)],
    }
    problems = [f"{what}: {', '.join(sorted(keys)[:8])}" for what, keys in wrong.items() if keys]
    if problems:
        raise StageError(
            f"{folder} does not hold a {kind.replace('_', ' ')} ({type(model).__name__}); {'; '.join(problems)}"
        )
    bad = [name for name, parameter in model.named_parameters() if not is_finite(parameter)]
    if bad:
        raise StageError(f"{folder}: values are not finite in {', '.join(bad[:8])}")
