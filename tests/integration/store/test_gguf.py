"""GGUF files: what is exported comes back as the same model, and nothing of a file goes unread."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGMLQuantizationType
from gguf.quants import dequantize, quantize
from safetensors.torch import load_file
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from typer.testing import CliRunner

from launch.cli.main import app
from recipes.data.tokenizers import TrainTokenizer
from recipes.errors import RequestError
from trainers.data.tokenizer import Tokenization, load_tokenization, train_tokenizer
from trainers.models.gguf_export import write_gguf
from trainers.models.gguf_import import write_folder
from trainers.models.gguf_open import open_gguf
from trainers.models.imports import import_folder
from trainers.store.store import Store

Q8_0 = GGMLQuantizationType.Q8_0
TEXTS = ["The cat sat on the mat, and 12 dogs barked at it.\n", "def f(x):\n    return x + 1\n"] * 40
SIZES: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "vocab_size": 304, "head_dim": 16, "bos_token_id": None,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192, "rope_theta": 500000.0,
}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 10000.0}
GEMMA = {"query_pre_attn_scalar": 16, "sliding_window": 8}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {"tie_word_embeddings": True},
    "llama, llama3": {"rope_parameters": LLAMA3},
    "mistral": {"sliding_window": None},
    "qwen2": {"head_dim": 8, "rope_parameters": YARN},
    "qwen3": {},
    "gemma2": GEMMA,
    "gemma3_text": {**GEMMA, "num_hidden_layers": 7},
}


@pytest.fixture(scope="module")
def tokenization() -> Tokenization:
    return train_tokenizer(TrainTokenizer(train="bpe", vocab_size=300), TEXTS)


def make_folder(folder: Path, name: str, tokenization: Tokenization, **changes: Any) -> Path:
    torch.manual_seed(0)
    ids = {"eos_token_id": tokenization.eos_id, "pad_token_id": tokenization.pad_id}
    config = CONFIG_MAPPING[name.split(",")[0]](**SIZES | MODELS[name] | ids | changes)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    for file, content in tokenization.files().items():
        (folder / file).write_bytes(content)
    return folder


@pytest.mark.parametrize("name", MODELS)
def test_a_model_comes_back_from_its_file(tmp_path: Path, name: str, tokenization: Tokenization) -> None:
    folder = make_folder(tmp_path / "model", name, tokenization)
    assert write_gguf(folder, tmp_path / "model.gguf", "f32") < 1e-9
    write_folder(tmp_path / "model.gguf", tmp_path / "back")
    wanted, found = (load_file(place / "model.safetensors") for place in (folder, tmp_path / "back"))
    assert wanted.keys() == found.keys()
    for key in wanted:
        torch.testing.assert_close(found[key], wanted[key], rtol=0, atol=1e-7)
    texts = [*TEXTS, "It's 2024: caf\u00e9!", *tokenization.special_tokens]
    back = load_tokenization(tmp_path / "back")
    assert [back.encode(text) for text in texts] == [tokenization.encode(text) for text in texts]
    assert (back.eos_token, back.pad_token) == (tokenization.eos_token, tokenization.pad_token)


def test_rounded_files_are_close_and_shrink(tmp_path: Path, tokenization: Tokenization) -> None:
    folder = make_folder(tmp_path / "model", "llama", tokenization)
    changes = {kind: write_gguf(folder, tmp_path / f"{kind}.gguf", kind) for kind in ("f16", "bf16", "q8_0")}
    assert 0 < changes["f16"] < changes["bf16"] < 1e-3
    assert 0 < changes["q8_0"] < 1e-3
    sizes = [(tmp_path / f"{kind}.gguf").stat().st_size for kind in ("q8_0", "f16")]
    assert sizes[0] < sizes[1]
    held = open_gguf(tmp_path / "q8_0.gguf", torch.float32).state_dict()
    for key, values in load_file(folder / "model.safetensors").items():
        stock = dequantize(quantize(values.numpy(), Q8_0), Q8_0) if values.ndim == 2 else values.numpy()
        assert torch.equal(held[key], torch.from_numpy(stock).view_as(values)), key
    write_folder(tmp_path / "q8_0.gguf", tmp_path / "back")
    config = json.loads((tmp_path / "back" / "config.json").read_bytes())
    assert config["dtype"] == "bfloat16"
    assert "quantization_config" not in config


@pytest.mark.parametrize(
    ("name", "changes", "named"),
    [
        ("mistral", {"sliding_window": 8}, "sliding_window"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act"),
        ("llama", {"attention_bias": True}, "attention_bias|bias"),
        ("gemma3_text", {"layer_types": ["full_attention"] * 7}, "layer_types"),
        ("gemma2", {"query_pre_attn_scalar": 64}, "query_pre_attn_scalar"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, "rope"),
    ],
)
def test_what_a_file_cannot_say_is_refused(
    tmp_path: Path, tokenization: Tokenization, name: str, changes: dict[str, Any], named: str
) -> None:
    folder = make_folder(tmp_path / "model", name, tokenization, **changes)
    with pytest.raises(RequestError, match=named):
        write_gguf(folder, tmp_path / "model.gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_what_nobody_reads_of_a_file_is_refused(
    tmp_path: Path, tokenization: Tokenization, monkeypatch: pytest.MonkeyPatch
) -> None:
    import trainers.models.gguf_export as writer

    folder, settings = make_folder(tmp_path / "model", "llama", tokenization), writer._settings
    for number, further in enumerate(({"attention.scale": 0.5}, {"attention.sliding_window_pattern": 2})):
        monkeypatch.setattr(writer, "_settings", lambda *given, more=further: settings(*given) | more)
        monkeypatch.setattr(writer, "_verify", lambda *given: 0.0)
        write_gguf(folder, tmp_path / f"{number}.gguf")
        with pytest.raises(RequestError, match=next(iter(further))):
            open_gguf(tmp_path / f"{number}.gguf", torch.float32)
    cut = tmp_path / "cut.gguf"
    cut.write_bytes((tmp_path / "0.gguf").read_bytes()[:1000])
    with pytest.raises(RequestError, match=r"cut\.gguf"):
        open_gguf(cut, torch.float32)


def test_the_command_line_takes_files_in_and_writes_them(tmp_path: Path, tokenization: Tokenization) -> None:
    store = Store.open(str(tmp_path / "store"))
    import_folder(store, make_folder(tmp_path / "model", "qwen3", tokenization), name="mine")
    file = tmp_path / "out.gguf"
    run = CliRunner().invoke
    written = run(
        app, ["store", "export", "mine", str(file), "--to", "gguf", "--precision", "f32", "--store", store.uri]
    )
    assert written.exit_code == 0, written.output
    taken = run(app, ["store", "import", str(file), "--name", "back", "--store", store.uri])
    assert taken.exit_code == 0, taken.output
    folders = [store.folder(store.resolve(name), "model") for name in ("mine", "back")]
    one, other = (load_file(folder / "model.safetensors") for folder in folders)
    assert all(torch.equal(one[key], other[key]) for key in one)
    with pytest.raises(RequestError, match="store import"):
        import_folder(store, file)
