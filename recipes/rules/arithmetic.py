"""Numbers of a recipe that must fit each other: batches, steps, lengths, workers."""

import sys
from collections.abc import Iterator

from recipes.errors import Problem
from recipes.loaded_recipe import LoadedRecipe
from recipes.problem_codes import Code
from recipes.rules.chain import origin
from recipes.rules.models import ModelFacts, model_facts, reference_facts
from recipes.stages.base import TextStage
from recipes.stages.batch import micro_batches
from recipes.stages.environments import AnyEnvironment
from recipes.stages.kinds import Stage
from recipes.stages.rollout import Sampling


def check_arithmetic(loaded: LoadedRecipe) -> Iterator[Problem]:
    """Batches that cannot be divided, lengths past the model's, warm-ups past the end, settings at odds."""
    yield from _check_workers(loaded)
    for name, stage in loaded.stages_with("train", "rollout", "algorithm", "text", "shard", "lora"):
        yield from _check_shard(loaded, f"stages.{name}", stage)
        yield from _check_batch(loaded, name, stage)
    for name, stage in loaded.recipe.stages.items():
        yield from loaded.problems(name, stage.rules())
        if isinstance(stage, TextStage):
            yield from _check_sources(loaded, name, stage)
            yield from _check_packing(loaded, name, stage)
            yield from _check_lengths(loaded, name, stage)


def _check_workers(loaded: LoadedRecipe) -> Iterator[Problem]:
    cluster = loaded.recipe.cluster
    if cluster.workers != "auto" and cluster.min_workers is not None and cluster.min_workers > cluster.workers:
        message = f"min_workers must be at most workers ({cluster.workers})"
        yield loaded.problem(Code.MIN_ABOVE_MAX, "cluster.min_workers", cluster.min_workers, message)


def _check_shard(loaded: LoadedRecipe, place: str, stage: Stage) -> Iterator[Problem]:
    shard, cluster = stage.shard, loaded.recipe.cluster
    if shard.gradient_checkpointing and (finding := stage.no_checkpointing()) is not None:
        yield loaded.problem_from(finding, f"{place}.shard.gradient_checkpointing", True)
    for key in ("modules_to_save", "target_parameters", "init") if stage.adapters is not None else ():
        named = getattr(stage.adapters, key)
        if named and named != "default" and (finding := stage.no_saved_modules(key)) is not None:
            yield loaded.problem_from(finding, f"{place}.lora.{key}", named)
    method = None if stage.adapters is None else stage.adapters.quantize
    if method is not None and (finding := stage.no_quantised_base()) is not None:
        yield loaded.problem_from(finding, f"{place}.lora.quantize", method)
    if shard.offload == "cpu":
        reason = None
        if shard.engine == "plain":
            reason = "the plain engine has no offload"
        elif shard.zero == 0:
            reason = "offload needs zero 1, 2 or 3 (found 0)"
        elif cluster.gpus_per_worker == 0:
            reason = "offload moves state from the GPU; cluster.gpus_per_worker is 0"
        if reason is not None:
            yield loaded.problem(Code.UNMET_REQUIREMENT, f"{place}.shard.offload", "cpu", reason, "set offload to none")


def _check_batch(loaded: LoadedRecipe, name: str, stage: Stage) -> Iterator[Problem]:
    batch = stage.batch()
    if batch is None:
        return
    cluster = loaded.recipe.cluster
    findings = [*batch.rules(cluster.workers, cluster.min_workers or 1)]
    yield from loaded.problems(name, findings)
    if findings or stage.shard.micro_batch == "auto":
        return
    least = (cluster.min_workers or 1) if cluster.workers == "auto" else cluster.workers
    try:
        micro_batches(batch.size, least if batch.size % least == 0 else 1, stage.shard.micro_batch)
    except ValueError as error:
        place = f"stages.{name}.shard.micro_batch"
        suggestion = f"auto takes the largest divisor up to {stage.largest_micro_batch}"
        yield loaded.problem(Code.BATCH_NOT_DIVISIBLE, place, stage.shard.micro_batch, str(error), suggestion)


def _check_sources(loaded: LoadedRecipe, name: str, stage: TextStage) -> Iterator[Problem]:
    """Keys of a source that have an effect in a mixture alone; judged pairs where no pairs are read."""
    for use in stage.sources():
        if not use.facts.is_images and not use.is_derived:
            findings = (
                found._replace(field_path=f"{use.field_path}.{found.field_path}") for found in use.rows.rules_alone()
            )
            yield from loaded.problems(name, findings)
            for own in use.members():
                if own.source.made_by is not None and not own.facts.has_pairs:
                    message = f"a feedback stage makes pairs of answers, and `{use.field_path}` reads {own.role}"
                    place = f"stages.{name}.{own.field_path}.source"
                    yield loaded.problem(Code.NOT_APPLICABLE, place, own.source.source, message, "another source")


