"""What `check` says of rewards: columns that rows lack, functions that are not there, a critic without its start."""

import json
from pathlib import Path

import pytest

from launch.inputs.data_check import load_checked
from recipes.errors import RecipeError

RECIPE = """\
name: rules
stages:
  policy:
    kind: rl
    actor: store://chat
    prompts: {source: jsonl, files: [rows.jsonl]}
    rewards:
      right: {rule: number}
    algorithm: {name: ppo, iterations: 2, optimizer: {lr: 1e-3}}
"""


def problems(folder: Path, *changes: tuple[str, str]) -> set[tuple[str, str, int | None]]:
    text = RECIPE
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    rows = [{"prompt": f"What is {n}?", "answer": n} for n in range(3)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "scoring.py").write_text("raise SystemExit('run')\n\ndef score(texts, rows): ...\n")
    (folder / "recipe.yaml").write_text(text)
    try:
        load_checked(folder / "recipe.yaml")
    except RecipeError as error:
        return {(str(found.code), found.field, found.line) for found in error.problems}
    return set()


@pytest.mark.parametrize(
    "term",
    [
        "rule: number",
        "rule: regex, pattern: a",
        "python: 'scoring:score', columns: [answer]",
        "url: 'http://localhost:1/', columns: [answer]",
    ],
)
def test_terms_that_are_right(tmp_path: Path, term: str) -> None:
    assert problems(tmp_path, ("rule: number", term)) == set()


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ("rule: number", "rule: number, column: anwser", ("missing-column", "stages.policy.prompts.files.0", 6)),
        ("rule: number", "python: 'scoring:f'", ("missing-reward-function", "stages.policy.rewards.right", 8)),
        ("rule: number", "python: 'no_such:f'", ("missing-reward-function", "stages.policy.rewards.right", 8)),
        ("rule: number", "entry_point: no_such", ("missing-reward-function", "stages.policy.rewards.right", 8)),
        (
            "iterations: 2",
            "iterations: 2, critic: {start: reward}",
            ("unmet-requirement", "stages.policy.algorithm.critic.start", 9),
        ),
    ],
)
def test_terms_that_are_wrong(tmp_path: Path, old: str, new: str, problem: tuple[str, str, int]) -> None:
    assert problems(tmp_path, (old, new)) == {problem}
