"""The table of model types in docs/families.md, by what works with them.

`python -m recipes.models.type_page docs/families.md` writes it into the page; a test fails when it is out of date.
"""

import sys
from pathlib import Path

from recipes.models.type_table import Capability, TypeRecord, trained_kind, type_records

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
ASKED: dict[str, tuple[Capability, ...]] = {
    "language_model": COLUMNS[:7],
    "masked_model": ("packing", "adapters", "checkpointing", "classes"),
    "seq2seq_model": ("adapters", "checkpointing", "generation"),
    "vision_language_model": COLUMNS[:7],
}
"""What can be asked of the types of each kind."""
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
    asked = ASKED[trained_kind(record.classes)]
    return tuple(
        "" if name not in asked else "no" if name in record.lacks else _NO_CACHE if name in uncached else "yes"
        for name in COLUMNS
    )


def page_with_table(page: str) -> str:
    """The page with the table between its two marks."""
    before, rest = page.split(START, 1)
    return f"{before}{START}\n{types_table()}\n{END}{rest.split(END, 1)[1]}"


if __name__ == "__main__":
    path = Path(sys.argv[1])
    path.write_text(page_with_table(path.read_text(encoding="utf-8")), encoding="utf-8")
