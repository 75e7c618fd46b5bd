"""Judged pairs: which judgements count, how far annotators agree, and which rows of preferences come of it."""

import json
from collections.abc import Sequence
from typing import Any

import pytest

from recipes.errors import RequestError
from recipes.stages.feedback import PairChoice
from rlhf.feedback.choice import chosen_pairs
from rlhf.feedback.judgements import (
    Judgement,
    Pair,
    Verdict,
    agreement,
    judged_by_score,
    preference_set,
    standing,
)
from rlhf.feedback.labelled import labelled_lines, labelled_of, labelled_pair, with_labelled


def pairs_of(count: int) -> list[Pair]:
    return [Pair.of(f"question {n}", [f"one {n}", f"other {n}"]) for n in range(count)]


def judged(pairs: Sequence[Pair], *columns: tuple[str, Sequence[Verdict]]) -> list[Judgement]:
    return [
        Judgement(pair.id, name, verdict, at=float(place))
        for name, verdicts in columns
        for place, (pair, verdict) in enumerate(zip(pairs, verdicts, strict=True))
    ]


def rows(pairs: Sequence[Pair], judgements: Sequence[Judgement], **settings: Any) -> dict[str, dict[str, Any]]:
    lines = preference_set(pairs, judgements, **settings).files["preferences.jsonl"].splitlines()
    return {row["prompt"]: row for row in map(json.loads, lines)}


def test_the_later_word_stands_and_what_is_undone_does_not() -> None:
    said = [
        Judgement("a", "ann", "second", at=2.0),
        Judgement("a", "ann", "first", at=1.0),
        Judgement("b", "ann", "tie", at=3.0),
        Judgement("b", "ann", "undone", at=4.0),
        Judgement("b", "bob", "first", at=0.5),
    ]
    assert [(found.pair, found.annotator, found.verdict) for found in standing(said)] == [
        ("b", "bob", "first"),
        ("a", "ann", "second"),
    ]


def test_kappa_is_that_of_cohens_definition() -> None:
    # 20 and 15 agree, 5 and 10 do not: 0.7 observed, 0.5 * 0.6 + 0.5 * 0.4 = 0.5 by chance, so 0.4.
    table: list[tuple[Verdict, Verdict, int]] = [
        ("first", "first", 20), ("first", "second", 5), ("second", "first", 10), ("second", "second", 15),
    ]  # fmt: skip
    both = [(one, other) for one, other, count in table for _ in range(count)]
    pairs = pairs_of(len(both))
    found = agreement(judged(pairs, ("ann", [one for one, _ in both]), ("bob", [other for _, other in both])))
    assert (found.pairs, found.share) == (50, 0.7)
    assert found.kappa == pytest.approx(0.4)


def test_kappa_of_three_annotators_is_weighted_by_shared_pairs_and_undefined_where_all_say_one_thing() -> None:
    pairs = pairs_of(6)
    said = [
        *judged(pairs[:2], ("ann", ["first", "second"]), ("bob", ["first", "second"])),
        *judged(pairs[2:], ("ann", ["first", "first", "second", "second"]), ("eve", ["second", "first"] * 2)),
    ]
    assert agreement(said).kappa == pytest.approx((2 * 1.0 + 4 * 0.0) / 6)
    alike = agreement(judged(pairs, ("ann", ["first"] * 6), ("bob", ["first"] * 6)))
    assert (alike.share, alike.kappa) == (1.0, None)
    assert agreement(judged(pairs, ("ann", ["tie"] * 6))).share is None


def test_the_majority_is_preferred_and_what_is_level_or_flagged_is_left_out() -> None:
    pairs = pairs_of(5)
    said = judged(
        pairs,
        ("ann", ["first", "second", "first", "skip", "first"]),
        ("bob", ["tie", "second", "second", "first", "flag"]),
    )
    found = rows(pairs, said)
    assert {prompt: row["chosen"] for prompt, row in found.items()} == {
        "question 0": "one 0",
        "question 1": "other 1",
        "question 3": "one 3",
    }
    assert found["question 1"]["rejected"] == "one 1"
    assert [found[f"question {n}"]["annotators"] for n in (0, 1, 3)] == [["ann", "bob"], ["ann", "bob"], ["bob"]]


def test_a_higher_score_is_preferred_past_the_margin() -> None:
    gains = [0.3, -0.3, 0.05]
    pairs = [Pair.of(f"{n}", ["a", "b"], rewards=[{"score": gain}, {"score": 0.0}]) for n, gain in enumerate(gains)]
    assert [found.verdict for found in judged_by_score(pairs, "rule", 0.1)] == ["first", "second", "tie"]


@pytest.mark.parametrize(
    ("verdicts", "asked", "min_kappa", "reasons"),
    [
        (["first", "second"], 4, None, 0),
        (["first", "tie"], 5, None, 1),
        (["tie", "skip"], 0, None, 1),
        (["first", "second"], 4, 0.9, 0),
        (["second", "first"], 4, 0.9, 2),
    ],
)
def test_gates(verdicts: list[Verdict], asked: int, min_kappa: float | None, reasons: int) -> None:
    pairs = pairs_of(2)
    said = judged(pairs, ("ann", ["first", "second"]), ("bob", verdicts))
    if verdicts == ["tie", "skip"]:
        said = judged(pairs, ("bob", verdicts))
    assert len(preference_set(pairs, said, asked=asked, min_kappa=min_kappa).reasons) == reasons


def scored(*gains: tuple[float, float]) -> list[Pair]:
    """Pairs by what two terms give the first answer more than the second; the score is the first term."""
    nothing = {"a": 0.0, "b": 0.0, "score": 0.0}
    return [
        Pair.of(f"q{n}", ["x", "y"], rewards=[{"a": a, "b": b, "score": a}, nothing]) for n, (a, b) in enumerate(gains)
    ]


def test_pairs_are_chosen_by_the_smallest_margin_or_the_largest_disagreement() -> None:
    pairs = scored((3.0, 30.0), (-0.1, 10.0), (2.0, -20.0), (0.2, 1.0))
    assert chosen_pairs(pairs, PairChoice(by="margin", pairs=2)) == [pairs[1], pairs[3]]
    # Roots of the mean squares: 1.806 and 18.71, so 0.058, 0.590, 2.177 and 0.057 apart.
    by_terms = PairChoice(by="disagreement", pairs=2, between=["a", "b"])
    assert chosen_pairs(pairs, by_terms) == [pairs[1], pairs[2]]
    assert chosen_pairs(scored((1.0, 0.0)), by_terms) == scored((1.0, 0.0))


def test_pairs_that_were_judged_before_join_the_set() -> None:
    pairs = pairs_of(2)
    columns = {"chosen": "one 1", "rejected": "other 1", "annotator": "bob"}
    known = labelled_of(labelled_lines([labelled_pair({"id": "r:1", "prompt": "question 1", "columns": columns})]))
    made = with_labelled(pairs, judged(pairs, ("ann", ["first", "first"])), known)
    assert {prompt: row["annotators"] for prompt, row in rows(*made).items()} == {
        "question 0": ["ann"],
        "question 1": ["ann", "bob"],
    }
    with pytest.raises(RequestError, match=r"r:2.*rejected"):
        labelled_pair({"id": "r:2", "prompt": "q", "columns": {**columns, "rejected": None}})
