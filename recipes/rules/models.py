"""What is known of the model and the tokenizer that a stage works with before it exists, and what is wrong there."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace

from recipes.artifact_kinds import takes_tokenizer
from recipes.data.tokenizers import DEFAULT_CHAT_TEMPLATE, ExistingTokenizer, Tokenizer, TrainTokenizer
from recipes.errors import Problem
from recipes.loaded_recipe import LoadedRecipe
from recipes.models.architecture import LINEAR_MODULES, MODEL_TYPES, TEXT_FAMILIES
from recipes.models.base import TextFamily
from recipes.models.encoder_decoder import ENCODER_DECODER
from recipes.models.families import NOUNS
from recipes.models.folders import FolderFacts, config_positions, read_folder
from recipes.models.type_table import find_record, ties_head
from recipes.models.vision_language import VisionFacts
from recipes.nearest import nearest
from recipes.problem_codes import Code
from recipes.references import FolderRef, HubRef, StoreRef, parse_reference
from recipes.rules.chain import built_by, origin, stage_of
from recipes.stages.answers import TextFacts
from recipes.stages.base import StageBase, TextStage
from recipes.stages.kinds import Stage
from recipes.stages.lora import ModuleNames
from recipes.stages.pretrain import Pretrain
from recipes.tokenizers.token_contract import (
    TokenizerFacts,
    find_pad_token,
    missing_token,
    pad_token_rule,
    token_problems,
)

BYTES = 256
ROLES = ("system", "user", "assistant")
_MARKER = re.compile(r"<\|[^|<>\s]{1,40}\|>")


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What is known of a stage's model before it exists; None: not known (of the store and the hub: yet)."""

    type: str | None = None
    family: TextFamily | None = None
    positions: int | None = None
    positions_at: str = ""
    tokenizer: TokenizerFacts | None = None
    vision: VisionFacts | None = None
    configured_ends: frozenset[int] = frozenset()
    """End tokens that the model's configuration files name."""
    is_tied: bool = False
    """Whether its head and its embedding are one tensor."""


def model_facts(loaded: LoadedRecipe, stage: StageBase) -> ModelFacts:
    """The facts of the model that the stage starts from or builds."""
    start = stage.text_start()
    if start is None:
        return _built(loaded, stage) if isinstance(stage, Pretrain) else ModelFacts()
    return reference_facts(loaded, start)


def reference_facts(loaded: LoadedRecipe, text: str) -> ModelFacts:
    """The facts of the language model that a reference means."""
    source = origin(text, loaded.recipe.stages)
    if isinstance(source, Pretrain):
        return _built(loaded, source)
    if isinstance(source, FolderRef):
        facts = _folder(loaded, source.path, "model")
        family = None if facts.type is None else MODEL_TYPES[facts.type]
        length_at = f"{source.path}/config.json's length"
        known = (facts.tokenizer, facts.vision, facts.configured_ends, facts.is_tied)
        return ModelFacts(facts.type, family, facts.positions, length_at, *known)
    if isinstance(source, StoreRef | HubRef) and source in loaded.configs:
        config = loaded.configs[source]
        kind = config.get("model_type")
        if kind in MODEL_TYPES:
            positions, is_tied = config_positions(config), ties_head(config)
            return ModelFacts(kind, MODEL_TYPES[kind], positions, "its config.json's length", is_tied=is_tied)
    return ModelFacts()


def text_facts(loaded: LoadedRecipe, stage: TextStage) -> TextFacts:
    """What the stage's own rules ask of its model."""
    facts = model_facts(loaded, stage)
    tokens = None if facts.tokenizer is None else facts.tokenizer.special_tokens
    made = stage_of(stage.text_start(), loaded.recipe.stages)
    is_classifier = isinstance(made, TextStage) and made.is_classifier(model_facts(loaded, made).family)
    images = None if facts.vision is None else facts.vision.tokens_per_image
    return TextFacts(facts.family, tokens, is_classifier, images, facts.type)


