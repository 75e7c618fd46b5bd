"""Who judges which pair next, and how many judgements there are: a table in memory of what the store holds."""

import hmac
import sqlite3
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import astuple, dataclass, fields
from typing import Any, Literal

from launch.label.desk import Desk
from recipes.errors import RequestError
from rlhf.feedback.judgements import COUNTED, Judgement, Pair, standing

HOLD_S = 300.0
"""How long a pair that is shown to an annotator is kept from others who are not needed."""
Choice = Literal["left", "right", "tie", "skip", "flag"]
CHOICES: tuple[Choice, ...] = ("left", "right", "tie", "skip", "flag")
MAX_COMMENT = 2000

_COUNTED = ", ".join(f"'{verdict}'" for verdict in COUNTED)
_SCHEMA = """
CREATE TABLE pairs (id TEXT PRIMARY KEY, place INTEGER NOT NULL, judges INTEGER NOT NULL);
CREATE TABLE judgements (
    pair TEXT NOT NULL, annotator TEXT NOT NULL, verdict TEXT NOT NULL, comment TEXT NOT NULL, shown_left TEXT NOT NULL,
    at REAL NOT NULL, PRIMARY KEY (pair, annotator)
);
CREATE TABLE held (annotator TEXT PRIMARY KEY, pair TEXT NOT NULL, until REAL NOT NULL);
"""
_KEEP = """
INSERT INTO judgements VALUES (?, ?, ?, ?, ?, ?)
ON CONFLICT (pair, annotator) DO UPDATE SET verdict = excluded.verdict, comment = excluded.comment,
shown_left = excluded.shown_left, at = excluded.at WHERE excluded.at >= judgements.at
"""
_OPEN = f"""
SELECT id FROM pairs
LEFT JOIN (
    SELECT pair, SUM(verdict IN ({_COUNTED})) AS labels, SUM(verdict = 'flag') AS flags, SUM(annotator = :me) AS mine
    FROM judgements WHERE verdict != 'undone' GROUP BY pair
) said ON said.pair = id
LEFT JOIN (
    SELECT pair, COUNT(*) AS holders FROM held WHERE annotator != :me AND until > :now GROUP BY pair
) busy ON busy.pair = id
LEFT JOIN held own ON own.pair = id AND own.annotator = :me
WHERE COALESCE(mine, 0) = 0 AND COALESCE(flags, 0) = 0 AND COALESCE(labels, 0) + COALESCE(holders, 0) < judges
ORDER BY own.pair IS NULL, COALESCE(labels, 0) DESC, place LIMIT 1
"""
"""What an annotator judges next: the pair on their screen, else one that lacks a second judge, else the next."""


@dataclass(frozen=True)
class Shown:
    """A pair as an annotator sees it."""

    pair: Pair
    left: Literal["first", "second"]

    def to_json(self) -> dict[str, Any]:
        """For the page."""
        answers = self.pair.answers if self.left == "first" else self.pair.answers[::-1]
        return {"id": self.pair.id, "prompt": self.pair.prompt, "left": answers[0], "right": answers[1]}


