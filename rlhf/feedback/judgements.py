"""Judged pairs of answers: who prefers which, how far people agree, and the set of preferences (pure)."""

import hashlib
import json
import math
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Verdict = Literal["first", "second", "tie", "skip", "flag", "undone"]
"""first, second: this answer is better. skip: no opinion. flag: the pair is unsuited. undone: as if never judged."""
COUNTED: tuple[Verdict, ...] = ("first", "second", "tie")
"""Verdicts that count as labels."""


@dataclass(frozen=True)
class Pair:
    """A prompt and two answers to it."""

    id: str
    """Of its content: equal pairs have the same."""
    prompt: Any
    """Text, or messages."""
    answers: tuple[str, str]
    source: str = ""
    """The prompt's row in its source."""
    rewards: tuple[Mapping[str, float], Mapping[str, float]] = field(default_factory=lambda: ({}, {}))
    """What each term of a reward gave the answers, and `score`, their weighted sum."""

    @staticmethod
    def of(
        prompt: Any, answers: Sequence[str], source: str = "", rewards: Sequence[Mapping[str, float]] = ({}, {})
    ) -> "Pair":
        """Make a pair, named by its content."""
        text = json.dumps([prompt, *answers], sort_keys=True, ensure_ascii=False)
        first, second = answers
        own, other = rewards
        return Pair(hashlib.sha256(text.encode()).hexdigest()[:16], prompt, (first, second), source, (own, other))

    @staticmethod
    def from_json(line: Mapping[str, Any]) -> "Pair":
        """Read what `as_lines` wrote."""
        return Pair(**{**line, "answers": tuple(line["answers"]), "rewards": tuple(line["rewards"])})

    @property
    def score_gain(self) -> float:
        """By how much the first answer's score is the higher one."""
        return self.rewards[0]["score"] - self.rewards[1]["score"]


@dataclass(frozen=True)
class Judgement:
    """What one annotator said of one pair."""

    pair: str
    annotator: str
    verdict: Verdict
    comment: str = ""
    left: Literal["first", "second"] = "first"
    """Which answer was shown on the left."""
    at: float = 0.0
    """Seconds since the epoch; of two judgements of a pair by an annotator the later one stands."""


def standing(judgements: Iterable[Judgement]) -> list[Judgement]:
    """Of each annotator's judgements of a pair the latest, in the order of time; what was undone is left out."""
    latest = {(judgement.pair, judgement.annotator): judgement for judgement in sorted(judgements, key=lambda j: j.at)}
    return sorted((j for j in latest.values() if j.verdict != "undone"), key=lambda j: j.at)


def judged_by_score(pairs: Sequence[Pair], judge: str, margin: float) -> list[Judgement]:
    """What a reward says of the pairs: the higher score is better; within `margin` of each other it is a tie."""

    def verdict(gain: float) -> Verdict:
        return "tie" if abs(gain) <= margin else "first" if gain > 0 else "second"

    return [Judgement(pair.id, judge, verdict(pair.score_gain)) for pair in pairs]


@dataclass(frozen=True)
class Agreement:
    """How far annotators agree on pairs that two or more of them judged."""

    pairs: int
    """Pairs of judgements, of one pair of answers by two annotators."""
    share: float | None
    """Of these with the same verdict."""
    kappa: float | None
    """Cohen's (1960), of every two annotators, weighted by how many pairs they share; None: it is not defined."""


def agreement(judgements: Sequence[Judgement]) -> Agreement:
    """Measure agreement on verdicts that count."""
    by_pair: dict[str, dict[str, Verdict]] = defaultdict(dict)
    for judgement in judgements:
        if judgement.verdict in COUNTED:
            by_pair[judgement.pair][judgement.annotator] = judgement.verdict
    shared: dict[tuple[str, str], list[tuple[Verdict, Verdict]]] = defaultdict(list)
    for verdicts in by_pair.values():
        names = sorted(verdicts)
        for place, name in enumerate(names):
            for other in names[place + 1 :]:
                shared[name, other].append((verdicts[name], verdicts[other]))
    both = [verdicts for found in shared.values() for verdicts in found]
    if not both:
        return Agreement(0, None, None)
    kappas = [(len(found), kappa) for found in shared.values() if (kappa := _kappa(found)) is not None]
    weighted = sum(count * kappa for count, kappa in kappas) / sum(count for count, _ in kappas) if kappas else None
    return Agreement(len(both), sum(one == other for one, other in both) / len(both), weighted)


