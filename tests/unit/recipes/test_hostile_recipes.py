# ruff: noqa: E501 - one line a case
"""Recipes that mean harm: code, other files, devices, sizes. Refused by file and field, and nothing executed."""

import gzip
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from launch.inputs.data_check import load_checked
from recipes.errors import RecipeError

WriteRecipe = Callable[..., Path]
TOUCH = "__import__('os').system('touch canary')"
SEED = "seed: 3"
ROWS = "rows/chat.jsonl"


class Payload:
    """Leaves a file where it is unpickled."""

    def __reduce__(self) -> Any:
        return os.system, ("touch canary",)


def template(text: str) -> tuple[str, str]:
    """A chat template for the base's tokenizer."""
    return "vocab_size: 512", f"vocab_size: 512\n      chat_template: {text!r}"


TEXTS: dict[str, tuple[str, str, str]] = {
    # tags that YAML loaders execute
    "apply": (SEED, "seed: !!python/object/apply:os.system ['touch canary']", "unsupported-yaml"),
    "new": (SEED, "seed: !!python/object/new:os.system ['touch canary']", "unsupported-yaml"),
    "module": (SEED, "seed: !!python/module:code", "unsupported-yaml"),
    "name": (SEED, "seed: !!python/name:os.system", "unsupported-yaml"),
    "own tag": (SEED, "seed: !env HOME", "unsupported-yaml"),
    "a tag in a list": ("[chat, policy]", "[chat, !!python/object/apply:os.system ['touch canary']]", "unsupported-yaml"),
    "binary": (SEED, "seed: !!binary gASVIQAAAAAAAACMBXBvc2l4lIwGc3lzdGVtlJOUjAV0b3VjaJSFlFKULg==", "unsupported-yaml"),
    # more than it seems
    "aliases": (SEED, "seed: &a 3\nname2: *a", "unsupported-yaml"),
    "merge": ("kl_coef: 0.05", "<<: {kl_coef: 0.05}", "unsupported-yaml"),
    "second document": (SEED, "seed: 3\n---\nname: other", "invalid-yaml"),
    "a key twice": ("    kind: reward", "    kind: reward\n    kind: pretrain", "duplicate-key"),
    "a control character": (SEED, "seed: 3 # \x1b[2J", "control-character"),
    "a key that is a list": (SEED, "? [seed]\n: 3", "invalid-yaml"),
    "a deep value": (SEED, "seed: " + "[" * 2000 + "]" * 2000, "recipe-too-large"),
    "many values": (SEED, "seed: [" + "1," * 100_000 + "]", "recipe-too-large"),
    "a long key": (SEED, f"seed: 3\n{'s' * 100_000}: 4", "invalid-yaml"),
    "a key that is not short": (SEED, f"seed: 3\n{'s' * 1000}: 4", "unknown-key"),
    "a long word": ("kind: reward", f"kind: {'reward' * 20_000}", "stages.judge.kind"),
    "a long number": (SEED, f"seed: {'9' * 100_000}", "seed"),
    "a huge number": ("tokens: 100_000", "tokens: 1e999", "tokens"),
    "infinity": ("kl_coef: 0.05", "kl_coef: .inf", "unsupported-number"),
    # code where text is expected
    "code as a number": (SEED, f"seed: {TOUCH}", "wrong-type"),
    "shell as a name": ("name: chain", "name: $(touch canary)", "name"),
    "a name that climbs": ("name: chain", "name: ../../chain", "name"),
    "a name with a line": ("name: chain", 'name: "a\\nb"', "name"),
    "a stage that climbs": ("  judge:", "  ../judge:", "judge"),
    "a variable": ("init_from: base", "init_from: ${oc.env:HOME}", "invalid-reference"),
    "shell as a stage": ("init_from: base", "init_from: '`touch canary`'", "invalid-reference"),
    "a store that climbs": ("init_from: base", "init_from: store://../../x", "invalid-reference"),
    "code of a hub": ("init_from: base", "init_from: hf://org/name", "invalid-reference"),
    "a file address": ("init_from: base", "init_from: file:///etc/passwd", "invalid-reference"),
    "a data script": ("{source: jsonl, files: [rows/chat.jsonl], hold_out: 0.1}", "{source: datasets, path: ./code.py, hold_out: 0.1}", "path"),
    "trust in code": ("{source: jsonl, ", "{source: jsonl, trust_remote_code: true, ", "unknown-key"),
    "an import path": ("source: python-docs, part", "source: code.Source, part", "source"),
    "an architecture's class": ("type: llama", "type: code.Model", "type"),
    # templates
    "template: globals": (*template("{{ cycler.__init__.__globals__.os.system('touch canary') }}"), "invalid-chat-template"),
    "template: subclasses": (*template("{{ ''.__class__.__mro__[1].__subclasses__() }}"), "invalid-chat-template"),
    "template: format": (*template("{{ '{0.__class__.__init__.__globals__}'.format(messages) }}"), "invalid-chat-template"),
    "template: import": (*template("{% import '/etc/passwd' as x %}"), "invalid-chat-template"),
    "template: include": (*template("{% include '/etc/passwd' %}"), "invalid-chat-template"),
    "template: changes": (*template("{% set _ = messages.append(1) %}"), "invalid-chat-template"),
    "template: huge range": (*template("{% for i in range(10000000000) %}x{% endfor %}"), "invalid-chat-template"),
    "template: without end": (*template("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}"), "invalid-chat-template"),
    "template: huge number": (*template("{{ 9 ** 9 ** 9 }}"), "invalid-chat-template"),
    "template: huge text": (*template("{{ 'x' * 10 ** 12 }}"), "invalid-chat-template"),
    "template: loops": (*template("{% for i in range(99999) %}{% for j in range(99999) %}x{% endfor %}{% endfor %}"), "invalid-chat-template"),
}  # fmt: skip


