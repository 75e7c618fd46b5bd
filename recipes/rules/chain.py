"""The chain that the stages form: who reads whose output, in which order, and what is wrong with it (pure)."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from recipes.data.tokenizers import ExistingTokenizer
from recipes.errors import Problem
from recipes.loaded_recipe import LoadedRecipe
from recipes.models.families import NOUNS
from recipes.models.images.architecture import ImageArchitecture
from recipes.nearest import nearest
from recipes.problem_codes import Code
from recipes.recipe import Recipe
from recipes.references import Reference, StageRef, StoreRef, parse_reference
from recipes.stages.answers import INPUT_FIELDS, Input, TokenizerId
from recipes.stages.base import TextStage
from recipes.stages.kinds import Stage
from recipes.stages.pretrain import Pretrain, PretrainImages


@dataclass(frozen=True, slots=True)
class Edge:
    """One stage reads what another makes."""

    stage: str
    field_path: str
    parent: str


def edges(stages: Mapping[str, Stage]) -> Iterator[Edge]:
    """Every reference between two of the stages, in the order of the recipe."""
    for name, stage in stages.items():
        for item in stage.inputs():
            reference = _parse(item.text)
            if isinstance(reference, StageRef) and reference.stage in stages:
                yield Edge(name, item.field_path, reference.stage)


def order(recipe: Recipe) -> list[str]:
    """Stage names, parents first, otherwise as the recipe lists them; raises ValueError for a cycle."""
    parents: dict[str, set[str]] = {name: set() for name in recipe.stages}
    for edge in edges(recipe.stages):
        parents[edge.stage].add(edge.parent)
    ordered: list[str] = []
    while len(ordered) < len(parents):
        ready = next((name for name in parents if name not in ordered and parents[name] <= set(ordered)), None)
        if ready is None:
            raise ValueError(
                "stages wait for each other: " + ", ".join(name for name in parents if name not in ordered)
            )
        ordered.append(ready)
    return ordered


def origin(text: str, stages: Mapping[str, Stage]) -> Pretrain | Reference | None:
    """Where a language model comes from in the end: the stage that builds it, or something outside the recipe."""
    seen: set[str] = set()
    while True:
        reference = _parse(text)
        if not isinstance(reference, StageRef):
            return reference
        stage = stages.get(reference.stage)
        if stage is None or reference.stage in seen or not stage.trains:
            return None
        seen.add(reference.stage)
        start = stage.text_start()
        if start is None:
            return stage if isinstance(stage, Pretrain) else None
        text = start


def built_by(text: str, stages: Mapping[str, Stage]) -> Pretrain | None:
    """The stage of the recipe that builds a language model; None: it comes from outside, or is not known."""
    found = origin(text, stages)
    return found if isinstance(found, Pretrain) else None


def stage_of(text: str | None, stages: Mapping[str, Stage]) -> Stage | None:
    """The stage that a reference names; None: it names none of the recipe's."""
    reference = None if text is None else _parse(text)
    return stages.get(reference.stage) if isinstance(reference, StageRef) else None


def image_builder(stage: Stage | None, stages: Mapping[str, Stage]) -> PretrainImages | None:
    """What builds the model of images that a stage makes in the end: the stage itself, or the first of its starts."""
    seen: set[int] = set()
    while stage is not None and id(stage) not in seen:
        start = stage.image_start()
        if start is None:
            return stage if isinstance(stage, PretrainImages) else None
        seen.add(id(stage))
        stage = stage_of(start, stages)
    return None


def image_source(item: Input, stages: Mapping[str, Stage]) -> PretrainImages | None:
    """The stage that builds the image model which an input means in the end; None: none of the recipe's, or the model
    is of no kind that the input takes.
    """
    built = image_builder(stage_of(item.text, stages), stages)
    return built if built is not None and built.architecture.kind() in item.wants else None


def image_stage_of(stage: Stage, stages: Mapping[str, Stage]) -> PretrainImages | None:
    """The stage on whose images a stage works: itself, or what built the model of images that it starts from."""
    start = stage.image_start()
    if start is None:
        return image_builder(stage, stages)
    return next((image_source(item, stages) for item in stage.inputs() if item.text == start), None)


def autoencoder_of(stage: PretrainImages, stages: Mapping[str, Stage]) -> ImageArchitecture | None:
    """The autoencoder of this recipe in whose latents a diffusion runs; None: in pixels, or in those of another's."""
    item = next((item for item in stage.inputs() if item.field_path == "autoencoder"), None)
    built = None if item is None else image_source(item, stages)
    return None if built is None else built.architecture


def check_chain(loaded: LoadedRecipe) -> Iterator[Problem]:
    """References that cannot be read, name nothing, fit no need, or form a cycle."""
    stages = loaded.recipe.stages
    for name, stage in loaded.stages_with(*INPUT_FIELDS):
        for item in stage.inputs():
            yield from _check_input(loaded, name, item)
    for name, stage in stages.items():
        if isinstance(stage, TextStage):
            yield from loaded.problems(name, stage.tokenizer_rules(lambda _, text: _tokenizer_of(text, stages)))
        if isinstance(stage, PretrainImages):
            yield from _check_autoencoder(loaded, name, stage)
    yield from _check_cycles(loaded)


def _parse(text: str) -> Reference | None:
    try:
        return parse_reference(text)
    except ValueError:
        return None


