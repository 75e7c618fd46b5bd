"""Suite `perplexity`: language models on held-out text, and the counted model of what their chain learnt from."""

from collections.abc import Mapping, Sequence
from typing import Any

from recipes.stages.evaluate import Evaluate
from trainers.data.batches import evaluation_batches
from trainers.data.dataset import Dataset
from trainers.data.layouts.packed import Packed
from trainers.data.layouts.stream import Stream
from trainers.data.materialise import find_dataset
from trainers.data.streams import HeldOutStream, beginning
from trainers.data.tokenizer import load_tokenization
from trainers.evaluation.held_out import evaluate, perplexity
from trainers.evaluation.ngram import ngram_perplexity
from trainers.evaluation.suite import Measured, Parts, open_measured
from trainers.models.load import model_family
from trainers.models.token_losses import CarriedTokenLosses, TokenLosses
from trainers.objectives.carried_language_model import CarriedLanguageModelObjective
from trainers.objectives.language_model import LanguageModelObjective
from trainers.runtime.observer import counted
from trainers.store.manifest import ArtifactManifest
from trainers.store.store import Store
from trainers.training.context import StageContext, data_request, model_folder, open_dataset, text_settings

FORWARD_BATCH = 16
"""Rows of a forward pass."""


def measure_perplexity(spec: Evaluate, context: StageContext, labels: Sequence[str], parts: Parts) -> Measured:
    """Return each model's perplexity and its baseline's; collective."""
    metrics: dict[str, float] = {}
    for index, label in enumerate(labels):
        found = _perplexity(spec, context, index, parts.place(index))
        metrics |= {f"{label}.{name}": value for name, value in found.items()}
    return Measured(metrics)


def _perplexity(spec: Evaluate, context: StageContext, index: int, place: Mapping[str, int]) -> dict[str, float]:
    """Perplexity of one model on the held-out text, and that of its counted baseline; collective."""
    folder, ranks, observer = model_folder(context, f"of.{index}"), context.ranks, context.observer
    tokenization = load_tokenization(folder)
    is_carried = model_family(folder).is_recurrent
    settings = text_settings("text", tokenization, spec.sequence_length)
    layout = Stream(settings) if is_carried else Packed(settings, "text")
    dataset = open_dataset(context, data_request(context, spec.get_source("text"), layout))
    rows = min(spec.num_sequences or spec.num_prompts, len(dataset))
    model: Any = open_measured(spec, context, f"of.{index}", "language_model")
    if is_carried:
        if rows < len(dataset):
            dataset = beginning(dataset, rows, spec.sequence_length)
        share = {"length": spec.sequence_length, "workers": ranks.world_size, "rank": ranks.rank}
        stream = HeldOutStream(dataset, model.base_model.zero_state, **share)
        batches = counted(stream, observer, "perplexity", rows, **place)
        means = evaluate(CarriedTokenLosses(model), CarriedLanguageModelObjective(), batches, ranks.device)
    else:
        read = evaluation_batches(dataset, rows, ranks.world_size, ranks.rank, FORWARD_BATCH)
        shown = counted(read, observer, "perplexity", rows, **place)
        means = evaluate(TokenLosses(model), LanguageModelObjective(), shown, ranks.device)
    found = {"perplexity": perplexity(means["loss"])}
    training_sets = chain_training_sets(context.inputs[f"of.{index}"], context.store)
    if training_sets:
        observer.phase("ngram", **place)
        counted_rows = None if is_carried else rows
        found["ngram_perplexity"] = ngram_perplexity(training_sets, dataset, counted_rows, tokenization.vocab_size)
    return found


def chain_training_sets(model: ArtifactManifest, store: Store) -> list[Dataset]:
    """Return the sets of text that a model and those it was made from learnt from, from the first on.

    Empty where a link of the chain says nothing of its text, or the store has let it go: what is left of a chain would
    make a baseline that saw less than the model. PPO learns from no text of its own.
    """
    found: list[Dataset] = []
    current: ArtifactManifest | None = model
    while current is not None:
        digest = current.metrics.get("training_set")
        dataset = find_dataset(digest, store) if isinstance(digest, str) else None
        if dataset is not None:
            found.insert(0, dataset)
        elif "actor" not in current.parents:
            return []
        start = current.parents.get("init_from") or current.parents.get("actor")
        if start is None:
            return found
        current = store.find_artifact(start.fingerprint)
    return []
