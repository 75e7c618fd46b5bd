"""What `check` shows and says of the first rows, with real tokenizers and without torch."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from launch.checks.preflight import CheckResult
from launch.checks.preflight import check as check_recipe
from recipes.data.tokenizers import TrainTokenizer
from trainers.data.tokenizer import train_tokenizer
from trainers.store.manifest import ArtifactManifest, files_digest
from trainers.store.store import Store

ROOT = Path(__file__).parents[3]
MODULES = 800
"""That `check` may load; each is found, read and run before anything is answered."""
CHATML = (
    "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system turn') }}{% endif %}"
    "{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
SHORT = {"prompt": "What is 1?", "completion": "One."}
LONG = {"prompt": "What is 2? " * 20, "completion": "Two."}
TRAIN = {"steps": 1, "global_batch": 2, "sequence_length": 48, "optimizer": {"lr": 1e-3}}

Check = Callable[..., CheckResult]


@pytest.fixture
def check(tmp_path: Path) -> Check:
    """Check a fine-tuning of a base with a trained tokenizer of ChatML's marks, on rows."""
    spec = TrainTokenizer(
        train="bpe", vocab_size=300, special_tokens=["<|im_start|>"], eos_token="<|im_end|>", chat_template=CHATML
    )
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    for name, content in train_tokenizer(spec, ["What is one?"]).files().items():
        (folder / name).write_bytes(content)
    (tmp_path / "text.txt").write_text("One and two.\n")
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}

    def run(rows: list[Any], *overrides: str, kind: str = "finetune") -> CheckResult:
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        stages = {
            "base": {
                "kind": "pretrain",
                "architecture": {"family": "decoder", "type": "llama", "max_position_embeddings": 64, **sizes},
                "tokenizer": {"from": "./tokenizer"},
                "data": {"source": "text", "files": ["text.txt"]},
                "train": TRAIN,
            },
            "tuned": {
                "kind": kind,
                "init_from": "base",
                "data": {"source": "jsonl", "files": ["rows.jsonl"], "hold_out": 0.1},
                "train": TRAIN,
            },
        }
        path = tmp_path / "recipe.yaml"
        path.write_text(json.dumps({"name": "rows", "stages": stages}))
        return check_recipe(path, overrides)

    return run


def shown(found: CheckResult, stage: str = "tuned") -> list[tuple[str, str]]:
    return [(piece.kind, piece.text) for row in found.rows if row.stage == stage for piece in row.pieces]


def test_a_row_is_shown_as_the_model_gets_it(check: Check) -> None:
    found = check([SHORT])
    assert shown(found) == [
        ("prompt", "<|im_start|>user\nWhat is 1?<|im_end|>\n<|im_start|>assistant\n"),
        ("target", "One.<|im_end|>"),
    ]
    assert shown(found, "base") == [("target", "One and two.\n<|im_end|>")]
    assert (found.warnings, found.exit_code) == ([], 0)
    assert shown(check([SHORT], "stages.tuned.template=none")) == [
        ("prompt", "What is 1?"),
        ("target", "One.<|im_end|>"),
    ]
    assert shown(check([SHORT], "stages.tuned.loss_on=all"))[0][0] == "target"


def test_every_turn_of_a_conversation_is_told_apart(check: Check) -> None:
    user, answer = {"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}
    kinds = [kind for kind, _ in shown(check([{"messages": [user, answer, user, answer]}]))]
    assert kinds == ["prompt", "target", "prompt", "target"]


def test_pairs_that_would_be_dropped_are_a_warning(check: Check) -> None:
    pairs = [{"prompt": row["prompt"], "chosen": "One.", "rejected": "Two."} for row in [SHORT, *[LONG] * 19]]
    (warning,) = check(pairs, kind="reward").warnings
    for part in ("19 of 20 rows (95%)", "19 longer than 48 tokens", "rows.jsonl:2", "max_dropped (0.9)"):
        assert part in warning
    allowed = check(pairs, "stages.tuned.data.max_dropped=1.0", kind="reward")
    assert "max_dropped" not in allowed.warnings[0]
    assert check(pairs[:1] * 20, kind="reward").warnings == []


def test_truncated_rows_are_a_warning(check: Check) -> None:
    messages = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "One and two. " * 20}]
    assert "1 of 1 rows (100%) truncated to 48 tokens" in check([{"messages": messages}]).warnings[0]


def test_what_the_template_refuses_is_said_before_the_run(check: Check) -> None:
    found = check([{"messages": [{"role": "system", "content": "Be brief."}, {"role": "assistant", "content": "A"}]}])
    (problem,) = found.problems
    assert (problem.code, problem.field) == ("rows-not-usable", "stages.tuned.data")
    assert "rows.jsonl:1: " in problem.message
    assert "no system turn" in problem.message
    assert found.exit_code == 2


def test_a_model_of_the_store_is_read_where_the_store_is_named(check: Check, tmp_path: Path) -> None:
    store = Store.open(str(tmp_path / "store"))
    (tmp_path / "model").mkdir()
    (tmp_path / "tokenizer").rename(tmp_path / "model" / "model")
    files = store.objects.put_folder(tmp_path / "model")
    ended = {"state": "completed", "rule": None, "steps_done": 0, "steps_planned": 0}
    made = ArtifactManifest.model_validate(
        {
            "fingerprint": "ab" * 32,
            "digest": files_digest(files),
            "kind": "model",
            "stage": "sft",
            "files": files,
            "outcome": ended,
            "architecture": {"model_type": "llama"},
        }
    )
    store.put_artifact(made)
    path = tmp_path / "recipe.yaml"
    data = {"source": "jsonl", "files": ["rows.jsonl"]}
    (tmp_path / "rows.jsonl").write_text(json.dumps(SHORT) + "\n")
    tuned = {"kind": "finetune", "init_from": f"store://{'ab' * 8}", "data": data, "train": TRAIN}
    path.write_text(json.dumps({"name": "rows", "stages": {"tuned": tuned}}))
    assert check_recipe(path).rows == []
    pieces = [(piece.kind, piece.text) for row in check_recipe(path, store=store.uri).rows for piece in row.pieces]
    assert pieces[-1] == ("target", "One.<|im_end|>")


