"""Model folders in the Hugging Face layout: written, probed, and verified by stock classes."""

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from recipes.errors import StageError
from recipes.models.model_kinds import MODEL_KINDS, ModelKind
from recipes.tokenizers.token_contract import TokenizerFacts, token_problems
from trainers.data.image_processor import ImageProcessor, load_image_processor
from trainers.models.forward_forms import image_arguments, record_of
from trainers.models.load import stock_class
from trainers.models.lora import DEFAULT, active_adapters, adapter_tensors, plain_name, start_names
from trainers.models.merged_adapters import base_tensors
from trainers.models.saved_modules import tied_names
from trainers.models.stack import load_stack
from trainers.models.verification import MergeLoss, OpenedFiles, Probe
from trainers.models.vision_language import demand_fitting, sample_images
from trainers.runtime.precision import exact_matmul
from trainers.store.adapters import Weights
from trainers.store.hf_loaders import open_adapter

WEIGHTS = "model.safetensors"
PROBE_TOKENS = 16
PROBE_POSITIONS = 4
_VOLATILE = ("transformers_version", "_name_or_path", "_attn_implementation", "attn_implementation", "peft_version")
"""Configuration keys that name a version or a place; no artifact holds them."""


def write_model(
    folder: Path,
    kind: ModelKind,
    config: Any,
    tensors: Iterable[tuple[str, Tensor]],
    further_files: Mapping[str, bytes],
    *,
    dtype: torch.dtype,
    end_ids: Sequence[int] = (),
    max_shard_bytes: int = 5_000_000_000,
) -> None:
    """Write config.json, safetensors, generation_config.json (language models) and the files beside them; rank 0 only.

    `tensors` have the stock class's names, tied ones once. `end_ids` are what ends a response, where that is not the
    configuration's end token alone. More than `max_shard_bytes` become shards with an index. The
    same weights give the same bytes.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _write_weights(folder, ((name, tensor.to(dtype)) for name, tensor in tensors), max_shard_bytes)
    write_json(folder / "config.json", model_config(config, kind, dtype))
    if MODEL_KINDS[kind].writes:
        names = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id", "forced_eos_token_id")
        ids = {key: getattr(config.get_text_config(), key, None) for key in names}
        if end_ids:
            ids["eos_token_id"] = list(end_ids) if len(end_ids) > 1 else end_ids[0]
        write_json(folder / "generation_config.json", {key: value for key, value in ids.items() if value is not None})
    for name, content in further_files.items():
        (folder / name).write_bytes(content)


def file_tensors(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return what a model's files hold, of its parameters and its buffers; a tied one under the name that is loaded."""
    tied = tied_names(model)
    named = {
        tied[name] if name in tied and tied[name] not in tensors else name: tensor for name, tensor in tensors.items()
    }
    return {**named, **{name: tensor for name, tensor in saved_buffers(model).items() if name not in named}}


def saved_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Return the buffers that a model's files hold beside its parameters, as a mixture of experts' routing biases."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    left_out = getattr(model, "_keys_to_ignore_on_load_missing", None) or ()
    return {
        plain_name(name): tensor
        for name, tensor in model.state_dict().items()
        if name not in parameters and not any(re.search(pattern, name) for pattern in left_out)
    }


