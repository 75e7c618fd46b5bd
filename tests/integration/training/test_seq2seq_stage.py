"""An encoder-decoder on two workers, as whole stages: spans, targets of sources, full and by adapters, evaluation."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from recipes.errors import RequestError
from tests.ranks import run_ranks
from tests.stages import Case, run_cases

TRAIN: dict[str, Any] = {
    "steps": 6,
    "global_batch": 8,
    "sequence_length": 24,
    "optimizer": {"lr": 1e-2},
    "save_every": 100,
    "evaluate_every": 4,
    "evaluation_rows": 10,
}
DATA: dict[str, Any] = {
    "source": "csv",
    "files": ["pairs.tsv"],
    "header": ["en", "es"],
    "quotes": False,
    "columns": {"prompt": "en", "completion": "es"},
    "hold_out": 0.2,
}
BART: dict[str, Any] = {
    "family": "encoder_decoder",
    "type": "bart",
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 1,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "max_position_embeddings": 32,
    "dropout": 0.1,
}
STAGES: dict[str, dict[str, Any]] = {
    "spans": {
        "kind": "pretrain",
        "architecture": BART,
        "tokenizer": {"train": "bpe", "vocab_size": 320, "num_sentinels": 8},
        "span_corruption": {"noise_density": 0.3},
        "data": DATA,
        "train": TRAIN,
        "shard": {"zero": 2},
    },
    "full": {
        "kind": "finetune",
        "init_from": "spans",
        "num_beams": 3,
        "data": DATA,
        "train": TRAIN,
        "shard": {"zero": 3},
    },
    "adapted": {
        "kind": "finetune",
        "init_from": "spans",
        "lora": {"r": 4},
        "data": DATA,
        "train": TRAIN,
        "shard": {"zero": 1, "precision": "bf16"},
    },
}
EVALUATION: dict[str, Any] = {
    "kind": "evaluate",
    "of": ["full", "adapted"],
    "suites": ["targets"],
    "prompts": DATA,
    "num_prompts": 10,
    "num_samples": 2,
    "num_beams": 3,
    "sequence_length": 24,
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the stages ran."""
    folder = tmp_path_factory.mktemp("seq2seq")
    rows = [f'the "number" {n}\tel "número" {n}' for n in range(120)]
    (folder / "pairs.tsv").write_text("\n".join(rows), encoding="utf-8")
    cases = []
    for stage, spec in STAGES.items():
        inputs = {} if stage == "spans" else {"init_from": "spans"}
        cases.append(Case("straight", stage, spec, inputs, is_kept=True))
    cases.append(Case("straight", "eval", EVALUATION, {"of.0": "full", "of.1": "adapted"}))
    run_ranks(folder, 2, run_cases, folder, cases)
    return folder


@pytest.fixture(scope="module")
def again(finished: Path) -> Path:
    """The same folder, in which the fine-tuning ran again: with a preemption, and without sharding."""
    full, inputs = STAGES["full"], {"init_from": "spans"}
    cases = [Case("stopped", "full", full, inputs, stop_at=2), Case("stopped", "full", full, inputs)]
    cases.append(Case("unsharded", "full", full | {"shard": {"zero": 0}}, inputs))
    run_ranks(finished, 2, run_cases, finished, cases)
    return finished


def result(folder: Path, name: str) -> dict[str, Any]:
    """Read what rank 0 reported."""
    found: dict[str, Any] = json.loads((folder / f"{name}.json").read_text())
    return found


def test_the_chain_commits_verified_models(finished: Path) -> None:
    spans, full, adapted = (result(finished, f"straight-{stage}") for stage in STAGES)
    assert [found["kind"] for found in (spans, full, adapted)] == ["model", "model", "adapter"]
    assert {name.split("/")[0] for name in adapted["files"]} == {"adapter", "model"}
    assert spans["difference"] < 1e-5
    assert full["difference"] < 1e-5
    assert adapted["difference"] < 2e-2
    assert spans["metrics"]["train"]["loss"] < math.log(320) + 0.5
    kept = [found["metrics"]["data"]["kept"] for found in (spans, full)]
    assert kept[0] == kept[1] < 120, "pretraining and fine-tuning keep the same rows away"


def test_held_out_targets_are_written_and_scored(finished: Path) -> None:
    for stage, beams in (("full", 3), ("adapted", 1)):
        metrics = result(finished, f"straight-{stage}")["metrics"]
        assert 0 <= metrics["evaluation"]["bleu"] <= 100
        assert 0 <= metrics["evaluation"]["chrf"] <= 100
        report = metrics["translations"]
        assert report["rows"] == 10
        assert report["num_beams"] == beams
        assert report["examples"][0]["source"].startswith('the "number" ')
        assert report["examples"][0]["target"].startswith('el "número" ')


