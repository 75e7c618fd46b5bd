"""How stages put plain text to their models: a chat template where there is one, and the same along a chain."""

from collections.abc import Iterator

from recipes.errors import Problem
from recipes.loading.document import LoadedRecipe
from recipes.problem_codes import Code
from recipes.references import StageRef, parse_reference
from recipes.rules.models import model_facts
from recipes.stages.base import Template
from recipes.stages.evaluate import Evaluate
from recipes.stages.finetune import Finetune
from recipes.stages.kinds import Stage
from recipes.stages.reward import Reward
from recipes.stages.rl import PpoStage

Templated = Finetune | Reward | PpoStage | Evaluate
"""Stages with a `template`."""


def check_templates(loaded: LoadedRecipe) -> Iterator[Problem]:
    """A template that the model lacks or its family does not take; stages that put the same text in two ways."""
    for name, stage in loaded.recipe.stages.items():
        if isinstance(stage, Templated):
            yield from _check_own(loaded, name, stage)
            yield from _check_inputs(loaded, name, stage)


def stage_template(loaded: LoadedRecipe, stage: Stage) -> Template | None:
    """What the stage does with prompts and answers of plain text; None: it reads none, or its model is not known."""
    if not isinstance(stage, Templated):
        return None
    facts = model_facts(loaded, stage)
    if facts.family in ("encoder", "encoder_decoder"):
        return None
    if stage.template is not None or facts.tokenizer is None:
        return stage.template
    return "chat" if facts.tokenizer.has_chat_template else "none"


def _check_own(loaded: LoadedRecipe, name: str, stage: Templated) -> Iterator[Problem]:
    if stage.template is None:
        return
    facts, place = model_facts(loaded, stage), f"stages.{name}.template"
    if facts.family == "encoder":
        message = "an encoder reads texts and their labels; a template has no effect"
        yield loaded.problem(Code.NOT_APPLICABLE, place, stage.template, message, "remove the key")
    elif stage.template == "chat" and facts.tokenizer is not None and not facts.tokenizer.has_chat_template:
        message = "the model's tokenizer has no chat template"
        yield loaded.problem(
            Code.MISSING_CHAT_TEMPLATE,
            place,
            stage.template,
            message,
            "template: none, or tokenizer.chat_template where it is made",
        )


def _check_inputs(loaded: LoadedRecipe, name: str, stage: Templated) -> Iterator[Problem]:
    """Models that learned from plain text put to them in another way than this stage puts it."""
    own = stage_template(loaded, stage)
    inputs = {"init_from": getattr(stage, "init_from", None), "actor": getattr(stage, "actor", None)}
    inputs |= {"reward": getattr(stage, "reward", None)}
    if isinstance(stage, Evaluate):
        inputs |= {f"of.{index}": text for index, text in enumerate(stage.of)}
    learned: dict[str, Template] = {}
    for field, text in inputs.items():
        made = _stage_of(loaded, text)
        template = None if made is None else stage_template(loaded, made)
        if template is not None and not isinstance(made, Evaluate):
            learned[field] = template
    if own is None or len(set(learned.values())) != 1 or own in learned.values():
        return
    field, template = next(iter(learned.items()))
    message = f"plain text is formatted differently from where the model was trained ({inputs[field]}: {template})"
    yield loaded.problem(
        Code.TEMPLATE_MISMATCH,
        f"stages.{name}.template",
        own,
        message,
        f"template: {template} on both, or chat on both",
    )


def _stage_of(loaded: LoadedRecipe, text: str | None) -> Stage | None:
    try:
        reference = parse_reference(text or "")
    except ValueError:
        return None
    return loaded.recipe.stages.get(reference.stage) if isinstance(reference, StageRef) else None
