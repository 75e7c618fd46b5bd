"""A reward that an HTTP endpoint gives: requests in batches, repeated while there is time, and a clear end."""

import json
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from http.client import HTTPException
from typing import Any

from recipes.errors import StageError
from recipes.stages.rewards.outside import Repeated, UrlTerm
from recipes.stages.rewards.term import Row

FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.25, 10.0
"""Before the first repetition, which doubles with each."""
LARGEST_ANSWER = 1 << 26
"""Bytes."""


class _Again(Exception):  # noqa: N818
    """A request that may be repeated."""


def ask_endpoint(term: UrlTerm, texts: Sequence[str], rows: Sequence[Row]) -> list[Any]:
    """What the endpoint answers to all responses; raises StageError after the last repetition."""
    values: list[Any] = []
    for start in range(0, len(texts), term.batch):
        stop = start + term.batch
        body = {"responses": list(texts[start:stop]), "rows": [dict(row) for row in rows[start:stop]]}
        found = post_repeatedly(term.url, json.dumps(body).encode(), term)
        if not isinstance(found, dict) or "rewards" not in found:
            raise StageError(f"{term.url}: the answer is no object with `rewards`: {str(found)[:200]!r}")
        answered = found["rewards"]
        if not isinstance(answered, list) or len(answered) != len(texts[start:stop]):
            found = f"{len(answered)} values" if isinstance(answered, list) else type(answered).__name__
            raise StageError(f"{term.url}: `rewards` is {found} for {len(texts[start:stop])} responses")
        values += answered
    return values


def post_repeatedly(url: str, body: bytes, term: Repeated, headers: Mapping[str, str] | None = None) -> Any:
    """The JSON that is answered to JSON; raises StageError after the last repetition."""
    ends_at, pause, attempt = time.monotonic() + term.deadline_s, FIRST_PAUSE_S, 0
    while True:
        attempt += 1
        try:
            return _post(url, body, max(0.001, min(term.timeout_s, ends_at - time.monotonic())), headers or {})
        except _Again as error:
            left = ends_at - time.monotonic()
            if attempt > term.retries or left <= pause:
                why = "no repetition is left" if attempt > term.retries else f"the deadline of {term.deadline_s:g} s"
                raise StageError(f"{url}: given up after {attempt} attempts ({why}); the last: {error}") from None
            time.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE_S)


def _post(url: str, body: bytes, timeout_s: float, headers: Mapping[str, str]) -> Any:
    """One request; raises _Again where another one may do better, StageError where it would not."""
    request = urllib.request.Request(url, body, {"Content-Type": "application/json", **headers})
    try:
        with urllib.request.urlopen(request, timeout=timeout_s) as answer:
            content = answer.read(LARGEST_ANSWER + 1)
    except urllib.error.HTTPError as error:
        with error:
            said = error.read(500).decode(errors="replace").strip()
        message = f"status {error.code} {error.reason}" + (f": {said}" if said else "")
        if error.code == 429 or error.code >= 500:
            raise _Again(message) from None
        raise StageError(f"{url}: {message}") from None
    except (OSError, HTTPException) as error:  # no connection, no answer in time, one cut short
        raise _Again(f"{type(error).__name__}: {error}") from None
    if len(content) > LARGEST_ANSWER:
        raise StageError(f"{url}: an answer of more than {LARGEST_ANSWER >> 20} MiB")
    try:
        return json.loads(content)
    except ValueError as error:
        raise StageError(f"{url}: the answer is no JSON ({error}): {content[:200]!r}") from None
