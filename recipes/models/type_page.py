"""The table of model types in docs/families.md, by what works with them.

`python -m recipes.models.type_page docs/families.md` writes it into the page; a test fails when it is out of date.
"""

import sys
from pathlib import Path

from recipes.models.model_kinds import MODEL_KINDS, KindFacts, trained_kind
from recipes.models.type_table import Capability, TypeRecord, type_records

START, END = "<!-- types: start -->", "<!-- types: end -->"
COLUMNS: tuple[Capability, ...] = (
    "packing", "adapters", "checkpointing", "generation", "reward_model", "critic", "vllm", "classes",
)  # fmt: skip
_TITLES = (
    "rows packed",
    "adapters",
    "gradient checkpointing",
    "sampled from",
    "reward model",
    "critic",
    "vLLM",
    "classes",
)
_NO_CACHE = "without cache"


def types_table() -> str:
    """The table: types with the same answers share a row; of those that are not trained the reason."""
    records = type_records()
    groups: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    refused: list[str] = []
    for name, record in records.items():
        if (reason := record.lacks.get("training")) is not None:
            refused.append(f"- `{name}`: {reason}")
        else:
            groups.setdefault((record.family, _answers(record)), []).append(f"`{name}`")
    lines = [f"| family | types | {' | '.join(_TITLES)} |", "| --- " * (len(_TITLES) + 2) + "|"]
    for (family, answers), names in sorted(groups.items(), key=lambda item: (item[0][0], -len(item[1]))):
        lines.append(f"| `{family}` | {', '.join(sorted(names))} | {' | '.join(answers)} |")
    if refused:
        lines += ["", "Not trained, with the reason that `check` gives:", "", *sorted(refused)]
    return "\n".join(lines)


def _answers(record: TypeRecord) -> tuple[str, ...]:
    """Yes or no for each column; `without cache` where each token takes a forward over the whole sequence."""
    uncached = {"generation"} if record.decoding == "no_cache" else set()
    asked = _asked(MODEL_KINDS[trained_kind(record.classes)])
    return tuple(
        "" if name not in asked else "no" if name in record.lacks else _NO_CACHE if name in uncached else "yes"
        for name in COLUMNS
    )


def _asked(kind: KindFacts) -> tuple[Capability, ...]:
    """What can be asked of the types of a kind."""
    if kind.fills_masks:
        return ("packing", "adapters", "checkpointing", "classes")
    return ("adapters", "checkpointing", "generation") if kind.reads_targets else COLUMNS[:7]


def page_with_table(page: str) -> str:
    """The page with the table between its two marks."""
    before, rest = page.split(START, 1)
    return f"{before}{START}\n{types_table()}\n{END}{rest.split(END, 1)[1]}"


if __name__ == "__main__":
    path = Path(sys.argv[1])
    path.write_text(page_with_table(path.read_text(encoding="utf-8")), encoding="utf-8")
