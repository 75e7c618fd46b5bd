"""GGUF files of real pretrained models: written, compared by their logits, sized, taken in again."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from launch.cli.main import app
from tests.real_models import ANSWER, QUESTION, greedy_answer
from trainers.models.gguf_import import logits, probe_tokens
from trainers.models.imports import import_folder
from trainers.store.store import Store

pytestmark = [pytest.mark.long, pytest.mark.timeout(3000)]

SIZES_MB = {"smollm2": {"bf16": 271, "q8_0": 145}}
"""Of the files, in millions of bytes, by model and by what its matrices are stored in; their tokenizers are inside."""


@pytest.mark.parametrize("precision", ["bf16", "q8_0"])
@pytest.mark.parametrize("name", SIZES_MB)
def test_a_real_model_is_written_and_comes_back(
    name: str, precision: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    folder: Path = request.getfixturevalue(name)
    store = Store.open(str(tmp_path / "store"))
    import_folder(store, folder, name=name)
    file, run = tmp_path / f"{name}.gguf", CliRunner().invoke
    for arguments in (
        ["export", name, str(file), "--to", "gguf", "--precision", precision],
        ["import", str(file), "--name", "back"],
    ):
        result = run(app, ["store", *arguments, "--store", store.uri])
        assert result.exit_code == 0, result.output
    assert file.stat().st_size / 1e6 == pytest.approx(SIZES_MB[name][precision], rel=0.02)
    back = store.folder(store.resolve("back"), "model")
    tokens = probe_tokens(49_000)
    expected, found = (
        logits(AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32), tokens) for place in (folder, back)
    )
    if precision == "bf16":  # what the folder holds
        assert torch.equal(found, expected)
    else:
        kept, changed = (values.log_softmax(dim=-1) for values in (expected, found))
        divergence = (kept.exp() * (kept - changed)).sum(dim=-1)
        assert 0 < float(divergence.mean()) < 0.05
        return
    assert greedy_answer(back, QUESTION) == ANSWER
