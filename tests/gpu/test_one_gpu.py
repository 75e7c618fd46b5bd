"""One GPU: the engines agree, resume is exact, bf16 follows fp32, memory stays under the prediction, the chain runs."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from recipes.architecture import Llama
from recipes.optim import AdamW
from recipes.sharding import Shard

PROJECT = Path(__file__).resolve().parents[2]
WORKER = PROJECT / "tests" / "numerics" / "training_worker.py"
FP32_LIMIT = 1e-5
BF16_LIMIT = 1e-2


def one_rank() -> dict[str, str]:
    """Return torchrun's environment of a group of one on the device."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {key: value for key, value in os.environ.items() if key != "DS_ACCELERATOR"}
    return environment | {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "LOCAL_WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": str(PROJECT),
    }


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the worker of the numerics tests reports from the device."""
    folder = tmp_path_factory.mktemp("gpu")
    engines = {"plain": {"engine": "plain"}} | {f"zero{z}": {"engine": "deepspeed", "zero": z} for z in range(4)}
    cases = [{"name": name, "do": "curve", **engine} for name, engine in engines.items()]
    cases += [{"name": f"{name}-bf16", "do": "curve", "precision": "bf16", **e} for name, e in engines.items()]
    store = str(folder / "store")
    cases += [{"name": f"resume-{name}", "do": "resume", "store": store, **e} for name, e in engines.items()]
    job, result = folder / "job.json", folder / "result.json"
    job.write_text(json.dumps({"cases": cases}))
    command = [sys.executable, str(WORKER), str(job), str(result)]
    done = subprocess.run(command, env=one_rank(), capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    results: dict[str, Any] = json.loads(result.read_text())
    return results


def curve(found: dict[str, Any], name: str) -> list[float]:
    """Return a case's losses."""
    assert "error" not in found[name], found[name]["error"]
    losses: list[float] = found[name]["losses"]
    return losses


@pytest.mark.parametrize("zero", range(4))
def test_every_zero_stage_gives_the_plain_curve(found: dict[str, Any], zero: int) -> None:
    plain = curve(found, "plain")
    assert plain[0] - plain[-1] > 0.5
    for one, other in zip(curve(found, f"zero{zero}"), plain, strict=True):
        assert abs(one - other) / other < FP32_LIMIT


@pytest.mark.parametrize("name", ["plain", "zero0", "zero1", "zero2", "zero3"])
def test_bf16_follows_fp32(found: dict[str, Any], name: str) -> None:
    for one, other in zip(curve(found, f"{name}-bf16"), curve(found, name), strict=True):
        assert abs(one - other) / other < BF16_LIMIT


@pytest.mark.parametrize("name", ["plain", "zero0", "zero1", "zero2", "zero3"])
def test_resumed_equals_straight_to_the_bit(found: dict[str, Any], name: str) -> None:
    case = found[f"resume-{name}"]
    assert "error" not in case, case["error"]
    assert case["found"] == case["wanted"]


def test_training_stays_under_the_predicted_memory() -> None:
    from recipes.memory import predict_sizes
    from recipes.stages import Pretrain
    from trainers.architectures.decoder import TokenizerFacts, build_decoder
    from trainers.architectures.token_losses import TokenLosses
    from trainers.data.batches import TokenBatch
    from trainers.engine.build import build_engine, parameter_group
    from trainers.objectives.language_model import LanguageModelObjective

    vocabulary, length, rows = 8192, 256, 8
    keys = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8, "num_attention_heads": 8}
    architecture = Llama.model_validate(
        {"family": "decoder", "type": "llama", "max_position_embeddings": length, **keys}
    )
    stage = Pretrain.model_validate(
        {
            "kind": "pretrain",
            "architecture": architecture.model_dump(),
            "tokenizer": {"train": "bpe", "vocab_size": vocabulary},
            "data": {"source": "python-docs"},
            "train": {"steps": 1, "global_batch": rows, "sequence_length": length, "optimizer": {"lr": 1e-3}},
            "shard": {"engine": "plain", "precision": "bf16"},
        }
    )
    predicted = predict_sizes(stage, architecture, vocabulary, workers=1, micro_batch=rows).memory_per_worker_bytes
    device = torch.device("cuda", 0)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    model: Any = build_decoder(
        architecture.model_dump(exclude_none=True), TokenizerFacts(vocabulary, 0, 1), seed=0, device=device
    )
    module = TokenLosses(model)
    group = parameter_group("model", module, AdamW(lr=1e-3))
    engine = build_engine(module, [group], Shard(engine="plain", precision="bf16"), clip=1.0, device=device)
    ids = torch.randint(0, vocabulary, (rows, length))
    mask = torch.ones(rows, length, dtype=torch.bool)
    mask[:, 0] = False
    ones, positions = torch.ones_like(ids), torch.arange(length).expand(rows, length)
    batch = TokenBatch(ids, ones, positions, mask, torch.arange(rows)).to(device)
    objective = LanguageModelObjective()
    for _ in range(2):
        engine.backward(objective.loss(engine.module, batch).loss_sum / objective.weight(batch))
        engine.step({"model": 1e-3})
    peak = torch.cuda.max_memory_allocated(device) - before
    engine.close()
    print(f"\npeak {peak / 2**20:.0f} MiB, predicted {predicted / 2**20:.0f} MiB")
    assert peak <= predicted
    assert predicted <= 4 * peak


def test_the_chain_runs_on_the_device(tmp_path: Path) -> None:
    import launch

    store = str(tmp_path / "store")
    overrides = ["cluster.workers=1", "cluster.gpus_per_worker=1"]
    overrides += [f"stages.{stage}.shard.precision=bf16" for stage in ("base", "chat")]
    result = launch.run(PROJECT / "recipes" / "quickstart.yaml", overrides=overrides, smoke=True, store=store)
    assert all(not stage.cached for stage in result.stages.values())
    for stage in result.stages.values():
        verification = stage.manifest.verification
        assert stage.kind == "evaluate" or (verification is not None and verification.how == "clean-process")
