"""The pages by task: each of their commands that takes no workers runs here, and prints what the page shows."""

import json
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.integration.rlhf.workshop import open_workshop

DOCS = Path(__file__).parents[3] / "docs"
PAGES = (
    "your-model.md",
    "your-data.md",
    "your-gpus.md",
    "your-cluster.md",
    "your-reward.md",
    "your-evaluation.md",
    "how-much.md",
    "verification-failed.md",
)
NEEDS_WORKERS = ("run", "resume", "submit", "sample", "logs", "stop", "report", "compare", "doctor", "replay")
"""Not run here: they need a run, or depend on the machine; `test_documentation.py` compares their options."""
LLAMA_8B = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 4096, "intermediate_size": 14336,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 8192,
    "vocab_size": 128256,
}  # fmt: skip
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
EXIT_CODE = re.compile(r"\s+# exit code (\d+)$")


@dataclass(frozen=True)
class Shown:
    """A command of a page, and what the page says that it does."""

    words: list[str]
    code: int
    lines: list[str]


def commands_of(text: str) -> Iterator[Shown]:
    """The commands of a page's blocks without a language, each with the output below it."""
    for language, block in BLOCK.findall(text):
        if language:
            continue
        before, *parts = re.split(r"^(?=trainwright )", block.replace("\\\n", " "), flags=re.MULTILINE)
        assert not before.strip(), f"output without a command: {before}"
        for part in parts:
            command, *lines = part.splitlines()
            ended = EXIT_CODE.search(command)
            words = shlex.split(EXIT_CODE.sub("", command), comments=True)[1:]
            yield Shown(words, int(ended[1]) if ended else 0, [line for line in lines if line.strip(" .")])


def files_of(text: str) -> Iterator[tuple[str, str]]:
    """Files that a page shows: blocks whose first line is a comment with a name."""
    for language, block in BLOCK.findall(text):
        name = re.match(r"# ([\w.-]+\.\w+)\n", block)
        if language and name is not None:
            yield name[1], block


def pattern_of(line: str) -> str:
    """A line of output: blanks count alike, and `...` is anything."""
    return r".*".join(r"\s+".join(re.escape(word) for word in part.split()) for part in line.split("..."))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where somebody has a model, rows and a recipe."""
    (tmp_path / "made").mkdir()
    open_workshop(tmp_path / "made", width=32)
    (tmp_path / "made" / "chat" / "model").rename(tmp_path / "my-model")
    rows = [{"question": f"What is {n} and {n}?", "answer": f"It is {2 * n}.", "id": n} for n in range(40)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    choices = {"text": ["salt", "nectar"], "label": ["A", "B"]}
    asked = {"question": "What do bees collect?", "choices": choices, "answerKey": "B"}
    (tmp_path / "choices.jsonl").write_text(json.dumps(asked) + "\n")
    (tmp_path / "llama-8b").mkdir()
    (tmp_path / "llama-8b" / "config.json").write_text(json.dumps(LLAMA_8B))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path


@pytest.mark.parametrize("page", PAGES)
def test_a_page_shows_what_its_commands_do(page: str, call: Any, folder: Path) -> None:
    text = (DOCS / page).read_text(encoding="utf-8")
    for name, content in files_of((DOCS / "your-model.md").read_text(encoding="utf-8") + text):
        (folder / name).write_text(content)
    shown = [*commands_of(text)]
    assert shown
    for command in shown:
        if set(command.words[:2]) & set(NEEDS_WORKERS):
            assert command.lines == []
            continue
        code, out, err = call(*command.words)
        said = f"{err}{out}"
        assert code == command.code, f"{shlex.join(command.words)}\n{said}"
        missing = [line for line in command.lines if re.search(pattern_of(line), said) is None]
        assert missing == [], f"{shlex.join(command.words)}\n{said}"
