"""One GPU: training stays under the predicted memory, and the whole chain runs."""

from pathlib import Path
from typing import Any

import torch

from recipes.models.decoder import Llama
from recipes.stages.optim import AdamW
from recipes.stages.sharding import Shard

PROJECT = Path(__file__).resolve().parents[2]


def test_training_stays_under_the_predicted_memory() -> None:
    from recipes.models.known_models import KnownModel
    from recipes.planning.memory import predict_sizes
    from recipes.stages.pretrain import Pretrain
    from trainers.data.batches import TokenBatch
    from trainers.engine.build import build_engine, parameter_group
    from trainers.models.decoder import build_decoder
    from trainers.models.protocol import TokenizerFacts
    from trainers.models.token_losses import TokenLosses
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
    sizes = predict_sizes(stage, KnownModel(architecture, vocabulary), workers=1, micro_batch=rows, on_gpu=True)
    predicted = sizes.memory_per_worker_bytes
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
    overrides += [f"stages.{stage}.shard.precision=bf16" for stage in ("base", "sft")]
    result = launch.run(PROJECT / "recipes" / "quickstart.yaml", overrides=overrides, smoke=True, store=store)
    assert all(not stage.cached for stage in result.stages.values())
    for stage in result.stages.values():
        verification = stage.manifest.verification
        assert stage.kind == "evaluate" or (verification is not None and verification.how == "clean-process")
