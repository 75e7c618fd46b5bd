"""What `check` tells of the tokens that end a model's answers, where its files do not agree on them."""

from collections.abc import Iterator

from recipes.data.tokenizers import DEFAULT_CHAT_TEMPLATE
from recipes.errors import Finding, Problem
from recipes.loaded_recipe import LoadedRecipe
from recipes.problem_codes import Code
from recipes.references import FolderRef
from recipes.rules.chain import origin
from recipes.rules.models import ModelFacts, reference_facts
from recipes.stages.base import TextStage


def end_token_warnings(loaded: LoadedRecipe) -> Iterator[Problem]:
    """Warnings about the end tokens of every model that answers, each model once."""
    reported: list[object] = []
    for name, stage in loaded.recipe.stages.items():
        answering = stage.writers() if isinstance(stage, TextStage) and stage.reads_chats else []
        for field, text in ((item.field_path, item.text) for item in answering):
            source = origin(text, loaded.recipe.stages)
            key = source.path if isinstance(source, FolderRef) else id(source)
            facts = reference_facts(loaded, text)
            if key in reported or facts.tokenizer is None or facts.family is None or not facts.family.continues:
                continue
            reported.append(key)
            for finding in _disagreements(facts):
                yield loaded.problem_from(finding, f"stages.{name}.{field}", text)


def _disagreements(facts: ModelFacts) -> Iterator[Finding]:
    tokenizer = facts.tokenizer
    assert tokenizer is not None
    vocabulary, own = tokenizer.vocabulary or {}, tokenizer.eos_token
    names = {number: token for token, number in vocabulary.items()}
    configured = [names.get(number, str(number)) for number in sorted(facts.configured_ends)]
    if configured and own is not None and own not in configured:
        yield Finding(
            Code.END_TOKENS_DISAGREE,
            f"the tokenizer's end token is {own}, config.json and generation_config.json name {', '.join(configured)}; "
            "answers end at each of them, and the output's generation_config.json names them all",
        )
    if tokenizer.chat_template in (None, DEFAULT_CHAT_TEMPLATE):
        return
    end = tokenizer.turn_end
    if end is None:
        yield Finding(
            Code.NO_END_OF_TURN,
            "the chat template writes no special token after an answer, so a model tuned on chats does not learn "
            "where to stop; its answers run to max_new_tokens",
        )
    elif end != own and end not in configured:
        others = ", ".join(dict.fromkeys([own or "none", *configured]))
        yield Finding(
            Code.END_TOKENS_DISAGREE,
            f"the chat template ends an answer with {end}, which is not among the model's end tokens ({others}); "
            "answers end there too in `sample`, RL and evaluations, and the output's generation_config.json names it",
        )
