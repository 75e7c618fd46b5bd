"""The feedback stage's part that needs a model: prompts answered twice, and what a reward says of the answers."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch

from recipes.errors import RequestError
from recipes.stages.feedback import ANSWERS, Feedback
from rlhf.feedback.choice import chosen_pairs
from rlhf.feedback.judgements import Pair, PreferenceSet, as_lines, judged_by_score, preference_set
from rlhf.feedback.labelled import LABELLED_FILE, Labelled, labelled_lines, labelled_pair, with_labelled
from rlhf.text.answers import FORWARD_BATCH, draw_samples, shared_prompts
from rlhf.text.judge_model import open_judges
from rlhf.text.jury import Jury, jury_of
from rlhf.text.samples import Sample, collate
from trainers.data.dataset import Dataset
from trainers.data.tokenizer import Tokenization, load_tokenization
from trainers.evaluation.suite import open_measured
from trainers.inference.rollouts import SampleKey
from trainers.models.load import model_family
from trainers.runtime import distributed
from trainers.runtime.precision import use_fast_matmul
from trainers.training.context import Candidate, StageContext, model_folder, open_dataset, text_request


def run_feedback(spec: Feedback, context: StageContext) -> Candidate | None:
    """Answer and, unless people do it, judge; the candidate comes from rank 0. Collective.

    Where people judge, it holds the pairs alone: the driver waits for what is said of them.
    """
    use_fast_matmul(context.ranks.device)
    folder = model_folder(context, "of")
    if (refused := spec.refuse_model(model_family(folder))) is not None:
        raise RequestError(f"of {spec.of}: {refused}")
    tokenization = load_tokenization(folder)
    length = spec.sampling.max_prompt_tokens
    prompts = open_dataset(
        context, text_request(context, spec.get_source("prompts"), tokenization, length, spec.template)
    )
    rows = shared_prompts([prompts], spec.num_prompts, context.seed)[0]
    pairs, equal = _pairs(spec, context, prompts, rows, tokenization)
    if not pairs:
        raise RequestError(
            f"prompts: both answers to each of {len(rows)} prompts are the same; raise sampling.temperature"
        )
    made_of = {} if spec.choose is None else {"pairs_made": len(pairs)}
    if spec.choose is not None:
        pairs = chosen_pairs(pairs, spec.choose)
    judged = _labelled(spec, context, tokenization)
    context.observer.phase("write")
    if context.ranks.rank != 0:
        return None
    if spec.labelling is not None:
        files = {"pairs.jsonl": as_lines(asdict(pair) for pair in pairs)}
        if judged:
            files[LABELLED_FILE] = labelled_lines(judged)
        made = PreferenceSet(files, {}, ())
    else:
        scored = judged_by_score(pairs, spec.judge, spec.margin)
        made = preference_set(*with_labelled(pairs, scored, judged))
    return Candidate(
        kind="preferences",
        files={name: context.store.objects.put_chunks([data]) for name, data in made.files.items()},
        checks=(),
        outcome={"state": "completed", "rule": None, "steps_done": 0, "steps_planned": 0},
        metrics={**made.metrics, "equal_answers": equal, **made_of},
        gate_reasons=made.reasons,
    )


def _labelled(spec: Feedback, context: StageContext, tokenization: Tokenization) -> list[Labelled]:
    """Pairs that were judged before; collective."""
    source = spec.find_source("labelled")
    if source is None:
        return []
    request = text_request(context, source, tokenization, spec.sampling.max_prompt_tokens, spec.template)
    return [labelled_pair(record) for record in open_dataset(context, request).records]


def _pairs(
    spec: Feedback, context: StageContext, prompts: Dataset, rows: Sequence[int], tokenization: Tokenization
) -> tuple[list[Pair], int]:
    """Every prompt's two answers in the order of the prompts, and to how many prompts both are the same; collective."""
    model = open_measured(spec, context, "of", "language_model")
    jury = jury_of(spec, context, open_judges(spec, context))(prompts, tokenization)
    own = rows[context.ranks.rank :: context.ranks.world_size]
    keys: list[SampleKey] = [(row, number) for row in own for number in range(ANSWERS)]

    def watch(share: float) -> None:
        context.observer.phase("answer", rows=int(share * len(rows)), rows_planned=len(rows))

    samples = draw_samples(context, model, prompts, keys, keys, spec.sampling, tokenization, watch)
    context.observer.phase("judge")
    lines = [
        {"row": sample.row, "text": sample.text, "rewards": rewards}
        for sample, rewards in zip(samples, _rewards(jury, samples, tokenization, context), strict=True)
    ]
    by_row: dict[int, list[dict[str, Any]]] = {}
    for line in (line for part in distributed.gather_json(lines) for line in part):
        by_row.setdefault(line["row"], []).append(line)
    made = [
        Pair.of(
            prompts.records[row]["prompt"],
            [line["text"] for line in by_row[row]],
            prompts.records[row]["id"],
            [line["rewards"] for line in by_row[row]],
        )
        for row in rows
    ]
    different = {pair.id: pair for pair in made if pair.answers[0] != pair.answers[1]}
    return list(different.values()), len(made) - len(different)


@torch.no_grad()
def _rewards(
    jury: Jury, samples: Sequence[Sample], tokenization: Tokenization, context: StageContext
) -> list[dict[str, float]]:
    """What each term gives every sample, and `score`; nothing without terms."""
    found: list[dict[str, float]] = []
    for start in range(0, len(samples), FORWARD_BATCH):
        part = samples[start : start + FORWARD_BATCH]
        if not jury.reward.weights:
            found += [{} for _ in part]
            continue
        by_term = jury.rewards(collate(part, tokenization.pad_id, context.ranks.device))
        columns = {name: values_B.tolist() for name, values_B in by_term.items()}
        found += [{name: values[place] for name, values in columns.items()} for place in range(len(part))]
    return found
