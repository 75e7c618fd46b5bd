"""LoRA on a vision-language model: what learns, what the artifact holds, and that stock classes answer as it does."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from launch.sampling.text import sample_texts
from recipes.errors import RequestError
from recipes.loading.load import load_recipe, parse_recipe
from tests.observers import Quiet
from tests.tiers import tiered
from trainers.models.imports import import_folder
from trainers.models.small_llava import DIGIT_TEXTS, write_small_llava
from trainers.models.small_vision import SMALL, write_small_vision
from trainers.runtime.distributed import Ranks
from trainers.store.export import export
from trainers.store.manifest import ArtifactManifest, files_digest
from trainers.store.store import Store
from trainers.tasks.language_model import run_language_model
from trainers.training.context import StageContext, verify_checks

SPEC: dict[str, Any] = {
    "kind": "finetune",
    "init_from": "./model",
    "lora": {"r": 4},
    "data": {"source": "jsonl", "files": ["rows.jsonl"], "hold_out": 0.2},
    "train": {"steps": 6, "global_batch": 8, "sequence_length": 64, "optimizer": {"lr": 3e-2}, "evaluation_rows": 16},
    "shard": {"engine": "plain", "precision": "fp32"},
}


PROJECTORS = (".multi_modal_projector.", ".visual.merger.", ".visual.deepstack_merger_list.", ".connector.")


def write_rows(folder: Path) -> None:
    rows = []
    for number in range(48):
        Image.fromarray(np.full((6, 6), 5 * number, dtype=np.uint8)).save(folder / f"{number}.png")
        answer = "dark" if number < 24 else "light"
        turns = [{"role": "user", "content": "Which?"}, {"role": "assistant", "content": answer}]
        rows.append({"images": [f"{number}.png"], "messages": turns})
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def run(
    folder: Path, name: str, changes: dict[str, Any], model_type: str = "llava", **model: Any
) -> tuple[Store, ArtifactManifest]:
    """Run a stage to its verified commit."""
    write_rows(folder)
    if model_type == "llava":
        write_small_llava(folder / "model", DIGIT_TEXTS, **{"image_size": 8, "width": 32} | model)
    else:
        write_small_vision(folder / "model", model_type, DIGIT_TEXTS)
    uri = str(folder / "store")
    store = Store.open(uri)
    spec = parse_recipe({"name": "small", "stages": {name: SPEC | changes}}).stages[name]
    inputs = {"init_from": import_folder(store, folder / "model")}
    fingerprint = hashlib.sha256(name.encode()).hexdigest()
    ranks = Ranks(0, 1, 0, torch.device("cpu"))
    lease = store.take_lease("run", name)
    context = StageContext(store, "run", name, fingerprint, lease, 0, folder, inputs, {}, Quiet(), ranks)
    candidate = run_language_model(spec, context)  # type: ignore[arg-type]
    assert candidate is not None
    assert verify_checks(store, candidate.files, list(candidate.checks), inputs, uri).difference < 1e-5
    made = ArtifactManifest(
        fingerprint=fingerprint,
        digest=files_digest(candidate.files),
        kind=candidate.kind,  # type: ignore[arg-type]
        stage=name,
        files=dict(candidate.files),
        base=candidate.base,
        architecture=dict(candidate.architecture or {}),
        metrics=dict(candidate.metrics),
    )
    store.put_artifact(made)
    store.name_artifact(name, fingerprint)
    return store, made


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Store, ArtifactManifest]:
    folder = tmp_path_factory.mktemp("vision")
    return (folder, *run(folder, "see", {}))


Tuned = tuple[Path, Store, ArtifactManifest]


def test_the_adapter_lies_on_the_language_part_alone(tuned: Tuned) -> None:
    folder, store, made = tuned
    adapter = load_file(store.folder(made, "adapter") / "adapter_model.safetensors")
    assert adapter
    assert all(".language_model.layers." in name for name in adapter)
    before, after = (
        load_file(folder / "model" / "model.safetensors"),
        load_file(store.folder(made, "model") / "model.safetensors"),
    )
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert before.keys() == after.keys()
    assert changed
    assert all(".language_model.layers." in name and "proj" in name for name in changed)
    assert set(made.metrics["responses"]) >= {"exact", "eos_rate", "prompts"}


def test_stock_classes_open_adapter_and_merged_model_and_agree(tuned: Tuned, tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForImageTextToText, AutoProcessor

    folder, store, made = tuned
    merged, adapter = export(store, made, tmp_path / "merged", merge=True), export(store, made, tmp_path / "adapter")
    processor = AutoProcessor.from_pretrained(merged, local_files_only=True)
    question = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Which?"}]}]
    text = processor.apply_chat_template(question, add_generation_prompt=True, tokenize=False)
    with Image.open(folder / "3.png") as image:
        inputs = processor(images=image.convert("RGB"), text=text, return_tensors="pt")
    base = AutoModelForImageTextToText.from_pretrained(adapter / "base", local_files_only=True)
    AutoProcessor.from_pretrained(adapter / "base", local_files_only=True)
    whole = AutoModelForImageTextToText.from_pretrained(merged, local_files_only=True).eval()
    with torch.no_grad():
        untuned = base.eval()(**inputs).logits
        patched = PeftModel.from_pretrained(base, adapter).eval()(**inputs).logits
        torch.testing.assert_close(whole(**inputs).logits, patched, atol=1e-5, rtol=1e-4)
    assert float((patched - untuned).abs().max()) > 1e-3
    answer = whole.generate(**inputs, max_new_tokens=6, do_sample=False)[0][inputs["input_ids"].shape[1] :]
    ours = sample_texts(
        str(merged), ["Which?"], chat=True, images=[folder / "3.png"], max_new_tokens=6, temperature=0.0
    )
    assert ours[0]["response"] == processor.decode(answer, skip_special_tokens=True)


def test_sampling_says_what_does_not_fit(tuned: Tuned, tmp_path: Path) -> None:
    folder, store, _ = tuned
    (tmp_path / "bad.png").write_bytes(b"no image")
    with pytest.raises(RequestError, match=r"bad\.png"):
        sample_texts("store://see", ["Which?"], store=store.uri, images=[tmp_path / "bad.png"])
    with pytest.raises(RequestError, match=r"2 places .* 1 images"):
        sample_texts("store://see", ["<image><image>"], store=store.uri, images=[folder / "1.png"])


@pytest.mark.parametrize("lora", [None, {"r": 2}], ids=["full", "lora"])
@pytest.mark.parametrize("model_type", tiered(sorted(SMALL), ("qwen2_vl",)))
def test_every_type_is_tuned_and_verified(tmp_path: Path, model_type: str, lora: Any) -> None:
    steps = SPEC["train"] | {"steps": 2, "sequence_length": 128, "packing": False}
    store, made = run(tmp_path, "see", {"lora": lora, "train": steps}, model_type)
    before = load_file(tmp_path / "model" / "model.safetensors")
    after = load_file(store.folder(made, "model") / "model.safetensors")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert before.keys() == after.keys()
    if lora is None:
        assert changed == set(before)
        return
    assert changed
    assert not any(part in name for name in changed for part in ("visual", "vision_model", "connector"))
    merged = export(store, made, tmp_path / "merged", merge=True)
    answers = [
        sample_texts(place, ["Which?"], chat=True, images=[tmp_path / "3.png"], temperature=0.0, store=store.uri)
        for place in (str(merged), "store://see")
    ]
    assert answers[0] == answers[1]


@pytest.mark.parametrize("model_type", tiered(["llava", *sorted(SMALL)], ("qwen2_vl",)))
def test_an_adapter_on_the_projector_alone(tmp_path: Path, model_type: str) -> None:
    steps = SPEC["train"] | {"steps": 2, "sequence_length": 128, "packing": False}
    store, made = run(tmp_path, "see", {"parts": ["projector"], "lora": {"r": 2}, "train": steps}, model_type)
    adapter = load_file(store.folder(made, "adapter") / "adapter_model.safetensors")
    assert all(any(part in name for part in PROJECTORS) for name in adapter)
    assert all(bool(tensor.abs().max() > 0) for tensor in adapter.values())


@pytest.mark.long
@pytest.mark.parametrize("text_type", ["llama", "qwen2", "qwen3", "olmo2", "phi"])
@pytest.mark.parametrize("tower", ["clip_vision_model", "siglip_vision_model"])
def test_every_tower_and_decoder_is_tuned(tmp_path: Path, tower: str, text_type: str) -> None:
    parts = {"parts": ["vision", "projector"], "lora": {"r": 2}}
    store, made = run(tmp_path, "see", parts, tower=tower, text_type=text_type, feature_layer=-2)
    adapter = load_file(store.folder(made, "adapter") / "adapter_model.safetensors")
    assert all(".vision_tower." in name or ".multi_modal_projector." in name for name in adapter)
    assert not any(".layers.1." in name for name in adapter)
    assert all(bool(tensor.abs().max() > 0) for tensor in adapter.values())


@pytest.mark.long
def test_the_shipped_recipe_learns_to_read_digits(tmp_path: Path, say: Callable[[str], None]) -> None:
    recipes = Path(__file__).parents[3] / "recipes" / "image"
    shutil.copytree(recipes / "files", tmp_path / "files")
    stage = load_recipe(recipes / "vision_language.yaml").recipe.stages["see"].model_dump(mode="json")
    changes = {"data": stage["data"], "train": stage["train"], "lora": None}
    _, made = run(tmp_path, "see", changes, image_size=16, width=64)
    responses = made.metrics["responses"]
    say(f"{responses['exact']:.1%} of {responses['prompts']} held-out digits are named; chance names a tenth")
    assert responses["exact"] > 0.8
    assert made.metrics["evaluation"]["perplexity"] < made.metrics["evaluation"]["ngram_perplexity"]
