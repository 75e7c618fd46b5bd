"""Folders of others are opened by stock classes, and nothing in such a folder can make those unpickle or import."""

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models

from launch.sampling.text import sample_texts
from recipes.errors import RequestError
from trainers.models.folders import with_adapter
from trainers.models.load import load_model

CPU = torch.device("cpu")


class Canary:
    """Leaves a file where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (str(self.path),)


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value))


def edit(path: Path, **changes: Any) -> None:
    write_json(path, {**json.loads(path.read_text()), **changes})


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, and an adapter with its base, as stock libraries write them."""
    place = tmp_path_factory.mktemp("parts")
    config = transformers.LlamaConfig(
        vocab_size=3, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
        pad_token_id=0, bos_token_id=1, eos_token_id=1,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    model.save_pretrained(place / "model")
    write_json(place / "model" / "tokenizer_config.json", {"eos_token": "<eos>", "pad_token": "<pad>"})
    words = Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1, "a": 2}, unk_token="<pad>"))
    words.save(str(place / "model" / "tokenizer.json"))
    lora = peft.LoraConfig(r=2, target_modules=["v_proj"], task_type="CAUSAL_LM")
    peft.get_peft_model(model, lora).save_pretrained(place / "adapter")
    shutil.copytree(place / "model", place / "adapter" / "base")
    return place


@pytest.fixture
def folder(parts: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(parts, tmp_path / "foreign"))


