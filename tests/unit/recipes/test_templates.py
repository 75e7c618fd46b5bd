"""How stages put plain text to their models, as far as the recipe tells."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from recipes.loading.load import check_file, load_recipe
from recipes.rules.templates import stage_template
from recipes.stages.finetune import Finetune

Write = Callable[..., Path]


def problems(path: Path, *overrides: str) -> dict[str, str]:
    return {problem.field: problem.code for problem in check_file(path, overrides)[1]}


def without_template(path: Path) -> None:
    """Give the chain a tokenizer from a folder, which has no chat template."""
    from tokenizers import Tokenizer, models

    folder = path.parent / "plain"
    folder.mkdir()
    vocabulary = {token: number for number, token in enumerate(["<|pad|>", "<|end|>", "a", "b"])}
    Tokenizer(models.WordLevel(vocabulary, unk_token="a")).save(str(folder / "tokenizer.json"))
    config = {"eos_token": "<|end|>", "pad_token": "<|pad|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


EVERY_NONE = [f"stages.{name}.template=none" for name in ("chat", "judge", "policy", "eval")]
PLAIN = "stages.base.tokenizer={from: ./plain}"


def test_the_default_is_the_models_template(write_recipe: Write) -> None:
    path = write_recipe()
    without_template(path)
    for overrides, expected in ((), "chat"), ((PLAIN,), "none"), (EVERY_NONE, "none"):
        loaded, _ = check_file(path, overrides)
        assert loaded is not None
        assert stage_template(loaded, loaded.recipe.stages["chat"]) == expected


def test_a_model_without_a_template_cannot_be_asked_by_it(write_recipe: Write) -> None:
    path = write_recipe()
    without_template(path)
    found = problems(path, PLAIN, "stages.chat.template=chat")
    assert found["stages.chat.template"] == "missing-chat-template"


def test_a_chain_puts_its_text_in_one_way(write_recipe: Write) -> None:
    path = write_recipe()
    found = problems(path, "stages.chat.template=none")
    assert found["stages.judge.template"] == "template-mismatch"
    assert "stages.eval.template" not in found  # its models do not agree: no template would do
    assert problems(path, *EVERY_NONE) == {}
    assert problems(path) == {}


@pytest.mark.parametrize("value", ["plain", "true", "Chat"])
def test_other_templates_are_refused(write_recipe: Write, value: str) -> None:
    assert "stages.chat.template" in problems(write_recipe(), f"stages.chat.template={value}")


def test_the_default_is_no_meaning_of_its_own(write_recipe: Write) -> None:
    from recipes.planning.fingerprint import meaning_of

    stage: Any = load_recipe(write_recipe()).recipe.stages["chat"]
    assert isinstance(stage, Finetune)
    assert "template" not in meaning_of(stage)
    assert meaning_of(stage.model_copy(update={"template": "none"}))["template"] == "none"
