"""Artifacts leave the store as folders that stock transformers and peft open."""

import json
import os
import secrets
import shutil
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

from recipes.errors import RequestError
from recipes.models.architecture import MODEL_TYPES
from recipes.models.decoder import DECODER
from trainers.store.adapters import ADAPTER, WHOLE_PARTS, Weights, find_stack
from trainers.store.hf_loaders import ADAPTER_CONFIG, open_adapter, open_model
from trainers.store.joined_adapters import is_joinable, write_joined
from trainers.store.manifest import ArtifactManifest
from trainers.store.materialised_folders import files_under
from trainers.store.place import demand_empty, writing
from trainers.store.store import Store


def parts_of(manifest: ArtifactManifest) -> list[str]:
    """Return the parts of an artifact, the top folders of its files."""
    return sorted({name.split("/", 1)[0] for name in manifest.files if "/" in name})


def export(
    store: Store, manifest: ArtifactManifest, directory: Path, *, merge: bool = False, part: str | None = None
) -> Path:
    """Write an artifact to a new folder.

    A full model lands in the folder itself. An adapter does too, with its base model in `base/` and named there; one on
    others is joined with them to one adapter. With `merge` the adapter's merged model is written instead. `part` picks
    one of several parts (`critic`). What has neither model nor adapter (a report) is written whole.
    """
    target = directory.absolute()
    demand_empty(target)
    parts = parts_of(manifest)
    if part is not None and part not in parts:
        raise RequestError(f"{manifest.stage} has no part {part!r}; it has {', '.join(parts) or 'files only'}")
    chosen = part if part is not None else _main_part(parts, merge)
    building = target.with_name(f".{target.name}.{secrets.token_hex(6)}")
    with writing(target):
        building.mkdir(parents=True)
        try:
            _write(store, manifest, chosen, merge, building, target)
            if target.exists():
                target.rmdir()
            os.rename(building, target)
        finally:
            shutil.rmtree(building, ignore_errors=True)
    return target


def _write(store: Store, manifest: ArtifactManifest, chosen: str, merge: bool, building: Path, target: Path) -> None:
    """Write what was chosen of an artifact to `building`, which becomes `target`."""
    if chosen != ADAPTER:
        _copy(store, manifest, chosen, building)
        return
    weights = _opened(store, manifest)
    if merge:
        _merge(weights, manifest.kind, building)
        return
    own, below = weights.adapters[-1], weights.adapters[:-1]
    if below and is_joinable(weights.adapters):
        write_joined(weights.adapters, building)
    else:
        _copy_folder(own, building)
    if below and not is_joinable(weights.adapters):
        _merge(replace(weights, adapters=below), "model", building / "base", "float32")
    elif weights.quantized is not None:
        _merge(replace(weights, adapters=()), "model", building / "base", weights.dtype)
    else:
        _copy_folder(weights.folder, building / "base")
    _name_base(building, target / "base")


def _main_part(parts: list[str], merge: bool) -> str:
    models = [name for name in WHOLE_PARTS if name in parts]
    if "adapter" in parts and not (merge and models):
        return "adapter"
    return models[0] if models else ""


def _copy(store: Store, manifest: ArtifactManifest, prefix: str, target: Path) -> None:
    """Copy files that are hash-checked; the copies are the user's to change."""
    for name, entry in sorted(files_under(manifest.files, prefix).items()):
        place = target / name
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(store.objects.local_path(entry.sha256), place)


def _copy_folder(folder: Path, target: Path) -> None:
    """Copy a folder of hash-checked files."""
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            place = target / path.relative_to(folder)
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, place)


def _opened(store: Store, manifest: ArtifactManifest) -> Weights:
    """Return the whole model and the adapters that an artifact's adapter is bound to by digest, itself the last."""
    if manifest.base is None:
        raise RequestError(f"{manifest.stage} has an adapter and no base")
    found = find_stack(store, manifest, (*manifest.lies_on, manifest.digest))
    if found is None:
        listed = ", ".join(manifest.lies_on)
        raise RequestError(f"the base of {manifest.stage}, digest {listed}, is not in store {store.uri}")
    return found


def _name_base(adapter: Path, base: Path) -> None:
    path = adapter / "adapter_config.json"
    config = json.loads(path.read_bytes())
    config["base_model_name_or_path"] = str(base)
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def _merge(weights: Weights, kind: str, target: Path, dtype: str | None = None) -> None:
    """Write a whole model with adapters added to its weights, computed in fp32 and rounded once, to `dtype` or its own.

    `kind` is that of the artifact whose adapter is the last. A base that adapters learned on in few bits is written as
    these give it back.
    """
    import torch
    import transformers
    from transformers.utils import logging

    from trainers.runtime.low_bits import round_linears

    logging.disable_progress_bar()
    last = weights.adapters[-1] / ADAPTER_CONFIG if weights.adapters else None
    task = None if last is None else json.loads(last.read_bytes()).get("task_type")
    is_reward = kind == "reward_model"
    stock = "AutoModelForSequenceClassification" if is_reward else _stock_class(weights.folder, task)
    options: dict[str, Any] = {"num_labels": 1} if is_reward else {}
    model = open_model(getattr(transformers, stock), weights.folder, dtype=torch.float32, **options)
    was_tied = model.config.get_text_config().tie_word_embeddings
    if weights.quantized is not None:
        round_linears(model, weights.quantized, getattr(torch, weights.dtype))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Input and output embeddings are no longer tied")  # `_tie` sees to it
        for adapter in weights.adapters:
            model = open_adapter(model, adapter).merge_and_unload(safe_merge=True)
    if was_tied:
        _tie(model)
    _copy_folder(weights.folder, target)
    for path in target.glob("model*.safetensors*"):
        path.unlink()
    kept = {path.name: path.read_bytes() for path in target.iterdir()}
    stored = json.loads(kept["config.json"])
    model.to(getattr(torch, dtype or stored.get("dtype") or stored.get("torch_dtype") or "float32"))
    model.save_pretrained(target)
    for name in ("generation_config.json",):
        if name in kept:
            (target / name).write_bytes(kept[name])


def _tie(model: Any) -> None:
    """Make head and embedding of a merged model one tensor again, unless an adapter told them apart."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head is None:
        return
    is_tied = bool((head.weight == embedding.weight).all())
    if is_tied:
        head.weight = embedding.weight
    model.config.tie_word_embeddings = model.config.get_text_config().tie_word_embeddings = is_tied


def _stock_class(base: Path, task: str | None) -> str:
    """Return the name of transformers' class of what an adapter is merged into."""
    path = base / "config.json"
    model_type = json.loads(path.read_bytes()).get("model_type") if path.is_file() else None
    family = None if model_type is None else MODEL_TYPES.get(model_type, DECODER)
    is_merged = family is not None and family.takes_adapters and not family.has_classes
    if family is None or not is_merged or task not in (None, "CAUSAL_LM", "SEQ_2_SEQ_LM"):
        raise RequestError(
            f"an adapter on {model_type or 'a model of images'} ({task or 'no task_type'}) is not merged here; "
            "export the merged model of the stage that made it: store export --merge"
        )
    return family.auto_class
