"""`trainwright check` reports at its key what the training reader says of a file."""

from pathlib import Path

import numpy as np
import pytest

from launch.checks.preflight import check
from tests.contract.data.agreement import idx, npy

RECIPE = """\
name: data
stages:
  base:
    kind: pretrain
    architecture: {family: decoder, type: llama, num_hidden_layers: 1, hidden_size: 32, intermediate_size: 64,
                   num_attention_heads: 2, max_position_embeddings: 64}
    tokenizer: {train: bpe, vocab_size: 320}
    data: {DATA}
    train: {steps: 2, global_batch: 2, sequence_length: 32, optimizer: {lr: 1e-3}}
"""
DRAWING = """\
name: images
stages:
  vae:
    kind: pretrain
    architecture: {family: vae}
    data: {DATA}
    train: {steps: 2, global_batch: 2, optimizer: {lr: 1e-3}}
"""
FILES: list[tuple[str, bytes, str, str, str]] = [
    (RECIPE, b"prompt, completion\nWhat?, two\n", "source: csv", "", ""),
    (RECIPE, b"prompt, completion\nWhat?, two\n", "source: csv, columns: {completion: ' completion'}", "files.0",
     "no column ' completion' (mapped to completion)"),
    (RECIPE, b"prompt,completion\na,b\na,b,c\n", "source: csv", "files.0", "row 2 (line 3) has 3 cells, the header 2"),
    (RECIPE, b'text,label\na,x\n"unclosed,z\n', "source: csv", "files.0", "row 2 (line 3): unexpected end of data"),
    (RECIPE, b'{"prompt":"q","completion":"\\ud83d"}\n', "source: jsonl", "files.0", ":1: not JSON"),
    (DRAWING, idx(np.zeros(3)), "source: idx", "files.0", "is not an IDX file of unsigned bytes with 3 dimensions"),
    (DRAWING, npy(np.zeros((2, 4, 4, 5), np.uint8)), "source: arrays", "files.0", "an array of shape (4, 4, 5)"),
    (DRAWING, npy(np.full((2, 4, 4), 300)), "source: arrays", "files.0", "pixels from 0 to 300"),
]  # fmt: skip


@pytest.mark.parametrize(("recipe", "content", "keys", "field", "said"), FILES)
def test_the_command_says_what_the_reader_says(
    tmp_path: Path, recipe: str, content: bytes, keys: str, field: str, said: str
) -> None:
    (tmp_path / "recipe.yaml").write_text(recipe.replace("{DATA}", f"{{{keys}, files: [rows.file]}}"))
    (tmp_path / "rows.file").write_bytes(content)
    found = check(tmp_path / "recipe.yaml")
    assert found.exit_code == (2 if said else 0), found.problems
    if said:
        (problem,) = found.problems
        assert problem.field.endswith(f".data.{field}")
        assert problem.line is not None
        assert str(tmp_path / "rows.file") in problem.message
        assert said in problem.message
