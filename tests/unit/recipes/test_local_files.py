"""Local data files, model folders and tokenizers, as far as their headers tell."""

import gzip
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from launch.inputs.data_check import DataCheck
from recipes.loading.load import check_file
from recipes.models.folders import read_folder
from trainers.data.sources.local_files import match_files

Write = Callable[..., Path]


def _codes(path: Path, field: str, *overrides: str) -> list[str]:
    """Codes of the problems at a field."""
    _, problems = check_file(path, overrides, check_data=DataCheck())
    return [str(problem.code) for problem in problems if problem.field == field]


def _folder_codes(folder: Path, wants: str = "model") -> list[str]:
    """Codes of what is wrong with a folder, read afresh."""
    read_folder.cache_clear()
    return [str(finding.code) for finding in read_folder(folder, wants).problems]


@pytest.mark.parametrize(
    ("content", "code", "place"),
    [
        (b"", "empty-file", ""),
        (b"\n\n\n", "empty-file", ""),
        (b'{"prompt": "a", "completion": "b"}\n{"prompt": "a"\n', "invalid-data-format", "chat.jsonl:2: "),
        (b"[1, 2]\n", "invalid-data-format", "chat.jsonl:1: "),
        (b'{"prompt": "a"}\n', "missing-column", "chat.jsonl:1: "),
        (b'{"prompt": "a", "completion": 3}\n', "wrong-cell-type", "chat.jsonl:1: column 'completion'"),
        (b'{"messages": "hello"}\n', "wrong-cell-type", "chat.jsonl:1: column 'messages'"),
        (b'{"messages": [{"role": "user"}]}\n', "wrong-cell-type", "chat.jsonl:1: messages[0]"),
        (b"\xfe{\n", "not-utf8", "chat.jsonl:1 (byte 0xfe)"),
        (b"[" * 100_000 + b"\n", "invalid-data-format", "chat.jsonl:1: "),
    ],
)
def test_rows_that_cannot_be_used(content: bytes, code: str, place: str, write_recipe: Write) -> None:
    path = write_recipe()
    (path.parent / "rows" / "chat.jsonl").write_bytes(content)
    (problem,) = check_file(path, check_data=DataCheck())[1]
    assert (problem.code, problem.field) == (code, "stages.chat.data.files.0")
    assert place in problem.message


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "a", "completion": "b"},
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
        {"prompt": [{"role": "user", "content": "a"}], "completion": [{"role": "assistant", "content": "b"}]},
        {"text": "a", "other": None},
    ],
)
def test_the_ecosystem_s_standard_rows_are_taken(row: dict[str, Any], write_recipe: Write) -> None:
    path = write_recipe()
    (path.parent / "rows" / "chat.jsonl").write_text(json.dumps(row) + "\n")
    assert check_file(path, check_data=DataCheck())[1] == []


def test_a_single_document_is_not_divided(write_recipe: Write) -> None:
    one = "stages.base.data={source: text, files: [rows/text.txt], hold_out: 0.1}"
    assert _codes(write_recipe(), "stages.base.data.hold_out", one) == ["single-document"]
    for more in ("documents=paragraph", 'files=["rows/*.txt", "rows/chat.jsonl"]', "hold_out=0"):
        assert _codes(write_recipe(), "stages.base.data.hold_out", one, f"stages.base.data.{more}") == []


@pytest.mark.parametrize(("stage", "codes"), [("judge", ["missing-column"]), ("chat", []), ("base", [])])
def test_summaries_are_for_stages_that_read_prompt_and_completion(
    stage: str, codes: list[str], write_recipe: Write
) -> None:
    set_to = f"stages.{stage}.data={{source: python-docs-summaries}}"
    assert _codes(write_recipe(), f"stages.{stage}.data.source", set_to) == codes


def test_columns_are_mapped(write_recipe: Write) -> None:
    path = write_recipe(("files: [rows/chat.jsonl]", "columns: {prompt: q, completion: a}, files: [rows/chat.jsonl]"))
    (path.parent / "rows" / "chat.jsonl").write_text('{"q": "x", "a": "y"}\n')
    assert check_file(path, check_data=DataCheck())[1] == []
    assert _codes(path, "stages.chat.data.columns.promt", "stages.chat.data.columns={promt: q}") == ["unknown-choice"]


