"""Merging of recipes, command-line settings, and resolved recipes."""

from collections.abc import Callable
from pathlib import Path

import pytest

from launch.inputs.data_check import DataCheck
from recipes.errors import Problem, RecipeError
from recipes.loading.load import check_file, dump_recipe, load_recipe, parse_recipe
from recipes.stages.evaluate import Evaluate
from recipes.stages.finetune import Finetune
from recipes.stages.pretrain import Pretrain
from recipes.stages.reward import Reward
from recipes.stages.rl import RlText

Write = Callable[..., Path]


def _refused(path: Path, *overrides: str) -> list[Problem]:
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, overrides)
    return caught.value.problems


def _base(path: Path, *overrides: str) -> Pretrain:
    stage = load_recipe(path, overrides).recipe.stages["base"]
    assert isinstance(stage, Pretrain)
    return stage


def test_a_child_is_laid_over_its_parent(write_recipe: Write, tmp_path: Path) -> None:
    write_recipe(name="parent.yaml")
    child = tmp_path / "child.yaml"
    child.write_text("extends: parent.yaml\nname: child\nstages:\n  base: {train: {tokens: null, steps: 9}}\n")
    loaded = load_recipe(child)
    base = loaded.recipe.stages["base"]
    assert isinstance(base, Pretrain)
    assert (loaded.recipe.name, loaded.recipe.seed) == ("child", 3)
    assert (base.train.steps, base.train.tokens, base.train.global_batch) == (9, None, 8)
    assert list(loaded.recipe.stages) == ["base", "chat", "judge", "policy", "eval"]


def test_lists_are_replaced_whole_and_variants_do_not_mix(write_recipe: Write, tmp_path: Path) -> None:
    write_recipe(name="parent.yaml")
    child = tmp_path / "child.yaml"
    child.write_text(
        "extends: parent.yaml\nstages:\n"
        "  chat: {data: {source: python-docs}, lora: {target_modules: [k_proj]}}\n"
        "  base: {architecture: {type: gpt2, family: decoder, n_embd: 64, n_layer: 2, n_head: 2, n_positions: 128}}\n"
        "  judge: {seed: 4}\n"
    )
    loaded = load_recipe(child, ["stages.chat.lora.target_modules=[c_attn]"])
    chat = loaded.recipe.stages["chat"]
    assert isinstance(chat, Finetune)
    assert chat.lora is not None
    assert chat.lora.target_modules == ["c_attn"]
    assert chat.data.source == "python-docs"
    assert loaded.recipe.stages["judge"].seed == 4


def test_a_problem_names_the_file_that_holds_the_value(write_recipe: Write, tmp_path: Path) -> None:
    parent = write_recipe(("kl_coef: 0.05", "kl_coef: -1"), name="parent.yaml")
    child = tmp_path / "child.yaml"
    child.write_text("extends: parent.yaml\nstages:\n  base: {train: {global_batch: 0}}\n")
    problems = {problem.field: problem for problem in _refused(child)}
    assert problems["stages.policy.algorithm.kl_coef"].file == str(parent)
    assert (problems["stages.base.train.global_batch"].file, problems["stages.base.train.global_batch"].line) == (
        str(child),
        3,
    )


def test_paths_of_an_extended_recipe_start_at_the_extending_file(write_recipe: Write, tmp_path: Path) -> None:
    write_recipe(name="parent.yaml")
    folder = tmp_path / "below"
    folder.mkdir()
    child = folder / "child.yaml"
    child.write_text("extends: ../parent.yaml\nname: child\n")
    _, problems = check_file(child, check_data=DataCheck())
    assert {problem.field for problem in problems} == {"stages.chat.data.files.0", "stages.judge.data.files.0"}
    (tmp_path / "rows").rename(folder / "rows")
    assert check_file(child, check_data=DataCheck())[1] == []


@pytest.mark.parametrize(
    ("extends", "code"),
    [
        ("child.yaml", "extends-cycle"),
        ("nowhere.yaml", "recipe-not-readable"),
        ("~/x.yaml", "invalid-extends"),
        ("http://example.org/x.yaml", "invalid-extends"),
        ("[a.yaml, b.yaml]", "invalid-extends"),
        (".", "recipe-not-readable"),
    ],
)
def test_extends_that_leads_nowhere(extends: str, code: str, tmp_path: Path) -> None:
    child = tmp_path / "child.yaml"
    child.write_text(f"name: child\nextends: {extends}\n")
    (problem,) = _refused(child)
    assert (problem.code, problem.file, problem.line, problem.field) == (code, str(child), 2, "extends")


