"""What every shipped recipe's stages are known by: their fingerprints, and the meanings that these are the hashes of.

Usage: python -m tests.golden.fingerprints, which rewrites fingerprints.json and prints what changed.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from launch.inputs.changes import differing_values
from launch.inputs.digests import data_digests
from launch.inputs.resolved import Resolved
from recipes.loading.load import load_recipe
from recipes.planning.settle import Hardware, settle_shards
from recipes.recipe import Recipe
from recipes.references import StoreRef, parse_reference
from trainers.store.manifest import ArtifactManifest, files_digest, sha256_hex

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = Path(__file__).with_name("fingerprints.json")

FORMS = {
    "full": (False, Hardware()),
    "smoke": (True, Hardware()),
    "bf16": (False, Hardware(is_gpu=True, fast_bf16="compute capability 9.0")),
}
"""Whether a form is the smoke form, and the hardware by which its `auto` is settled."""
INSTALLED = ("python-docs", "python-docs-summaries", "digits")
"""Sources whose rows come with the installation: a digest of their name stands for that of their rows."""
OUTSIDE = {"eyes": "llava", "smollm2": "llama", "minilm": "bert"}
"""Models that recipes take from the store, and their types: a digest of their name stands for that of their files."""


def shipped_recipes() -> list[str]:
    """Names of the recipes below `recipes/`, by their path there."""
    folder = ROOT / "recipes"
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.yaml"))


def record_recipe(name: str) -> dict[str, Any]:
    """ "Recipe form stage" -> the fingerprint and, but for `bf16`, the meaning without its parents' fingerprints."""
    found = {}
    for form, (smoke, hardware) in FORMS.items():
        resolved = _resolve(name, smoke, hardware)
        plan = resolved.plan(None)
        for stage, meaning in resolved.meanings(plan).items():
            parts = {path: parent["part"] for path, parent in meaning["parents"].items()}
            said = {} if form == "bf16" else {"meaning": {**meaning, "parents": parts}}
            fingerprint = next(planned.fingerprint for planned in plan.stages if planned.name == stage)
            found[f"{name} {form} {stage}"] = {"fingerprint": fingerprint, **said}
    return found


def _resolve(name: str, smoke: bool, hardware: Hardware) -> Resolved:
    """As a run on one worker does it, but for inputs that depend on the machine."""
    loaded = load_recipe(ROOT / "recipes" / name, smoke=smoke)
    cluster = loaded.recipe.cluster.model_copy(update={"workers": 1, "gpus_per_worker": 0})
    recipe = settle_shards(loaded.recipe.model_copy(update={"cluster": cluster}), hardware, 1, lambda _: {}).recipe
    external = _outside_models(recipe)
    return Resolved(recipe, loaded.base_dir, external=external, data=_digests(recipe, loaded.base_dir, external))


def _digests(
    recipe: Recipe, base_dir: Path, external: Mapping[str, Mapping[str, ArtifactManifest]]
) -> dict[str, dict[str, str]]:
    """The digests of files in the tree, and fixed ones for what comes with the installation."""
    digests, wrong = data_digests(recipe, base_dir, external)
    assert not wrong, wrong
    for name, stage in recipe.stages.items():
        for use in stage.sources():
            if use.source.source in INSTALLED:
                digests[name][use.field_path] = sha256_hex(use.source.source.encode())
    return digests


def _outside_models(recipe: Recipe) -> dict[str, dict[str, ArtifactManifest]]:
    found: dict[str, dict[str, ArtifactManifest]] = {}
    for name, stage in recipe.stages.items():
        for item in stage.inputs():
            reference = parse_reference(item.text)
            if isinstance(reference, StoreRef):
                model = reference.name_or_fingerprint
                found.setdefault(name, {})[item.field_path] = ArtifactManifest(
                    fingerprint=sha256_hex(model.encode()), digest=files_digest({}), kind="model", stage="import",
                    files={}, architecture={"model_type": OUTSIDE[model]},
                )  # fmt: skip
    return found


def load() -> dict[str, Any]:
    """What was recorded."""
    recorded: dict[str, Any] = json.loads(GOLDEN.read_text(encoding="utf-8"))
    return recorded


def differences(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """A line for each value that differs; a fingerprint alone is named where nothing of the stage's own changed."""
    lines = []
    for key in sorted(before.keys() | after.keys()):
        if key not in before or key not in after:
            lines.append(f"{key}: {'gone' if key in before else 'new'}")
        elif before[key] != after[key]:
            old, new = before[key].get("meaning", {}), after[key].get("meaning", {})
            changed = [
                f"{key}: {change.field}: {json.dumps(change.before)} -> {json.dumps(change.after)}"
                for change in differing_values(old, new)
            ]
            lines += changed or [f"{key}: fingerprint, by a parent's or by how it is hashed"]
    return lines


def main() -> None:
    """Rewrite the record and print what changed."""
    before = load() if GOLDEN.exists() else {}
    after = {key: value for name in shipped_recipes() for key, value in record_recipe(name).items()}
    lines = [f"{json.dumps(key)}: {json.dumps(value, sort_keys=True)}" for key, value in after.items()]
    GOLDEN.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
    print("\n".join(differences(before, after)) or "nothing changed")


if __name__ == "__main__":
    main()