def _check_input(loaded: LoadedRecipe, name: str, item: Input) -> Iterator[Problem]:
    place = f"stages.{name}.{item.field_path}"
    try:
        reference = parse_reference(item.text)
    except ValueError as error:
        yield loaded.problem(Code.INVALID_REFERENCE, place, item.text, str(error))
        return
    stages = loaded.recipe.stages
    if isinstance(reference, StoreRef) or not isinstance(reference, StageRef) or reference.stage in loaded.unsound:
        return
    if item.field_path == "tokenizer.from":
        message = "a tokenizer comes from store://NAME, a local folder or hf://ORG/NAME@REVISION, not from a stage"
        yield loaded.problem(
            Code.WRONG_ARTIFACT_KIND, place, item.text, message, "use init_from to continue from a stage's model"
        )
        return
    if reference.stage == name:
        yield loaded.problem(Code.STAGE_CYCLE, place, item.text, "a stage cannot take its own output")
        return
    if reference.stage not in stages:
        known = [other for other in [*stages, *loaded.unsound] if other != name]
        guess = nearest(reference.stage, known)
        fitting = _fitting(stages, item, name) or known
        suggestion = f"did you mean {guess}?" if guess else "fitting here: " + ", ".join(fitting) if fitting else ""
        yield loaded.problem(Code.UNKNOWN_STAGE, place, item.text, "the recipe has no such stage", suggestion)
        return
    yield from _check_kind(loaded, name, item, reference)


def _fitting(stages: Mapping[str, Stage], item: Input, taker: str) -> list[str]:
    """What other stages make of the kinds that an input takes, as a recipe names it."""
    fitting = [
        name if kind == next(iter(stage.outputs().values())) else f"{name}.{part}"
        for name, stage in stages.items()
        for part, kind in stage.outputs().items()
        if kind in item.wants and name != taker
    ]
    return list(dict.fromkeys(fitting))


def _check_kind(loaded: LoadedRecipe, name: str, item: Input, reference: StageRef) -> Iterator[Problem]:
    stages, place = loaded.recipe.stages, f"stages.{name}.{item.field_path}"
    source = stages[reference.stage]
    parts = source.outputs()
    part = reference.part or next(iter(parts))
    if part not in parts:
        guess = nearest(part, list(parts))
        suggestion = f"did you mean {reference.stage}.{guess}?" if guess else "its outputs: " + ", ".join(parts)
        if part == "model" and "adapter" in parts:
            suggestion = f"set stages.{reference.stage}.merge to true"
        yield loaded.problem(
            Code.UNKNOWN_OUTPUT, place, item.text, f"stage {reference.stage} has no output {part!r}", suggestion
        )
        return
    if parts[part] in item.wants:
        return
    needed = " or ".join(NOUNS[kind] for kind in item.wants)
    fitting = _fitting(stages, item, name)
    suggestion = "fitting here: " + ", ".join(fitting) if fitting else ""
    if parts[part] == "adapter" and "model" in item.wants and reference.part is None:
        suggestion = f"set stages.{reference.stage}.merge to true: later stages build on the merged model"
    message = f"needs {needed}, but {item.text} ({source.kind}) is {NOUNS[parts[part]]}"
    yield loaded.problem(Code.WRONG_ARTIFACT_KIND, place, item.text, message, suggestion)


def _tokenizer_of(text: str, stages: Mapping[str, Stage]) -> TokenizerId | None:
    """The tokenizer of a language model that the recipe builds, by what it is made from."""
    built = built_by(text, stages)
    if built is None:
        return None
    origin = next(name for name, stage in stages.items() if stage is built)
    if isinstance(built.tokenizer, ExistingTokenizer):
        return TokenizerId(built.tokenizer, origin)
    return TokenizerId((built.tokenizer, built.data, built.seed), origin)


def _check_autoencoder(loaded: LoadedRecipe, name: str, stage: PretrainImages) -> Iterator[Problem]:
    """The latents of an autoencoder of this recipe must keep a height and a width."""
    autoencoder = autoencoder_of(stage, loaded.recipe.stages)
    if autoencoder is not None and (finding := autoencoder.latents_rule()) is not None:
        yield loaded.problem_from(finding, f"stages.{name}.autoencoder", stage.autoencoder)


def _check_cycles(loaded: LoadedRecipe) -> Iterator[Problem]:
    """One problem for each circle, at the reference that closes it."""
    remaining = dict(loaded.recipe.stages)
    while (circle := _find_circle(remaining)) is not None:
        closing = circle[-1]
        route = " -> ".join([edge.stage for edge in circle] + [closing.parent])
        place = f"stages.{closing.stage}.{closing.field_path}"
        yield loaded.problem(Code.STAGE_CYCLE, place, closing.parent, f"stages form a cycle: {route}")
        for edge in circle:
            del remaining[edge.stage]


def _find_circle(stages: Mapping[str, Stage]) -> list[Edge] | None:
    """The edges of one circle; stages that wait for no other are taken away until only circles are left."""
    out: dict[str, list[Edge]] = {name: [] for name in stages}
    for edge in edges(stages):
        if edge.stage != edge.parent:
            out[edge.stage].append(edge)
    while free := [name for name, leaving in out.items() if not any(edge.parent in out for edge in leaving)]:
        for name in free:
            del out[name]
    if not out:
        return None
    name = next(iter(out))
    trail: list[Edge] = []
    while name not in [edge.stage for edge in trail]:
        edge = next(edge for edge in out[name] if edge.parent in out)
        trail.append(edge)
        name = edge.parent
    return trail[[edge.stage for edge in trail].index(name) :]