def test_settings_from_the_command_line(write_recipe: Write) -> None:
    path = write_recipe()
    assert _base(path, "stages.base.train.tokens=10_000_000").train.tokens == 10_000_000
    assert _base(path, "stages.base.train.optimizer.lr=1e-5").train.optimizer.lr == 1e-5
    evaluation = load_recipe(path, ["stages.eval.of.1=base"]).recipe.stages["eval"]
    assert isinstance(evaluation, Evaluate)
    assert evaluation.of == ["chat", "base"]
    assert _base(path, "stages.base.train.save_every=7 steps").train.save_every == 7
    policy = load_recipe(path, ["stages.policy.algorithm.save_every=7 iterations"]).recipe.stages["policy"]
    assert isinstance(policy, RlText)
    assert policy.algorithm.save_every == 7
    assert _base(path, "stages.base.train={steps: 3, global_batch: 2, sequence_length: 8, optimizer: {lr: 1}}").train
    reward = load_recipe(path, ["stages.judge.lora={r: 2}", "stages.judge.lora.alpha=4"]).recipe.stages["judge"]
    assert isinstance(reward, Reward)
    assert reward.lora is not None
    assert (reward.lora.r, reward.lora.alpha) == (2, 4)
    cleared = load_recipe(path, ["stages.chat.lora=", "stages.chat.data.hold_out=0.2"]).recipe.stages["chat"]
    assert isinstance(cleared, Finetune)
    assert cleared.lora is None


@pytest.mark.parametrize(
    ("override", "field", "code"),
    [
        ("stages.base.train.steps", "", "invalid-override"),
        ("=3", "", "invalid-override"),
        ("stages.eval.of.7=chat", "stages.eval.of.7", "invalid-override"),
        ("stages.base.kind.x=3", "stages.base.kind", "unknown-choice"),
        ("stages.base.train.stpes=3", "stages.base.train.stpes", "unknown-key"),
        ("seed=[1", "seed", "invalid-yaml"),
        ("seed=*x", "seed", "unsupported-yaml"),
        ("seed=!!int 3", "seed", "unsupported-yaml"),
        ("seed=-1", "seed", "out-of-range"),
        ("stages.bsae.train.steps=3", "stages.bsae.train.steps", "unknown-stage"),
    ],
)
def test_a_wrong_setting_is_named_as_such(override: str, field: str, code: str, write_recipe: Write) -> None:
    problem = next(problem for problem in _refused(write_recipe(), override) if problem.field == field)
    assert problem.file.startswith("--set ")
    assert problem.line is None
    assert problem.code == code


def test_a_resolved_recipe_reads_back_as_the_same(write_recipe: Write) -> None:
    recipe = load_recipe(write_recipe()).recipe
    data = dump_recipe(recipe)
    assert parse_recipe(data) == recipe
    assert "lambda" in data["stages"]["policy"]["algorithm"]
    data["stages"]["base"]["train"]["stpes"] = 1
    with pytest.raises(RecipeError, match=r"stages\.base\.train\.stpes: .* steps\?"):
        parse_recipe(data)


@pytest.mark.parametrize("text", ["- a\n- b\n", "just text\n", "3\n"])
def test_a_file_that_is_no_mapping(text: str, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    assert "a mapping of keys" in _refused(path)[0].message


@pytest.mark.parametrize("text", ["name: x\nstages: {}\n", "name: x\nstages: [a]\n", "name: x\nstages: {A b: {}}\n"])
def test_stages_that_are_none(text: str, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    assert any(problem.field.startswith("stages") and problem.line == 2 for problem in _refused(path))


def test_a_missing_file_and_a_folder(tmp_path: Path) -> None:
    assert "no such recipe file" in str(_refused(tmp_path / "none.yaml")[0])
    assert "is a folder" in str(_refused(tmp_path)[0])


def test_a_misspelt_file_is_named_with_the_nearest_one(tmp_path: Path) -> None:
    (tmp_path / "translation.yaml").write_text("name: x\n")
    (tmp_path / "notes.txt").write_text("")
    assert _refused(tmp_path / "tranlsation.yaml")[0].suggestion == f"did you mean {tmp_path / 'translation.yaml'}?"
    assert _refused(tmp_path / "notes.tx")[0].suggestion == ""
    over = tmp_path / "over.yaml"
    over.write_text("extends: translaton.yaml\n")
    assert _refused(over)[0].suggestion == f"did you mean {tmp_path / 'translation.yaml'}?"


def test_python_names_of_aliased_keys_are_unknown(write_recipe: Write) -> None:
    _, problems = check_file(write_recipe(("kl_coef: 0.05", "lam: 0.9")))
    assert [(problem.field, problem.code) for problem in problems] == [("stages.policy.algorithm.lam", "unknown-key")]


def test_a_name_with_a_line_break_stays_on_its_line(tmp_path: Path) -> None:
    """What cannot be printed is shown as Python writes it."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text('name: x\nstages: {"a\\nb": {kind: pretrain}}\n')
    _, problems = check_file(recipe)
    assert problems
    assert all("\n" not in str(problem) for problem in problems)
    assert any("stages.'a\\nb'" in str(problem) for problem in problems)
