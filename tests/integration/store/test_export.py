"""Exported folders open with stock transformers and peft and give the logits of the model that went in."""

import json
import os
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from launch.cli.main import app
from recipes.errors import RequestError
from trainers.models.imports import import_folder
from trainers.store.export import export, parts_of
from trainers.store.inspection import verify
from trainers.store.manifest import ArtifactManifest, FileEntry, Parent, files_digest
from trainers.store.store import Store

TOKENS = torch.tensor([[1, 2, 3, 4]])


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return Store.open(str(tmp_path_factory.mktemp("store")))


@pytest.fixture(scope="module")
def base(store: Store, tmp_path_factory: pytest.TempPathFactory) -> ArtifactManifest:
    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=16, hidden_size=8, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=32, eos_token_id=1, bos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1, "a": 2}, unk_token="<pad>")).save(
        str(folder / "tokenizer.json")
    )
    (folder / "tokenizer_config.json").write_text('{"eos_token": "<eos>", "pad_token": "<pad>"}')
    return import_folder(store, folder)


@pytest.fixture(scope="module")
def chat(store: Store, base: ArtifactManifest, tmp_path_factory: pytest.TempPathFactory) -> ArtifactManifest:
    """An artifact with the adapter alone."""
    folder = tmp_path_factory.mktemp("chat")
    model = get_peft_model(load(store.folder(base, "model")), LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter)
    model.save_pretrained(folder / "adapter")
    config = folder / "adapter" / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "base_model_name_or_path": base.digest}))
    (folder / "adapter" / "README.md").unlink(missing_ok=True)
    return commit(store, folder, "chat", base, "cd")


def commit(store: Store, folder: Path, stage: str, base: ArtifactManifest, mark: str) -> ArtifactManifest:
    files: dict[str, FileEntry] = store.objects.put_folder(folder)
    manifest = ArtifactManifest(
        fingerprint=mark * 32, digest=files_digest(files), kind="adapter", stage=stage, files=files, base=base.digest,
        parents={"init_from": Parent(fingerprint=base.fingerprint, digest=base.digest)},
    )  # fmt: skip
    return store.put_artifact(manifest).manifest


def load(folder: Path) -> LlamaForCausalLM:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    return model.eval()(TOKENS).logits


def test_a_model_lands_in_the_folder_itself(store: Store, base: ArtifactManifest, tmp_path: Path) -> None:
    folder = export(store, base, tmp_path / "out" / "model")
    assert torch.equal(logits(load(folder)), logits(load(store.folder(base, "model"))))
    config = folder / "config.json"
    config.write_text("mine now")
    assert verify(store).damage == [], "an exported file is a copy"
    with pytest.raises(RequestError, match=f"{folder} exists"):
        export(store, base, folder)


def test_an_adapter_lands_beside_its_base(
    store: Store, base: ArtifactManifest, chat: ArtifactManifest, tmp_path: Path
) -> None:
    target = tmp_path / "adapter"
    target.mkdir()
    folder = export(store, chat, target)
    expected = logits(PeftModel.from_pretrained(load(store.folder(base, "model")), store.folder(chat, "adapter")))
    assert not torch.allclose(expected, logits(load(store.folder(base, "model"))))
    opened = PeftModel.from_pretrained(load(folder / "base"), folder)
    assert torch.equal(logits(opened), expected)
    assert opened.peft_config["default"].base_model_name_or_path == str(folder / "base")
    stock = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)  # finds the base by the name
    assert torch.allclose(logits(stock), expected, atol=1e-6)


def test_merge_writes_one_model(store: Store, base: ArtifactManifest, chat: ArtifactManifest, tmp_path: Path) -> None:
    folder = export(store, chat, tmp_path / "merged", merge=True)
    expected = logits(PeftModel.from_pretrained(load(store.folder(base, "model")), store.folder(chat, "adapter")))
    assert torch.allclose(logits(load(folder)), expected, atol=1e-5)
    assert (folder / "tokenizer.json").is_file()
    assert not (folder / "adapter_config.json").exists()
    assert [name for name in os.listdir(tmp_path) if name.startswith(".")] == []