@pytest.fixture(autouse=True)
def unpickled(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was unpickled, whether or not the unpickler would have refused it."""
    found: list[str] = []
    load, loads, torch_load = pickle.load, pickle.loads, torch.load

    def watched(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any, **options: Any) -> Any:
            found.append(name)
            return call(*arguments, **options)

        return run

    monkeypatch.setattr(pickle, "load", watched("pickle.load", load))
    monkeypatch.setattr(pickle, "loads", watched("pickle.loads", loads))
    monkeypatch.setattr(torch, "load", watched("torch.load", torch_load))
    return found


def pickled(folder: Path, name: str, canary: Path) -> None:
    (folder / name).write_bytes(pickle.dumps(Canary(canary)))


def only_pickle(folder: Path, canary: Path) -> None:
    torch.save(load_file(folder / "model" / "model.safetensors"), folder / "model" / "pytorch_model.bin")
    (folder / "model" / "model.safetensors").unlink()


def index_names_pickle(folder: Path, canary: Path) -> None:
    names = load_file(folder / "model" / "model.safetensors")
    (folder / "model" / "model.safetensors").unlink()
    pickled(folder / "model", "a.bin", canary)
    write_json(folder / "model" / "model.safetensors.index.json", {"weight_map": dict.fromkeys(names, "a.bin")})


def config_names_pickle(folder: Path, canary: Path) -> None:
    pickled(folder / "model", "adapter_model.bin", canary)
    edit(folder / "model" / "config.json", transformers_weights="adapter_model.bin")


def config_names_config(folder: Path, canary: Path) -> None:
    """transformers reads config.4.0.0.json in its place."""
    place = folder / "model"
    pickled(place, "adapter_model.bin", canary)
    shutil.copyfile(place / "config.json", place / "config.4.0.0.json")
    edit(place / "config.4.0.0.json", transformers_weights="adapter_model.bin")
    edit(place / "config.json", configuration_files=["config.4.0.0.json"])


def adapter_is_pickle(folder: Path, canary: Path) -> None:
    (folder / "adapter" / "adapter_model.safetensors").unlink()
    pickled(folder / "adapter", "adapter_model.bin", canary)


def adapter_imports(folder: Path, canary: Path) -> None:
    edit(folder / "adapter" / "adapter_config.json", megatron_config={"a": 1}, megatron_core="antigravity")


def adapter_of_a_kind_that_loads(folder: Path, canary: Path) -> None:
    pickled(folder / "adapter", "prompt.pt", canary)
    edit(
        folder / "adapter" / "adapter_config.json",
        peft_type="MULTITASK_PROMPT_TUNING",
        prompt_tuning_init="AVERAGE_SOURCE_TASKS",
        prompt_tuning_init_state_dict_path=str(folder / "adapter" / "prompt.pt"),
    )


def own_code(folder: Path, canary: Path) -> None:
    (folder / "model" / "own.py").write_text(f"import os\nos.mkdir({str(canary)!r})\n")
    edit(folder / "model" / "config.json", auto_map={"AutoModelForCausalLM": "own.Own"})


def base_has_own_code(folder: Path, canary: Path) -> None:
    edit(folder / "adapter" / "base" / "config.json", auto_map={"AutoModelForCausalLM": "own.Own"})


def weights_are_a_device(folder: Path, canary: Path) -> None:
    (folder / "model" / "model.safetensors").unlink()
    (folder / "model" / "model.safetensors").symlink_to("/dev/zero")


def header_lies(folder: Path, canary: Path) -> None:
    with (folder / "model" / "model.safetensors").open("ab") as file:
        file.write(b"more")


HOSTILE: dict[str, tuple[Callable[[Path, Path], None], str, str]] = {
    "only pickle": (only_pickle, "model", r"only as pytorch_model\.bin, a format that can run code"),
    "index names pickle": (index_names_pickle, "model", r"index\.json names 'a\.bin', which is not a safetensors file"),
    "config names pickle": (config_names_pickle, "model", r"config\.json has transformers_weights"),
    "config names config": (config_names_config, "model", r"config\.json has configuration_files"),
    "adapter is pickle": (adapter_is_pickle, "adapter", r"only as adapter_model\.bin, a format that can run code"),
    "adapter imports": (adapter_imports, "adapter", r"adapter_config\.json has megatron_config"),
    "adapter loads": (adapter_of_a_kind_that_loads, "adapter", r"peft_type is 'MULTITASK_PROMPT_TUNING'"),
    "own code": (own_code, "model", r"config\.json has auto_map"),
    "base has own code": (base_has_own_code, "adapter", r"base/config\.json has auto_map"),
    "device": (weights_are_a_device, "model", r"model\.safetensors is not a file"),
    "header lies": (header_lies, "model", r"model\.safetensors has \d+ bytes; its header accounts for"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_folder_that_could_run_code_is_refused_by_file(
    folder: Path, unpickled: list[str], refused: Any, case: str
) -> None:
    damage, part, message = HOSTILE[case]
    canary = Path("canary").absolute()
    damage(folder, canary)
    with refused(RequestError, message, folder):
        sample_texts(str(folder / part), ["a"], max_new_tokens=1)
    assert not canary.exists()
    assert unpickled == []


def adapter_beside(folder: Path, canary: Path) -> None:
    pickled(folder, "adapter_model.bin", canary)
    write_json(folder / "adapter_config.json", {"peft_type": "LORA", "r": 2, "target_modules": ["q_proj"]})


def checkpoint_beside(folder: Path, canary: Path) -> None:
    pickled(folder, ".metadata", canary)
    pickled(folder, "__0_0.distcp", canary)


def pickle_beside(folder: Path, canary: Path) -> None:
    pickled(folder, "pytorch_model.bin", canary)


@pytest.mark.parametrize("beside", [adapter_beside, checkpoint_beside, pickle_beside], ids=lambda call: call.__name__)
def test_what_lies_beside_a_model_is_not_seen(
    folder: Path, tmp_path: Path, unpickled: list[str], beside: Callable[[Path, Path], None]
) -> None:
    canary = tmp_path / "canary"
    beside(folder / "adapter" / "base", canary)
    beside(folder / "model", canary)
    (answer,) = sample_texts(str(folder / "adapter"), ["a"], max_new_tokens=1)
    assert answer["prompt"] == "a"
    load_model(folder / "model", "language_model", device=CPU)
    assert not canary.exists()
    assert unpickled == []


def test_an_adapters_weights_are_the_files(folder: Path) -> None:
    """The file's values arrive: an adapter of large numbers changes the model."""
    path = folder / "adapter" / "adapter_model.safetensors"
    save_file({name: torch.ones_like(tensor) for name, tensor in load_file(path).items()}, path)
    model: Any = load_model(folder / "adapter" / "base", "language_model", device=CPU)
    ids = torch.tensor([[2, 2]])
    before = model(ids).logits
    patched = with_adapter(model, folder / "adapter")
    assert not torch.allclose(patched(ids).logits, before)
