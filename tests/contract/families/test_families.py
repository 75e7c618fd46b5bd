"""One suite for every family of the union by name; a family counts when it passes."""

import base64
import importlib.util
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig

from recipes.errors import RequestError
from recipes.families import FAMILIES as BUILT
from trainers.architectures.vision_language import probe_pixels
from trainers.artifacts import Probe
from trainers.precision import exact_matmul
from trainers.store.export import export
from trainers.store.store import Store

HERE = Path(__file__).parent
WORKER = Path(__file__).parents[2] / "stage_worker.py"
LANGUAGE = ("decoder", "encoder", "encoder_decoder", "rnn", "vision_language")
PICTURES = sorted(set(BUILT) - set(LANGUAGE))
DRAWING = [family for family in PICTURES if family != "classifier"]
LIMIT = 1e-5
TWENTY = {"train": {"steps": 20, "global_batch": 8, "optimizer": {"lr": 1e-3}, "grid": 0, "evaluation_rows": 16}}
PLAIN = {"engine": "plain"}
TWO_WORKERS = {"engine": "deepspeed", "zero": 1}


def load_module(path: Path) -> Any:
    """Load a file of this folder, or the worker, as a module."""
    spec = importlib.util.spec_from_file_location(f"families_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


SMALL = load_module(HERE / "family_stages.py")
STAGES: dict[str, dict[str, Any]] = SMALL.STAGES | {"vision_language": SMALL.VISION_LANGUAGE}
FAMILIES = (*BUILT, "vision_language")
CROSSINGS: dict[str, tuple[dict[str, Any], dict[str, str]]] = SMALL.CROSSINGS
TUNED: dict[str, tuple[dict[str, Any], dict[str, str]]] = SMALL.TUNED
KIT = [*FAMILIES, *CROSSINGS]
"""Every family, and the stages that build on several."""
CLASSIFIED = [name for name in CROSSINGS if name.startswith("classified")]


def _zero(family: str, zero: int) -> int:
    """A GAN's networks run through each other: `check` refuses ZeRO 3, so its highest stage is 2."""
    return min(zero, 2) if family == "gan" else zero


def _case(family: str, run: str, shard: dict[str, Any], changes: Any = None, **more: Any) -> dict[str, Any]:
    inputs = {"init_from": "small-llava"} if family == "vision_language" else {}
    spec, inputs = CROSSINGS[family] if family in CROSSINGS else (STAGES[family], inputs)
    spec = spec | {"shard": shard} | (changes or {})
    return {"run": run, "stage": family, "spec": spec, "inputs": inputs, **more}


def _cases(zero_stages: tuple[int, ...]) -> list[dict[str, Any]]:
    cases: list[dict[str, Any]] = []
    for family in KIT:
        cases.append(_case(family, "straight", TWO_WORKERS, is_kept=True))
        cases.append(_case(family, "stopped", TWO_WORKERS, stop_at=2))
        cases.append(_case(family, "stopped", TWO_WORKERS))
        cases += [
            _case(family, f"zero{zero}", {"engine": "deepspeed", "zero": _zero(family, zero)}) for zero in zero_stages
        ]
    for name in TUNED:
        cases += [_tuned(name, "straight", TWO_WORKERS, is_kept=True), _tuned(name, "stopped", TWO_WORKERS, stop_at=3)]
        cases += [_tuned(name, "stopped", TWO_WORKERS)]
        cases += [_tuned(name, f"zero{zero}", {"engine": "deepspeed", "zero": zero}) for zero in zero_stages]
    return [*cases, _case("gan", "twenty", {"engine": "deepspeed", "zero": 2}, TWENTY)]


def _tuned(name: str, run: str, shard: dict[str, Any], **more: Any) -> dict[str, Any]:
    """A reward-tuned diffusion of the families' own stages."""
    spec, inputs = TUNED[name]
    return {"run": run, "stage": name, "spec": spec | {"shard": shard}, "inputs": inputs, **more}


@pytest.fixture(scope="module")
def finished(run_ranks: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which every family ran on two workers, and with the plain engine on one."""
    return _run(run_ranks, tmp_path_factory.mktemp("families"), (3,))


def _run(run_ranks: Any, folder: Path, zero_stages: tuple[int, ...]) -> Path:
    (folder / "text.txt").write_text("\n\n".join(f"The number {n} comes before {n + 1}." for n in range(120)))
    rows = [
        (f"The number {n} comes before {n + 1}.", "" if n % 6 == 0 else "early" if n < 60 else "late")
        for n in range(120)
    ]
    (folder / "labelled.csv").write_text("text,label\n" + "".join(f"{text},{label}\n" for text, label in rows))
    _write_pictures(folder)
    cache = {"TRAINWRIGHT_CACHE": str(folder / "cache")}
    run_ranks(WORKER, [folder, json.dumps(_cases(zero_stages))], folder / "two", 2, **cache)
    plain = [_case(family, "plain", PLAIN) for family in KIT] + [_case("gan", "twenty-plain", PLAIN, TWENTY)]
    plain += [_tuned(name, "plain", PLAIN) for name in TUNED]
    run_ranks(WORKER, [folder, json.dumps(plain)], folder / "one", 1, **cache)
    return folder


def _write_pictures(folder: Path) -> None:
    """Write questions about pictures, some without one, and commit a model whose last layer of vision is not read."""
    from PIL import Image

    from trainers.architectures.small_llava import write_small_llava
    from trainers.store.imports import import_folder

    rows = []
    for number in range(48):
        shade = np.full((6, 6), 5 * number, dtype=np.uint8)
        Image.fromarray(shade).save(folder / f"{number}.png")
        images = [] if number % 6 == 0 else [f"{number}.png"] * (1 + number % 2)
        rows.append(
            {"images": images, "prompt": f"Number {number} is ", "completion": "dark" if number < 24 else "light"}
        )
    (folder / "pictures.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_small_llava(folder / "llava", ["Number 0 is dark or light."], image_size=8, width=32, feature_layer=-2)
    import_folder(Store.open(str(folder / "store")), folder / "llava", name="small-llava")


def result(folder: Path, run: str, family: str) -> dict[str, Any]:
    """Read what rank 0 reported."""
    found: dict[str, Any] = json.loads((folder / f"{run}-{family}.json").read_text())
    return found


def difference(found: dict[str, float], wanted: dict[str, float]) -> float:
    """Return the largest relative difference of two curves over the same steps."""
    assert found.keys() == wanted.keys()
    differences = [abs(found[step] - wanted[step]) / max(abs(wanted[step]), 1e-3) for step in wanted]
    assert all(map(math.isfinite, differences)), differences  # max() passes over a nan
    return max(differences)


def test_the_kit_knows_every_family() -> None:
    assert set(STAGES) == {*BUILT, "vision_language"}


def _kind(name: str) -> str:
    """Kind of the artifact that a stage of the kit makes."""
    if name in CLASSIFIED:
        return "text_classifier"
    return "model" if name in LANGUAGE else "ddpm" if name in CROSSINGS else name


@pytest.mark.parametrize("family", KIT)
def test_a_stage_runs_to_a_verified_draft(finished: Path, family: str) -> None:
    found = result(finished, "straight", family)
    assert found["outcome"] == {"state": "completed", "rule": None, "steps_done": 6, "steps_planned": 6}
    assert found["kind"] == _kind(family)
    assert found["difference"] < LIMIT
    assert list(found["curves"]["eval/loss"]) == ["4", "6"]
    assert found["metrics"]["evaluation"]["loss"] == found["curves"]["eval/loss"]["6"]


@pytest.mark.parametrize("family", KIT)
def test_a_preempted_stage_ends_in_the_same_bytes(finished: Path, family: str) -> None:
    straight, resumed = result(finished, "straight", family), result(finished, "stopped", family)
    assert resumed["steps"] == [4, 5, 6]
    assert resumed["digest"] == straight["digest"]
    assert resumed["metrics"] == straight["metrics"]


@pytest.mark.parametrize("family", KIT)
@pytest.mark.parametrize("run", ["zero3", "plain"])
def test_sharding_and_workers_do_not_change_the_curve(finished: Path, family: str, run: str) -> None:
    wanted, found = result(finished, "straight", family), result(finished, run, family)
    assert len(set(wanted["curves"]["loss"].values())) == 6
    for curve in ("loss", "eval/loss"):
        assert difference(found["curves"][curve], wanted["curves"][curve]) < LIMIT


def test_a_gan_s_two_engines_equal_the_plain_one_over_twenty_steps(finished: Path) -> None:
    wanted, found = result(finished, "twenty-plain", "gan"), result(finished, "twenty", "gan")
    assert wanted["steps"] == list(range(1, 21))
    for curve in ("loss", "generator_loss"):
        assert difference(found["curves"][curve], wanted["curves"][curve]) < LIMIT


@pytest.mark.long
@pytest.mark.parametrize("family", KIT)
def test_every_zero_stage_gives_the_plain_curve(every_stage: Path, family: str) -> None:
    wanted = result(every_stage, "plain", family)
    for zero in (0, 2, 3):
        found = result(every_stage, f"zero{zero}", family)
        for curve in ("loss", "eval/loss"):
            assert difference(found["curves"][curve], wanted["curves"][curve]) < LIMIT, zero


@pytest.fixture(scope="module")
def every_stage(run_ranks: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which every family ran under every ZeRO stage on two workers."""
    return _run(run_ranks, tmp_path_factory.mktemp("every_stage"), (0, 2, 3))


@pytest.mark.parametrize("name", TUNED)
def test_a_tuned_diffusion_ends_in_the_same_bytes_after_a_preemption(finished: Path, name: str) -> None:
    straight, resumed = result(finished, "straight", name), result(finished, "stopped", name)
    assert straight["outcome"] == {"state": "completed", "rule": None, "steps_done": 6, "steps_planned": 6}
    assert straight["kind"] == "ddpm"
    assert straight["difference"] < LIMIT
    assert resumed["steps"] == [5, 6]
    assert resumed["digest"] == straight["digest"]
    assert resumed["metrics"] == straight["metrics"]
    assert straight["metrics"]["end"]["score_mean"] == straight["curves"]["score_mean"]["6"]
    assert [line["step"] for line in straight["grids"]] == [0, 2, 4, 6]
    assert straight["grids"][0]["image"] != straight["grids"][-1]["image"]


@pytest.mark.parametrize("run", ["zero3", "plain"])
@pytest.mark.parametrize("name", TUNED)
def test_the_first_iteration_of_a_tuned_diffusion_is_the_same_everywhere(finished: Path, name: str, run: str) -> None:
    wanted, found = result(finished, "straight", name), result(finished, run, name)
    assert found["curves"]["score_mean"]["0"] == pytest.approx(wanted["curves"]["score_mean"]["0"], rel=1e-5)
    for step in ("1", "2"):
        assert found["curves"]["loss"][step] == pytest.approx(wanted["curves"]["loss"][step], rel=2e-4, abs=2e-5)
    assert wanted["curves"]["kl"]["2"] > 0


def test_a_tuned_diffusion_draws_by_the_sampler_that_it_was_tuned_with(finished: Path, tmp_path: Path) -> None:
    from trainers.families.build import open_family

    store = Store.open(str(finished / "store"))
    opened: Any = open_family(export(store, store.resolve("tuned"), tmp_path / "model"))
    assert (opened.settings.sampler, opened.settings.sampling_steps, opened.settings.guidance) == ("ddpm", 5, 1.5)
    assert opened.sample([1, 2], [1, 8]).shape == (2, 1, 8, 8)


def test_a_captioned_diffusion_is_tuned_by_an_adapter_that_is_bound_to_it(finished: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    from trainers.families.build import open_family

    store = Store.open(str(finished / "store"))
    start, tuned = store.resolve("captioned"), store.resolve("tuned-captions")
    assert tuned.base == start.digest
    assert [check["adapter"] for check in result(finished, "straight", "tuned-captions")["checks"]] == [None, "adapter"]
    assert "adapter/adapter_model.safetensors" in tuned.files
    unet = "unet/diffusion_pytorch_model.safetensors"
    before, after = (load_file(store.folder(manifest, "model") / unet) for manifest in (start, tuned))
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved
    assert all(".to_" in name for name in moved)
    assert tuned.files["model/text_encoder/model.safetensors"] == start.files["model/text_encoder/model.safetensors"]
    opened: Any = open_family(store.folder(tuned, "model"))
    assert (opened.settings.sampler, opened.settings.guidance, opened.is_captioned) == ("ddpm", 1.5, True)
    assert opened.sample([1, 2], captions=["a seven", "a thin three"]).shape == (2, 1, 8, 8)
    exported = export(store, tuned, tmp_path / "adapter")
    assert json.loads((exported / "adapter_config.json").read_text())["base_model_name_or_path"] == str(
        exported / "base"
    )


def _stock_kind(name: str) -> str | None:
    """What the libraries open a model of the kit as; None for modules of this project."""
    kinds = {
        "encoder": "masked_model",
        "encoder_decoder": "seq2seq_model",
        "vision_language": "vision_language_model",
        "rnn": "rnn",
    }
    match _kind(name):
        case "model":
            return kinds.get(name, "language_model")
        case "text_classifier" | "ddpm":
            return _kind(name)
    return None


STOCK = [name for name in KIT if _stock_kind(name) is not None]


def _case_of_export(finished: Path, folder: Path, name: str) -> tuple[dict[str, str], np.ndarray]:
    """Export a model of the kit; returns what to ask of the stock classes, and what must come out."""
    from trainers.families.build import open_family

    store = Store.open(str(finished / "store"))
    manifest = store.resolve(name)
    exported = export(store, manifest, folder / name)
    assert (exported / "adapter_config.json").is_file() == ("lora" in CROSSINGS.get(name, ({},))[0])
    if _stock_kind(name) == "ddpm":
        opened: Any = open_family(store.folder(manifest, "model"))
        rng = np.random.default_rng(0)
        given = {"sample": rng.standard_normal((2, 1, 8, 8), dtype=np.float32), "timestep": np.array([3, 40])}
        if opened.is_captioned:
            given["encoder_hidden_states"] = rng.standard_normal((2, 5, 32), dtype=np.float32)
        else:
            given["class_labels"] = np.array([1, 10])
        with torch.no_grad():
            wanted = opened.net(**{key: torch.from_numpy(value) for key, value in given.items()}).sample.numpy()
    else:
        live = result(finished, "straight", name)["checks"][0]["probe"]
        probe = Probe.from_bytes(store.objects.get_bytes(live["sha256"]))
        given, wanted = _inputs(exported, name, probe), probe.outputs
    np.savez(folder / f"{name}.npz", **given)
    asked = {"folder": str(exported), "what": str(_stock_kind(name))}
    return {**asked, "given": str(folder / f"{name}.npz"), "output": str(folder / f"{name}.npy")}, wanted


def _inputs(folder: Path, name: str, probe: Probe) -> dict[str, np.ndarray]:
    """What the live model was run on before its draft was written."""
    ids = np.array([probe.token_ids])
    if name == "rnn":
        return {"input_ids": ids}
    given = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    if name == "encoder_decoder":
        given["decoder_input_ids"] = ids
    if name == "vision_language":
        given["pixel_values"] = probe_pixels(AutoConfig.from_pretrained(folder, local_files_only=True)).numpy()
    return given


def _demand_equal(name: str, output: str, wanted: np.ndarray) -> None:
    """Compare the outputs of stock classes with the live model's: all of them, or the logits of the last positions."""
    found = np.load(output)
    if _stock_kind(name) == "text_classifier":
        found = found.reshape(-1, 1)
    elif _stock_kind(name) != "ddpm":
        found = found[0, -len(wanted) :]
    assert found.shape == wanted.shape
    np.testing.assert_allclose(found, wanted, atol=LIMIT * max(1.0, float(np.abs(wanted).max())), rtol=0)


@pytest.mark.parametrize("family", STOCK)
def test_stock_classes_open_an_export_and_give_the_same_outputs(finished: Path, tmp_path: Path, family: str) -> None:
    asked, wanted = _case_of_export(finished, tmp_path, family)
    with exact_matmul():
        load_module(HERE / "stock_outputs.py").answer(asked)
    _demand_equal(family, asked["output"], wanted)


@pytest.mark.long
def test_stock_classes_in_a_clean_process_give_the_same_outputs(finished: Path, tmp_path: Path) -> None:
    cases = {name: _case_of_export(finished, tmp_path, name) for name in STOCK}
    (tmp_path / "request.json").write_text(json.dumps([asked for asked, _ in cases.values()]))
    command = [sys.executable, "-I", str(HERE / "stock_outputs.py"), str(tmp_path / "request.json")]
    done = subprocess.run(command, cwd="/", capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for name, (asked, wanted) in cases.items():
        _demand_equal(name, asked["output"], wanted)


@pytest.mark.parametrize("family", PICTURES)
def test_an_exported_model_of_pictures_opens(finished: Path, tmp_path: Path, family: str) -> None:
    from trainers.families.build import open_family, verify_family

    store = Store.open(str(finished / "store"))
    folder = export(store, store.resolve(family), tmp_path / "model")
    opened = open_family(folder)
    assert opened.facts.shape == (1, 8, 8)
    assert opened.facts.classes == tuple("0123456789")
    live = result(finished, "straight", family)["checks"][0]["probe"]
    assert verify_family(folder, Probe.from_bytes(store.objects.get_bytes(live["sha256"]))) < LIMIT


@pytest.mark.parametrize("family", DRAWING)
def test_a_picture_depends_on_its_seed_alone(finished: Path, family: str) -> None:
    from trainers.families.build import open_family

    store = Store.open(str(finished / "store"))
    opened: Any = open_family(store.folder(store.resolve(family), "model"))
    labels = [0, 1, 2, 3] if opened.is_conditional else None
    four = opened.sample([5, 6, 7, 8], labels)
    again = opened.sample([7], None if labels is None else [2])
    assert four.shape == (4, 1, 8, 8)
    assert float(four.min()) >= 0
    assert float(four.max()) <= 1
    np.testing.assert_allclose(again[0], four[2], atol=1e-5)
    assert not np.allclose(opened.sample([9], None if labels is None else [2])[0], four[2], atol=1e-2)


@pytest.mark.parametrize("family", LANGUAGE)
def test_an_answer_depends_on_its_seed_alone(finished: Path, family: str) -> None:
    from launch.sampler import sample_texts

    gaps = {
        "encoder": "The <|mask|> 5 comes <|mask|> 6.<|mask|><|mask|>",
        "encoder_decoder": "The number comes before 6.",
    }
    prompt = gaps.get(family, "The")
    options: dict[str, Any] = {"store": str(finished / "store"), "max_new_tokens": 8}
    first, same, other = (sample_texts(f"store://{family}", [prompt], seed=seed, **options) for seed in (3, 3, 4))
    assert first == same
    assert first != other


@pytest.mark.parametrize("name", CLASSIFIED)
def test_a_classifier_of_texts_names_the_class(finished: Path, name: str) -> None:
    from launch.sampler import sample_texts

    prompts, store = ["The number 3 comes before 4."], str(finished / "store")
    (found,) = sample_texts(f"store://{name}", prompts, store=store)
    shares = dict(part.split(" ") for part in found["response"].split(", "))
    assert set(shares) == {"early", "late"}
    assert sum(map(float, shares.values())) == pytest.approx(1, abs=2e-3)
    assert sample_texts(f"store://{name}", prompts, store=store, seed=5) == [found]


def test_pseudo_labels_teach_after_their_warm_up_and_after_a_resume(finished: Path) -> None:
    straight, resumed = (result(finished, run, "classified-few") for run in ("straight", "stopped"))
    assert set(straight["curves"]["pseudo_share"]) == {"2", "3", "4", "5", "6"}
    assert min(straight["curves"]["pseudo_share"].values()) > 0
    assert resumed["curves"]["pseudo_share"] == {
        step: share for step, share in straight["curves"]["pseudo_share"].items() if int(step) > 3
    }
    rows = straight["metrics"]["rows"]
    assert 0 < rows["labelled"] < rows["unlabelled"]
    assert result(finished, "straight", "classified")["curves"]["pseudo_share"] == {}


def test_an_exam_of_a_recurrent_model_agrees_with_its_stage(finished: Path) -> None:
    source = STAGES["rnn"]["data"]
    exam = {"kind": "evaluate", "of": ["rnn"], "suites": ["perplexity"], "text": source, "sequence_length": 24}
    _run_case_here(finished, {"run": "here", "stage": "exam", "spec": exam, "inputs": {"of.0": "rnn"}})
    found = result(finished, "here", "exam")["metrics"]
    own = result(finished, "straight", "rnn")["metrics"]["evaluation"]
    for name in ("perplexity", "ngram_perplexity"):
        assert found[f"rnn.{name}"] == pytest.approx(own[name], rel=1e-5)


@pytest.mark.parametrize("family", DRAWING)
def test_grids_over_training_are_drawn_at_fixed_seeds(finished: Path, family: str) -> None:
    straight = result(finished, "straight", family)["grids"]
    assert [line["step"] for line in straight] == [4, 6]
    assert straight[0]["image"] != straight[1]["image"]
    assert straight[1]["image"] == result(finished, "stopped", family)["grids"][-1]["image"]
    head, _, data = straight[0]["image"].partition(",")
    assert head == "data:image/png;base64"
    assert base64.b64decode(data).startswith(b"\x89PNG")


def _bad_data(folder: Path, what: str) -> tuple[dict[str, Any], str]:
    """Write pictures with a fault; returns the source and what the error must say."""
    rng = np.random.default_rng(0)
    images = rng.random((12, 8, 8))
    labels = np.arange(12) % 3
    source = {"source": "arrays", "files": ["bad.npz"], "labels": "labels"}
    if what == "no pictures":
        images, labels = images[:0], labels[:0]
    if what == "NaN":
        images[4, 2, 3] = np.nan
    if what == "out of range":
        images[5] *= 300
    if what == "channels":
        np.savez(folder / "bad.npz", images=rng.random((12, 8, 8, 2)), labels=labels)
        return source, r"bad.npz: picture 0: an array of shape \(8, 8, 2\)"
    np.savez(folder / "bad.npz", images=images, labels=labels)
    said = {
        "no pictures": "no pictures",
        "NaN": "bad.npz: picture 4: 1 pixels are NaN",
        "out of range": r"bad.npz: picture 5: pixels from .* expected \[0, 1\]",
    }
    return source, said[what]


@pytest.mark.parametrize("what", ["no pictures", "NaN", "out of range", "channels"])
@pytest.mark.parametrize("family", PICTURES)
def test_bad_pictures_are_named(tmp_path: Path, family: str, what: str) -> None:
    source, said = _bad_data(tmp_path, what)
    with pytest.raises(RequestError, match=said):
        _run_here(tmp_path, family, source)


@pytest.mark.parametrize("family", ["classifier", "gan", "ddpm"])
@pytest.mark.parametrize(("labels", "said"), [("labels", "one label, '1', on every picture"), (None, "no labels")])
def test_too_few_classes_are_refused(tmp_path: Path, family: str, labels: str | None, said: str) -> None:
    np.savez(tmp_path / "one.npz", images=np.zeros((8, 8, 8)), labels=np.ones(8, dtype=np.int64))
    with pytest.raises(RequestError, match=f"at least two classes; the data has {said}"):
        _run_here(tmp_path, family, {"source": "arrays", "files": ["one.npz"], "labels": labels})


def _bad_text(folder: Path, name: str, what: str) -> tuple[dict[str, Any], str]:
    """Write rows with a fault for a stage that reads words; returns the source and what the error must say."""
    kind = "jsonl" if name in CLASSIFIED or name == "vision_language" else "text"
    row: dict[str, Any] = {"text": "A number.", "label": "odd"}
    if name == "vision_language":
        row = {"images": [], "prompt": "A number is ", "completion": "odd"}
    lines = [json.dumps(row) if kind == "jsonl" else row["text"]] * 8
    said = {
        "no words": "nothing to learn from in 1 rows .*: empty: bad.txt" if kind == "text" else "no rows",
        "not UTF-8": r"bad.txt: (row 8: )?not (UTF-8|JSON)",
        "a broken row": r"bad.txt:(4| row 4): not JSON",
    }
    if what == "a broken row":
        lines[3] = lines[3][:-4]
    content = "" if what == "no words" else "\n".join(lines)
    (folder / "bad.txt").write_bytes(content.encode() + (b" \xff" if what == "not UTF-8" else b""))
    return {"source": kind, "files": ["bad.txt"]}, said[what]


BAD_TEXTS = [(name, what) for name in [*LANGUAGE, *CLASSIFIED] for what in ("no words", "not UTF-8")]
BAD_TEXTS += [(name, "a broken row") for name in ["vision_language", *CLASSIFIED]]


@pytest.mark.parametrize(("name", "what"), BAD_TEXTS)
def test_bad_texts_are_named(finished: Path, name: str, what: str) -> None:
    source, said = _bad_text(finished, name, what)
    with pytest.raises(RequestError, match=said):
        _run_here(finished, name, source)


def test_texts_of_one_class_are_refused(finished: Path) -> None:
    (finished / "one.csv").write_text("text,label\n" + "A number.,odd\nA word.,odd\n" * 8)
    with pytest.raises(RequestError, match="at least two classes; the labels that are used have odd"):
        _run_here(finished, "classified", {"source": "csv", "files": ["one.csv"]})


def _run_here(folder: Path, family: str, source: dict[str, Any]) -> None:
    """Run a family's stage in this process on another source."""
    _run_case_here(folder, _case(family, "here", PLAIN, {"data": source}))


def _run_case_here(folder: Path, case: dict[str, Any]) -> None:
    import torch

    from trainers.distributed import Ranks

    worker = load_module(WORKER)
    worker.run_case(folder, Ranks(0, 1, 0, torch.device("cpu")), worker.Case(**case))