def test_gzip_is_read_and_a_cut_one_is_named(write_recipe: Write) -> None:
    path = write_recipe(("rows/chat.jsonl", "rows/chat.jsonl.gz"))
    packed = gzip.compress(b'{"text": "some words that do not repeat"}\n' * 50)
    file = path.parent / "rows" / "chat.jsonl.gz"
    file.write_bytes(packed)
    assert check_file(path, check_data=DataCheck())[1] == []
    file.write_bytes(packed[: len(packed) // 2])
    assert _codes(path, "stages.chat.data.files.0") == ["unreadable-data"]
    file.write_bytes(b"not gzip")
    assert _codes(path, "stages.chat.data.files.0") == ["unreadable-data"]


def test_csv_headers(write_recipe: Write) -> None:
    path = write_recipe()
    file = path.parent / "rows" / "pairs.csv"
    file.write_text("prompt,chosen\na,b\n")
    assert _codes(path, "stages.judge.data.files.0") == ["missing-column"]
    file.write_text("prompt,chosen,rejected\n")
    assert _codes(path, "stages.judge.data.files.0") == ["empty-file"]
    file.write_text("chosen,chosen,rejected\na,b,c\n")
    assert _codes(path, "stages.judge.data.files.0") == ["duplicate-item"]


def test_parquet_columns(write_recipe: Write) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = write_recipe(("{source: csv, files: [rows/pairs.csv]", "{source: parquet, files: [rows/pairs.parquet]"))
    file = path.parent / "rows" / "pairs.parquet"
    parquet.write_table(pyarrow.table({"chosen": ["a"], "rejected": ["b"]}), file)
    assert check_file(path, check_data=DataCheck())[1] == []
    parquet.write_table(pyarrow.table({"chosen": ["a"]}), file)
    assert _codes(path, "stages.judge.data.files.0") == ["missing-column"]
    file.write_bytes(file.read_bytes()[:-9] + b"\x00" * 5 + b"PAR1")
    assert _codes(path, "stages.judge.data.files.0") == ["invalid-data-format"]


def test_patterns(tmp_path: Path) -> None:
    for name in ("b.txt", "a.txt", "sub/c.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    assert [file.name for file in match_files("*.txt", tmp_path)] == ["a.txt", "b.txt"]
    assert [file.name for file in match_files("**/*.txt", tmp_path)] == ["a.txt", "b.txt", "c.txt"]
    assert [file.name for file in match_files(str(tmp_path / "*.txt"), Path("/nowhere"))] == ["a.txt", "b.txt"]
    assert match_files("none.txt", tmp_path) == []


@pytest.mark.parametrize("pattern", ["~/x.jsonl", "$HOME/x.jsonl", "http://example.org/x.jsonl"])
def test_nothing_is_expanded(pattern: str, write_recipe: Write) -> None:
    assert _codes(write_recipe(), "stages.chat.data.files.0", f"stages.chat.data.files=['{pattern}']") == [
        "invalid-path"
    ]


def test_a_data_set_folder(write_recipe: Write) -> None:
    datasets = pytest.importorskip("datasets")
    path = write_recipe(("{source: jsonl, files: [rows/chat.jsonl]", "{source: datasets, path: ./set, split: trian"))
    assert _codes(path, "stages.chat.data.path") == ["missing-folder"]
    folder = path.parent / "set"
    folder.mkdir()
    assert _codes(path, "stages.chat.data.path") == ["invalid-data-format"]
    folder.rmdir()
    datasets.DatasetDict({"train": datasets.Dataset.from_dict({"text": ["a"]})}).save_to_disk(str(folder))
    assert _codes(path, "stages.chat.data.split") == ["unknown-split"]


def _tokenizer(folder: Path, **config: Any) -> None:
    from tokenizers import Tokenizer, models

    folder.mkdir(exist_ok=True)
    tokenizer = Tokenizer(models.BPE(vocab={"a": 0, "b": 1}, merges=[]))
    tokenizer.add_special_tokens(["<eos>", "<pad>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


CLASSES = {"llama": "LlamaForCausalLM", "gpt2": "GPT2LMHeadModel", "bert": "BertForMaskedLM"}


def _weights(path: Path, names: Iterable[str]) -> None:
    path.parent.mkdir(exist_ok=True)
    save_file({name: np.zeros((2, 2), dtype=np.float32) for name in names}, path)


def _model(folder: Path, **config: Any) -> None:
    _tokenizer(folder, eos_token="<eos>", pad_token={"content": "<pad>"}, chat_template="x")
    config = {"model_type": "llama", "max_position_embeddings": 128, **config}
    config = {"architectures": [CLASSES[config["model_type"]]], **config}
    (folder / "config.json").write_text(json.dumps(config))
    _weights(folder / "model.safetensors", ["model.embed_tokens.weight"])


def test_a_model_folder(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    assert _folder_codes(folder) == ["missing-folder"]
    _model(folder)
    read_folder.cache_clear()
    facts = read_folder(folder, "model")
    assert (facts.problems, facts.type, facts.positions) == ([], "llama", 128)
    assert facts.tokenizer is not None
    assert (facts.tokenizer.eos_token, facts.tokenizer.pad_token) == ("<eos>", "<pad>")
    assert facts.tokenizer.has_token("a")
    assert not facts.tokenizer.has_token("ab")


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (lambda folder: (folder / "config.json").unlink(), "missing-model-file"),
        (lambda folder: (folder / "config.json").write_text("{"), "unreadable-model-file"),
        (lambda folder: (folder / "config.json").write_text('{"model_type": "xlnet"}'), "unsupported-model"),
        (lambda folder: _model(folder, auto_map={"AutoModel": "x.y"}), "remote-code"),
        (lambda folder: _model(folder, architectures=["T5Model"]), "unsupported-model"),
        (lambda folder: _model(folder, architectures=None), "unsupported-model"),
        (lambda folder: (folder / "tokenizer.json").write_text("{}"), "unreadable-model-file"),
        (lambda folder: (folder / "tokenizer.json").unlink(), "missing-model-file"),
        (lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin"), "missing-model-file"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"cut off"), "unreadable-model-file"),
        (
            lambda folder: (folder / "config.json").rename(folder / "adapter_config.json"),
            "not-a-model-folder",
        ),
    ],
)
def test_a_model_folder_that_cannot_be_used(change: Callable[[Path], Any], code: str, tmp_path: Path) -> None:
    _model(tmp_path / "model")
    change(tmp_path / "model")
    assert _folder_codes(tmp_path / "model") == [code]


def test_everything_that_is_wrong_with_a_folder_is_found_at_once(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    _model(folder, num_hidden_layers=3, architectures=["LlamaModel"], auto_map={"AutoModel": "x.y"})
    _tokenizer(folder)
    layers = ["model.layers.0.a", "model.layers.0.b", "model.layers.1.a", "model.layers.1.b", "model.layers.2.a"]
    _weights(folder / "model.safetensors", layers)
    assert set(_folder_codes(folder)) == {
        "missing-special-token",
        "unsupported-model",
        "remote-code",
        "layer-mismatch",
    }


def test_shards_are_looked_at(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    _model(folder, num_hidden_layers=1)
    (folder / "model.safetensors").unlink()
    _weights(folder / "one.safetensors", ["model.layers.0.a"])
    index = {"model.layers.0.a": "one.safetensors", "model.layers.1.a": "two.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    assert _folder_codes(folder) == ["unreadable-model-file"]
    _weights(folder / "two.safetensors", ["model.layers.1.a"])
    assert _folder_codes(folder) == ["layer-mismatch"]


IMAGES: dict[str, Any] = {"format": 1, "channels": 1, "height": 8, "width": 8, "classes": ["a"], "family": "vae"}


def _images(folder: Path, architecture: dict[str, Any], *files: str, **more: Any) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "image.json").write_text(json.dumps({**IMAGES, "architecture": architecture, **more}))
    for name in files:
        (folder / name).parent.mkdir(exist_ok=True)
        if name.endswith(".json"):
            (folder / name).write_text("{}")
        else:
            _weights(folder / name, ["w"])


def test_a_folder_of_a_model_of_images(write_recipe: Write) -> None:
    path = write_recipe()
    folder = path.parent / "model"
    drawing = (
        "stages.draw={kind: finetune, family: ddpm, init_from: ./model, data: {source: digits}, "
        "train: {steps: 4, global_batch: 4, optimizer: {lr: 1}}}"
    )
    _images(folder, {"family": "ddpm"}, "unet/config.json", "scheduler/scheduler_config.json")
    read_folder.cache_clear()
    assert _codes(path, "stages.draw.init_from", drawing) == ["missing-model-file"]
    _images(folder, {"family": "ddpm"}, "unet/diffusion_pytorch_model.safetensors")
    read_folder.cache_clear()
    assert check_file(path, [drawing], check_data=DataCheck())[1] == []
    assert _codes(path, "stages.chat.init_from", "stages.chat.init_from=./model") == ["wrong-artifact-kind"]
    _images(folder, {"family": "vae"}, "model.safetensors")
    read_folder.cache_clear()
    assert _codes(path, "stages.draw.init_from", drawing) == ["wrong-artifact-kind"]
    wrongs: tuple[dict[str, Any], ...] = ({"classes": [7]}, {"format": 2}, {"height": "8"})
    for wrong in wrongs:
        _images(folder, {"family": "vae"}, **wrong)
        assert _folder_codes(folder, "vae") == ["unreadable-model-file"]
    _images(folder, {"family": "vae", "width": 0})
    assert _folder_codes(folder, "vae") == ["unreadable-model-file"]


def test_a_folder_s_length_and_modules_are_checked(write_recipe: Write) -> None:
    path = write_recipe(("init_from: base", "init_from: ./model"))
    _model(path.parent / "model", max_position_embeddings=32, model_type="gpt2")
    read_folder.cache_clear()
    assert _codes(path, "stages.chat.train.sequence_length") == ["sequence-too-long"]
    assert _codes(path, "stages.chat.lora.target_modules.0") == ["unknown-module"]


def test_a_folder_of_another_kind_is_named(write_recipe: Write) -> None:
    path = write_recipe(("init_from: base", "init_from: ./model"))
    _model(path.parent / "model", architectures=["LlamaForSequenceClassification"], id2label={"0": "a"})
    read_folder.cache_clear()
    assert _codes(path, "stages.chat.init_from") == ["wrong-artifact-kind"]
    _model(path.parent / "model", architectures=["LlamaForSequenceClassification"], id2label={"0": "a", "1": "b"})
    read_folder.cache_clear()
    assert _codes(path, "stages.chat.init_from") == ["unsupported-model"]


def test_a_stock_bert_is_taken(tmp_path: Path) -> None:
    """It names no end token, its sep token ends a text; a bare one has no head."""
    folder = tmp_path / "model"
    for name, is_headless in (("BertModel", True), ("BertForPreTraining", False), ("BertForMaskedLM", False)):
        _model(folder, model_type="bert", architectures=[name])
        _tokenizer(folder, sep_token="<eos>", pad_token="<pad>")
        read_folder.cache_clear()
        facts = read_folder(folder, "model")
        assert facts.problems == []
        assert facts.tokenizer is not None
        assert facts.tokenizer.eos_token == "<eos>"
        assert facts.model_class is not None
        assert (facts.model_class.kind, facts.model_class.is_headless) == ("model", is_headless)


def test_an_existing_tokenizer(write_recipe: Write) -> None:
    path = write_recipe(("train: bpe\n      vocab_size: 512", "from: ./words"))
    place = "stages.base.tokenizer"
    assert _codes(path, f"{place}.from") == ["missing-folder"]
    _tokenizer(path.parent / "words", eos_token="<eos>")
    read_folder.cache_clear()
    assert check_file(path, check_data=DataCheck())[1] == [], "a usual pad token of the vocabulary serves"
    _tokenizer(path.parent / "words", pad_token="<pad>")
    read_folder.cache_clear()
    assert _codes(path, place) == ["missing-special-token"]
    assert _codes(path, place, f"{place}.eos_token=<pad>") == ["missing-special-token"]
    _tokenizer(path.parent / "words", eos_token="<eos>")
    read_folder.cache_clear()
    assert _codes(path, f"{place}.pad_token", f"{place}.pad_token=<eos>") == ["pad-token-conflict"]
    assert _codes(path, f"{place}.pad_token", f"{place}.pad_token=<bad>") == ["unknown-token"]
    assert check_file(path, [f"{place}.pad_token=<pad>"], check_data=DataCheck())[1] == []
