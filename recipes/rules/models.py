"""What is known of the model and the tokenizer that a stage works with before it exists, and what is wrong there."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace

from recipes.artifact_kinds import NOUNS
from recipes.data.text import DEFAULT_CHAT_TEMPLATE, ExistingTokenizer, Tokenizer, TrainTokenizer
from recipes.errors import Problem
from recipes.loading.document import LoadedRecipe
from recipes.loading.schema_paths import nearest
from recipes.models.architecture import LINEAR_MODULES, MODEL_TYPES
from recipes.models.folders import FolderFacts, config_positions, read_folder
from recipes.models.vision_language import VisionFacts
from recipes.problem_codes import Code
from recipes.references import FolderRef, HubRef, StageRef, StoreRef, parse_reference
from recipes.rules.chain import origin
from recipes.stages.base import StageBase
from recipes.stages.evaluate import Evaluate
from recipes.stages.finetune import Finetune
from recipes.stages.kinds import Stage
from recipes.stages.pretrain import Pretrain
from recipes.stages.reward import Reward
from recipes.stages.rl import PpoStage
from recipes.tokenizers.token_contract import TokenizerFacts, find_pad_token, token_problems

BYTES = 256
ROLES = ("system", "user", "assistant")
NOUN_OF: dict[str | None, str] = {
    None: "of an unknown family",
    "decoder": "a decoder",
    "rnn": "an rnn",
    "encoder": "an encoder",
    "encoder_decoder": "an encoder-decoder",
    "vision_language": "a vision-language model",
}
"""Families of language models as messages name them."""
_MARKER = re.compile(r"<\|[^|<>\s]{1,40}\|>")


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What is known of a stage's model before it exists; None: not known (of the store and the hub: yet)."""

    type: str | None = None
    family: str | None = None
    positions: int | None = None
    positions_at: str = ""
    tokenizer: TokenizerFacts | None = None
    vision: VisionFacts | None = None
    configured_ends: frozenset[int] = frozenset()
    """End tokens that the model's configuration files name."""


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
        known = (facts.tokenizer, facts.vision, facts.configured_ends)
        return ModelFacts(facts.type, family, facts.positions, length_at, *known)
    if isinstance(source, StoreRef | HubRef) and source in loaded.configs:
        config = loaded.configs[source]
        kind = config.get("model_type")
        if kind in MODEL_TYPES:
            return ModelFacts(kind, MODEL_TYPES[kind], config_positions(config), "its config.json's length")
    return ModelFacts()


def is_text_classifier(loaded: LoadedRecipe, text: str) -> bool:
    """Whether a reference means a stage of the recipe that makes a text classifier."""
    try:
        reference = parse_reference(text)
    except ValueError:
        return False
    made = loaded.recipe.stages.get(reference.stage) if isinstance(reference, StageRef) else None
    return isinstance(made, Finetune) and model_facts(loaded, made).family == "encoder"


def check_models(loaded: LoadedRecipe) -> Iterator[Problem]:
    """Folders that hold no such model, unknown special tokens, adapters on modules that the model lacks."""
    for name, stage in loaded.recipe.stages.items():
        place = f"stages.{name}"
        yield from _check_folders(loaded, place, stage)
        facts = model_facts(loaded, stage)
        yield from _check_family(loaded, place, stage, facts)
        if isinstance(stage, Pretrain) and stage.tokenizer is not None:
            yield from _check_tokenizer(loaded, f"{place}.tokenizer", stage.tokenizer, facts.tokenizer)
        if isinstance(stage, Finetune | Reward | PpoStage):
            yield from _check_lora(loaded, f"{place}.lora", stage, facts)
        if isinstance(stage, PpoStage):
            yield from _check_stop_tokens(loaded, f"{place}.rollout", stage.rollout.stop_tokens, facts)
        if isinstance(stage, Evaluate):
            yield from _check_stop_tokens(loaded, f"{place}.sampling", stage.sampling.stop_tokens, facts)
    yield from _check_chat_marks(loaded)


