"""Folders whose tokenizer is a sentencepiece model are taken in with a tokenizer.json that splits texts as it does."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForSeq2SeqLM
from typer.testing import CliRunner

from launch.cli.main import app
from recipes.errors import RequestError
from recipes.models.folders import sentencepiece_conversion
from trainers.data.tokenizer import load_tokenization
from trainers.models.sentencepiece_import import PROBES
from trainers.store.store import Store

sentencepiece = pytest.importorskip("sentencepiece", reason="the package sentencepiece is not installed")

SIZES: dict[str, Any] = {
    "vocab_size": 600, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
    "d_model": 16, "d_ff": 32, "d_kv": 8, "num_layers": 1, "num_heads": 2,
}  # fmt: skip
LLAMA = {
    "model_type": "bpe", "byte_fallback": True, "normalization_rule_name": "identity",
    "remove_extra_whitespaces": False,
}  # fmt: skip
T5 = {"model_type": "unigram", "pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1}


def make_folder(folder: Path, name: str, **training: Any) -> Path:
    """A tiny model in the layout of the first llama or T5."""
    torch.manual_seed(0)
    is_llama = name == "llama"
    ids = {"bos_token_id": 1, "eos_token_id": 2} if is_llama else {"eos_token_id": 1, "pad_token_id": 0}
    auto: Any = AutoModelForCausalLM if is_llama else AutoModelForSeq2SeqLM
    auto.from_config(CONFIG_MAPPING[name](**SIZES | ids)).save_pretrained(folder)
    texts = folder.parent / "texts.txt"
    texts.write_text("\n".join([*PROBES, "def return the cat and dogs of the mat"]) * 40)
    prefix = str(folder / ("tokenizer" if is_llama else "spiece"))
    options = {"vocab_size": 340 if is_llama else 90, "minloglevel": 2, "hard_vocab_limit": False, **training}
    sentencepiece.SentencePieceTrainer.train(input=str(texts), model_prefix=prefix, **options)
    tokens = {"eos_token": "</s>", "unk_token": "<unk>"} | (
        {"bos_token": "<s>"} if is_llama else {"pad_token": "<pad>"}
    )
    kind = {"tokenizer_class": "LlamaTokenizer" if is_llama else "T5Tokenizer"}
    (folder / "tokenizer_config.json").write_text(json.dumps({**tokens, **kind, "pad_token": tokens["unk_token"]}))
    return folder


@pytest.mark.parametrize(("name", "training"), [("llama", LLAMA), ("t5", T5)])
def test_a_folder_without_a_tokenizer_json_comes_in(tmp_path: Path, name: str, training: dict[str, Any]) -> None:
    folder = make_folder(tmp_path / name, name, **training)
    assert "store import" in sentencepiece_conversion(folder)
    uri = str(tmp_path / "store")
    result = CliRunner().invoke(app, ["store", "import", str(folder), "--name", "mine", "--store", uri])
    assert result.exit_code == 0, result.output
    store = Store.open(uri)
    taken = store.folder(store.resolve("mine"), "model")
    (model,) = folder.glob("*.model")
    processor = sentencepiece.SentencePieceProcessor(model_file=str(model))
    tokenization = load_tokenization(taken)
    for text in PROBES:
        assert tokenization.encode(text) == processor.encode(text)


def test_a_normaliser_that_is_lost_is_refused(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "llama", "llama", **{**LLAMA, "remove_extra_whitespaces": True})
    uri = str(tmp_path / "store")
    result = CliRunner().invoke(app, ["store", "import", str(folder), "--name", "mine", "--store", uri])
    assert isinstance(result.exception, RequestError)
    assert "tokenizer.model" in str(result.exception)