def model_config(config: Any, kind: ModelKind, dtype: torch.dtype) -> dict[str, Any]:
    """Return the content of config.json: only what describes the model."""
    content = {key: value for key, value in json.loads(config.to_json_string()).items() if key not in _VOLATILE}
    content["architectures"] = [stock_class(config.model_type, kind).__name__]
    content["dtype"] = str(dtype).removeprefix("torch.")
    if MODEL_KINDS[kind].has_score:
        content |= {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
    if MODEL_KINDS[kind].scores_tokens:
        content["classifier_dropout"] = 0.0
    return content


def write_adapter(
    folder: Path, peft_config: Any, tensors: Iterable[tuple[str, Tensor]], *, base_digest: str, dtype: torch.dtype
) -> None:
    """Write adapter_config.json and adapter_model.safetensors in peft's layout, the base by digest; rank 0 only."""
    folder.mkdir(parents=True, exist_ok=True)
    content = {key: _plain(value) for key, value in peft_config.to_dict().items() if key not in _VOLATILE}
    content |= {"base_model_name_or_path": base_digest, "inference_mode": True}
    write_json(folder / "adapter_config.json", content)
    cast: dict[str, Tensor] = {}
    places: set[int] = set()
    for name, tensor in tensors:
        found = tensor.to(dtype).contiguous()
        cast[name] = found.clone() if found.data_ptr() in places else found  # tied ones are saved twice
        places.add(found.data_ptr())
    save_file(cast, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def probe(
    model: nn.Module,
    kind: ModelKind,
    weights: Iterable[tuple[str, Tensor]],
    images: ImageProcessor | None = None,
) -> Probe:
    """Run the fixed prompt through a bare, whole model in fp32, with an image before it where it takes any.

    `weights` are its tensors by their names in the files. The model's mode is restored.
    """
    config: Any = model.config
    left_out = {config.get_text_config().pad_token_id}
    before: list[int] = []
    if images is not None:
        left_out.add(images.image_id)
        before = images.sample.ids.tolist()
    ids = [
        token
        for token in (
            (7 * index * index + 3) % config.get_text_config().vocab_size for index in range(4 * PROBE_TOKENS)
        )
        if token not in left_out
    ]
    ids = before + ids[:PROBE_TOKENS]
    dtype = next(iter(model.parameters())).dtype
    return Probe.of(model, lambda: _outputs(model, kind, ids, images), weights, dtype, ids)


def verify_folder(
    folder: Path,
    kind: ModelKind,
    expected: Probe | None,
    adapter: Path | None = None,
    *,
    start: Weights | None = None,
    merged: Path | None = None,
) -> tuple[float, MergeLoss | None]:
    """Open with stock classes; return the output difference over the outputs' size, and what merging has lost.

    Demands the exact key set, shapes, finite values, tied weights, and a tokenizer that fits; where a live model is
    `expected`, its weights bit for bit and its outputs. With `adapter` the peft adapter, and the scalar head that it
    brings, is put on the model first, over the adapters of its `start`; `merged` is the folder that must hold the same
    model with all of them merged. Raises StageError naming what is wrong.
    """
    config = json.loads((folder / "config.json").read_text())
    dtype = getattr(torch, config["dtype"]) if expected is None else expected.dtype
    facts = MODEL_KINDS[kind]
    brings_head = adapter is not None and not facts.predicts_tokens
    classes = _adapter_classes(adapter) if adapter is not None and facts.has_classes else ()
    model: Any = load_stack(
        start or Weights(folder, ()),
        kind,
        device=torch.device("cpu"),
        dtype=dtype,
        new_head_seed=0 if brings_head else None,
        classes=classes,
    )
    model.set_attn_implementation(record_of(model).attention)
    # T5Config says so of every T5, whatever the files hold.
    is_tied = bool(config.get("tie_word_embeddings")) and facts.predicts_tokens and config["model_type"] != "t5"
    if (
        is_tied
        and not (start and start.adapters)
        and model.get_output_embeddings().weight is not model.get_input_embeddings().weight
    ):
        raise StageError(f"{folder}: tie_word_embeddings is set but head and embedding differ")
    if not facts.has_score:
        _check_tokenizer(folder, model.config.get_text_config())
    images = None
    if facts.reads_images:
        images = load_image_processor(folder)
        demand_fitting(model, images)
    names = [*start_names(0 if start is None else len(start.adapters)), DEFAULT]
    if adapter is not None:
        model = with_adapter(model, adapter)
    model.eval()
    if expected is None:
        return 0.0, None
    token_ids = expected.token_ids

    def outputs() -> np.ndarray:
        with active_adapters(model, names):
            return _outputs(model, kind, token_ids, images)

    where = folder.name if adapter is None else f"{folder.name} with {adapter.name}"
    return OpenedFiles(where, model, file_weights(model, names[:-1]), outputs, names).compare(expected, merged)


def file_weights(model: Any, below: Sequence[str] = ()) -> dict[str, Tensor]:
    """Return a stock model's weights by their names in files; of peft's model the base's and the adapters'.

    The adapters `below` the uppermost have their own name before those in their files.
    """
    named = dict(model.named_parameters())
    if not hasattr(model, "peft_config"):
        return named
    from peft import get_peft_model_state_dict

    start = "base_model.model."
    base = {
        name.removeprefix(start): tensor
        for name, tensor in base_tensors(named).items()
        if not {"modules_to_save", "original_module"} & set(name.split("."))
    }
    bare = {name.removeprefix(start): tensor for name, tensor in named.items()}
    under = {f"{name}: {key}": tensor for name in below for key, tensor in adapter_tensors(bare, name).items()}
    return {**base, **under, **get_peft_model_state_dict(model, save_embedding_layers=False)}


def _outputs(model: Any, kind: ModelKind, token_ids: list[int], images: ImageProcessor | None = None) -> np.ndarray:
    was_training = model.training
    model.eval()
    device = next(iter(model.parameters())).device
    ids = torch.tensor([token_ids], device=device)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if images is not None:
        inputs |= image_arguments(model, ids, sample_images(images))
    if MODEL_KINDS[kind].reads_targets:
        inputs["decoder_input_ids"] = ids
    with exact_matmul(), torch.no_grad():
        logits = model(**inputs, use_cache=False).logits[0].float().cpu()
    model.train(was_training)
    kept: np.ndarray = (
        logits[-PROBE_POSITIONS:] if MODEL_KINDS[kind].predicts_tokens else logits.reshape(-1, 1)
    ).numpy()
    return np.ascontiguousarray(kept)


def with_adapter(model: Any, adapter: Path) -> Any:
    """Put a peft adapter on a model; raises StageError unless its file holds exactly the adapter's tensors."""
    from peft import get_peft_model_state_dict
    from safetensors import safe_open

    wrapped = open_adapter(model, adapter)
    with safe_open(adapter / "adapter_model.safetensors", framework="pt") as file:
        found = set(file.keys())
    wanted = set(get_peft_model_state_dict(wrapped, save_embedding_layers=False))
    if found != wanted:
        raise StageError(f"{adapter}: keys differ from the adapter's: {sorted(found ^ wanted)[:8]}")
    return wrapped


def _adapter_classes(adapter: Path) -> list[str]:
    """Return as many names of classes as the adapter's classifier tells apart."""
    from safetensors import safe_open

    with safe_open(adapter / "adapter_model.safetensors", framework="pt") as file:
        key = next(key for key in file.keys() if key.endswith("classifier.bias"))  # noqa: SIM118 - no mapping
        return [str(number) for number in range(file.get_slice(key).get_shape()[0])]


def _check_tokenizer(folder: Path, config: Any) -> None:
    """Open the tokenizer by its stock class where the folder has one; its ids must fit the model."""
    if not (folder / "tokenizer.json").exists():
        return
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
    special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    facts = TokenizerFacts(
        tokenizer.eos_token, tokenizer.pad_token, frozenset(special), tokenizer.get_vocab(), tokenizer.chat_template
    )
    path = folder / "generation_config.json"
    generation = json.loads(path.read_text()) if path.exists() else {}
    if problems := list(token_problems(facts, config.to_dict(), generation)):
        raise StageError(f"{folder}: {'; '.join(map(str, problems))}")


def _write_weights(folder: Path, tensors: Iterator[tuple[str, Tensor]], max_shard_bytes: int) -> None:
    """Write shards as they fill up; one shard keeps the plain name."""
    shards: list[tuple[Path, list[str]]] = []
    total = 0

    def flush(part: dict[str, Tensor]) -> None:
        path = folder / f"part-{len(shards)}"
        save_file(part, path, metadata={"format": "pt"})
        shards.append((path, list(part)))

    part: dict[str, Tensor] = {}
    size = 0
    for name, tensor in tensors:
        if part and size + tensor.nbytes > max_shard_bytes:
            flush(part)
            part, size = {}, 0
        part[name] = tensor.contiguous()
        size += tensor.nbytes
        total += tensor.nbytes
    flush(part)
    if len(shards) == 1:
        shards[0][0].rename(folder / WEIGHTS)
        return
    places: dict[str, str] = {}
    for number, (path, names) in enumerate(shards, start=1):
        final = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        path.rename(folder / final)
        places |= dict.fromkeys(names, final)
    write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": places})


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write JSON such that equal contents give equal bytes."""
    path.write_text(json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def _plain(value: Any) -> Any:
    """Give sets an order and enumerations their value."""
    if isinstance(value, set | frozenset):
        return sorted(value)
    return getattr(value, "value", value)
