"""What every conversion does: what is wrong is named, no key vanishes, files are read as they are written."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recipes.convert.engine import convert
from recipes.convert.registry import SYSTEMS, find_system, recognise
from recipes.convert.rules import Outcome
from recipes.convert.source_text import SourceFile, read_source
from recipes.convert.write import recipe_text
from recipes.errors import RecipeError, RequestError
from recipes.loading.yaml_text import parse_yaml
from recipes.problem_codes import Code
from tests.unit.recipes.conversions import AXOLOTL, LLAMA_FACTORY, Convert, refused_of, stage_of


@pytest.mark.parametrize(
    ("line", "key", "code", "reason"),
    [
        ("sample_pakcing: true", "sample_pakcing", Code.UNKNOWN_KEY, "did you mean sample_packing?"),
        ("max_grad_norm: yes please", "max_grad_norm", Code.WRONG_TYPE, "must be a number"),
        ("fp8: 3", "fp8", Code.WRONG_TYPE, "must be true or false"),
        ("loraplus_lr_ratio: 16", "loraplus_lr_ratio", Code.NOT_CONVERTIBLE, "one learning rate"),
        ("unfrozen_parameters: ['model.embed_tokens.weight[:320]']", "unfrozen_parameters", Code.NOT_CONVERTIBLE, ""),
        ("special_tokens: 3", "special_tokens", Code.WRONG_TYPE, "must be a mapping"),
        ("save_steps: $EVERY", "save_steps", Code.NOT_CONVERTIBLE, "variable that the file does not set"),
    ],
)
def test_what_is_wrong_is_named_with_its_line(converted: Convert, line: str, key: str, code: Code, reason: str) -> None:
    found = converted(AXOLOTL + line + "\n")
    problems = {problem.field: problem for problem in map(found.draft.describe, found.refused)}
    assert problems.keys() == {key}
    assert problems[key].code == code
    assert reason in problems[key].message
    assert problems[key].line == AXOLOTL.count("\n") + 1


def test_a_default_does_not_count_beside_the_key_that_replaces_it(converted: Convert) -> None:
    with_steps = AXOLOTL.replace("warmup_ratio: 0.1", "warmup_steps: 5")
    assert "warmup_ratio" not in recipe_text(converted(with_steps), "a.yml")
    assert "warmup_ratio: 0.03 (its default)" in recipe_text(
        converted(AXOLOTL.replace("warmup_ratio: 0.1\n", "")), "a.yml"
    )


def test_keys_that_say_different_things(converted: Convert) -> None:
    found = converted(AXOLOTL.replace("bf16: auto", "bf16: true\nfloat32: true"))
    assert refused_of(found).keys() == {"float32"}
    assert "another key says 'bf16'" in refused_of(found)["float32"]


@pytest.mark.parametrize(
    ("key", "named"),
    [("base_model", "model"), ("learning_rate", "learning rate"), ("datasets", "data")],
)
def test_what_is_missing_is_named(converted: Convert, key: str, named: str) -> None:
    kept = [line for line in AXOLOTL.splitlines() if not line.startswith(key)]
    if key == "datasets":
        kept = [line for line in kept if not line.startswith("  ")]
    assert refused_of(converted("\n".join(kept))).keys() == {named}


def test_a_key_is_left_out_on_request(converted: Convert) -> None:
    found = converted(AXOLOTL + "tokens: ['<mine>']\n", without=["tokens", "datasets"])
    assert [line.key for line in found.draft.of(Outcome.LEFT_OUT)] == ["tokens", "datasets"]
    with pytest.raises(RequestError, match=r"--without token: .* tokens"):
        converted(AXOLOTL + "tokens: ['<mine>']\n", without=["token"])


@pytest.mark.parametrize(
    ("text", "code", "line"),
    [
        ("", Code.INVALID_YAML, None),
        ("# nothing\n", Code.INVALID_YAML, None),
        ("base_model: a/b\n  x: [", Code.INVALID_YAML, 2),
        ("- base_model\n", Code.WRONG_TYPE, 1),
        (f"{AXOLOTL}---\nseed: 3\n", Code.INVALID_YAML, AXOLOTL.count("\n") + 2),
        (f"{AXOLOTL}seed: 3\n", Code.DUPLICATE_KEY, AXOLOTL.count("\n") + 1),
        ("base_model: !!python/name:os.system\n", Code.UNSUPPORTED_YAML, 1),
        ('{"base_model": "a/b", "base_model": "c/d"}', Code.DUPLICATE_KEY, None),
        ('{"base_model": ', Code.INVALID_YAML, 1),
        ("a: &a [*a]\n", Code.RECIPE_TOO_LARGE, 1),
    ],
)
def test_files_that_cannot_be_read(tmp_path: Path, text: str, code: Code, line: int | None) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError) as caught:
        read_source(path, tmp_path)
    (problem,) = caught.value.problems
    assert (problem.code, problem.line, problem.file) == (code, line, str(path))


def test_a_bomb_of_aliases_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    bomb = "a0: &a0 [x, x]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 12))
    path.write_text(bomb)
    with pytest.raises(RecipeError) as caught:
        read_source(path, tmp_path)
    assert caught.value.codes == (Code.RECIPE_TOO_LARGE,)


def test_anchors_and_merge_keys_are_resolved(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("base: &base {a: 1, b: 2}\nother: {<<: *base, b: 3}\nlisted: {<<: [{a: 5}, *base]}\n")
    assert read_source(path, tmp_path).value == {
        "base": {"a": 1, "b": 2}, "other": {"a": 1, "b": 3}, "listed": {"a": 5, "b": 2},
    }  # fmt: skip


def test_the_system_is_told_by_its_keys() -> None:
    assert recognise({"base_model": "a/b", "sequence_len": 8}, "f")[0].name == "axolotl"
    assert recognise({"stage": "sft"}, "f") == (SYSTEMS["llama-factory"], ["stage"])
    assert recognise({"zero_optimization": {}}, "f")[0].name == "deepspeed"
    with pytest.raises(RequestError, match=r"of several systems \(axolotl: base_model; LLaMA-Factory: stage"):
        recognise({"base_model": "a/b", "stage": "sft"}, "f")
    with pytest.raises(RequestError, match=r"keys \(color\) .* axolotl, llama-factory"):
        recognise({"color": "red"}, "f")
    with pytest.raises(RequestError, match=r"--from axolotl2: .* axolotl"):
        find_system("axolotl2")


VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 10**6), st.floats(), st.text(max_size=8),
    st.sampled_from(["auto", "lora", "cosine", "true", "1e-4", "a/b", "./a", "pt", "rm", "zero3", "\n#x", "$HOME"]),
    st.lists(st.one_of(st.text(max_size=5), st.dictionaries(st.sampled_from(["path", "type"]), st.text(max_size=5)))),
    st.dictionaries(st.text(min_size=1, max_size=5), st.integers(), max_size=2),
)  # fmt: skip


@pytest.mark.parametrize("name", list(SYSTEMS))
@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_no_key_vanishes_and_what_is_written_reads_back(name: str, data: st.DataObject) -> None:
    system = SYSTEMS[name]
    keys = sorted(key.replace("*", "x") for key in system.table)
    value = data.draw(st.dictionaries(st.sampled_from([*keys, "unheard_of"]), VALUES, max_size=8))
    found = convert([(SourceFile("c.yaml", value, Path("/nowhere")), system)], Path("/nowhere"))
    listed = [".".join(map(str, line.place)) + "." for line in found.draft.lines if not line.is_default]
    assert [key for key in value if not any(line.startswith(f"{key}.") for line in listed)] == []
    if not found.refused:
        assert parse_yaml(recipe_text(found, "c.yaml"), "r").value == found.recipe


def test_comments_stay_comments(converted: Convert) -> None:
    found = converted(
        AXOLOTL.replace("wandb_project: mine", 'wandb_project: "a\\nseed: 9"\noutput_dir: "x\\u2028y: 1"')
    )
    document = parse_yaml(recipe_text(found, "evil\nname: x.yaml"), "r")
    assert (document.value, document.problems) == (found.recipe, [])


def test_a_part_of_a_configuration_becomes_keys_of_a_stage(converted: Convert) -> None:
    held = {"zero_optimization": {"stage": 1}, "train_micro_batch_size_per_gpu": 2, "gradient_clipping": 0.5}
    found = converted(json.dumps(held), "ds.json")
    assert found.recipe == {
        "train": {"global_batch": 2, "gradient_clipping": 0.5}, "shard": {"zero": 1, "micro_batch": 2},
    }  # fmt: skip
    assert not found.is_whole


@pytest.mark.usefixtures("factory_data")
@pytest.mark.parametrize(
    ("text", "added", "method"),
    [
        (LLAMA_FACTORY, "quantization_bit: 4\ndouble_quantization: true\n", "nf4"),
        (LLAMA_FACTORY, "quantization_bit: 8\n", "int8"),
        (LLAMA_FACTORY, "quantization_bit: 2\n", None),
        (AXOLOTL.replace("qlora", "lora").replace("load_in_4bit", "load_in_8bit"), "", "int8"),
        (AXOLOTL.replace("qlora", "lora").replace("load_in_4bit: true", "load_in_4bit: false"), "", None),
        (AXOLOTL.replace("load_in_4bit: true", ""), "", "nf4"),
    ],
)
def test_a_base_in_few_bits_is_carried(converted: Convert, text: str, added: str, method: str | None) -> None:
    found = converted(text + added)
    assert refused_of(found) == {}
    assert stage_of(found)["lora"].get("quantize") == method
