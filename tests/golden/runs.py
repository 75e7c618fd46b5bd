"""What the smoke forms of shipped recipes come to: each stage's curves, its artifact's digest and its files' hashes.

Usage: python -m tests.golden.runs [RECIPE ...], which rewrites the record of this environment and prints what changed.
With `--to FILE` it writes what it found there, and nothing else.
"""

import argparse
import json
import multiprocessing
import os
import platform
import re
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

from cluster.local_group import LocalGroup
from cluster.protocol import Json, OnBeat, Target, WorkerFailed, WorkerSpec
from launch.capacity.workers import Workers
from launch.inputs.digests import data_digests
from launch.inputs.resolve import resolve
from launch.records.new_run import new_record
from launch.report.progress import SilentView
from launch.runs.execute_run import RUN_STAGE, VERIFY_CANDIDATE, PoolRequest, execute_run
from launch.runs.worker_pool import StageWorkers
from recipes.errors import StageError, TrainwrightError
from recipes.loading.load import load_recipe
from recipes.planning.settle import Hardware
from tests.golden.fingerprints import ROOT, shipped_recipes
from tests.ranks import PRELOADED
from tests.real_models import MINILM, SMOLLM2, cache
from trainers.models.imports import import_folder
from trainers.store.manifest import ArtifactManifest, canonical_json, sha256_hex
from trainers.store.store import Store

RUNS = Path(__file__).with_name("runs")

FAST = (
    "quickstart.yaml",
    "llm/preference.yaml",
    "text/rnn_files.yaml",
    "text/polarity.yaml",
    "text/translation_files.yaml",
    "image/vision_language_files.yaml",
    "image/files.yaml",
    "image/gan_files.yaml",
    "image/ddpo_files.yaml",
)
"""Recipes that have, between them, a stage of every kind and every family. The second takes its first stages from the
first."""
IMAGES = ["diffusers.models.unets.unet_2d", "trainers.models.images.families"]
"""What stages of images import besides; here most stages have a process that lives for them alone."""
REAL_MODELS = {
    "llm/smollm2.yaml": ("smollm2", SMOLLM2),
    "llm/evaluation.yaml": ("smollm2", SMOLLM2),
    "llm/smollm2_rl.yaml": ("smollm2", SMOLLM2),
    "text/minilm_polarity.yaml": ("minilm", MINILM),
}
"""Recipes that start from a real model: its name in the store, and its folder's."""
FEWER = {
    "llm/smollm2.yaml": (
        "stages.sft.train.steps=2",
        "stages.sft.train.schedule.warmup_steps=0",
        "stages.sft.train.global_batch=2",
        "stages.sft.train.sequence_length=96",
        "stages.sft.train.evaluation_rows=4",
        "stages.reward.train.steps=2",
        "stages.reward.train.schedule.warmup_steps=0",
        "stages.reward.train.global_batch=2",
        "stages.reward.train.evaluation_rows=4",
        "stages.policy.rollout.prompts_per_iteration=4",
        "stages.policy.rollout.max_new_tokens=8",
        "stages.policy.algorithm.iterations=1",
        "stages.eval.num_prompts=2",
        "stages.eval.sampling.max_new_tokens=8",
        "stages.eval.of=[sft, policy]",
    ),
    "llm/smollm2_rl.yaml": (
        "stages.policy.rollout.prompts_per_iteration=2",
        "stages.policy.rollout.max_new_tokens=8",
        "stages.policy.algorithm.iterations=1",
        "stages.eval.num_prompts=2",
        "stages.eval.sampling.max_new_tokens=8",
    ),
}
"""What makes a smoke form smaller that takes minutes."""
NOT_RECORDED: dict[str, str] = {}
"""Shipped recipes without a record, and why."""
VERSIONS = (
    "torch", "transformers", "tokenizers", "deepspeed", "peft", "diffusers", "numpy", "scikit-learn", "safetensors",
)  # fmt: skip
FLAGS = re.compile(r"(avx|amx|fma|vnni)\w*")
"""Instructions by which libraries choose their kernels."""
MEASURED = re.compile(r"(_s|_per_s|_bytes)$")
"""Metrics that are measured on the machine."""


