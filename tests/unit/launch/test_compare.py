"""`trainwright compare` on reports of a store: paired figures, marks, gates, rows that are not the same, the page."""

import hashlib
import json
from collections.abc import Callable, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from tests.unit.launch.bench import Bench
from tests.unit.launch.test_json_forms import documented, keys_of
from trainers.evaluation.intervals import paired
from trainers.store.manifest import ArtifactManifest, Outcome, files_digest
from trainers.store.store import Store

FIGURES = {
    "boolq": {"metrics": ["acc"], "judged": ["acc"]},
    "bias": {"metrics": ["difference"], "judged": []},
}
EVIL = "</details><script>alert(1)</script>"


def report(store: Store, name: str, right: Sequence[int], *, model: str, asked: Sequence[str] = (), **row: Any) -> None:
    """Commit a report of one model under a name: which of the rows it had right, and what it was asked."""
    names = list(asked) or [f"asked {place}" for place in range(len(right))]
    lines = [
        {
            "model": model, "id": f"rows.jsonl:{place + 1}", "asked": names[place], "question": f"why {place} {EVIL}",
            "answer": "yes", "group": "", "number": place, "said": f"{model} {value}", "details": {},
            "values": {"acc": float(value), "difference": value / 3}, **row,
        }
        for place, value in enumerate(right)
    ]  # fmt: skip
    content = {"benchmarks.json": json.dumps(FIGURES), **dict.fromkeys(
        ("rows/boolq.jsonl", "rows/bias.jsonl"), "".join(json.dumps(line) + "\n" for line in lines)
    )}  # fmt: skip
    files = {path: store.objects.put_chunks([text.encode()]) for path, text in content.items()}
    manifest = ArtifactManifest(
        fingerprint=hashlib.sha256(name.encode()).hexdigest(), digest=files_digest(files), kind="report", stage="eval",
        files=files, parents={}, data={}, outcome=Outcome(steps_done=0, steps_planned=0),
    )  # fmt: skip
    store.put_artifact(manifest)
    store.name_artifact(name, manifest.fingerprint)


BEFORE = [1] * 30 + [0] * 30
AFTER = [1] * 20 + [0] * 38 + [1] * 2


@pytest.fixture
def compared(bench: Bench, call: Any) -> Callable[..., Any]:
    """Call `compare` on a store with two reports; returns what it prints."""
    report(bench.store, "before", BEFORE, model="base")
    report(bench.store, "after", AFTER, model="tuned")

    def run(*words: str, code: int = 0, form: str = "--json") -> Any:
        ended, out, err = call("compare", *words, *([form] if form else []), "--store", bench.store.uri)
        assert ended == code, err
        return json.loads(out) if form and out else out + err

    return run


def test_a_regression_is_marked_and_its_rows_are_listed(compared: Callable[..., Any]) -> None:
    found = compared("before", "after")
    assert keys_of(found) == documented()["compare"]
    assert found["models"] == ["base", "tuned"]
    acc, difference = found["figures"]
    expected = paired(BEFORE, AFTER)
    assert (acc["benchmark"], acc["metric"], acc["verdict"]) == ("boolq", "acc", "worse")
    assert acc["difference"] == expected._asdict()
    assert acc["difference"]["p"] == pytest.approx(2 * (1 + 12 + 66) / 2**12)  # McNemar: 10 lost, 2 gained
    assert acc["lost"] == [f"rows.jsonl:{place}" for place in range(21, 31)]
    assert acc["gained"] == ["rows.jsonl:59", "rows.jsonl:60"]
    assert acc["own"]["mean"] == pytest.approx(22 / 60)
    assert difference["difference"]["p"] < 0.05
    assert difference["verdict"] == ""  # neither more nor less of it is better
    better = compared("after", "before")["figures"][0]
    assert (better["verdict"], better["difference"]["mean"]) == ("better", -acc["difference"]["mean"])
    table = compared("before", "after", form="")
    assert "worse" in table


def test_gates_are_about_what_the_difference_may_be(compared: Callable[..., Any], bench: Bench) -> None:
    report(bench.store, "same", BEFORE, model="same")
    compared("before", "after", "--gate", "boolq.acc=0.2", code=4)
    compared("before", "after", "--gate", "boolq.acc=0.3")
    compared("before", "after", "--no-regressions", code=4)
    compared("before", "same", "--no-regressions")
    # 60 rows on which nothing changed do not show that less than a point is lost
    compared("before", "same", "--gate", "boolq.acc=0.01", code=4)
    assert compared("before", "same", "--gate", "boolq.acc=0.07")["failed"] == []
    for gate in ("boolq.f1=0.1", "boolq.acc=-1", "boolq.acc", "boolq.acc=nan"):
        compared("before", "after", "--gate", gate, code=2, form="")


def test_rows_that_are_not_the_same(compared: Callable[..., Any], bench: Bench) -> None:
    report(bench.store, "other", BEFORE, model="other", asked=[f"asked {place + 30}" for place in range(60)])
    report(bench.store, "shots", BEFORE, model="shots", asked=[f"after examples {place}" for place in range(60)])
    report(bench.store, "short", BEFORE[:50], model="short")
    for name, said in (("other", "30 of them the same"), ("shots", "rows.jsonl:1"), ("short", "50 of them the same")):
        assert said in compared("before", name, code=2, form="")
    compared("before", "shots", "--common", code=2, form="")
    assert compared("before", "other", "--common")["figures"][0]["rows"] == 30
    assert compared("before", "short", "--common")["figures"][0]["rows"] == 50


def test_reports_and_models_by_name(compared: Callable[..., Any], bench: Bench) -> None:
    assert compared("before", "before")["models"] == ["before:base", "before:base"]
    assert compared("before:base", "after:tuned")["models"] == ["base", "tuned"]
    compared("before:tuned", "after", code=2, form="")
    compared("before", code=2, form="")
    compared("nothing", "after", code=2, form="")
    record, _ = bench.drive()
    compared(record.run, f"{record.run}/chat", code=2, form="")  # neither holds rows


class Page(HTMLParser):
    """The tags of a page, and what they refer to."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str | None] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value for name, value in attrs if name in ("src", "href")]


def test_the_page_holds_the_rows_and_nothing_from_outside(compared: Callable[..., Any], tmp_path: Path) -> None:
    compared("before", "after", "-o", str(tmp_path / "page.html"))
    text = (tmp_path / "page.html").read_text()
    page = Page(text)
    assert page.links == []
    assert "script" not in page.tags
    assert page.tags.count("details") == 4  # lost and gained of two figures
    assert "tuned 0" in text