def test_a_merged_model_of_the_artifact_is_taken_as_it_is(
    store: Store, base: ArtifactManifest, chat: ArtifactManifest, tmp_path: Path
) -> None:
    source = tmp_path / "source"
    store.folder(chat, "adapter", into=source / "adapter")
    export(store, chat, source / "model", merge=True)
    both = commit(store, source, "both", base, "ef")
    assert parts_of(both) == ["adapter", "model"]
    merged = export(store, both, tmp_path / "merged", merge=True)
    assert (merged / "model.safetensors").read_bytes() == (source / "model" / "model.safetensors").read_bytes()
    assert (export(store, both, tmp_path / "adapter") / "base" / "model.safetensors").exists()
    assert (export(store, both, tmp_path / "part", part="model") / "config.json").exists()
    with pytest.raises(RequestError, match=r"'critic'.* adapter, model"):
        export(store, both, tmp_path / "critic", part="critic")


def test_an_adapter_without_its_base_is_refused(store: Store, chat: ArtifactManifest, tmp_path: Path) -> None:
    lost = chat.model_copy(update={"base": "00" * 32})
    with pytest.raises(RequestError, match="digest 0000"):
        export(store, lost, tmp_path / "out")
    assert os.listdir(tmp_path) == []


def test_an_exported_adapter_comes_back_with_its_base_and_merged(
    store: Store, base: ArtifactManifest, chat: ArtifactManifest, tmp_path: Path
) -> None:
    folder = export(store, chat, tmp_path / "adapter")
    other = str(tmp_path / "other")
    arguments = ["store", "import", str(folder), "--name", "chat", "--merge", "--store", other]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines()[-1] == "store://chat"
    taken = Store.open(other)
    merged = taken.resolve("chat")
    assert {manifest.kind for manifest in taken.list_artifacts()} == {"model", "adapter"}
    assert base.digest in [manifest.digest for manifest in taken.list_artifacts()]
    expected = logits(PeftModel.from_pretrained(load(store.folder(base, "model")), store.folder(chat, "adapter")))
    assert torch.allclose(logits(load(taken.folder(merged, "model"))), expected, atol=1e-5)
    adapters = [manifest for manifest in taken.list_artifacts() if manifest.kind == "adapter"]
    weights = "adapter/adapter_model.safetensors"
    assert [(found.base, found.files[weights]) for found in adapters] == [(base.digest, chat.files[weights])] * 2
    assert parts_of(merged) == ["adapter", "model"]


def test_an_adapter_without_its_model_is_not_taken_in(
    store: Store, base: ArtifactManifest, chat: ArtifactManifest, tmp_path: Path
) -> None:
    folder = store.folder(chat, "adapter", into=tmp_path / "adapter")
    with pytest.raises(RequestError, match=f"{base.digest} at .*/base"):
        import_folder(store, folder)
    store.folder(base, "model", into=folder / "base")
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").chmod(0o644)
    (folder / "adapter_config.json").write_text(json.dumps({**config, "peft_type": "LOHA"}))
    with pytest.raises(RequestError, match="peft_type is 'LOHA'; only LORA is taken in"):
        import_folder(store, folder)
    for start in ("pissa_niter_4", "OLoRA", "corda", "loftq"):  # on weights that are no longer the model's in base/
        (folder / "adapter_config.json").write_text(json.dumps({**config, "init_lora_weights": start}))
        with pytest.raises(RequestError, match=start):
            import_folder(store, folder)
    (folder / "adapter_config.json").write_text(json.dumps({**config, "init_lora_weights": "gaussian"}))
    assert import_folder(store, folder).kind == "adapter"


def test_a_report_is_written_whole(store: Store, tmp_path: Path) -> None:
    contents = {"report.json": b"{}", "samples/first.json": b"[]"}
    files = {name: FileEntry(sha256=store.objects.put_bytes(data), bytes=len(data)) for name, data in contents.items()}
    report = ArtifactManifest(
        fingerprint="12" * 32, digest=files_digest(files), kind="report", stage="eval", files=files
    )
    folder = export(store, report, tmp_path / "report")
    assert {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()} == set(contents)