class Board:
    """The judgements of a stage; threads may share it."""

    def __init__(
        self,
        desk: Desk,
        annotators: Sequence[str],
        *,
        twice: float,
        labels: int | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.annotators = tuple(annotators)
        self._desk = desk
        self._clock = clock
        self._pairs = {pair.id: pair for pair in desk.pairs}
        self._tokens = {name: desk.token(name) for name in annotators}
        self._writer = desk.writer()
        self._lock = threading.RLock()
        self._seen: set[str] = set()
        self._table = sqlite3.connect(":memory:", check_same_thread=False, isolation_level=None)
        self._table.executescript(_SCHEMA)
        judges = judges_of(list(self._pairs), twice, len(annotators))
        rows = ((name, place, judges[name]) for place, name in enumerate(self._pairs))
        self._table.executemany("INSERT INTO pairs VALUES (?, ?, ?)", rows)
        self.wanted = sum(judges.values()) if labels is None else labels
        self.refresh()

    def link(self, address: str, annotator: str) -> str:
        """The address of the page for an annotator; what follows # stays in the browser."""
        return f"{address}/#{self._tokens[annotator]}"

    def annotator_of(self, token: str) -> str | None:
        """The annotator whose token it is; None: the token is unknown."""
        found = None
        for name, known in self._tokens.items():  # all of them, so that the time says nothing
            if hmac.compare_digest(known.encode(), token.encode()):
                found = name
        return found

    def refresh(self) -> None:
        """Take in what other pages have written."""
        with self._lock:
            new = [path for path in self._desk.segments() if path not in self._seen]
            for judgement in self._desk.read(new):
                self._keep(judgement)
            self._seen.update(new)

    def judgements(self) -> list[Judgement]:
        """Those that stand, in the order of time."""
        names = [field.name for field in fields(Judgement)]
        with self._lock:
            rows = self._table.execute("SELECT pair, annotator, verdict, comment, shown_left, at FROM judgements")
            return standing(Judgement(**dict(zip(names, row, strict=True))) for row in rows)

    def count(self, annotator: str | None = None) -> int:
        """Labels so far, of one annotator or of all."""
        whose, values = ("", ()) if annotator is None else (" AND annotator = ?", (annotator,))
        question = f"SELECT COUNT(*) FROM judgements WHERE verdict IN ({_COUNTED}){whose}"
        with self._lock:
            return int(self._table.execute(question, values).fetchone()[0])

    def is_done(self) -> bool:
        """Whether all wanted labels are there, or no pair is left for anyone."""
        with self._lock:
            return self.count() >= self.wanted or all(self._open(name, held=False) is None for name in self.annotators)

    def next(self, annotator: str) -> Shown | None:
        """The pair that an annotator judges next, kept for them a while; None: there is none for them now."""
        with self._lock:
            if self.count() >= self.wanted:
                return None
            found = self._open(annotator)
            if found is None:
                return None
            self._hold(annotator, found)
            return Shown(self._pairs[found], shown_left(found, annotator))

    def judge(self, annotator: str, pair: str, choice: Choice, comment: str = "") -> None:
        """Keep what an annotator says of a pair, durably; raises RequestError for what is no pair or no choice."""
        if pair not in self._pairs:
            raise RequestError(f"there is no pair {pair[:40]!r}")
        if choice not in CHOICES:
            raise RequestError(f"{str(choice)[:40]!r} is none of {', '.join(CHOICES)}")
        if len(comment) > MAX_COMMENT:
            raise RequestError(f"a comment has at most {MAX_COMMENT} characters, not {len(comment)}")
        left = shown_left(pair, annotator)
        right: Literal["first", "second"] = "second" if left == "first" else "first"
        verdict = left if choice == "left" else right if choice == "right" else choice
        with self._lock:
            self._write(Judgement(pair, annotator, verdict, comment.strip(), left, self._now()))
            self._table.execute("DELETE FROM held WHERE annotator = ?", (annotator,))

    def undo(self, annotator: str) -> bool:
        """Take back an annotator's latest judgement, and show them its pair again; False: there is none."""
        with self._lock:
            own = [judgement for judgement in self.judgements() if judgement.annotator == annotator]
            if not own:
                return False
            last = own[-1]
            self._write(Judgement(last.pair, annotator, "undone", "", last.left, self._now()))
            self._hold(annotator, last.pair)
            return True

    def _open(self, annotator: str, *, held: bool = True) -> str | None:
        now = self._clock() if held else float("inf")
        row = self._table.execute(_OPEN, {"me": annotator, "now": now}).fetchone()
        return None if row is None else str(row[0])

    def _hold(self, annotator: str, pair: str) -> None:
        self._table.execute("REPLACE INTO held VALUES (?, ?, ?)", (annotator, pair, self._clock() + HOLD_S))

    def _write(self, judgement: Judgement) -> None:
        self._desk.write(self._writer, judgement)
        self._keep(judgement)

    def _keep(self, judgement: Judgement) -> None:
        self._table.execute(_KEEP, astuple(judgement))

    def _now(self) -> float:
        """Later than every judgement so far."""
        latest = self._table.execute("SELECT MAX(at) FROM judgements").fetchone()[0]
        return max(self._clock(), (latest or 0.0) + 1e-6)


def judges_of(pairs: Iterable[str], twice: float, annotators: int) -> dict[str, int]:
    """How many annotators judge each pair: two of a share of the pairs, by their ids."""
    names = sorted(pairs)
    doubled = set(names[: round(twice * len(names))] if annotators > 1 else ())
    return {name: 2 if name in doubled else 1 for name in names}


def shown_left(pair: str, annotator: str) -> Literal["first", "second"]:
    """Which answer an annotator sees on the left: by chance, and the same whenever the page is opened."""
    return "first" if hmac.new(annotator.encode(), pair.encode(), "sha256").digest()[0] % 2 else "second"
