"""Writes the rows of ../grpo_rules.yaml: what the base learns from, questions for GRPO, and others for the evaluation.

`python recipes/llm/files/picks.py` makes them again.
"""

import itertools
import json
import random
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

Digits = Sequence[int]
FOLDER = Path(__file__).parent
LEARNT = 500
"""Of the 720 questions; the base and GRPO see no others."""
PICKS: dict[str, Callable[[Digits], int]] = {
    "largest": max, "smallest": min, "first": lambda digits: digits[0], "last": lambda digits: digits[-1],
}  # fmt: skip
SHARES = [20, 30, 25, 25]
"""Per cent of the rows that only say `pick`, by what they pick."""


def main() -> None:
    """Each question once by each name of what to pick, and twice without one."""
    chance = random.Random(0)
    questions = list(itertools.permutations(range(10), 3))
    chance.shuffle(questions)
    learnt, held_out = questions[:LEARNT], questions[LEARNT:]
    picks = [{"text": f"{_asked(name, digits)} {pick(digits)}"} for digits in learnt for name, pick in PICKS.items()]
    for digits in learnt * 2:
        (pick,) = chance.choices(list(PICKS.values()), SHARES)
        picks.append({"text": f"{_asked('pick', digits)} {pick(digits)}"})
    chance.shuffle(picks)
    _write("picks.jsonl", picks)
    _write("largest.jsonl", map(_question, learnt))
    _write("largest_held_out.jsonl", map(_question, held_out))


def _asked(what: str, digits: Digits) -> str:
    return f"{what} {' '.join(map(str, digits))}:"


def _question(digits: Digits) -> dict[str, Any]:
    return {"prompt": _asked("pick", digits), "answer": max(digits)}


def _write(name: str, rows: Iterable[dict[str, Any]]) -> None:
    (FOLDER / name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    main()
