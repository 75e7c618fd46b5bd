"""What the Markdown pages name is there: files, links, commands with their options; and every file is named."""

import functools
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer.main

from launch.cli.main import app

ROOT = Path(__file__).parents[3]
PACKAGES = ("recipes", "cluster", "trainers", "rlhf", "launch", "benchmarks")
PAGES = sorted(
    page
    for pattern in ("*.md", "docs/*.md", "tests/*.md", *(f"{package}/**/*.md" for package in PACKAGES))
    for page in ROOT.glob(pattern)
)
PATH = re.compile(r"[\w*-]+(?:/[\w.*-]+)*\.(?:py|ya?ml|md|css|png|toml|txt)")
COMMAND = re.compile(r"`((?:trainwright )[^`]+)`|^((?:trainwright )[^#\n]+)", re.MULTILINE)
MADE_UP = {
    "accelerate.yaml",
    "axolotl.yaml",
    "axolotl_more.yaml",
    "llama_factory.yaml",
    "recipes/my.yaml",
    "trl.yaml",
    "my.yaml",
    "a.txt",
    "b.txt",
    "trainers/data/sources/yaml_files.py",
    "trainers/evaluation/suites/next_token.py",
    "recipes/stages/distill.py",
    "trainers/tasks/distillation.py",
    "recipes/models/images/flow.py",
    "trainers/models/images/flow.py",
    "recipes/image/flow.yaml",
    "rlhf/algorithms/soft_gate.py",
}
"""Names of a reader's own files; tests/e2e/test_extending.py writes the modules."""


def _name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def _readme_of(module: Path) -> Path:
    """The nearest README above a module."""
    return next(folder / "README.md" for folder in module.parents if (folder / "README.md").is_file())


MODULES = sorted(
    module
    for package in PACKAGES
    for module in (ROOT / package).rglob("*.py")
    if module.name != "__init__.py" and "files" not in module.parts
)


def test_every_module_is_named_in_the_readme_above_it() -> None:
    readmes = {module: _readme_of(module) for module in MODULES}
    missing = [_name(module) for module in MODULES if f"`{module.name}`" not in readmes[module].read_text("utf-8")]
    assert MODULES
    assert not missing


@functools.cache
def _file_names() -> frozenset[str]:
    """The names of all files in the project's folders, without hidden ones: a virtual environment has many."""
    folders = [folder for folder in ROOT.iterdir() if folder.is_dir() and not folder.name.startswith(".")]
    return frozenset(path.name for folder in folders for path in folder.rglob("*"))


def _is_there(name: str, page: Path) -> bool:
    if "/" not in name and "*" not in name and name in _file_names():
        return True
    places = (ROOT, page.parent, *(ROOT / package for package in PACKAGES), ROOT / "recipes" / "image", ROOT / "docs")
    return any(next(place.glob(name), None) is not None for place in places)


@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_files_and_links_that_a_page_names_are_there(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    named = [name for name in re.findall(r"`([^`\n]+)`", text) if PATH.fullmatch(name)]
    links = [link.split("#")[0] for link in re.findall(r"\]\(([^)]+)\)", text) if "://" not in link]
    missing = [name for name in named if name not in MADE_UP and not _is_there(name, page)]
    missing += [link for link in links if link and not (page.parent / link).exists()]
    assert not missing


def _commands(page: Path) -> Iterator[list[str]]:
    """Commands of a page, as words; what a table has to escape is put back, and lines that go on are joined."""
    for match in COMMAND.finditer(page.read_text(encoding="utf-8").replace("\\\n", " ")):
        yield shlex.split((match.group(1) or match.group(2)).replace(r"\|", "|"))


@pytest.fixture(scope="module")
def trainwright() -> Any:
    """The command with all that are below it; to put it together takes a tenth of a second."""
    return typer.main.get_command(app)


@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_commands_that_a_page_shows_have_these_options(page: Path, trainwright: Any) -> None:
    for words in _commands(page):
        command, rest = trainwright, words[1:]
        while rest and hasattr(command, "commands") and rest[0] not in ("...", "--help"):
            assert rest[0] in command.commands, shlex.join(words)
            command, rest = command.commands[rest[0]], rest[1:]
        known = {name for parameter in command.params for name in parameter.opts} | {"--help"}
        unknown = [word for word in rest if word.startswith("--") and word.split("=")[0] not in known]
        assert not unknown, shlex.join(words)
