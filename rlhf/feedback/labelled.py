"""Pairs that were judged elsewhere, as on the page of a stage's rollouts, and join those of a feedback stage."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from recipes.errors import RequestError
from rlhf.feedback.judgements import Judgement, Pair, as_lines

LABELLED_FILE = "labelled.jsonl"
"""Where workers leave them for the driver, which waits for people."""
Labelled = tuple[Pair, Judgement]


def labelled_pair(record: Mapping[str, Any]) -> Labelled:
    """A pair whose first answer an annotator found better; raises RequestError that names the row."""
    columns = record["columns"]
    for name, value in columns.items():
        if not isinstance(value, str) or not value:
            raise RequestError(f"labelled: row {record['id']}: column {name!r} is {value!r}, not text")
    pair = Pair.of(record["prompt"], (columns["chosen"], columns["rejected"]), record["id"])
    return pair, Judgement(pair.id, columns["annotator"], "first")


def labelled_lines(judged: Sequence[Labelled]) -> bytes:
    """They as lines."""
    return as_lines({"pair": asdict(pair), "judgement": asdict(judgement)} for pair, judgement in judged)


def labelled_of(data: bytes) -> list[Labelled]:
    """What `labelled_lines` wrote."""
    lines = map(json.loads, data.splitlines())
    return [(Pair.from_json(line["pair"]), Judgement(**line["judgement"])) for line in lines]


def with_labelled(
    pairs: Sequence[Pair], judgements: Sequence[Judgement], judged: Sequence[Labelled]
) -> tuple[list[Pair], list[Judgement]]:
    """Pairs and judgements with those that were there before; a pair that is there twice stands once."""
    known = {pair.id: pair for pair in [*pairs, *(pair for pair, _ in judged)]}
    return list(known.values()), [*judgements, *(judgement for _, judgement in judged)]
