"""Rows in the forms of published data sets, as TRL's standard columns: recognised by their names."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from trainers.data.bad_row import BadRow

Standard = dict[str, Any]

MARK = re.compile(r"\n\n(Human|Assistant):")
"""Starts a turn of HH-RLHF's transcripts."""


@dataclass(frozen=True, slots=True)
class Published:
    """A form that data sets are published in."""

    name: str
    needs: tuple[str, ...]
    """Columns that tell it."""
    reads: tuple[str, ...]
    """Further columns that are read where they are there."""
    convert: Callable[[Mapping[str, Any]], Standard]
    """Gives standard columns; raises BadRow."""
    gives: tuple[str, ...] = ("prompt", "completion")

    def fits(self, row: Mapping[str, Any]) -> bool:
        """Tell whether a row has the columns."""
        return all(row.get(name) is not None for name in self.needs)


def _joined(row: Mapping[str, Any], *names: str) -> str:
    """Join columns by a blank line; empty ones leave nothing. Raises BadRow for what is no text."""
    texts = []
    for name in names:
        value = row.get(name)
        if value is not None and not isinstance(value, str):
            raise BadRow(f"column {name!r} is {type(value).__name__}, not text")
        if value:
            texts.append(value)
    return "\n\n".join(texts)


def _asked(row: Mapping[str, Any], prompt: str, completion: str, system: str = "system") -> Standard:
    found = {"prompt": prompt, "completion": _joined(row, completion)}
    return {**found, "system": row[system]} if row.get(system) else found


def _alpaca(row: Mapping[str, Any]) -> Standard:
    found = _asked(row, _joined(row, "instruction", "input"), "output")
    history = row.get("history") or []
    if not history:
        return found
    if not all(isinstance(turn, list | tuple) and len(turn) == 2 for turn in history):
        raise BadRow("column 'history' is not a list of [instruction, answer]")
    earlier = [
        {"role": role, "content": text}
        for turn in history
        for role, text in zip(("user", "assistant"), turn, strict=True)
    ]
    asked = [*earlier, {"role": "user", "content": found["prompt"]}]
    return {**found, "prompt": asked, "completion": [{"role": "assistant", "content": found["completion"]}]}


def _ranked(row: Mapping[str, Any]) -> Standard:
    """Nectar: the best and the worst of ranked answers."""
    return _best_and_worst(row["prompt"], row["answers"], "answers", "answer", lambda answer: -float(answer["rank"]))


def _scored(row: Mapping[str, Any]) -> Standard:
    """UltraFeedback: the completions with the highest and the lowest overall score."""
    score = "overall_score"
    if row["completions"] and "overall_score" not in row["completions"][0]:
        score = "fine-grained_score"
    return _best_and_worst(
        row["instruction"], row["completions"], "completions", "response", lambda answer: float(answer[score])
    )


def _best_and_worst(
    prompt: Any, answers: Any, column: str, text: str, value: Callable[[Mapping[str, Any]], float]
) -> Standard:
    try:
        ranked = sorted(answers, key=value)
        found = {"prompt": prompt, "chosen": ranked[-1][text], "rejected": ranked[0][text]}
        is_tie = value(ranked[-1]) == value(ranked[0])
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise BadRow(
            f"column {column!r} is no list of answers with {text} and their rank or score ({error!r})"
        ) from None
    return {**found, "rejected": found["chosen"]} if is_tie else found  # equal answers are dropped, and counted


def _asked_pair(row: Mapping[str, Any]) -> Standard:
    found = {"prompt": _joined(row, "question"), "chosen": row["chosen"], "rejected": row["rejected"]}
    return {**found, "system": row["system"]} if row.get("system") else found


ASKED_PAIR = Published("orca-dpo", ("question", "chosen", "rejected"), ("system",), _asked_pair, ("chosen", "rejected"))
"""Its answers stand in standard columns, its prompt does not."""
FORMS = (
    Published("alpaca", ("instruction", "output"), ("input", "system", "history"), _alpaca),
    Published(
        "dolly", ("instruction", "response"), ("context",),
        lambda row: _asked(row, _joined(row, "context", "instruction"), "response"),
    ),
    Published(
        "p3", ("inputs_pretokenized", "targets_pretokenized"), (),
        lambda row: _asked(row, _joined(row, "inputs_pretokenized"), "targets_pretokenized"),
    ),
    Published(
        "open-orca", ("question", "response"), ("system_prompt",),
        lambda row: _asked(row, _joined(row, "question"), "response", "system_prompt"),
    ),
    Published(
        "question-answer", ("question", "answer"), (), lambda row: _asked(row, _joined(row, "question"), "answer")
    ),
    Published("nectar", ("prompt", "answers"), (), _ranked, ("chosen", "rejected")),
    Published("ultrafeedback", ("instruction", "completions"), (), _scored, ("chosen", "rejected")),
)  # fmt: skip
"""In the order in which they are looked for; only of rows that lack the standard columns of their role."""


def is_transcript(value: Any) -> bool:
    """Tell whether a text marks its turns as HH-RLHF does."""
    return isinstance(value, str) and MARK.match(value) is not None


def recognise(row: Mapping[str, Any], gives: tuple[str, ...]) -> Published | None:
    """Return the form of a row that gives these standard columns; None: it has none."""
    return next((form for form in FORMS if form.gives == gives and form.fits(row)), None)