def environment() -> dict[str, Any]:
    """What bits depend on: the CPU, versions of libraries, and the documentation that comes with Python."""
    import torch

    documented = load_recipe(ROOT / "recipes" / "text" / "decoder.yaml").recipe
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").split("\n\n")[0].splitlines()
    cpu = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    flags = sorted(flag for flag in cpu.get("flags", "").split() if FLAGS.fullmatch(flag))
    return {
        "cpu": " ".join(cpu.get(key, "?") for key in ("vendor_id", "cpu family", "model")),
        "instructions": " ".join(flags),
        "torch_capability": torch.backends.cpu.get_cpu_capability(),
        "mkldnn": torch.backends.mkldnn.is_available(),
        "python": platform.python_version(),
        "python_docs": data_digests(documented, ROOT, {})[0]["decoder"]["data"],
        **{name: version(name) for name in VERSIONS},
    }


def load() -> dict[str, Any] | None:
    """The record of this environment; None: there is none."""
    here = environment()
    records = (json.loads(path.read_text(encoding="utf-8")) for path in sorted(RUNS.glob("*.json")))
    return next((record for record in records if record["environment"] == here), None)


def missing_model(name: str) -> str:
    """Why a recipe cannot run here; empty: it can."""
    if name not in REAL_MODELS or (cache() / REAL_MODELS[name][1]).is_dir():
        return ""
    return f"no real model: {cache() / REAL_MODELS[name][1]} is not there; `make models` makes it"