def _check_packing(loaded: LoadedRecipe, name: str, stage: TextStage) -> Iterator[Problem]:
    """`packing: true` in the recipe's text, of a stage that packs nothing."""
    finding = stage.packing_rule(model_facts(loaded, stage).family)
    if finding is not None and loaded.is_written(name, "train.packing"):
        yield loaded.problem_from(finding, f"stages.{name}.train.packing", True)


def _check_lengths(loaded: LoadedRecipe, name: str, stage: TextStage) -> Iterator[Problem]:
    """Sequences and answers that are longer than the model that takes the shortest ones: all read the same."""
    writers = [item.text for item in stage.writers()]
    facts = _least_room([reference_facts(loaded, text) for text in writers] or [model_facts(loaded, stage)])
    for field_path, length in stage.lengths():
        yield from _check_length(loaded, f"stages.{name}.{field_path}", length, facts)
    if stage.sampled is not None:
        field_path, sampling = stage.sampled
        scorer = _shortest_scorer(loaded, writers, [item.text for item in stage.scorers()])
        yield from _check_sampling(loaded, f"stages.{name}.{field_path}", sampling, facts, scorer)
    if stage.converses_with is not None and stage.sampled is not None:
        yield from _check_conversation(loaded, name, stage.converses_with, stage.sampled[1], facts)


def _shortest_scorer(loaded: LoadedRecipe, writers: list[str], scorers: list[str]) -> ModelFacts:
    """The facts of the reward model with the least room among those that read a writer's own tokens.

    Those are the ones that descend from the same model; others read the text in tokens that nobody knows yet.
    """
    stages = loaded.recipe.stages
    written = [found for text in writers if (found := origin(text, stages)) is not None]
    return _least_room([reference_facts(loaded, text) for text in scorers if origin(text, stages) in written])


def _least_room(known: list[ModelFacts]) -> ModelFacts:
    return min(
        known, key=lambda facts: sys.maxsize if facts.positions is None else facts.positions, default=ModelFacts()
    )


def _check_length(loaded: LoadedRecipe, place: str, length: int, facts: ModelFacts) -> Iterator[Problem]:
    if facts.positions is not None and length > facts.positions:
        message = f"longer than the model: {facts.positions_at} is {facts.positions}"
        yield loaded.problem(Code.SEQUENCE_TOO_LONG, place, length, message, f"at most {facts.positions}")


def _check_conversation(
    loaded: LoadedRecipe, name: str, environment: AnyEnvironment, sampling: Sampling, facts: ModelFacts
) -> Iterator[Problem]:
    """The prompt, all turns and all observations between them must fit the model."""
    whole = sampling.max_prompt_tokens + environment.longest(sampling.max_new_tokens)
    if facts.positions is not None and whole > facts.positions:
        message = (
            f"max_prompt_tokens + turns x max_new_tokens + (turns - 1) x max_observation_tokens ({whole}) is longer "
            f"than the model: {facts.positions_at} is {facts.positions}"
        )
        place = f"stages.{name}.environment.turns"
        yield loaded.problem(Code.SEQUENCE_TOO_LONG, place, environment.turns, message, "fewer turns, or shorter ones")


def _check_sampling(
    loaded: LoadedRecipe, place: str, sampling: Sampling, facts: ModelFacts, scorer: ModelFacts
) -> Iterator[Problem]:
    """Prompt and response must fit the writer; a scorer also reads the end token after an unfinished response."""
    prompt, new = sampling.max_prompt_tokens, sampling.max_new_tokens
    summed = f"max_prompt_tokens + max_new_tokens ({prompt} + {new} = {prompt + new})"
    closed = f"{summed} and the end token that a reward model reads after an unfinished response"
    limits = [
        (known.positions - more, what, known)
        for known, more, what in ((scorer, 1, closed), (facts, 0, summed))
        if known.positions is not None
    ]
    limit, what, known = min(limits, key=lambda entry: entry[0], default=(prompt + new, summed, facts))
    if prompt + new > limit:
        are = "is" if what == summed else "are"
        message = f"{what} {are} longer than the model: {known.positions_at} is {known.positions}"
        suggestion = f"at most {limit - prompt}" if limit > prompt else f"max_prompt_tokens must be below {limit}"
        yield loaded.problem(Code.SEQUENCE_TOO_LONG, f"{place}.max_new_tokens", new, message, suggestion)
