"""Measures encoder-decoders on held-out rows of source and target: the loss of the targets, and what is written."""

from collections.abc import Sequence

from recipes.stages.evaluate import Evaluate
from trainers.data.batches import evaluation_batches
from trainers.data.tokenizer import load_tokenization
from trainers.evaluation.held_out import evaluate, perplexity
from trainers.evaluation.translation import Translations, translate
from trainers.models.encoder_decoder import TargetLosses
from trainers.models.stack import load_exact
from trainers.training.context import StageContext, data_request, model_folder, model_weights, open_dataset
from trainers.training.objectives.seq2seq import Seq2SeqObjective
from trainers.training.observer import counted
from trainers.training.precision import dtype_of

ROWS_AT_ONCE = 16


def measure_targets(
    spec: Evaluate, context: StageContext, labels: Sequence[str]
) -> tuple[dict[str, float], dict[str, Translations]]:
    """Return metrics by `model.metric`, and what each model wrote; equal on all ranks. Collective.

    The rows are those that a fine-tuning's own evaluation takes of the same data: the numbers agree with its own.
    """
    metrics: dict[str, float] = {}
    found: dict[str, Translations] = {}
    ranks = context.ranks
    for index, label in enumerate(labels):
        observer, place = context.observer, {"step": index, "steps_planned": len(labels)}
        folder = model_folder(context, f"of.{index}")
        tokenization = load_tokenization(folder)
        use = spec.get_source("prompts")
        dataset = open_dataset(context, data_request(context, use, tokenization, spec.sequence_length, spec.template))
        observer.phase("model", **place)
        dtype = dtype_of(spec.shard.precision)
        loaded = load_exact(model_weights(context, f"of.{index}"), "seq2seq_model", device=ranks.device, dtype=dtype)
        model = loaded.to(ranks.device).eval().requires_grad_(False)
        rows = min(spec.num_prompts, len(dataset))
        share = (dataset, rows, ranks.world_size, ranks.rank, ROWS_AT_ONCE)
        measured = counted(evaluation_batches(*share), observer, "perplexity", rows, **place)
        means = evaluate(TargetLosses(model), Seq2SeqObjective(), measured, ranks.device)
        search = {"num_beams": spec.num_beams, "max_new_tokens": spec.sequence_length}
        asked = counted(evaluation_batches(*share), observer, "targets", rows, **place)
        written = translate(model, dataset, asked, tokenization, **search)
        report = written.report()
        values = {
            "loss": means["loss"],
            "perplexity": perplexity(means["loss"]),
            **written.scores(),
            "eos_rate": report["eos_rate"],
            "length_mean": report["mean_length"],
            "rows_left_out": float(sum(dataset.report.dropped.values())),
        }
        metrics |= {f"{label}.{name}": value for name, value in values.items()}
        if index == 0:
            metrics["prompts"] = float(len(written.written))
        found[label] = written
    return metrics, found