def test_the_command_loads_nothing_heavy() -> None:
    program = (
        "import sys, json, launch.checks.preflight as p; found = p.check('recipes/quickstart.yaml');"
        "print(json.dumps([sorted(sys.modules), [row.stage for row in found.rows]]))"
    )
    output = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    modules, stages = json.loads(output.stdout)
    assert not {"torch", "ray", "deepspeed", "transformers", "datasets", "pyarrow", "pandas", "sklearn"} & set(modules)
    assert len(modules) < MODULES
    assert set(stages) == {"base", "sft", "reward", "second_reward", "policy", "eval"}


def test_a_published_form_and_columns_that_are_not_read_are_named(check: Check) -> None:
    row = {"instruction": "What is", "input": "1?", "output": "One.", "id": 7}
    found = check([row])
    (tuned,) = [row for row in found.rows if row.stage == "tuned"]
    assert (tuned.forms, tuned.unread) == ({"alpaca": 1}, {"id": 1})
    assert list(tuned.lines())[1:3] == ["  recognised as alpaca", "  not read: id"]
    assert found.warnings == []
    (warning,) = check([row], "stages.tuned.data.columns={prompt: instruction, completion: output}").warnings
    assert warning.startswith("stages.tuned.data: input ")


def test_what_the_template_does_not_read_is_a_warning(check: Check) -> None:
    turns = [{"role": "user", "content": "Q", "name": "Ann"}, {"role": "narrator", "content": "N"}]
    found = check([{"messages": [*turns, {"role": "assistant", "content": "A"}], "tools": [{"name": "f"}]}])
    for warning, named in zip(found.warnings, ("messages.name", "tools", "turns of role 'narrator'"), strict=True):
        assert warning.startswith(f"stages.tuned.data: {named} ")


def test_rows_with_an_empty_turn_are_counted(check: Check) -> None:
    empty = {"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": ""}]}
    found = check([empty, SHORT])
    assert shown(found)[-1] == ("target", "One.<|im_end|>")
    for part in ("1 of 2 rows (50%)", "1 with an empty turn", "rows.jsonl:1"):
        assert part in found.warnings[0]


def test_rows_are_read_although_something_else_is_wrong(check: Check) -> None:
    """One pass finds a misspelt key, a rule between fields, a missing file, and what the template refuses."""
    system = [{"role": "system", "content": "Be brief."}, {"role": "assistant", "content": "A"}]
    found = check(
        [{"messages": system}],
        "stages.base.train.sequence_lenght=8",
        "stages.tuned.train.optimizer.lr=-1",
        "stages.base.data.files=[gone.txt]",
        "stages.other={kind: reward, init_from: base, data: {source: jsonl, files: [rows.jsonl]}, train: {steps: 0}}",
        "stages.tuned2={kind: finetune, init_from: base, data: {source: jsonl, files: [rows.jsonl], hold_out: 0.1}, "
        "train: {steps: 1, global_batch: 2, sequence_length: 48, optimizer: {lr: 1e-3}}}",
    )
    codes = {(problem.code, problem.field) for problem in found.problems}
    assert {
        ("unknown-key", "stages.base.train.sequence_lenght"),
        ("out-of-range", "stages.tuned.train.optimizer.lr"),
        ("missing-file", "stages.base.data.files.0"),
        ("missing-column", "stages.other.data.files.0"),
        ("rows-not-usable", "stages.tuned2.data"),
    } <= codes


def test_a_prompt_that_ends_with_an_end_token_is_a_warning(check: Check, tmp_path: Path) -> None:
    chat = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '<|im_end|>' }}{% endfor %}"
    check([SHORT])
    (tmp_path / "tokenizer" / "chat_template.jinja").write_text(chat)
    (warning,) = [text for text in check_recipe(tmp_path / "recipe.yaml").warnings if "starts the answer" in text]
    assert "rows.jsonl:1 ends with <|im_end|>" in warning


def test_an_input_that_the_store_lacks_is_found_with_everything_else(check: Check, tmp_path: Path) -> None:
    check([SHORT])
    overrides = ["stages.tuned.init_from=store://nothing", "stages.base.train.steps=0"]
    store = Store.open(str(tmp_path / "store"))
    found = check_recipe(tmp_path / "recipe.yaml", overrides, store=store.uri)
    codes = {(problem.code, problem.field) for problem in found.problems}
    assert {("input-not-found", "stages.tuned.init_from"), ("out-of-range", "stages.base.train.steps")} <= codes


def test_rows_of_which_nothing_is_left_to_learn_are_a_problem(check: Check) -> None:
    tools = [{"name": "weather", "description": "of a city " * 20}]
    rows = [{"messages": [{"role": "user", "content": "Q " * 60}, {"role": "assistant", "content": "A"}]}] * 4
    (problem,) = check(rows).problems
    assert (problem.code, problem.field) == ("rows-not-usable", "stages.tuned.data")
    assert "4 rows at sequence_length 48: no_response: rows.jsonl:1" in problem.message
    assert check([{**SHORT, "tools": tools}] * 4).exit_code == 0
