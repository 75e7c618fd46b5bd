"""Numbers that follow from a recipe: micro-batch, accumulation and planned steps (pure)."""

import math

from recipes.stages.kinds import (
    Evaluate,
    Finetune,
    FinetuneImages,
    PpoImages,
    PpoStage,
    Pretrain,
    PretrainImages,
    Reward,
    Stage,
)
from recipes.stages.ppo import Updates
from recipes.stages.train import ImageTrain, Train

MAX_AUTO_MICRO_BATCH = 16
MAX_AUTO_PICTURES = 256
"""The same for a stage of pictures: pictures are small beside sequences."""


def micro_batches(
    global_batch: int, workers: int, micro_batch: int | str = "auto", *, at_most: int = MAX_AUTO_MICRO_BATCH
) -> tuple[int, int]:
    """Micro-batch and accumulation so that workers x micro-batch x accumulation = global batch; raises ValueError."""
    if global_batch % workers:
        raise ValueError(f"global_batch ({global_batch}) cannot be divided among {workers} workers")
    share = global_batch // workers
    if micro_batch == "auto":
        micro = max(size for size in range(1, min(share, at_most) + 1) if share % size == 0)
    else:
        micro = int(micro_batch)
        if share % micro:
            raise ValueError(
                f"micro_batch ({micro}) must divide each worker's share of the batch "
                f"({global_batch} / {workers} = {share})"
            )
    return micro, share // micro


def planned_steps(train: Train | ImageTrain, rows: int | None = None) -> int | None:
    """Optimiser steps of a training stage; `epochs` needs `rows`, the sequences or pairs in the data (None without)."""
    if train.steps is not None:
        return train.steps
    if isinstance(train, Train) and train.tokens is not None:
        return math.ceil(train.tokens / (train.global_batch * train.sequence_length))
    assert train.epochs is not None
    return None if rows is None else max(1, math.ceil(train.epochs * rows / train.global_batch))


def steps_per_iteration(ppo: Updates) -> int:
    """Optimiser steps between two rollouts."""
    return ppo.epochs * ppo.mini_batches


def stage_steps(stage: Stage, rows: int | None = None) -> int | None:
    """Optimiser steps of any stage; None where they follow from data that is not counted yet; 0 for an evaluation."""
    match stage:
        case Pretrain() | PretrainImages() | Finetune() | FinetuneImages() | Reward():
            return planned_steps(stage.train, rows)
        case PpoStage() | PpoImages():
            return stage.ppo.iterations * steps_per_iteration(stage.ppo)
        case Evaluate():
            return 0


def largest_micro_batch(stage: Stage) -> int:
    """The largest micro-batch that `auto` takes; a picture of a rollout counts all of its denoising steps."""
    return MAX_AUTO_PICTURES if isinstance(stage, PretrainImages | FinetuneImages) else MAX_AUTO_MICRO_BATCH


def stage_batch(stage: Stage) -> int:
    """What the workers share in a step: sequences, pairs, pictures or responses; for an evaluation its prompts."""
    match stage:
        case Pretrain() | PretrainImages() | Finetune() | FinetuneImages() | Reward():
            return stage.train.global_batch
        case PpoStage():
            return stage.rollout.prompts_per_iteration * stage.rollout.samples_per_prompt // stage.ppo.mini_batches
        case PpoImages():
            return stage.rollout.pictures_per_iteration // stage.ppo.mini_batches
        case Evaluate():
            return stage.num_prompts


def samples_divide(stage: PpoStage | PpoImages, workers: int) -> bool:
    """Whether an iteration's prompts or pictures, and a step's text if any, can be shared evenly among the workers."""
    if isinstance(stage, PpoImages):
        return stage.rollout.pictures_per_iteration % workers == 0
    text_rows = 0 if stage.text is None else stage.ppo.text_batch
    return stage.rollout.prompts_per_iteration % workers == 0 and text_rows % workers == 0
