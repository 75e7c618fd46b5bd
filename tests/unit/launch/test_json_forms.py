"""Every `--json` form has the keys that docs/command-line.md lists, and every command with one is listed there."""

import contextlib
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer.main
from PIL import Image
from safetensors.numpy import save_file
from tokenizers import Tokenizer, models

from launch.cli import main as cli
from recipes.models.model_kinds import MODEL_KINDS
from tests.unit.launch.bench import Bench

DOCS = Path(__file__).parents[3] / "docs" / "command-line.md"
MAPS = ("files", "parents", "inputs", "settled_by", "forms", "unread", "filtered", "report", "lost")
"""Keys whose value maps names of the user's to something."""


def documented() -> dict[str, set[str]]:
    """Keys of each row of the table, by its first cell; those of `store ls` where it is referred to."""
    table = DOCS.read_text().split("| command | prints | keys |")[1].split("\n\n")[0]
    rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in table.splitlines()[2:]]
    keys = {first.replace("`", "").strip(): set(re.findall(r"`(\w+)`", cell)) for first, _, cell in rows}
    for first, _, cell in rows:
        if "as `store ls`" in cell:
            keys[first.replace("`", "").strip()] |= keys["store ls"]
    return keys


def keys_of(value: Any) -> set[str]:
    """Every key in a JSON value, at any depth; of a map only what its values hold."""
    if isinstance(value, list):
        return {key for item in value for key in keys_of(item)}
    if not isinstance(value, dict):
        return set()
    found = set(value)
    for key, item in value.items():
        found |= keys_of(list(item.values()) if key in MAPS and isinstance(item, dict) else item)
    return found


def commands(group: Any) -> Iterator[str]:
    """Names of the commands that take --json."""
    for name, command in group.commands.items():
        yield from (f"{name} {inner}" for inner in commands(command)) if hasattr(command, "commands") else ()
        if any("--json" in option.opts for option in command.params):
            yield name


def test_every_command_is_listed() -> None:
    rows = {re.sub(r" (by|--).*", "", row) for row in documented()}
    assert rows == set(commands(typer.main.get_command(cli.app)))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A folder that holds enough of a language model to be imported."""
    folder = tmp_path / "model"
    folder.mkdir()
    Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1, "a": 2}, unk_token="<pad>")).save(
        str(folder / "tokenizer.json")
    )
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<eos>", "pad_token": "<pad>"}))
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    (folder / "config.json").write_text(json.dumps(config))
    save_file({"weight": np.zeros(2, np.float32)}, folder / "model.safetensors")
    return folder


@pytest.fixture
def forms(call: Any, bench: Bench, recipe: Path, model: Path, tmp_path: Path) -> Callable[..., Any]:
    """Call a command on a store with a run; returns what it prints with --json."""
    record, _ = bench.drive()

    def form(*arguments: str, code: int = 0) -> Any:
        words = [word.format(run=record.run, recipe=recipe, model=model, folder=tmp_path) for word in arguments]
        ended, out, err = call(*words, "--json", *([] if "--store" in words else ["--store", bench.store.uri]))
        assert ended == code, err
        return json.loads(out)

    return form


def test_recipes_and_runs(forms: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    import launch.jobs.submit

    known = documented()
    monkeypatch.setattr(launch.jobs.submit, "submit", lambda *arguments, **settings: "toy-1")
    assert keys_of(forms("check", "{recipe}", "--set", "seed=x", code=2)) == known["check"]
    assert keys_of(forms("data", "{recipe}")) == known["data"]
    assert keys_of(forms("plan", "{recipe}", "--set", "cluster.workers=1")) == known["plan"]
    assert keys_of(forms("status")) == known["status"]
    assert keys_of(forms("submit", "{recipe}", "--address", "http://head:8265")) == known["submit"]
    assert keys_of(forms("logs", "{run}")) == known["logs"]
    assert keys_of(forms("report", "{run}")) == known["report"]
    assert keys_of(forms("doctor")) == known["doctor"]


def test_stores(forms: Callable[..., Any], bench: Bench) -> None:
    known = documented()
    assert keys_of(forms("store", "import", "{model}", "--store", "{folder}/other")) == known["store import"]
    assert keys_of(forms("store", "ls")) == known["store ls"]
    shown = forms("store", "show", "{run}/chat")
    assert (shown["type"], shown["imports"]) == ("artifact", [])
    assert keys_of(forms("store", "lineage", "{run}/chat")) == known["store lineage"]
    assert keys_of(forms("store", "export", "{run}/chat", "{folder}/b", "--bundle")) == known["store export"]
    assert keys_of(forms("store", "pin", "{run}/chat")) == known["store pin"]
    assert keys_of(forms("store", "unpin", "{run}/chat")) == known["store unpin"]
    assert keys_of(forms("store", "gc", "--dry-run")) == known["store gc"]
    entry = bench.store.list_artifacts()[0].files["model/weights.bin"]
    path = bench.store.objects.local_path(entry.sha256)
    path.chmod(0o644)
    path.write_bytes(b"x" * entry.bytes)
    assert keys_of(forms("store", "verify", code=5)) == known["store verify"]


class Parrot:
    """Says what it was asked."""

    facts = MODEL_KINDS["language_model"]

    def __init__(self, folder: Path) -> None:
        assert (folder / "config.json").is_file()

    def write(self, prompt: str, **settings: Any) -> str:
        return prompt


def test_models(forms: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import launch.sampling.images
    import launch.sampling.text
    from recipes.models.images.classifier import Classifier
    from recipes.models.images.vae import Vae
    from trainers.models.images.classifier import ClassifierFamily
    from trainers.models.images.protocol import ImageFacts
    from trainers.models.images.vae import VaeFamily

    known = documented()
    monkeypatch.setattr(launch.sampling.text, "Sampler", Parrot)
    assert keys_of(forms("sample", "{model}", "--prompt", "a")) == known["sample"]
    facts = ImageFacts(1, 8, 8, ("no", "yes"))
    families = {
        "vae": VaeFamily(Vae(family="vae", width=4, latent=2), facts),
        "judge": ClassifierFamily(Classifier(family="classifier", width=4), facts),
    }

    @contextlib.contextmanager
    def opened(text: str, store: str | None = None) -> Iterator[Any]:
        yield families[text]

    monkeypatch.setattr(launch.sampling.images, "image_model", opened)
    Image.new("L", (8, 8)).save(tmp_path / "a.png")
    drawn = forms("sample", "vae", "--grid", "{folder}/grid.png", "--num-samples", "4")
    assert keys_of(drawn) == known["sample --grid"]
    assert drawn == launch.draw("vae", tmp_path / "grid.png", num_samples=4)
    for name, row in (("vae", "score by a VAE"), ("judge", "score by a classifier")):
        ranked = forms("score", name, "{folder}/a.png")
        assert keys_of(ranked) == known[row]
        assert ranked == launch.score(name, tmp_path / "a.png")