def check_models(loaded: LoadedRecipe) -> Iterator[Problem]:
    """Folders that hold no such model, unknown special tokens, adapters on modules that the model lacks."""
    for name, stage in loaded.recipe.stages.items():
        place = f"stages.{name}"
        yield from _check_folders(loaded, place, stage)
        if isinstance(stage, TextStage):
            facts = model_facts(loaded, stage)
            yield from _check_family(loaded, name, stage)
            if stage.adapters is not None and facts.type in LINEAR_MODULES:
                yield from loaded.problems(name, stage.adapters.target_rules(_module_names(stage, facts)))
            if stage.sampled is not None:
                field_path, sampling = stage.sampled
                yield from _check_stop_tokens(loaded, f"{place}.{field_path}", sampling.stop_tokens, facts)
            if stage.own_tokenizer is not None:
                yield from _check_tokenizer(loaded, f"{place}.tokenizer", stage.own_tokenizer, facts.tokenizer)
    yield from _check_chat_marks(loaded)


def _module_names(stage: TextStage, facts: ModelFacts) -> ModuleNames:
    """What the modules of the stage's model are called; a head of its own takes the place of the model's."""
    record, heads = find_record(facts.type), stage.new_heads(facts.family)
    return ModuleNames(
        facts.type or "",
        LINEAR_MODULES[facts.type or ""],
        "embed_tokens" if record is None else record.embedding,
        None if heads else "lm_head" if record is None else record.output,
        heads,
        is_tied=facts.is_tied and not heads,
        is_shared=facts.is_tied and facts.family is ENCODER_DECODER,
    )


def _built(loaded: LoadedRecipe, stage: Pretrain) -> ModelFacts:
    if stage.architecture is None:
        return ModelFacts()
    name = next((name for name, other in loaded.recipe.stages.items() if other is stage), "")
    return ModelFacts(
        type=stage.architecture.type,
        family=TEXT_FAMILIES[stage.architecture.family],
        positions=stage.architecture.shape().positions,
        positions_at=f"stages.{name}.architecture.{stage.architecture.length_key}",
        tokenizer=_tokenizer_facts(loaded, stage.tokenizer),
        is_tied=stage.architecture.shape().tied,
    )


def _tokenizer_facts(loaded: LoadedRecipe, tokenizer: Tokenizer | None) -> TokenizerFacts | None:
    if isinstance(tokenizer, TrainTokenizer):
        special = frozenset(tokenizer.names)
        return TokenizerFacts(tokenizer.eos_token, tokenizer.pad_token, special, chat_template=tokenizer.chat_template)
    if not isinstance(tokenizer, ExistingTokenizer):
        return None
    try:
        reference = parse_reference(tokenizer.from_)
    except ValueError:
        return None
    facts = _folder(loaded, reference.path, "tokenizer").tokenizer if isinstance(reference, FolderRef) else None
    if facts is None:
        return None
    return replace(
        facts,
        eos_token=tokenizer.eos_token or facts.eos_token,
        pad_token=tokenizer.pad_token or _pad_token(tokenizer, facts),
        chat_template=tokenizer.chat_template or facts.chat_template,
    )


def _pad_token(tokenizer: ExistingTokenizer, facts: TokenizerFacts) -> str | None:
    """The folder's pad token, looked up again when the recipe names another end token."""
    return find_pad_token(facts.pad_token, tokenizer.eos_token or facts.eos_token, facts.vocabulary or {})


def _folder(loaded: LoadedRecipe, path: str, wants: str) -> FolderFacts:
    return read_folder((loaded.base_dir / path).resolve(), wants)


def _check_folders(loaded: LoadedRecipe, place: str, stage: Stage) -> Iterator[Problem]:
    for item in stage.inputs():
        try:
            reference = parse_reference(item.text)
        except ValueError:
            continue
        if not isinstance(reference, FolderRef):
            continue
        facts = _folder(loaded, reference.path, item.wants[0])
        for finding in facts.problems:
            yield loaded.problem_from(finding, f"{place}.{item.field_path}", item.text)
        if facts.kind is not None and facts.kind not in item.wants and not takes_tokenizer(item.wants):
            needed = " or ".join(NOUNS[kind] for kind in item.wants)
            by = "" if facts.model_class is None else f" ({facts.model_class.name})"
            message = f"needs {needed}, but the folder holds {NOUNS[facts.kind]}{by}"
            yield loaded.problem(Code.WRONG_ARTIFACT_KIND, f"{place}.{item.field_path}", item.text, message)


