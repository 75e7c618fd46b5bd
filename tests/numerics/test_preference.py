"""Preference optimisation gives equal numbers: the plain engine and ZeRO 0 to 3, one worker and two, straight and
resumed to the same bytes.
"""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.ranks import run_ranks
from tests.stages import Case, run_cases
from tests.tiers import tiered, wants_long

LIMIT = 1e-4
"""Largest difference of losses; LoRA's first steps magnify roundings."""
TRAIN: dict[str, Any] = {
    "steps": 6, "global_batch": 8, "sequence_length": 64, "optimizer": {"lr": 5e-3}, "save_every": 2,
    "evaluate_every": 3, "evaluation_rows": 8,
}  # fmt: skip
BASE: dict[str, Any] = {
    "kind": "pretrain",
    "architecture": {
        "family": "decoder", "type": "llama", "hidden_size": 32, "intermediate_size": 64,
        "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 128,
    },
    "tokenizer": {"train": "bpe", "vocab_size": 320},
    "data": {"source": "text", "files": ["text.txt"], "documents": "paragraph", "hold_out": 0.2},
    "train": TRAIN,
}  # fmt: skip
LORA: dict[str, Any] = {"lora": {"r": 4}}
KINDS: dict[str, dict[str, Any]] = {
    "dpo": {"loss": {"name": "dpo", "beta": 0.5}, **LORA},
    "full": {"loss": {"name": "dpo", "beta": 0.5}},
    "orpo": {"loss": {"name": "orpo"}, **LORA},
    "kto": {"loss": {"name": "kto", "beta": 0.5, "undesirable_weight": 2.0}, **LORA},
}
FILES = {"kto": "judged.jsonl"}
ZERO = (0, 1, 2, 3)
SHARDED = [(kind, zero) for kind in KINDS for zero in ZERO]
DEFAULT = [("dpo", 1), ("full", 3), ("orpo", 2), ("kto", 3)]
RESUMED = {"dpo": 1, "full": 3, "kto": 3}
RESUMED_BY_DEFAULT = ("full", "kto")


def case(run: str, kind: str, shard: dict[str, Any], stop_at: int = 0) -> Case:
    spec = {
        "kind": "preference", "init_from": "base", "min_accuracy": 0.0, "train": TRAIN,
        "data": {"source": "jsonl", "files": [FILES.get(kind, "pairs.jsonl")], "hold_out": 0.2}, "shard": shard,
        **KINDS[kind],
    }  # fmt: skip
    return Case(run, kind, spec, {"init_from": "base"}, stop_at=stop_at)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    """Where every case has run."""
    place = tmp_path_factory.mktemp("preference")
    (place / "text.txt").write_text("\n\n".join(f"The number {n} comes before {n + 1}." for n in range(120)))
    pairs = [
        {"prompt": f"What comes after {n}?", "chosen": f" {n + 1}." * (1 + n % 3), "rejected": f" {n - 1}, {n}."}
        for n in range(60)
    ]
    (place / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    judged = [
        {"prompt": pair["prompt"], "completion": pair["chosen" if n % 3 else "rejected"], "label": n % 3 > 0}
        for n, pair in enumerate(pairs)
    ]
    (place / "judged.jsonl").write_text("".join(json.dumps(row) + "\n" for row in judged))
    cells = SHARDED if wants_long(request) else DEFAULT
    resumed = RESUMED if wants_long(request) else RESUMED_BY_DEFAULT
    cases = [Case("made", "base", BASE, is_kept=True)]
    cases += [case(f"zero{zero}", kind, {"engine": "deepspeed", "zero": zero}) for kind, zero in cells]
    for kind in resumed:
        shard = {"engine": "deepspeed", "zero": RESUMED[kind]}
        cases += [case("stopped", kind, shard, stop_at=3), case("stopped", kind, shard)]
    run_ranks(place, 2, run_cases, place, cases)
    plain = {"engine": "plain", "precision": "fp32", "micro_batch": 2}
    run_ranks(place, 1, run_cases, place, [case("plain", kind, plain) for kind in KINDS])
    return place


def result(folder: Path, run: str, kind: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / f"{run}-{kind}.json").read_text())
    return found


@pytest.mark.parametrize(("kind", "zero"), tiered(SHARDED, DEFAULT))
def test_shards_and_workers_change_nothing_that_is_learnt(folder: Path, kind: str, zero: int) -> None:
    wanted, found = result(folder, "plain", kind)["curves"], result(folder, f"zero{zero}", kind)["curves"]
    assert len(set(wanted["loss"].values())) == TRAIN["steps"]
    for name in ("loss", "eval/loss"):
        assert found[name].keys() == wanted[name].keys()
        for step, value in wanted[name].items():
            assert found[name][step] == pytest.approx(value, rel=LIMIT), (name, step)


@pytest.mark.parametrize("kind", tiered(RESUMED, RESUMED_BY_DEFAULT))
def test_a_stopped_stage_ends_with_the_same_bytes(folder: Path, kind: str) -> None:
    straight, resumed = result(folder, f"zero{RESUMED[kind]}", kind), result(folder, "stopped", kind)
    assert resumed["steps"][0] > 1
    assert resumed["digest"] == straight["digest"]
    for step, value in resumed["curves"]["loss"].items():
        assert value == straight["curves"]["loss"][step]
    assert straight["difference"] < 1e-4
