"""Suite `targets`: encoder-decoders on held-out rows of source and target, by the targets' loss and what is written."""

from collections.abc import Mapping, Sequence
from typing import Any

from recipes.stages.evaluate import Evaluate
from trainers.data.batches import evaluation_batches
from trainers.data.tokenizer import load_tokenization
from trainers.evaluation.held_out import evaluate, perplexity
from trainers.evaluation.suite import REFERENCE, Measured, Parts, open_measured
from trainers.evaluation.translation import Translations, translate
from trainers.models.encoder_decoder import TargetLosses
from trainers.objectives.seq2seq import Seq2SeqObjective
from trainers.runtime.observer import counted
from trainers.training.context import StageContext, model_folder, open_dataset, text_request

ROWS_AT_ONCE = 16


def measure_targets(spec: Evaluate, context: StageContext, labels: Sequence[str], parts: Parts) -> Measured:
    """Return metrics by `model.metric`, and some rows as each model wrote them; equal on all ranks. Collective.

    The rows are those that a fine-tuning's own evaluation takes of the same data: the numbers agree with its own.
    """
    metrics: dict[str, float] = {}
    found: dict[str, Translations] = {}
    ranks = context.ranks
    for index, label in enumerate(labels):
        observer, place = context.observer, parts.place(index)
        folder = model_folder(context, f"of.{index}")
        tokenization = load_tokenization(folder)
        use = spec.get_source("prompts")
        dataset = open_dataset(context, text_request(context, use, tokenization, spec.sequence_length, spec.template))
        model = open_measured(spec, context, f"of.{index}", "seq2seq_model")
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
            "rows_left_out": float(dataset.report.dropped),
        }
        metrics |= {f"{label}.{name}": value for name, value in values.items()}
        if index == 0:
            metrics["prompts"] = float(len(written.written))
        found[label] = written
    return Measured(metrics, written_side_by_side(found, spec.num_samples))


def written_side_by_side(found: Mapping[str, Translations], num_samples: int) -> list[dict[str, Any]]:
    """Lines {prompt, model, response} for some rows of the first model's; the data's own target stands first.

    A row that another model left out has no line of it.
    """
    lines: list[dict[str, Any]] = []
    written = {label: {(one.source, one.target): one for one in each.written} for label, each in found.items()}
    for row in list(next(iter(written.values())))[:num_samples]:
        source, target = row
        lines.append({"prompt": source, "model": REFERENCE, "response": target})
        for label, rows in written.items():
            if row in rows:
                one = rows[row]
                lines.append({"prompt": source, "model": label, "response": one.written, "ended": one.ended})
    return lines
