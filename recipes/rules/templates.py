"""How stages put plain text to their models: a chat template where there is one, and the same along a chain."""

from collections.abc import Iterator

from recipes.errors import Problem
from recipes.loaded_recipe import LoadedRecipe
from recipes.problem_codes import Code
from recipes.rules.chain import stage_of
from recipes.rules.models import model_facts
from recipes.stages.answers import Template, template_rule
from recipes.stages.base import StageBase, TextStage


def check_templates(loaded: LoadedRecipe) -> Iterator[Problem]:
    """A template that the model lacks or its family does not take; stages that put the same text in two ways."""
    for name, stage in loaded.recipe.stages.items():
        if isinstance(stage, TextStage) and stage.reads_chats:
            yield from _check_own(loaded, name, stage)
            yield from _check_environment(loaded, name, stage)
            yield from _check_inputs(loaded, name, stage)


def stage_template(loaded: LoadedRecipe, stage: StageBase) -> Template | None:
    """What the stage does with prompts and answers of plain text; None: it reads none, or its model is not known."""
    if not isinstance(stage, TextStage) or not stage.reads_chats:
        return None
    facts = model_facts(loaded, stage)
    if facts.family is not None and not facts.family.continues:
        return None
    if stage.own_template is not None or facts.tokenizer is None:
        return stage.own_template
    return "chat" if facts.tokenizer.has_chat_template else "none"


def _check_own(loaded: LoadedRecipe, name: str, stage: TextStage) -> Iterator[Problem]:
    if stage.own_template is None:
        return
    facts, place = model_facts(loaded, stage), f"stages.{name}.template"
    if facts.family is not None and facts.family.has_classes:
        message = f"{facts.family.noun} reads texts and their labels; a template has no effect"
        yield loaded.problem(Code.NOT_APPLICABLE, place, stage.own_template, message, "remove the key")
    elif facts.tokenizer is not None:
        finding = template_rule(stage.own_template, facts.tokenizer.has_chat_template)
        if finding is not None:
            yield loaded.problem_from(finding, place, stage.own_template)


def _check_environment(loaded: LoadedRecipe, name: str, stage: StageBase) -> Iterator[Problem]:
    """A chat template by which no conversation with the stage's environment can be continued."""
    environment, tokenizer = stage.converses_with, model_facts(loaded, stage).tokenizer
    if environment is None or tokenizer is None or stage_template(loaded, stage) == "none":
        return
    if problem := tokenizer.conversation_problem(environment.role):
        place, advice = f"stages.{name}.environment.role", "role: user, or a model with another template"
        yield loaded.problem(Code.INVALID_CHAT_TEMPLATE, place, environment.role, problem, advice)


def _check_inputs(loaded: LoadedRecipe, name: str, stage: TextStage) -> Iterator[Problem]:
    """Models that learned from plain text put to them in another way than this stage puts it."""
    own = stage_template(loaded, stage)
    inputs = {item.field_path: item.text for item in stage.inputs()}
    learned: dict[str, Template] = {}
    for field, text in inputs.items():
        made = stage_of(text, loaded.recipe.stages)
        template = None if made is None or not made.trains else stage_template(loaded, made)
        if template is not None:
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