def _check_tokenizer(
    loaded: LoadedRecipe, place: str, tokenizer: Tokenizer, facts: TokenizerFacts | None
) -> Iterator[Problem]:
    if tokenizer.chat_template is not None and tokenizer.chat_template != DEFAULT_CHAT_TEMPLATE:
        from recipes.tokenizers.chat_template import template_problem

        message = template_problem(tokenizer.chat_template, ROLES)
        if message is not None:
            yield loaded.problem(Code.INVALID_CHAT_TEMPLATE, f"{place}.chat_template", tokenizer.chat_template, message)
    if isinstance(tokenizer, TrainTokenizer):
        needed = BYTES + len(tokenizer.names)
        if tokenizer.vocab_size < needed:
            message = f"too small for {BYTES} bytes and {len(tokenizer.names)} special tokens (eos and pad too)"
            yield loaded.problem(
                Code.VOCABULARY_TOO_SMALL, f"{place}.vocab_size", tokenizer.vocab_size, message, f"at least {needed}"
            )
        return
    if facts is None:
        return
    if (missing := missing_token(facts.eos_token, facts.pad_token)) is not None:
        yield loaded.problem_from(missing, place, tokenizer.from_)
    for key in ("eos_token", "pad_token"):
        token = getattr(facts, key)
        if token is not None and facts.vocabulary is not None and token not in facts.vocabulary:
            guess = nearest(token, sorted(facts.special_tokens))
            suggestion = f"did you mean {guess}?" if guess else ""
            yield loaded.problem(
                Code.UNKNOWN_TOKEN, f"{place}.{key}", token, "not a token of this tokenizer", suggestion
            )
    if (conflict := pad_token_rule(facts.eos_token, facts.pad_token)) is not None:
        key = "pad_token" if tokenizer.pad_token is not None else "eos_token"
        yield loaded.problem_from(conflict, f"{place}.{key}", facts.pad_token)
    template = None if tokenizer.chat_template else facts.chat_template  # the recipe's own is tried above
    for finding in token_problems(replace(facts, eos_token=None, pad_token=None, chat_template=template)):
        yield loaded.problem_from(finding, place, tokenizer.from_)


def _check_chat_marks(loaded: LoadedRecipe) -> Iterator[Problem]:
    """Marks of a chat template that the tokenizer would split, where later stages talk in chats."""
    stages = loaded.recipe.stages
    talking = {
        id(source)
        for stage in stages.values()
        if isinstance(stage, TextStage)
        and stage.trains
        and stage.reads_chats
        and (source := built_by(stage.text_start() or "", stages)) is not None
    }
    for name, stage in stages.items():
        tokenizer = stage.own_tokenizer if isinstance(stage, TextStage) and id(stage) in talking else None
        if not isinstance(tokenizer, TrainTokenizer):
            continue
        if tokenizer.chat_template == DEFAULT_CHAT_TEMPLATE:
            marks = {f"<|{role}|>" for role in ROLES}
        else:
            marks = set(_MARKER.findall(tokenizer.chat_template))
        known = set(tokenizer.names)
        for mark in sorted(marks - known):
            message = f"the chat template writes {mark}, which is not a special token and would be split"
            place = f"stages.{name}.tokenizer.special_tokens"
            yield loaded.problem(
                Code.SPLIT_SPECIAL_TOKEN, place, tokenizer.special_tokens, message, f"add {mark} to special_tokens"
            )


def _check_family(loaded: LoadedRecipe, name: str, stage: TextStage) -> Iterator[Problem]:
    """Stages that cannot work with the model that they are given, or with keys that do not fit it."""
    refused = False
    for item in stage.writers():
        finding = stage.refuse_model(reference_facts(loaded, item.text).family)
        if finding is not None:
            refused = True
            yield loaded.problem_from(finding, f"stages.{name}.{item.field_path}", item.text)
    if not refused:
        yield from loaded.problems(name, stage.text_rules(text_facts(loaded, stage)))


def _check_stop_tokens(loaded: LoadedRecipe, place: str, tokens: list[str], facts: ModelFacts) -> Iterator[Problem]:
    if facts.tokenizer is None:
        return
    for index, token in enumerate(tokens):
        if not facts.tokenizer.has_token(token):
            known = sorted(facts.tokenizer.special_tokens)
            guess = nearest(token, known)
            suggestion = f"did you mean {guess}?" if guess else "special tokens: " + ", ".join(known[:12])
            yield loaded.problem(
                Code.UNKNOWN_TOKEN, f"{place}.stop_tokens.{index}", token, "not one token of the vocabulary", suggestion
            )
        elif token == facts.tokenizer.pad_token:
            yield loaded.problem(
                Code.PAD_TOKEN_CONFLICT, f"{place}.stop_tokens.{index}", token, "the pad token cannot be a stop token"
            )
