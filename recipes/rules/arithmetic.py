"""Numbers of a recipe that must fit each other: batches, steps, lengths, workers."""

import sys
from collections.abc import Iterator

from recipes.data.text import TrainTokenizer
from recipes.errors import Problem
from recipes.loading.document import LoadedRecipe
from recipes.loading.yaml_text import Path
from recipes.models.encoder_decoder import SpanCorruption, count_sentinels
from recipes.models.image_models import VENDI_PICTURES, Gan, Vae
from recipes.models.rnn import Rnn
from recipes.planning.derive import micro_batches
from recipes.problem_codes import Code
from recipes.rules.chain import origin
from recipes.rules.models import ModelFacts, model_facts, reference_facts
from recipes.rules.reward_tuning import check_reward_tuning
from recipes.stages.evaluate import Evaluate
from recipes.stages.finetune import Finetune, FinetuneImages
from recipes.stages.kinds import Stage
from recipes.stages.ppo import Sampling
from recipes.stages.pretrain import Pretrain, PretrainImages
from recipes.stages.reward import Reward
from recipes.stages.rl import PpoImages, PpoStage


def check_arithmetic(loaded: LoadedRecipe) -> Iterator[Problem]:
    """Batches that cannot be divided, lengths past the model's, warm-ups past the end, settings at odds."""
    yield from _check_workers(loaded)
    for name, stage in loaded.stages_with("train", "rollout", "ppo", "text", "shard", "lora"):
        yield from _check_shard(loaded, f"stages.{name}", stage)
        yield from _check_batch(loaded, f"stages.{name}", stage)
    for name, stage in loaded.recipe.stages.items():
        place = f"stages.{name}"
        facts = model_facts(loaded, stage)
        match stage:
            case Pretrain() | Finetune() | Reward():
                yield from _check_train(loaded, place, stage)
                if facts.family == "encoder_decoder" and not isinstance(stage, Reward):
                    yield from _check_unpacked(loaded, place, stage, facts)
                yield from _check_length(loaded, f"{place}.train.sequence_length", stage.train.sequence_length, facts)
            case PretrainImages():
                yield from _check_image(loaded, place, stage)
            case FinetuneImages():
                yield from _check_activations(loaded, place, stage)
            case PpoImages():
                yield from _check_activations(loaded, place, stage)
                yield from _check_updates(loaded, place, stage)
                yield from check_reward_tuning(loaded, place, stage)
            case PpoStage():
                yield from _check_updates(loaded, place, stage)
                yield from _check_critic_warmup(loaded, place, stage)
                scorer = _shortest_scorer(loaded, [stage.actor], [stage.reward])
                yield from _check_sampling(loaded, f"{place}.rollout", stage.rollout, facts, scorer)
            case Evaluate():
                facts = _shortest(loaded, stage)
                if stage.images is not None and stage.images.limit is not None and stage.images.limit < 4:
                    message = "distances need 2 held-out images and 2 others"
                    yield loaded.problem(
                        Code.TOO_FEW_SAMPLES, f"{place}.images.limit", stage.images.limit, message, "at least 4"
                    )
                if "perplexity" in stage.suites or "targets" in stage.suites:
                    yield from _check_length(loaded, f"{place}.sequence_length", stage.sequence_length, facts)
                if "generation" in stage.suites or "comparison" in stage.suites:
                    scorers = [text for text in (stage.reward, stage.second_scorer) if text is not None]
                    scorer = _shortest_scorer(loaded, stage.of, scorers)
                    yield from _check_sampling(loaded, f"{place}.sampling", stage.sampling, facts, scorer)


def _check_workers(loaded: LoadedRecipe) -> Iterator[Problem]:
    cluster = loaded.recipe.cluster
    if cluster.workers != "auto" and cluster.min_workers > cluster.workers:
        message = f"min_workers must be at most workers ({cluster.workers})"
        yield loaded.problem(Code.MIN_ABOVE_MAX, "cluster.min_workers", cluster.min_workers, message)


