"""Adapters and mixtures on a real pretrained model and real rows, killed and resumed: the same bytes come out.

Each way of tuning SmolLM2 takes a few steps on a mixture of Dolly and GSM8K twice, undisturbed and with a SIGKILL of
the driver or of the worker after a saved state.
"""

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.faults.run.bed import Bed

DATA = Path(__file__).resolve().parents[4] / "shared" / "data" / "sft"
pytestmark = [
    pytest.mark.serial,
    pytest.mark.long,
    pytest.mark.timeout(3000),
    pytest.mark.skipif(not DATA.is_dir(), reason="no folder ../shared/data/sft beside the repository"),
]

CASES: dict[str, dict[str, dict[str, Any]]] = {"nf4": {"tuned": {"lora": {"r": 8, "quantize": "nf4"}}}}


def recipe_of(case: str, model: Path) -> dict[str, Any]:
    """Few steps on three rows of Dolly for each of GSM8K."""
    mix = [
        {"source": "jsonl", "files": [str(DATA / "dolly_open_qa.jsonl")], "weight": 3, "alias": "dolly"},
        {"source": "jsonl", "files": [str(DATA / "gsm8k_train.jsonl.gz")], "weight": 1, "alias": "gsm8k"},
    ]
    shared = {
        "kind": "finetune",
        "init_from": str(model),
        "data": {"mix": [{**source, "limit": 200, "hold_out": 0.1} for source in mix]},
        "train": {
            "steps": 4, "save_every": 2, "global_batch": 4, "sequence_length": 96, "packing": False,
            "evaluation_rows": 8, "optimizer": {"lr": 1e-4},
        },
        "gate": "ignore",
        "shard": {"engine": "plain", "precision": "bf16"},
    }  # fmt: skip
    stages = {name: {**shared, **settings} for name, settings in CASES[case].items()}
    return {"name": f"adapters-{case}", "cluster": {"workers": 1, "gpus_per_worker": 0}, "stages": stages}


@pytest.mark.parametrize("case", CASES)
def test_smollm2_is_tuned_killed_and_resumed(
    make_bed: Callable[[], Bed], say: Callable[[str], None], tmp_path: Path, smollm2: Path, case: str
) -> None:
    path = tmp_path / f"{case}.yaml"
    path.write_text(json.dumps(recipe_of(case, smollm2)))
    undisturbed, bed = make_bed(), make_bed()
    undisturbed.finish("run", str(path))
    driver = bed.start("run", str(path))
    stages = list(CASES[case])
    for number, stage in enumerate(stages):
        bed.wait_for(lambda name=stage: any((bed.store / "refs" / "states").glob(f"*/{name}/*")), driver)
        assert not bed.committed(stage), f"{stage} was committed before the kill"
        victim = ("driver", "worker")[number % 2]
        pid = driver.pid if victim == "driver" else bed.wait_for(lambda name=stage: bed.workers(name).get(0), driver)
        os.kill(pid, signal.SIGKILL)
        say(f"{victim} killed in {stage}")
        if victim == "driver":
            driver.wait(10)
            driver = bed.start("resume", "last")
    assert driver.wait(1500) == 0, bed.output()
    made = bed.digests()
    assert set(stages) <= made.keys()
    assert made == undisturbed.digests()
    bed.finish("store", "export", "last/tuned", str(tmp_path / "out"), "--merge")
    demand_answers(tmp_path / "out")


def demand_answers(folder: Path) -> None:
    """Stock transformers answers as the model did before these few steps."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    question = [{"role": "user", "content": "What is the capital of France?"}]
    given = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    with torch.inference_mode():
        answer = model.generate(**given, max_new_tokens=16, do_sample=False)[0, given["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(answer)
