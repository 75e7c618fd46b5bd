"""Where the pairs of a feedback stage and what people say of them lie: in the run's folder of the store.

Every judgement is a separate file, written before the page hears that it is kept. So nothing is lost with the
driver or its machine, several pages may be open at once, also on other machines, and no database file lies on a disk
that is shared or a bucket.
"""

import hmac
import json
import secrets
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from hashlib import sha256
from typing import Any

from recipes.errors import RequestError
from rlhf.feedback.judgements import Judgement, Pair
from trainers.store.runs import Run, SegmentWriter
from trainers.store.store import Store

TOKEN_DIGITS = 32


@dataclass(frozen=True)
class Desk:
    """The pairs of one stage of a run; its own, by its fingerprint, of those that it may have had before."""

    store: Store
    run: str
    stage: str
    fingerprint: str

    @property
    def folder(self) -> Run:
        """The run's folder."""
        return self.store.run(self.run)

    def find(self) -> dict[str, Any] | None:
        """What the workers made, once they have: `pairs`, and the `result` that lacks the judgements."""
        data = self.folder.find(self._pairs_name)
        found: dict[str, Any] | None = None if data is None else json.loads(data)
        return found

    def lay_out(self, result: dict[str, Any]) -> None:
        """Keep what the workers made: pairs are answered once, and judged however often the run is resumed."""
        entry = result["candidate"]["files"]["pairs.jsonl"]
        lines = self.store.objects.get_bytes(entry["sha256"]).splitlines()
        document = {"result": result, "pairs": [json.loads(line) for line in lines]}
        self.folder.write_once(self._pairs_name, json.dumps(document, ensure_ascii=False, sort_keys=True).encode())

    @cached_property
    def pairs(self) -> list[Pair]:
        """The pairs to judge; raises RequestError where the stage has none yet."""
        found = self.find()
        if found is None:
            raise RequestError(
                f"{self.run}/{self.stage} has no pairs to judge yet; they are there once its model has answered"
            )
        return [Pair.from_json(line) for line in found["pairs"]]

    def writer(self) -> SegmentWriter:
        """Where a page writes judgements; each page has another place."""
        return self.folder.writer(f"{self._judgements}/{secrets.token_hex(6)}")

    def segments(self) -> list[str]:
        """Files of judgements so far."""
        return self.folder.segments(self._judgements)

    def read(self, segments: Iterable[str]) -> Iterator[Judgement]:
        """The judgements of such files."""
        return (Judgement(**line) for line in self.folder.lines(segments))

    def write(self, writer: SegmentWriter, judgement: Judgement) -> None:
        """Keep a judgement; it is durable on return."""
        writer.append(asdict(judgement))
        writer.flush()

    @cached_property
    def secret(self) -> bytes:
        """What tokens are made from; the same for every page of the stage, however often the run is resumed."""
        name = f"{self._root}/secret"
        while (found := self.folder.find(name)) is None:
            try:
                self.folder.write_once(name, secrets.token_hex(32).encode())
            except RequestError:
                continue  # another page was faster
        return found

    def token(self, annotator: str) -> str:
        """The token by which an annotator is known."""
        return hmac.new(self.secret, annotator.encode(), sha256).hexdigest()[:TOKEN_DIGITS]

    @property
    def _root(self) -> str:
        return f"labels/{self.stage}"

    @property
    def _judgements(self) -> str:
        return f"{self._root}/judgements"

    @property
    def _pairs_name(self) -> str:
        return f"{self._root}/pairs-{self.fingerprint[:16]}.json"