def _kappa(verdicts: Sequence[tuple[Verdict, Verdict]]) -> float | None:
    """Cohen's kappa; None where both always say the same one thing, so that chance explains all of it."""
    from sklearn.metrics import cohen_kappa_score  # takes a second to import

    one, other = zip(*verdicts, strict=True)
    if len({*one, *other}) == 1:
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a label that only one of them has used
        kappa = float(cohen_kappa_score(one, other, labels=list(COUNTED)))
    return kappa if math.isfinite(kappa) else None


@dataclass(frozen=True)
class PreferenceSet:
    """What judged pairs come to."""

    files: Mapping[str, bytes]
    """preferences.jsonl: rows with prompt, chosen, rejected; judgements.jsonl, pairs.jsonl: what they are made of."""
    metrics: Mapping[str, Any]
    reasons: tuple[str, ...]
    """Why a stage should not build on it."""


def preference_set(
    pairs: Sequence[Pair], judgements: Iterable[Judgement], *, asked: int = 0, min_kappa: float | None = None
) -> PreferenceSet:
    """Make a set of preferences: of each pair the answer that more of its judges prefer.

    Pairs that anyone flagged, and those without a majority, are left out. `asked`: labels that were wanted.
    """
    known = {pair.id for pair in pairs}
    stood = [judgement for judgement in standing(judgements) if judgement.pair in known]
    by_pair: dict[str, list[Judgement]] = defaultdict(list)
    for judgement in stood:
        by_pair[judgement.pair].append(judgement)
    rows = [row for pair in pairs if (row := _preference(pair, by_pair[pair.id])) is not None]
    verdicts = Counter(judgement.verdict for judgement in stood)
    labels = sum(verdicts[verdict] for verdict in COUNTED)
    agreed = agreement(stood)
    shown = [j.left == j.verdict for j in stood if j.verdict in ("first", "second")]
    measured = {
        "agreement": agreed.share,
        "kappa": agreed.kappa,
        "left_share": sum(shown) / len(shown) if shown else None,
    }
    metrics: dict[str, Any] = {
        "pairs": len(pairs),
        "labels": labels,
        "preferences": len(rows),
        "ties": verdicts["tie"],
        "skipped": verdicts["skip"],
        "flagged": verdicts["flag"],
        "pairs_judged_twice": agreed.pairs,
        **{name: value for name, value in measured.items() if value is not None},
        "labels_by": dict(sorted(Counter(j.annotator for j in stood if j.verdict in COUNTED).items())),
    }
    reasons = []
    if not rows:
        reasons.append("no answer is preferred to another")
    if labels < asked:
        reasons.append(f"{labels} of {asked} labels, and no pair is left to judge")
    if min_kappa is not None and (agreed.kappa is None or agreed.kappa < min_kappa):
        found = "not defined" if agreed.kappa is None else f"{agreed.kappa:.3f}"
        reasons.append(f"Cohen's kappa is {found} on {agreed.pairs} pairs judged twice, below {min_kappa:g}")
    files = {
        "preferences.jsonl": as_lines(rows),
        "judgements.jsonl": as_lines(asdict(judgement) for judgement in stood),
        "pairs.jsonl": as_lines(asdict(pair) for pair in pairs),
    }
    return PreferenceSet(files, metrics, tuple(reasons))


def _preference(pair: Pair, judged: Sequence[Judgement]) -> dict[str, Any] | None:
    """The row of a pair; None: it is flagged, or neither answer has more judges than the other."""
    votes = Counter(judgement.verdict for judgement in judged)
    if votes["flag"] or votes["first"] == votes["second"]:
        return None
    chosen = 0 if votes["first"] > votes["second"] else 1
    comments = [judgement.comment for judgement in judged if judgement.comment]
    return {
        "prompt": pair.prompt,
        "chosen": pair.answers[chosen],
        "rejected": pair.answers[1 - chosen],
        "pair": pair.id,
        "source": pair.source,
        "annotators": sorted(judgement.annotator for judgement in judged if judgement.verdict in COUNTED),
        "votes": {verdict: votes[verdict] for verdict in COUNTED},
        **({"comments": comments} if comments else {}),
    }


def as_lines(rows: Iterable[Mapping[str, Any]]) -> bytes:
    """JSON lines, equal for equal rows."""
    return b"".join(json.dumps(row, ensure_ascii=False, sort_keys=True).encode() + b"\n" for row in rows)
