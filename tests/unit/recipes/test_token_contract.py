"""Tokenizer, template and configuration of a model: `check`, the stage that loads it and the commit have one rule."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from launch.checks.preflight import check
from recipes.errors import RequestError
from recipes.loading.load import check_file
from recipes.models.folders import read_folder
from recipes.tokenizers.chat_template import end_of_turn
from recipes.tokenizers.token_contract import DEFAULT_ROWS
from tests.chat_models import CHATML, DOCUMENT_END, END, chat_tokenizer, write_chat_model
from trainers.data.tokenizer import load_tokenization

Edit = Callable[[Path], None]
ENTRIES = len(chat_tokenizer())
SPECIAL = ["<|pad|>", "<|im_start|>", END, DOCUMENT_END, "<end_of_turn>", "</s>", "<|end|>", "<|eot_id|>", "<|"]


def _edit(file: str, **changes: Any) -> Edit:
    def change(folder: Path) -> None:
        path = folder / file
        found = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps({key: value for key, value in {**found, **changes}.items() if value != "gone"}))

    return change


def _add_tokens(folder: Path) -> None:
    tokenizer = chat_tokenizer()
    tokenizer.add_tokens(["<new1>", "<new2>"])
    tokenizer.save_pretrained(folder)


def _template(text: str) -> Edit:
    return lambda folder: (folder / "chat_template.jinja").write_text(text) and None


WRONG: list[tuple[Edit, str, str]] = [
    # the code, and the value that is named
    (_add_tokens, "token-id-mismatch", "<new2>"),
    (
        _edit("tokenizer_config.json", additional_special_tokens=["<tool>", END]),
        "token-id-mismatch",
        "<tool>",
    ),
    (_edit("config.json", vocab_size=100), "token-id-mismatch", "100 rows"),
    (_edit("config.json", eos_token_id=4000), "token-id-mismatch", "config.json: eos_token_id is 4000"),
    (_edit("config.json", bos_token_id=4000), "token-id-mismatch", "config.json: bos_token_id is 4000"),
    (_edit("config.json", pad_token_id=4000), "token-id-mismatch", "config.json: pad_token_id is 4000"),
    (_edit("config.json", eos_token_id=[2, -5]), "token-id-mismatch", "config.json: eos_token_id is -5"),
    (_edit("config.json", eos_token_id="<|im_end|>"), "token-id-mismatch", "config.json: eos_token_id is '<|im_end|>'"),
    (
        _edit("generation_config.json", eos_token_id=[2, 4000]),
        "token-id-mismatch",
        "generation_config.json: eos_token_id is 4000",
    ),
    (
        _edit("config.json", vocab_size=ENTRIES + 20, eos_token_id=[2, ENTRIES + 3]),
        "token-id-mismatch",
        f"config.json: eos_token_id is {ENTRIES + 3}",
    ),
    (_edit("config.json", eos_token_id=70), "token-id-mismatch", "the ordinary token"),
    (_edit("tokenizer_config.json", eos_token="<|no|>"), "unknown-token", "eos_token: token '<|no|>'"),
    (_edit("tokenizer_config.json", pad_token="<|no|>"), "unknown-token", "pad_token: token '<|no|>'"),
    (_edit("tokenizer_config.json", bos_token="<|no|>"), "unknown-token", "bos_token: token '<|no|>'"),
    (_template("{% for m in messages %}{{ m.content }"), "invalid-chat-template", "line 1"),
    (_template("{{ messages | nosuchfilter }}"), "invalid-chat-template", "nosuchfilter"),
]

RIGHT: dict[str, Edit] = {
    "rows without a token": _edit("config.json", vocab_size=ENTRIES + 100),
    "a list of end tokens": _edit("config.json", eos_token_id=[2, 3]),
    "an end token in generation_config.json alone": _edit("generation_config.json", eos_token_id=[2, 3]),
    "another special end token than the tokenizer's": _edit("config.json", eos_token_id=3),
    "no end token in config.json": _edit("config.json", eos_token_id=None),
    "no pad token": _edit("config.json", pad_token_id=-1),
    "rows that are transformers' default": _edit("config.json", vocab_size="gone"),
    "no template": lambda folder: (folder / "chat_template.jinja").unlink(),
    "generation blocks and loop controls": _template(
        "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% continue %}{% endfor %}"
    ),
}


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_chat_model(tmp_path_factory.mktemp("models") / "sound", chat_tokenizer())


def _copied(sound: Path, folder: Path, edit: Edit) -> Path:
    folder.mkdir()
    for path in sound.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    generation = folder / "generation_config.json"
    generation.unlink(missing_ok=True)
    edit(folder)
    return folder


@pytest.mark.parametrize(("edit", "code", "named"), WRONG, ids=[named for _, _, named in WRONG])
def test_what_does_not_fit_is_said_by_check_and_by_who_loads_the_model(
    edit: Edit, code: str, named: str, sound: Path, tmp_path: Path
) -> None:
    folder = _copied(sound, tmp_path / "model", edit)
    recipe = tmp_path / "recipe.yaml"
    train = "{steps: 1, global_batch: 2, sequence_length: 64, optimizer: {lr: 1e-3}}"
    stage = f"{{kind: finetune, init_from: ./model, data: {{source: python-docs}}, train: {train}}}"
    recipe.write_text(f"name: x\nstages: {{a: {stage}}}\n")
    _, problems = check_file(recipe)
    (problem,) = problems
    assert (problem.code, problem.field) == (code, "stages.a.init_from")
    assert f"{folder}: " in problem.message
    assert named in problem.message
    with pytest.raises(RequestError) as error:
        load_tokenization(folder)
    assert problem.message == str(error.value)


@pytest.mark.parametrize("name", RIGHT)
def test_what_fits_is_taken(name: str, sound: Path, tmp_path: Path) -> None:
    folder = _copied(sound, tmp_path / "model", RIGHT[name])
    assert read_folder(folder, "model").problems == []
    load_tokenization(folder)


def test_end_tokens_are_gathered(tmp_path: Path) -> None:
    base = chat_tokenizer(eos=DOCUMENT_END)
    end, document_end = (base.convert_tokens_to_ids(token) for token in (END, DOCUMENT_END))
    folder = write_chat_model(tmp_path / "base", base, ends=[document_end])
    assert load_tokenization(folder).end_ids == (end, document_end)
    started = base.convert_tokens_to_ids("<|im_start|>")
    _edit("config.json", eos_token_id=[document_end, started])(folder)
    assert load_tokenization(folder).end_ids == (end, document_end, started)
    (folder / "chat_template.jinja").unlink()
    assert load_tokenization(folder).end_ids == (document_end, started)


TEMPLATES = {
    "ChatML": (CHATML, END),
    "Llama 3": (
        "{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content | trim }}<|eot_id|>"
        "{% endfor %}",
        "<|eot_id|>",
    ),
    "Mistral": (
        "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
        "{% else %} {{ m.content }} {{ eos_token }}{% endif %}{% endfor %}",
        "</s>",
    ),
    "Gemma": (
        "{% for m in messages %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
        "{{ m.content }}<end_of_turn>\n{% endfor %}",
        "<end_of_turn>",
    ),
    "Phi 3, which ends the document too": (
        "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
        "{% if not add_generation_prompt %}{{ eos_token }}{% endif %}",
        "<|end|>",
    ),
    "LLaVA, whose messages have parts": (
        "{% for m in messages %}{{ m.role }}: {% for p in m.content | selectattr('type', 'equalto', 'text') %}"
        "{{ p.text }}{% endfor %}{{ eos_token }}{% endfor %}",
        "</s>",
    ),
    "no end token": ("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}", None),
    "the longest of several that fit": ("{% for m in messages %}{{ m.content }}<|end|>{% endfor %}", "<|end|>"),
    "a template that refuses everything": ("{{ raise_exception('no') }}", None),
    "a template that never ends": (
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        None,
    ),
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_end_of_a_turn_is_what_follows_an_answer(name: str) -> None:
    template, expected = TEMPLATES[name]
    assert end_of_turn(template, {"eos_token": "</s>"}, SPECIAL) == expected


def test_default_rows_are_transformers() -> None:
    from transformers import CONFIG_MAPPING

    assert {kind: CONFIG_MAPPING[kind]().vocab_size for kind in DEFAULT_ROWS} == DEFAULT_ROWS


WARNINGS: dict[str, tuple[Edit, list[str]]] = {
    "all agree": (lambda folder: None, []),
    "generation_config.json names the end of turn": (_edit("generation_config.json", eos_token_id=[2, 3]), []),
    "nothing names the end of turn": (
        _template("{% for m in messages %}{{ m.content }}<|endoftext|>{% endfor %}"),
        ["end-tokens-disagree"],
    ),
    "the tokenizer has another end token": (
        _edit("config.json", eos_token_id=3),
        ["end-tokens-disagree"],
    ),
    "no end of turn": (
        _template("{% for m in messages %}{{ m.role }}: {{ m.content }}{% endfor %}"),
        ["no-end-of-turn"],
    ),
}


@pytest.mark.parametrize("name", WARNINGS)
def test_check_tells_of_end_tokens_that_differ(name: str, sound: Path, tmp_path: Path) -> None:
    edit, codes = WARNINGS[name]
    _copied(sound, tmp_path / "model", edit)
    recipe = tmp_path / "recipe.yaml"
    train = "{steps: 1, global_batch: 2, sequence_length: 64, optimizer: {lr: 1e-3}}"
    stage = f"{{kind: finetune, init_from: %s, data: {{source: python-docs}}, train: {train}}}"
    recipe.write_text(f"name: x\nstages:\n  a: {stage % './model'}\n  b: {stage % 'a'}\n")
    result = check(recipe)
    assert (result.exit_code, result.problems) == (0, [])
    told = [warning for warning in result.warnings if ".init_from: " in warning]
    for warning, code in zip(told, codes, strict=True):
        assert warning.startswith(f"{recipe}:3: stages.a.init_from: ")
        assert warning.endswith(f" [{code}]")


@pytest.mark.parametrize(
    ("edit", "code"),
    [
        (_template("{% for m in messages %}{{ m.content }"), "invalid-chat-template"),
        (_edit("tokenizer_config.json", bos_token="<|no|>"), "unknown-token"),
    ],
)
def test_a_tokenizer_that_a_new_model_takes_is_checked_too(
    edit: Edit, code: str, sound: Path, tmp_path: Path, write_recipe: Callable[..., Path]
) -> None:
    _copied(sound, tmp_path / "model", edit)
    train = "tokenizer:\n      train: bpe\n      vocab_size: 512\n"
    for given in ("from: ./model", "from: ./model, eos_token: <|endoftext|>"):
        _, problems = check_file(write_recipe((train, f"tokenizer: {{{given}}}\n")))
        assert [problem.code for problem in problems if problem.field == "stages.base.tokenizer"] == [code]
    _copied(sound, tmp_path / "fits", lambda folder: None)
    assert check_file(write_recipe((train, "tokenizer: {from: ./fits}\n")))[1] == []