@pytest.mark.parametrize("case", TEXTS)
def test_a_recipe_that_means_harm_is_refused(write_recipe: WriteRecipe, refused: Any, case: str) -> None:
    old, new, says = TEXTS[case]
    path = write_recipe((old, new))
    (path.parent / "code.py").write_text("open('canary', 'w').close()\n")
    with refused(RecipeError, None, path) as refusal:
        load_checked(path)
    assert says in str(refusal.value)
    assert len(str(refusal.value)) < 3000


def zipped(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("../../canary", "x")


def bomb(path: Path) -> None:
    path.write_bytes(gzip.compress(bytes(40 << 20), 9))


FILES: dict[str, tuple[str, Callable[[Path], Any], str]] = {
    "a pickle as rows": ("chat.jsonl", lambda p: p.write_bytes(pickle.dumps(Payload())), "not-utf8"),
    "a pickle as Parquet": ("chat.parquet", lambda p: p.write_bytes(pickle.dumps(Payload())), "invalid-data-format"),
    "an archive as rows": ("chat.jsonl", zipped, "not-utf8"),
    "a deep row": ("chat.jsonl", lambda p: p.write_text("[" * 200_000 + "\n"), "invalid-data-format"),
    "a row without end": ("chat.jsonl", lambda p: p.write_bytes(b'{"prompt": "' + b"x" * (20 << 20)), "chat.jsonl"),
    "a bomb": ("chat.jsonl.gz", bomb, "chat.jsonl.gz"),
    "a device": ("chat.jsonl", lambda p: p.symlink_to("/dev/zero"), "chat.jsonl"),
    "a pipe": ("chat.jsonl", os.mkfifo, "chat.jsonl"),
    "a circle": ("chat.jsonl", lambda p: p.symlink_to(p), "chat.jsonl"),
    "a folder": ("chat.jsonl", os.mkdir, "chat.jsonl"),
    "a link to nothing": ("chat.jsonl", lambda p: p.symlink_to("/nonexistent"), "chat.jsonl"),
}  # fmt: skip


@pytest.mark.parametrize("case", FILES)
def test_a_data_file_that_means_harm_is_refused(write_recipe: WriteRecipe, refused: Any, case: str) -> None:
    name, make, says = FILES[case]
    kind = "parquet" if name.endswith("parquet") else "jsonl"
    path = write_recipe(("{source: jsonl, files: [rows/chat.jsonl]", f"{{source: {kind}, files: [rows/{name}]"))
    (path.parent / "rows" / "chat.jsonl").unlink()
    make(path.parent / "rows" / name)
    with refused(RecipeError, None, path) as refusal:
        load_checked(path)
    assert says in str(refusal.value)


def devour(path: Path) -> None:
    path.unlink()
    path.symlink_to("/dev/zero")


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def circle(path: Path) -> None:
    path.unlink()
    path.symlink_to(path)


RECIPES: dict[str, Callable[[Path], Any]] = {
    "a pickle": lambda p: p.write_bytes(pickle.dumps(Payload())),
    "an archive": zipped,
    "a device": devour,
    "a pipe": pipe,
    "a circle": circle,
    "a folder": folder,
    "too large": lambda p: p.write_bytes(b"# x\n" * (1 << 20)),
    "nothing": lambda p: p.write_bytes(b""),
    "bytes": lambda p: p.write_bytes(bytes(range(256))),
    "extends itself": lambda p: p.write_text("extends: recipe.yaml\n"),
    "extends a device": lambda p: p.write_text("extends: /dev/zero\n"),
    "extends a password": lambda p: p.write_text("extends: /etc/passwd\n"),
}


@pytest.mark.parametrize("case", RECIPES)
def test_a_file_that_is_no_recipe_is_refused(write_recipe: WriteRecipe, refused: Any, case: str) -> None:
    path = write_recipe()
    RECIPES[case](path)
    with refused(RecipeError, None, path):
        load_checked(path)
