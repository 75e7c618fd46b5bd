"""`trainwright data`: rows as they will be trained on, in the terminal, as JSON and as one page."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from launch.cli.main import app
from recipes.data.tokenizers import TrainTokenizer
from recipes.errors import RequestError
from trainers.data.tokenizer import train_tokenizer

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
ROWS = [
    {"instruction": "What is", "input": "<1>?", "output": "One.", "id": 7},
    {"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": ""}]},
]
PAIR = {"prompt": "Q", "chosen": "One.", "rejected": "<Two>"}


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """A fine-tuning and a reward model on a base whose tokenizer is there."""
    spec = TrainTokenizer(
        train="bpe", vocab_size=300, special_tokens=["<|im_start|>"], eos_token="<|im_end|>", chat_template=CHATML
    )
    (tmp_path / "tokenizer").mkdir()
    for name, content in train_tokenizer(spec, ["What is one?"]).files().items():
        (tmp_path / "tokenizer" / name).write_bytes(content)
    (tmp_path / "text.txt").write_text("One and two.\n")
    for name, rows in (("rows", ROWS), ("pairs", [PAIR])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    train = {"steps": 1, "global_batch": 2, "sequence_length": 48, "optimizer": {"lr": 1e-3}}
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    stages = {
        "base": {
            "kind": "pretrain",
            "architecture": {"family": "decoder", "type": "llama", "max_position_embeddings": 64, **sizes},
            "tokenizer": {"from": "./tokenizer"},
            "data": {"source": "text", "files": ["text.txt"]},
            "train": train,
        },
        **{
            name: {
                "kind": kind,
                "init_from": "base",
                "data": {"source": "jsonl", "files": [file]},
                "evaluation": {"source": "jsonl", "files": [file]},
                "train": train,
            }
            for name, kind, file in (("sft", "finetune", "rows.jsonl"), ("rm", "reward", "pairs.jsonl"))
        },
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps({"name": "rows", "stages": stages}))
    return path


def run(*arguments: Any) -> str:
    found = CliRunner().invoke(app, ["data", *map(str, arguments)])
    if found.exception is not None and not isinstance(found.exception, SystemExit):
        raise found.exception
    assert found.exit_code == 0, found.output
    return found.output


def test_targets_are_marked_and_what_is_left_out_is_told(recipe: Path) -> None:
    views = {view["field"]: view for view in json.loads(run(recipe, "sft", "--json"))}
    view = views["data"]
    (row,) = view["rows"]
    (side,) = row["sides"]
    targets = "".join(token["text"] for token in side["tokens"] if token["is_target"])
    rest = "".join(token["text"] for token in side["tokens"] if not token["is_target"])
    assert targets == "One.<|im_end|>"
    assert rest == "<|im_start|>user\nWhat is\n\n<1>?<|im_end|>\n<|im_start|>assistant\n"
    assert view["report"]["forms"] == {"alpaca": 1}
    assert view["report"]["unread"] == {"id": 1}
    assert list(view["lost"]["empty_turn"]) == ["rows.jsonl:2"]
    printed = run(recipe, "sft")
    assert "dropped (empty_turn): 1 rows, for example rows.jsonl:2" in printed
    assert "recognised as alpaca (1 rows)" in printed
    assert "|[<|im_end|>]" in printed


def test_both_answers_of_a_pair_are_shown(recipe: Path) -> None:
    view = json.loads(run(recipe, "rm", "--json"))[0]
    sides = {side["name"]: side["tokens"] for side in view["rows"][0]["sides"]}
    learnt = {name: "".join(token["text"] for token in tokens if token["is_target"]) for name, tokens in sides.items()}
    assert learnt == {"chosen": "One.<|im_end|>", "rejected": "<Two><|im_end|>"}


def test_the_page_is_whole_and_escapes_what_rows_hold(recipe: Path, tmp_path: Path) -> None:
    page = tmp_path / "data.html"
    assert run(recipe, "--html", page).strip() == str(page)
    text = page.read_text(encoding="utf-8")
    assert text.startswith("<!doctype html>")
    assert text.endswith("</main></html>")
    assert "<h2>base.data</h2>" in text
    assert "<Two>" not in text
    assert "Dropped: empty_turn" in text
    assert 'class="target"' in text


def test_an_unknown_stage_is_refused(recipe: Path) -> None:
    with pytest.raises(RequestError, match=r"sfx; .* base, sft, rm"):
        run(recipe, "sfx")


def test_no_torch_is_loaded(recipe: Path) -> None:
    import subprocess

    program = f"import sys; sys.argv = ['trainwright', 'data', {str(recipe)!r}]\n"
    program += "from launch.cli.main import app\ntry: app()\nexcept SystemExit: print('torch' in sys.modules)"
    output = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert output.splitlines()[-1] == "False"