def _check_shard(loaded: LoadedRecipe, place: str, stage: Stage) -> Iterator[Problem]:
    shard, cluster = stage.shard, loaded.recipe.cluster
    if isinstance(stage, PpoStage) and stage.lora is not None and shard.gradient_checkpointing:
        message = "gradient checkpointing does not work with several adapters on one network"
        yield loaded.problem(
            Code.CONFLICTING_KEYS,
            f"{place}.shard.gradient_checkpointing",
            True,
            message,
            "set it to false, or drop lora",
        )
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


def _check_batch(loaded: LoadedRecipe, place: str, stage: Stage) -> Iterator[Problem]:
    shared = stage.batch()
    if shared is None:
        return
    workers = loaded.recipe.cluster.workers
    batch, found = shared.size, shared.written
    field = f"{place}.{shared.field_path}"
    shares = 1 if workers == "auto" else workers
    fitting = _near_multiple(found, shared.unit(shares))
    if isinstance(stage, PpoStage):
        rollout, mini_batches = stage.rollout, stage.ppo.mini_batches
        responses = rollout.prompts_per_iteration * rollout.samples_per_prompt
        if rollout.prompts_per_iteration % shares:
            message = f"the prompts of an iteration cannot be divided among {workers} workers"
            yield loaded.problem(Code.BATCH_NOT_DIVISIBLE, field, found, message, fitting)
            return
        if responses % mini_batches:
            message = (
                f"prompts_per_iteration x samples_per_prompt ({rollout.prompts_per_iteration} x "
                f"{rollout.samples_per_prompt} = {responses}) must divide into mini_batches ({mini_batches}); "
                f"remainder {responses % mini_batches}"
            )
            suggestion = _near_divisor(responses // shares, mini_batches)
            yield loaded.problem(
                Code.BATCH_NOT_DIVISIBLE, f"{place}.ppo.mini_batches", mini_batches, message, suggestion
            )
            return
        if workers != "auto" and stage.text is not None and stage.ppo.text_batch % workers:
            message = f"the text of a step cannot be divided among {workers} workers"
            suggestion = _near_multiple(stage.ppo.text_batch, workers)
            yield loaded.problem(
                Code.BATCH_NOT_DIVISIBLE, f"{place}.ppo.text_batch", stage.ppo.text_batch, message, suggestion
            )
            return
    if isinstance(stage, PpoImages):
        mini_batches = stage.ppo.mini_batches
        if found % shares:
            message = f"the images of an iteration cannot be divided among {workers} workers"
            yield loaded.problem(Code.BATCH_NOT_DIVISIBLE, field, found, message, fitting)
            return
        if found % mini_batches:
            message = f"pictures_per_iteration ({found}) must divide into mini_batches ({mini_batches})"
            suggestion = _near_divisor(found // shares, mini_batches)
            yield loaded.problem(
                Code.BATCH_NOT_DIVISIBLE, f"{place}.ppo.mini_batches", mini_batches, message, suggestion
            )
            return
    if workers != "auto" and batch % workers:
        message = f"the batch ({batch}) cannot be divided among {workers} workers; remainder {batch % workers}"
        yield loaded.problem(Code.BATCH_NOT_DIVISIBLE, field, found, message, fitting)
        return
    least = loaded.recipe.cluster.min_workers if workers == "auto" else workers
    if workers == "auto" and not any(shared.divides(count) for count in range(least, batch + 1)):
        message = f"no number of workers from min_workers ({least}) on divides the batch ({batch})"
        yield loaded.problem(Code.BATCH_NOT_DIVISIBLE, field, batch, message)
        return
    if stage.shard.micro_batch != "auto":
        try:
            micro_batches(batch, least if batch % least == 0 else 1, stage.shard.micro_batch)
        except ValueError as error:
            suggestion = "auto takes the largest divisor up to " + str(stage.largest_micro_batch)
            yield loaded.problem(
                Code.BATCH_NOT_DIVISIBLE, f"{place}.shard.micro_batch", stage.shard.micro_batch, str(error), suggestion
            )


def _near_multiple(value: int, of: int) -> str:
    low, high = value // of * of, -(-value // of) * of
    return f"for example {high}" if low == 0 else f"for example {low} or {high}"


def _near_divisor(total: int, wanted: int) -> str:
    fitting = [count for count in range(1, min(total, 4096) + 1) if total % count == 0]
    return f"for example {min(fitting, key=lambda count: (abs(count - wanted), count))}"


def _check_train(loaded: LoadedRecipe, place: str, stage: Pretrain | Finetune | Reward) -> Iterator[Problem]:
    train = stage.train
    if train.tokens is not None and isinstance(stage, Reward):
        message = "a reward stage counts pairs, not tokens"
        yield loaded.problem(
            Code.NOT_APPLICABLE, f"{place}.train.tokens", train.tokens, message, "give steps or epochs"
        )
    elif train.tokens is not None and not train.packing:
        message = "tokens has no effect without packing, and packing is false"
        yield loaded.problem(
            Code.UNMET_REQUIREMENT, f"{place}.train.tokens", train.tokens, message, "give steps or epochs"
        )
    if isinstance(stage, Reward) and train.packing and "packing" in train.model_fields_set and _written(loaded, place):
        yield loaded.problem(
            Code.NOT_APPLICABLE, f"{place}.train.packing", True, "pairs are never packed", "remove the key"
        )
    if isinstance(stage, Pretrain) and isinstance(stage.architecture, Rnn):
        if not train.packing:
            message = "an rnn reads its text as one stream"
            yield loaded.problem(Code.NOT_APPLICABLE, f"{place}.train.packing", False, message, "remove the key")
        if stage.shard.gradient_checkpointing:
            message = "an rnn does not support gradient checkpointing"
            yield loaded.problem(
                Code.NOT_APPLICABLE, f"{place}.shard.gradient_checkpointing", True, message, "remove the key"
            )
    steps = train.planned_steps()
    if train.tokens is not None and steps is not None and train.schedule.warmup_steps >= steps:
        message = (
            f"warmup_steps must be below the stage's {steps} steps (tokens {train.tokens} / "
            f"(global_batch {train.global_batch} x sequence_length {train.sequence_length}))"
        )
        yield loaded.problem(
            Code.WARMUP_TOO_LONG, f"{place}.train.schedule.warmup_steps", train.schedule.warmup_steps, message
        )


def _check_unpacked(
    loaded: LoadedRecipe, place: str, stage: Pretrain | Finetune, facts: ModelFacts
) -> Iterator[Problem]:
    """An encoder-decoder reads one source a row, and needs a sentinel for every span that is hidden of it."""
    train = stage.train
    if train.packing and "packing" in train.model_fields_set and _written(loaded, place):
        yield loaded.problem(
            Code.NOT_APPLICABLE,
            f"{place}.train.packing",
            True,
            "sources of an encoder-decoder are never packed",
            "remove it",
        )
    if train.tokens is not None:
        message = "an encoder-decoder counts rows, not tokens"
        yield loaded.problem(
            Code.NOT_APPLICABLE, f"{place}.train.tokens", train.tokens, message, "give steps or epochs"
        )
    if not isinstance(stage, Pretrain) or facts.tokenizer is None:
        return
    known = count_sentinels(facts.tokenizer.special_tokens)
    needed = (stage.span_corruption or SpanCorruption()).num_spans(train.sequence_length)
    if known < needed:
        message = f"{needed} spans are hidden of {train.sequence_length} tokens; the tokenizer has {known} sentinels"
        if isinstance(stage.tokenizer, TrainTokenizer):
            yield loaded.problem(
                Code.TOO_FEW_SENTINELS, f"{place}.tokenizer.num_sentinels", known, message, f"at least {needed}"
            )
        else:
            yield loaded.problem(
                Code.TOO_FEW_SENTINELS,
                f"{place}.train.sequence_length",
                train.sequence_length,
                message,
                "hide fewer spans",
            )


def _check_image(loaded: LoadedRecipe, place: str, stage: PretrainImages) -> Iterator[Problem]:
    yield from _check_activations(loaded, place, stage)
    architecture, steps = stage.architecture, stage.steps()
    if isinstance(architecture, Gan):
        if stage.shard.zero == 3:
            message = "the two networks of a GAN call each other, so each worker needs all parameters"
            yield loaded.problem(Code.OUT_OF_RANGE, f"{place}.shard.zero", 3, message, "at most 2")
        if 0 < stage.train.grid < VENDI_PICTURES and architecture.collapse_below > 0:
            message = f"the check of collapse_below needs {VENDI_PICTURES} images"
            yield loaded.problem(
                Code.TOO_FEW_SAMPLES,
                f"{place}.train.grid",
                stage.train.grid,
                message,
                f"at least {VENDI_PICTURES}, or 0",
            )
    if isinstance(architecture, Vae) and steps is not None and architecture.kl_warmup_steps > steps:
        message = f"the KL weight would never reach kl_weight; the stage has {steps} steps"
        yield loaded.problem(
            Code.WARMUP_TOO_LONG,
            f"{place}.architecture.kl_warmup_steps",
            architecture.kl_warmup_steps,
            message,
            f"at most {steps}",
        )


def _check_activations(
    loaded: LoadedRecipe, place: str, stage: PretrainImages | FinetuneImages | PpoImages
) -> Iterator[Problem]:
    if stage.shard.gradient_checkpointing:
        message = "image models do not support gradient checkpointing"
        yield loaded.problem(
            Code.NOT_APPLICABLE, f"{place}.shard.gradient_checkpointing", True, message, "remove the key"
        )


def _written(loaded: LoadedRecipe, place: str) -> bool:
    path: Path = (*place.split("."), "train", "packing")
    return path in loaded.sources


def _check_updates(loaded: LoadedRecipe, place: str, stage: PpoStage | PpoImages) -> Iterator[Problem]:
    ppo, steps = stage.ppo, stage.steps()
    assert steps is not None
    if ppo.schedule.warmup_steps >= steps:
        message = (
            f"warmup_steps must be below the stage's {steps} steps (iterations {ppo.iterations} x epochs {ppo.epochs} "
            f"x mini_batches {ppo.mini_batches})"
        )
        yield loaded.problem(
            Code.WARMUP_TOO_LONG, f"{place}.ppo.schedule.warmup_steps", ppo.schedule.warmup_steps, message
        )
    if ppo.kl_controller.name == "adaptive" and ppo.kl_coef == 0:
        message = "an adaptive controller multiplies kl_coef, which is 0 and would stay 0"
        yield loaded.problem(
            Code.UNMET_REQUIREMENT, f"{place}.ppo.kl_coef", ppo.kl_coef, message, "start above 0, for example 0.05"
        )


def _check_critic_warmup(loaded: LoadedRecipe, place: str, stage: PpoStage) -> Iterator[Problem]:
    ppo = stage.ppo
    if ppo.critic_warmup >= ppo.iterations:
        message = f"critic_warmup must be below iterations ({ppo.iterations}); otherwise the actor never learns"
        yield loaded.problem(Code.WARMUP_TOO_LONG, f"{place}.ppo.critic_warmup", ppo.critic_warmup, message)


def _shortest(loaded: LoadedRecipe, stage: Evaluate) -> ModelFacts:
    """The facts of the model that takes the shortest texts: all of them read the same ones."""
    return _least_room([] if "images" in stage.suites else [reference_facts(loaded, text) for text in stage.of])


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