def run_recipes(names: Sequence[str], folder: Path) -> dict[str, Any]:
    """Run smoke forms in one store, a stage that several recipes have once; what each came to by name, or its error."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*PRELOADED, *IMAGES])
    store = Store.open(str(folder / "store"))
    described: dict[str, dict[str, Any]] = {}
    results: dict[str, Any] = {}
    with ProcessPoolExecutor(1, mp_context=context, max_tasks_per_child=1) as processes:
        for name in names:
            started = time.monotonic()
            try:
                results[name] = run_recipe(name, store, folder / name.replace("/", "-"), processes, described)
            except TrainwrightError as error:
                results[name] = {"error": str(error)}
                store = Store.open(
                    str(folder / f"store-{len(results)}")
                )  # the stages before the error are not described
            print(f"{name}: {time.monotonic() - started:.1f} s", file=sys.stderr, flush=True)
    return results


class OneProcess(LocalGroup):
    """A group of one rank, in a process of its own for every run, as on Ray."""

    def __init__(self, spec: WorkerSpec, processes: ProcessPoolExecutor) -> None:
        super().__init__(spec)
        self._processes = processes

    def run(
        self, target: Target, payload: Json, on_beat: OnBeat | None = None, *, label: str = "run"
    ) -> list[Json | None]:
        """Calls the target there; its beats are not heard."""
        return self._processes.submit(_run_there, target, payload, self.spec.log_folder / f"{label}.log").result()


def _run_there(target: Target, payload: Json, log: Path) -> list[Json | None]:
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    try:
        return LocalGroup(WorkerSpec(name="one", num_workers=1, log_folder=log.parent)).run(target, payload)
    except WorkerFailed:
        raise StageError(traceback.format_exc()) from None


def run_recipe(
    name: str, store: Store, folder: Path, processes: ProcessPoolExecutor, described: dict[str, dict[str, Any]]
) -> dict[str, Any]:
    """Run a recipe's smoke form on one worker, as `trainwright run` does it on Ray.

    `described` has what is recorded of a stage by its fingerprint; stages that were run here join it.
    """
    _take_models_in(name, store, folder)
    loaded = load_recipe(ROOT / "recipes" / name, FEWER.get(name, ()), smoke=True)
    record = new_record(store, resolve(loaded, store, Workers(1, 0), Hardware()))

    def pool(request: PoolRequest) -> StageWorkers:
        return StageWorkers(lambda spec: OneProcess(spec, processes), RUN_STAGE, VERIFY_CANDIDATE, request.log_folder)

    outcome = execute_run(record, record.resolved(), None, SilentView(), pool)
    for result in outcome.results.values():
        if not result.cached:
            described[result.manifest.fingerprint] = describe(result.manifest, store, record.run)
    return {stage: described[result.manifest.fingerprint] for stage, result in outcome.results.items()}


def _take_models_in(name: str, store: Store, folder: Path) -> None:
    """Give the store the model that a recipe starts from."""
    if name.startswith("image/vision_language"):
        from trainers.models.small_llava import DIGIT_TEXTS, write_small_llava

        write_small_llava(folder / "eyes", DIGIT_TEXTS)
        import_folder(store, folder / "eyes", name="eyes")
    if name in REAL_MODELS:
        model, source = REAL_MODELS[name]
        import_folder(store, cache() / source, name=model)


def describe(manifest: ArtifactManifest, store: Store, run: str) -> dict[str, Any]:
    """What is recorded of a stage."""
    curves: dict[str, list[Any]] = {}
    for line in store.run(run).read_lines(f"metrics/{manifest.stage}"):
        for key, value in line["values"].items():
            if not MEASURED.search(key):
                curves.setdefault(key, []).append([line["step"], value])
    return {
        "digest": manifest.digest,
        "files": {name: entry.sha256[:16] for name, entry in manifest.files.items()},
        "metrics": {key: value for key, value in manifest.metrics.items() if not MEASURED.search(key)},
        "curves": curves,
    }


def differences(before: Mapping[str, Any], after: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """A line for each value that differs, the first of a curve alone."""
    for key in sorted(before.keys() | after.keys()):
        old, new, place = before.get(key), after.get(key), f"{prefix}{key}"
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            yield from differences(old, new, f"{place} ")
        elif isinstance(old, list) and isinstance(new, list) and old != new:
            pairs = [pair for pair in zip(old, new, strict=False) if pair[0] != pair[1]]
            yield f"{place}: " + (f"{pairs[0][0]} -> {pairs[0][1]}" if pairs else f"{len(old)} -> {len(new)} values")
        elif old != new:
            yield f"{place}: {'none' if old is None else old} -> {'none' if new is None else new}"


def main() -> None:
    """Run recipes, all by default; merge what they came to into the record, and print what changed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipes", nargs="*", help="recipes by their path below recipes/; all by default")
    parser.add_argument("--to", type=Path, help="write what was found to this file instead")
    arguments = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "HF_HUB_OFFLINE": "1"}
    names = [name for name in arguments.recipes or shipped_recipes() if not missing_model(name)]
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TRAINWRIGHT_CACHE"] = f"{folder}/cache"
        found = run_recipes(names, Path(folder))
    if arguments.to:
        arguments.to.write_text(json.dumps(found), encoding="utf-8")
        return
    failed = [f"{name}: {result['error']}" for name, result in found.items() if "error" in result]
    if failed:
        sys.exit("\n".join(failed))
    print("\n".join(update(found)) or "nothing changed")


def update(found: Mapping[str, Any]) -> list[str]:
    """Merge what was found into the record of this environment; what changed."""
    here = environment()
    before = (load() or {}).get("recipes", {})
    changed = list(differences({name: before[name] for name in found if name in before}, found))
    name = sha256_hex(canonical_json(here))[:12]
    lines = [
        f"{json.dumps(recipe)}: {{\n"
        + ",\n".join(f" {json.dumps(stage)}: {json.dumps(item, sort_keys=True)}" for stage, item in stages.items())
        + "\n}"
        for recipe, stages in sorted({**before, **found}.items())
    ]
    text = f'{{"environment": {json.dumps(here, indent=1)},\n"recipes": {{\n' + ",\n".join(lines) + "\n}}\n"
    RUNS.mkdir(exist_ok=True)
    (RUNS / f"{name}.json").write_text(text, encoding="utf-8")
    return changed


if __name__ == "__main__":
    main()
