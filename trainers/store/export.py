"""Artifacts leave the store as folders that stock transformers and peft open."""

import json
import os
import secrets
import shutil
from pathlib import Path
from typing import Any

from recipes.errors import RequestError
from recipes.models.architecture import MODEL_TYPES
from trainers.store.hf_loaders import open_adapter, open_model
from trainers.store.manifest import ArtifactManifest
from trainers.store.materialised_folders import files_under
from trainers.store.place import demand_empty, writing
from trainers.store.store import Store

MODEL_PARTS = ("model", "actor")
"""Parts that a bare artifact means, in this order."""


def parts_of(manifest: ArtifactManifest) -> list[str]:
    """Return the parts of an artifact, the top folders of its files."""
    return sorted({name.split("/", 1)[0] for name in manifest.files if "/" in name})


def export(
    store: Store, manifest: ArtifactManifest, directory: Path, *, merge: bool = False, part: str | None = None
) -> Path:
    """Write an artifact to a new folder.

    A full model lands in the folder itself. An adapter does too, with its base model in `base/` and named there; with
    `merge` the adapter's merged model is written instead. `part` picks one of several parts (`critic`). What has
    neither model nor adapter (a report) is written whole.
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
    if chosen != "adapter":
        _copy(store, manifest, chosen, building)
        return
    base, base_part = _find_base(store, manifest)
    if merge:
        _merge(store, manifest, base, base_part, building)
        return
    _copy(store, manifest, "adapter", building)
    _copy(store, base, base_part, building / "base")
    _name_base(building, target / "base")


def _main_part(parts: list[str], merge: bool) -> str:
    models = [name for name in MODEL_PARTS if name in parts]
    if "adapter" in parts and not (merge and models):
        return "adapter"
    return models[0] if models else ""


def _copy(store: Store, manifest: ArtifactManifest, prefix: str, target: Path) -> None:
    """Copy files that are hash-checked; the copies are the user's to change."""
    for name, entry in sorted(files_under(manifest.files, prefix).items()):
        place = target / name
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(store.objects.local_path(entry.sha256), place)


def _find_base(store: Store, manifest: ArtifactManifest) -> tuple[ArtifactManifest, str]:
    """Return the artifact that the adapter is bound to by digest, and the part that holds its whole model."""
    if manifest.base is None:
        raise RequestError(f"{manifest.stage} has an adapter and no base")
    parents = [store.find_artifact(parent.fingerprint) for parent in manifest.parents.values()]
    candidates = [found for found in parents if found is not None and found.digest == manifest.base]
    if not candidates:
        candidates = [found for found in store.list_artifacts() if found.digest == manifest.base]
    if not candidates:
        raise RequestError(f"the base of {manifest.stage}, digest {manifest.base}, is not in store {store.uri}")
    part = _main_part(parts_of(candidates[0]), merge=True)
    if part not in MODEL_PARTS:
        raise RequestError(f"the base of {manifest.stage}, {candidates[0].stage}, holds no whole model")
    return candidates[0], part


def _name_base(adapter: Path, base: Path) -> None:
    path = adapter / "adapter_config.json"
    config = json.loads(path.read_bytes())
    config["base_model_name_or_path"] = str(base)
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def _merge(store: Store, manifest: ArtifactManifest, base: ArtifactManifest, base_part: str, target: Path) -> None:
    """Write the base with the adapter added to its weights, which is computed in fp32 and rounded once."""
    import torch
    import transformers
    from transformers.utils import logging

    logging.disable_progress_bar()
    config = json.loads((store.folder(manifest, "adapter") / "adapter_config.json").read_bytes())
    folder = store.folder(base, base_part)
    stock = _stock_class(manifest, folder, config.get("task_type"))
    options: dict[str, Any] = {"num_labels": 1} if manifest.kind == "reward_model" else {}
    model = open_model(getattr(transformers, stock), folder, dtype=torch.float32, **options)
    merged = open_adapter(model, store.folder(manifest, "adapter")).merge_and_unload(safe_merge=True)
    _copy(store, base, base_part, target)
    for path in target.glob("model*.safetensors*"):
        path.unlink()
    kept = {path.name: path.read_bytes() for path in target.iterdir()}
    stored = json.loads(kept["config.json"])
    merged.to(getattr(torch, stored.get("dtype") or stored.get("torch_dtype") or "float32")).save_pretrained(target)
    for name in ("generation_config.json",):
        if name in kept:
            (target / name).write_bytes(kept[name])


def _stock_class(manifest: ArtifactManifest, base: Path, task: str | None) -> str:
    """Return the name of transformers' class of what an adapter is merged into."""
    if manifest.kind == "reward_model":
        return "AutoModelForSequenceClassification"
    path = base / "config.json"
    model_type = json.loads(path.read_bytes()).get("model_type") if path.is_file() else None
    names = {
        "decoder": "AutoModelForCausalLM",
        "encoder_decoder": "AutoModelForSeq2SeqLM",
        "vision_language": "AutoModelForImageTextToText",
    }
    found = None if model_type is None else names.get(MODEL_TYPES.get(model_type, "decoder"))
    if found is None or task not in (None, "CAUSAL_LM", "SEQ_2_SEQ_LM"):
        raise RequestError(
            f"an adapter on {model_type or 'a model of pictures'} ({task or 'no task_type'}) is not merged here; "
            "export the merged model of the stage that made it: store export --merge"
        )
    return found
