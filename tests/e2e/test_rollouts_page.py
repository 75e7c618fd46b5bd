"""The rollout browser in a real Chromium: searched, sorted, filtered, and nothing of the data is run."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from launch.report.rollouts import rollouts_page
from tests.chromium import CHROMIUM, DRIVER, MISSING, Browser, browsers

pytestmark = pytest.mark.skipif(CHROMIUM is None or DRIVER is None, reason=MISSING)
EVIL = "</script><img src=x onerror=\"document.title='taken'\"><script>document.title='taken'</script>"


def sample(iteration: int, prompt: int, draw: int, right: float, text: str) -> dict[str, Any]:
    tokens = [[piece + " ", 0.5 * draw - 0.25] for piece in text.split(" ")] + [["tool"]]
    total = sum(token[1] for token in tokens[:-1])
    return {
        "iteration": iteration, "prompt": prompt, "draw": draw, "stop": "stop" if right else "length",
        "rewards": {"right": right, "short": 1 / len(text)}, "sum": total, "length": len(tokens) - 1, "tokens": tokens,
        "answer": text,
    }  # fmt: skip


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """Two iterations of two prompts, each answered twice."""
    path: Path = tmp_path_factory.mktemp("page") / "rollouts.html"
    samples = [
        sample(
            iteration, prompt, draw, float(iteration and prompt and draw), f"answer {iteration}{prompt}{draw} {EVIL}"
        )
        for iteration in (0, 7)
        for prompt in (0, 1)
        for draw in (0, 1)
    ]
    asked = [{"prompt": text, "source": f"rows.jsonl:{row}"} for row, text in enumerate(("one", "two"))]
    found = {
        "prompts": [f"first {EVIL}", "second"],
        "asked": asked,
        "iterations": [0, 7],
        "kept": 8,
        "samples": samples,
    }
    path.write_text(rollouts_page(f"run / policy {EVIL}", found, "log-ratio"), encoding="utf-8")
    with browsers(1) as (browser,):
        browser.open(path.as_uri())
        yield browser


def groups(page: Browser, **tools: str) -> list[list[str]]:
    """Set tools, the others to what they were at first; returns the groups' answers by their numbers."""
    page.run("document.getElementById('tools').reset(); document.getElementById('order').value = '1'; update()")
    for name, value in tools.items():
        page.run(f"document.getElementById('{name}').value = '{value}'; update()")
    written = "[...group.querySelectorAll('.written')].map((each) => each.textContent)"
    found = page.run(f"return [...document.querySelectorAll('.group')].map((group) => {written})")
    return [[text.split()[1] for text in group] for group in found]


def test_groups_are_searched_sorted_and_filtered(page: Browser) -> None:
    assert groups(page) == [["000", "001"], ["010", "011"], ["700", "701"], ["710", "711"]]
    assert groups(page, search="SECOND", iteration="7") == [["710", "711"]]
    assert groups(page, search="answer 701") == [["701"]]
    assert groups(page, term="right", limit="0.5") == [["711"]]
    assert groups(page, stop="ended") == [["711"]]
    assert groups(page, sort="right", of="spread", order="-1")[0] == ["710", "711"]


def test_nothing_of_the_data_is_run_and_tokens_are_shaded(page: Browser) -> None:
    groups(page)
    assert page.run("return document.title").startswith("run / policy")
    assert EVIL.split(" ")[0] in page.text(".written")
    assert page.run("return document.querySelectorAll('img').length") == 0
    first = "(member) => member.querySelector('.written span').style.background"
    shades = page.run(f"return [...document.querySelectorAll('.member')].slice(0, 2).map({first})")
    assert shades[0].startswith("rgba(217")
    assert shades[1].startswith("rgba(47")
    assert page.run("return document.querySelector('.seen').style.background") == ""


def test_a_pair_is_labelled_and_saved_as_a_feedback_stage_reads_it(page: Browser) -> None:
    assert groups(page, iteration="7") == [["700", "701"], ["710", "711"]]
    assert "tokens, stopped at the length limit" in page.text(".member")
    page.run("document.querySelectorAll('.members')[1].querySelectorAll('.chosen')[1].click()")
    assert page.run("return document.getElementById('save').hidden")
    page.run("document.querySelectorAll('.members')[1].querySelectorAll('.rejected')[0].click()")
    page.run("document.getElementById('annotator').value = 'ann'")
    assert not page.run("return document.getElementById('save').hidden")
    (line,) = page.run("return lines()").splitlines()
    assert json.loads(line) == {
        "prompt": "two", "source": "rows.jsonl:1", "annotator": "ann",
        "chosen": f"answer 711 {EVIL}", "rejected": f"answer 710 {EVIL}",
    }  # fmt: skip
    page.run("document.querySelectorAll('.members')[1].querySelectorAll('.rejected')[0].click()")
    assert page.run("return lines()") == ""
