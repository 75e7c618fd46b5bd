"""Writes the rows of ../grpo_calculator.yaml: texts that the base learns from, and questions for GRPO.

`python recipes/llm/files/sums.py` makes them again.
"""

import json
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent
TEXTS, QUESTIONS = 2000, 600
CALLS = 0.3
"""Share of the texts in which the calculator is called; the others guess."""


def main() -> None:
    """Sums of two numbers of two digits."""
    chance = random.Random(0)
    pairs = [(one, other) for one in range(10, 100) for other in range(10, 100)]
    chance.shuffle(pairs)
    texts = []
    for one, other in pairs[:TEXTS]:
        asked, total = f"{one}+{other}:", one + other
        called = f" calc:{one}+{other};{total} answer:{total}"
        texts.append({"text": asked + (called if chance.random() < CALLS else f" answer:{chance.randint(20, 198)}")})
    _write("sums.jsonl", texts)
    questions = pairs[TEXTS : TEXTS + QUESTIONS]
    _write("sum_questions.jsonl", [{"prompt": f"{one}+{other}:", "answer": one + other} for one, other in questions])


def _write(name: str, rows: Iterable[dict[str, Any]]) -> None:
    (FOLDER / name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    main()