def test_an_evaluation_agrees_with_the_stage_on_the_rows_that_were_held_out(finished: Path) -> None:
    from recipes.stages.evaluate import Evaluate

    evaluation = result(finished, "straight-eval")
    found, own = evaluation["metrics"], result(finished, "straight-full")["metrics"]
    assert evaluation["kind"] == "report"
    assert found.keys() == Evaluate.model_validate(EVALUATION).metrics()
    assert found["prompts"] == own["translations"]["rows"] == 10
    for name in ("loss", "bleu", "chrf"):
        assert found[f"full.{name}"] == pytest.approx(own["evaluation"][name], rel=1e-5)
    assert found["full.perplexity"] == pytest.approx(math.exp(found["full.loss"]))
    assert found["full.loss"] != found["adapted.loss"]
    assert found["full.eos_rate"] == own["translations"]["eos_rate"]


def test_an_evaluation_shows_targets_beside_what_was_written(finished: Path) -> None:
    from trainers.store.store import Store

    files = result(finished, "straight-eval")["files"]
    store = Store.open(str(finished / "store"))
    lines = json.loads(store.objects.get_bytes(files["samples.json"]["sha256"]))
    assert [line["model"] for line in lines] == ["reference", "full", "adapted"] * 2
    own = result(finished, "straight-full")["metrics"]["translations"]["examples"]
    assert [line["response"] for line in lines[:2]] == [own[0]["target"], own[0]["written"]]
    assert all(line["prompt"] == own[0]["source"] for line in lines[:3])


def test_a_suite_for_other_models_is_refused_before_it_runs(finished: Path) -> None:
    import torch

    from launch.runs.stage_entry import compute
    from recipes.loading.load import parse_recipe
    from trainers.runtime.distributed import Ranks
    from trainers.store.store import Store
    from trainers.training.context import StageContext

    stage = {"kind": "evaluate", "of": ["full"], "suites": ["perplexity"]}
    spec = parse_recipe({"name": "small", "stages": {"eval": stage}}).stages["eval"]
    store, ranks = Store.open(str(finished / "store")), Ranks(0, 1, 0, torch.device("cpu"))
    inputs: Any = {"of.0": store.resolve("full")}
    context = StageContext(store, "wrong", "eval", "f" * 64, 1, 0, finished, inputs, {}, None, ranks)  # type: ignore[arg-type]
    with pytest.raises(RequestError, match=r"of\.0 full: suite .perplexity. measures .*; suites: \[targets\]"):
        compute(spec, context)


@pytest.mark.long
def test_a_preempted_stage_ends_in_the_same_bytes(again: Path) -> None:
    straight, resumed = result(again, "straight-full"), result(again, "stopped-full")
    assert resumed["steps"] == [4, 5, 6]
    assert resumed["digest"] == straight["digest"]
    assert resumed["metrics"] == straight["metrics"]


@pytest.mark.long
def test_sharding_does_not_change_the_curve(again: Path) -> None:
    sharded, whole = result(again, "straight-full")["curves"], result(again, "unsharded-full")["curves"]
    for curve in ("loss", "eval/loss"):
        for step, value in whole[curve].items():
            assert sharded[curve][step] == pytest.approx(value, rel=1e-5)


def test_models_open_with_stock_classes_and_write(finished: Path, tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

    from launch.sampling.text import sample_texts
    from trainers.store.export import export
    from trainers.store.store import Store

    store = Store.open(str(finished / "store"))
    folder = export(store, store.resolve("full"), tmp_path / "model")
    model = AutoModelForSeq2SeqLM.from_pretrained(folder, local_files_only=True).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    text = 'the "number" 7'
    ids = torch.tensor([[*tokenizer(text, add_special_tokens=False).input_ids, tokenizer.eos_token_id]])
    for beams in (1, 4):
        written = model.generate(ids, num_beams=beams, do_sample=False, max_new_tokens=12)[0]
        (ours,) = sample_texts(str(folder), [text], num_beams=beams, max_new_tokens=12)
        assert ours["response"] == tokenizer.decode(written, skip_special_tokens=True)
        assert not ours["continues"]
    (filled,) = sample_texts("store://spans", ["the <extra_id_0> 7"], store=str(finished / "store"))
    assert "<extra_id_0>" not in filled["response"]
    assert filled["response"].startswith("the")
