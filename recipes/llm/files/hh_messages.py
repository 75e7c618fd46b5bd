"""Anthropic's HH-RLHF as published (one text with `Human:` and `Assistant:` turns a side) as rows of messages.

    python hh_messages.py OUT.jsonl helpful-base.jsonl.gz [MORE.jsonl.gz ...]

Writes {"chosen": [messages], "rejected": [messages]}. Left out and counted: rows whose sides do not share all but the
last turn, are equal, or have an empty turn.
"""

import gzip
import json
import re
import sys
from pathlib import Path

ROLES = {"Human": "user", "Assistant": "assistant"}
TURN = re.compile(r"\n\n(Human|Assistant):")


def messages(text: str) -> list[dict[str, str]]:
    """The turns of one side."""
    before, *turns = TURN.split(text)
    if before.strip():
        raise ValueError(f"text before the first turn: {before[:80]!r}")
    return [
        {"role": ROLES[name], "content": content.strip()} for name, content in zip(turns[::2], turns[1::2], strict=True)
    ]


def is_pair(chosen: list[dict[str, str]], rejected: list[dict[str, str]]) -> bool:
    """Whether the two differ in a last answer alone."""
    ends = all(side and side[-1]["role"] == "assistant" for side in (chosen, rejected))
    is_full = all(turn["content"] for turn in (*chosen, *rejected))
    return ends and is_full and chosen[:-1] == rejected[:-1] and chosen[-1] != rejected[-1]


def main(out: str, *files: str) -> None:
    """Convert all files into one."""
    kept = dropped = 0
    with Path(out).open("w") as target:
        for file in files:
            with gzip.open(file, "rt") if file.endswith(".gz") else open(file) as lines:
                for line in lines:
                    row = {side: messages(text) for side, text in json.loads(line).items()}
                    if is_pair(row["chosen"], row["rejected"]):
                        target.write(json.dumps(row) + "\n")
                        kept += 1
                    else:
                        dropped += 1
    print(f"{out}: {kept} pairs; {dropped} left out")


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(f"usage: python {sys.argv[0]} OUT.jsonl FILE.jsonl[.gz] ...")
    main(*sys.argv[1:])