def _built(loaded: LoadedRecipe, stage: Pretrain) -> ModelFacts:
    if stage.architecture is None:
        return ModelFacts()
    name = next((name for name, other in loaded.recipe.stages.items() if other is stage), "")
    return ModelFacts(
        type=stage.architecture.type,
        family=stage.architecture.family,
        positions=stage.architecture.shape().positions,
        positions_at=f"stages.{name}.architecture.{stage.architecture.positions_key}",
        tokenizer=_tokenizer_facts(loaded, stage.tokenizer),
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
    """The folder's pad token, found anew when the recipe names another end token."""
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
        if facts.kind is not None and facts.kind not in item.wants and "tokenizer" not in item.wants:
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
    for key in ("eos_token", "pad_token"):
        token = getattr(facts, key)
        if token is None:
            differs = " that differs from its end token" if key == "pad_token" else ""
            message = f"the tokenizer has no {key}{differs}"
            yield loaded.problem(
                Code.MISSING_SPECIAL_TOKEN, place, tokenizer.from_, message, f"give {key}: one of its tokens"
            )
        elif facts.vocabulary is not None and token not in facts.vocabulary:
            guess = nearest(token, sorted(facts.special_tokens))
            suggestion = f"did you mean {guess}?" if guess else ""
            yield loaded.problem(
                Code.UNKNOWN_TOKEN, f"{place}.{key}", token, "not a token of this tokenizer", suggestion
            )
    if facts.eos_token is not None and facts.eos_token == facts.pad_token:
        message = "pad_token must differ from eos_token; the end of a response is found by it"
        key = "pad_token" if tokenizer.pad_token is not None else "eos_token"
        yield loaded.problem(
            Code.PAD_TOKEN_CONFLICT,
            f"{place}.{key}",
            facts.pad_token,
            message,
            "name another token of the vocabulary as pad_token",
        )
    template = None if tokenizer.chat_template else facts.chat_template  # the recipe's own is tried above
    for finding in token_problems(replace(facts, eos_token=None, pad_token=None, chat_template=template)):
        yield loaded.problem_from(finding, place, tokenizer.from_)


def _check_chat_marks(loaded: LoadedRecipe) -> Iterator[Problem]:
    """Marks of a chat template that the tokenizer would split, where later stages talk in chats."""
    stages = loaded.recipe.stages
    talking = {
        id(source)
        for stage in stages.values()
        if isinstance(stage, Finetune | Reward | PpoStage)
        and isinstance(source := origin(stage.text_start() or "", stages), Pretrain)
    }
    for name, stage in stages.items():
        if (
            id(stage) not in talking
            or not isinstance(stage, Pretrain)
            or not isinstance(stage.tokenizer, TrainTokenizer)
        ):
            continue
        tokenizer = stage.tokenizer
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


def _check_family(loaded: LoadedRecipe, place: str, stage: Stage, facts: ModelFacts) -> Iterator[Problem]:
    """Stages that cannot work with the family of the model that they are given."""
    if isinstance(stage, Reward | PpoStage) and facts.family not in (None, "decoder"):
        field = "init_from" if isinstance(stage, Reward) else "actor"
        message = f"a {stage.kind} stage needs a decoder; this model is {NOUN_OF[facts.family]}"
        yield loaded.problem(Code.UNSUPPORTED_FAMILY, f"{place}.{field}", getattr(stage, field), message)
        return
    if isinstance(stage, Evaluate):
        yield from _check_suites(loaded, place, stage)
        return
    if isinstance(stage, Pretrain) and facts.family == "vision_language":
        message = "vision-language models can only be fine-tuned"
        yield loaded.problem(Code.UNSUPPORTED_FAMILY, f"{place}.init_from", stage.init_from or "", message)
        return
    if isinstance(stage, Finetune) and facts.vision is not None and facts.vision.tokens_per_picture is not None:
        tokens, length = facts.vision.tokens_per_picture, stage.train.sequence_length
        if length < tokens + 2:
            message = f"one image takes {tokens} tokens of this model, which leaves no room for an answer"
            field = f"{place}.train.sequence_length"
            yield loaded.problem(Code.SEQUENCE_TOO_SHORT, field, length, message, f"above {tokens + 1}")
    if isinstance(stage, Finetune) and stage.parts is not None and facts.family not in (None, "vision_language"):
        message = f"`parts` applies to vision-language models; this model is {NOUN_OF[facts.family]}"
        yield loaded.problem(Code.NOT_APPLICABLE, f"{place}.parts", stage.parts, message, "remove the key")
    if isinstance(stage, Finetune) and stage.lora is not None and facts.family == "rnn":
        message = "an rnn has no linear modules for an adapter"
        yield loaded.problem(Code.NOT_APPLICABLE, f"{place}.lora", "", message, "remove the key")

    if isinstance(stage, Finetune) and facts.family not in (None, "encoder"):
        for key in ("labelled_share", "pseudo_labels"):
            if getattr(stage, key) not in (None, 1.0):
                message = f"labels are for encoders; this model is {NOUN_OF[facts.family]}"
                yield loaded.problem(Code.NOT_APPLICABLE, f"{place}.{key}", "", message, "remove the key")
        if stage.dropout is not None:
            message = f"`dropout` applies to encoders; this model is {NOUN_OF[facts.family]}"
            yield loaded.problem(Code.NOT_APPLICABLE, f"{place}.dropout", stage.dropout, message, "remove the key")
    if isinstance(stage, Pretrain | Finetune) and stage.init_from and is_text_classifier(loaded, stage.init_from):
        kind = "a classifier" if isinstance(stage, Finetune) else "pretraining"
        message = f"is a classifier already; {kind} starts from a pretrained encoder"
        yield loaded.problem(Code.WRONG_ARTIFACT_KIND, f"{place}.init_from", stage.init_from, message)
    if isinstance(stage, Finetune):
        yield from _check_targets(loaded, place, stage, facts)
    if isinstance(stage, Pretrain):
        for key, family in (("corruption", "encoder"), ("span_corruption", "encoder_decoder")):
            if getattr(stage, key) is None or facts.family in (None, family):
                continue
            message = f"`{key}` applies to {family.replace('_', '-')}s; this model is {NOUN_OF[facts.family]}"
            yield loaded.problem(Code.NOT_APPLICABLE, f"{place}.{key}", "", message, "remove the key")
        cls_token = stage.tokenizer.cls_token if isinstance(stage.tokenizer, TrainTokenizer) else None
        if cls_token is not None and facts.family not in (None, "encoder"):
            message = "with it the tokenizer would end every prompt with the end token; it is for encoders only"
            yield loaded.problem(
                Code.NOT_APPLICABLE, f"{place}.tokenizer.cls_token", cls_token, message, "remove the key"
            )
        if facts.family == "encoder" and isinstance(stage.tokenizer, TrainTokenizer):
            for key in ("cls_token", "mask_token"):
                if getattr(stage.tokenizer, key) is None:
                    message = "an encoder needs this token"
                    yield loaded.problem(
                        Code.MISSING_SPECIAL_TOKEN,
                        f"{place}.tokenizer.{key}",
                        "",
                        message,
                        f'for example "<|{key[:-6]}|>"',
                    )


def _check_suites(loaded: LoadedRecipe, place: str, stage: Evaluate) -> Iterator[Problem]:
    """Models of text that the suites do not measure."""
    if "images" in stage.suites:
        return
    for index, text in enumerate(stage.of):
        found = stage.unmeasured(reference_facts(loaded, text).family)
        if found is not None:
            yield loaded.problem_from(found, f"{place}.of.{index}", text)


def _check_targets(loaded: LoadedRecipe, place: str, stage: Finetune, facts: ModelFacts) -> Iterator[Problem]:
    """Keys of a fine-tuning that only encoder-decoders take, or that they do not."""
    if facts.family == "encoder_decoder" and stage.loss_on == "all":
        message = "an encoder-decoder only generates targets; sources have no loss"
        yield loaded.problem(Code.NOT_APPLICABLE, f"{place}.loss_on", "all", message, "remove the key")
    if facts.family not in (None, "encoder_decoder") and stage.num_beams > 1:
        message = f"`num_beams` applies to encoder-decoders; this model is {NOUN_OF[facts.family]}"
        yield loaded.problem(Code.NOT_APPLICABLE, f"{place}.num_beams", stage.num_beams, message, "remove the key")


def _check_lora(
    loaded: LoadedRecipe, place: str, stage: Finetune | Reward | PpoStage, facts: ModelFacts
) -> Iterator[Problem]:
    if stage.lora is None:
        if isinstance(stage, Finetune | PpoStage) and not stage.merge:
            outer = place.removesuffix(".lora")
            yield loaded.problem(
                Code.NO_EFFECT, f"{outer}.merge", False, "merge has no effect without lora", "remove the key"
            )
        return
    targets = stage.lora.target_modules
    if targets == "all-linear" or facts.type not in LINEAR_MODULES:
        return
    known = LINEAR_MODULES[facts.type]
    for index, target in enumerate(targets):
        if target not in known:
            guess = nearest(target, list(known))
            suggestion = f"did you mean {guess}?" if guess else "linear modules: " + ", ".join(known)
            message = f"{facts.type} has no linear module of this name"
            yield loaded.problem(Code.UNKNOWN_MODULE, f"{place}.target_modules.{index}", target, message, suggestion)


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
