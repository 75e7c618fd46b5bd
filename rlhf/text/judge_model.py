"""Language models of the store as judges, and judges' win rates in an evaluation."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from recipes.stages.base import TextStage
from recipes.stages.rewards.judge import GenerativeJudge
from rlhf.comparison import win_rate
from rlhf.rewards.judge import Ask, Judge, endpoint_judge
from rlhf.text.answer_metrics import ModelAnswers, named_wins
from trainers.data.batches import pad_texts
from trainers.data.tokenizer import load_tokenization
from trainers.evaluation.suite import open_measured
from trainers.inference.generation import generate, sampling_settings
from trainers.runtime import distributed
from trainers.training.context import StageContext, model_folder

ROWS_AT_ONCE = 16


def open_judges(spec: TextStage, context: StageContext) -> dict[str, Judge]:
    """The generative judges among a stage's terms, by name."""
    found: dict[str, Judge] = {}
    for name, term in spec.terms.items():
        if isinstance(term, GenerativeJudge):
            ask = (
                endpoint_judge(term) if term.is_endpoint else model_judge(spec, context, f"rewards.{name}.judge", term)
            )
            found[name] = Judge(term, ask)
    return found


def model_judge(spec: TextStage, context: StageContext, place: str, term: GenerativeJudge) -> Ask:
    """Ask a model on this rank's device, by its chat template where it has one; the likeliest token each time."""
    tokenization = load_tokenization(model_folder(context, place))
    model = open_measured(spec, context, place, "language_model")
    settings = sampling_settings(tokenization, term.max_new_tokens, 0.0)
    device = context.ranks.device

    def tokens(question: str) -> list[int]:
        if tokenization.chat_template is None:
            return tokenization.encode_prompt(f"{question}\n\n")
        return tokenization.encode_prompt([{"role": "user", "content": question}])

    @torch.no_grad()
    def ask(questions: Sequence[str]) -> list[str]:
        asked = [tokens(question) for question in questions]
        order = sorted(range(len(asked)), key=lambda place: -len(asked[place]))
        said = [""] * len(asked)
        for start in range(0, len(order), ROWS_AT_ONCE):
            rows = order[start : start + ROWS_AT_ONCE]
            batch = pad_texts([np.asarray(asked[row]) for row in rows], settings.pad_id, left=True)
            ids, mask = batch.input_ids_BT.to(device), batch.attention_mask_BT.to(device)
            found = generate(model, ids, mask, settings, None)
            for row, written, real in zip(rows, found.tokens_BR, found.response_mask_BR, strict=True):
                said[row] = tokenization.decode(written[real].tolist(), skip_special=True)
        return said

    return ask


def judged_wins(
    judges: Mapping[str, Judge],
    models: Sequence[ModelAnswers],
    known: Sequence[ModelAnswers],
    records: Sequence[Mapping[str, Any]],
    context: StageContext,
) -> dict[str, float]:
    """How often each judge prefers answers to the first model's, both put before it in both orders; collective.

    Next to each win rate: the share of questions without a verdict, and how often what stood first was preferred.
    """
    found: dict[str, float] = {}
    start = {answer.row: answer for answer in models[0].answers}
    for name, judge in judges.items():
        for each in [*models[1:], *known]:
            shared = [answer for answer in each.answers if answer.row in start]
            own = shared[context.ranks.rank :: context.ranks.world_size]
            prompts = [records[answer.row]["prompt"] for answer in own]
            said = judge.compare(prompts, [answer.text for answer in own], [start[answer.row].text for answer in own])
            lines = [[one.value, one.unparsed, one.first_shown] for one in said]
            merged = [line for part in distributed.gather_json(lines) for line in part]
            values, unparsed, first_shown = zip(*merged, strict=True)
            measured = named_wins(name, win_rate(values, [0.5] * len(values)))
            measured |= {
                f"{name}_unparsed": sum(unparsed) / len(unparsed),
                f"{name}_first_shown": sum(first_shown) / len(first_shown),
            }
            found |= {f"{each.label}.{figure}": value for figure, value in measured.items()}
    return found
