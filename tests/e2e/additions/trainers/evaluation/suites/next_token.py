"""Suite `next_token`: the share of held-out tokens that are the model's likeliest guess."""

from collections.abc import Sequence
from typing import Any

import torch

from recipes.stages.evaluate import Evaluate
from trainers.data.batches import evaluation_batches
from trainers.data.tokenizer import load_tokenization
from trainers.evaluation.suite import Measured, Parts, open_measured
from trainers.runtime import distributed
from trainers.runtime.observer import counted
from trainers.training.context import StageContext, model_folder, open_dataset, text_request


@torch.no_grad()
def measure_next_token(spec: Evaluate, context: StageContext, labels: Sequence[str], parts: Parts) -> Measured:
    """Guess every token from those before it; collective."""
    metrics = {}
    for index, label in enumerate(labels):
        tokenization = load_tokenization(model_folder(context, f"of.{index}"))
        request = text_request(context, spec.get_source("text"), tokenization, spec.sequence_length)
        dataset = open_dataset(context, request)
        model: Any = open_measured(spec, context, f"of.{index}", "language_model")
        rows, ranks = min(spec.num_prompts, len(dataset)), context.ranks
        read = evaluation_batches(dataset, rows, ranks.world_size, ranks.rank, 8)
        right = total = 0.0
        for batch in counted(read, context.observer, "next_token", rows, **parts.place(index)):
            guesses_BT = model(input_ids=batch.input_ids_BT).logits[:, :-1].argmax(-1)
            is_target_BT = batch.loss_mask_BT[:, 1:]
            right += float((guesses_BT == batch.input_ids_BT[:, 1:])[is_target_BT].sum())
            total += float(is_target_BT.sum())
        right, total = distributed.all_sum([right, total])
        metrics[f"{label}.next_token"] = right / total
    return Measured(metrics)
