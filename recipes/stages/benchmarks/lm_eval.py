"""Tasks of EleutherAI's lm-evaluation-harness: its prompts, examples, filters and figures, on rows of the recipe's."""

import json
from collections.abc import Iterable, Iterator
from typing import Any, Literal

from pydantic import model_validator

from recipes.fields import meaning, refuse
from recipes.problem_codes import Code
from recipes.stages.benchmarks.case import Benchmark, Case, Named, Option

REFUSED = ("process_docs", "custom_dataset", "use_prompt", "unsafe_code", "doc_to_image", "doc_to_audio", "class")
"""Keys of a task's file that are code, or need what is not here."""


class LmEval(Benchmark):
    """A task of lm-eval: `figures` are the metrics that it computes for a row, each the mean of the rows."""

    suite: Literal["lm_eval"] = meaning(description="A task of the lm-evaluation-harness (the extra `eval`).")
    task: str | dict[str, Any] = meaning(
        description="A task by its name there, as hellaswag, or the keys of a task's YAML file. Its rows are those of "
        "`data`, whatever it says of data sets and splits; max_tokens counts a row's columns."
    )
    figures: list[str] = meaning(
        default_factory=lambda: ["acc"],
        min_length=1,
        max_length=16,
        description="Which of the task's metrics; of several filters METRIC,FILTER, as exact_match,strict-match, else "
        "the first.",
    )
    shots: int | None = meaning(
        None,
        ge=0,
        le=64,
        description="Answered questions before each one, drawn from the other rows as lm-eval draws them; null: as the "
        "task says.",
    )

    @model_validator(mode="after")
    def _task_is_data(self) -> "LmEval":
        if isinstance(self.task, dict):
            for name in REFUSED:
                if self.task.get(name):
                    refuse(Code.NOT_APPLICABLE, f"task.{name} is code; a task that lm-eval ships is given by its name")
            for name in ("output_type", "doc_to_text", "doc_to_target"):
                if name not in self.task:
                    refuse(Code.MISSING_KEY, f"task has no {name}; a task's file says how its rows are asked")
        return self

    @property
    def metrics(self) -> tuple[str, ...]:
        return tuple(map(spelt, self.figures))

    @property
    def surroundings(self) -> str:
        return json.dumps(self.reading(), sort_keys=True)

    def cases(self, rows: Iterable[Named]) -> Iterator[tuple[int, Case]]:
        """Rows as they are: the harness makes questions of them."""
        for place, (_, row) in enumerate(rows):
            yield place, Case((Option(json.dumps(row, ensure_ascii=False, default=str), ""),), (0,))

    def shown(self, row: Named) -> tuple[str, str]:
        ((_, case),) = self.cases([row])
        return case.best


def spelt(figure: str) -> str:
    """A metric of lm-eval as a name in a report."""
    return "".join(character if character.isalnum() else "_" for character in figure.lower())
