"""Predicted bytes of a saved state against what the store holds."""

from pathlib import Path
from typing import Any

import pytest

from recipes.models.decoder import Llama
from recipes.models.known_models import KnownModel
from recipes.planning.memory import predict_sizes
from recipes.stages.finetune import Finetune
from recipes.stages.lora import Lora
from recipes.stages.train import Train
from rlhf.task import run_rl
from rlhf.text.reward_stage import run_reward
from tests.integration.rlhf.workshop import PLAIN, WORDS, jsonl, open_workshop, ppo_spec, reward_spec, sizes_of
from trainers.tasks.language_model import run_language_model


def test_the_predicted_state_is_what_is_stored(tmp_path: Path) -> None:
    """Wide enough that the files' headers are little: predicted bytes are within 2 % of all objects of a state."""
    workshop = open_workshop(tmp_path, width=64)
    answers = [{"prompt": f"What does {a}_{b} do?", "completion": f"{a}s the {b}."} for a in WORDS for b in WORDS[:5]]
    jsonl(tmp_path / "answers.jsonl", answers)
    few = Train.model_validate({"steps": 1, "global_batch": 4, "sequence_length": 64, "optimizer": {"lr": 1e-2}})
    rows = {"source": "jsonl", "files": ["answers.jsonl"], "hold_out": 0.2}
    chat = {"kind": "finetune", "init_from": "chat", "data": rows, "train": few, "shard": PLAIN}
    architecture = Llama.model_validate({"family": "decoder", "type": "llama", **sizes_of(64)})
    model = KnownModel(architecture, workshop.tokenization.vocab_size)
    for name, lora in (("full", None), ("lora", Lora(r=32))):
        stages: dict[str, tuple[Any, Any, dict[str, str]]] = {
            "chat": (Finetune.model_validate(chat), run_language_model, {"init_from": "chat"}),
            "judge": (reward_spec(False).model_copy(update={"train": few}), run_reward, {"init_from": "chat"}),
            "policy": (
                ppo_spec(False, iterations=1, kl_limit=10.0),
                run_rl,
                {"actor": "chat", "rewards.judge.model": f"judge-{name}"},
            ),
        }
        for kind, (plain, run, given) in stages.items():
            spec, stage = plain.model_copy(update={"lora": lora}), f"{kind}-{name}"
            workshop.keep(stage, run(spec, workshop.context(stage, given)), given)
            state = workshop.store.latest_state("run", stage)
            assert state is not None
            tensors = [tensor for group in state.tensors.values() for tensor in group]
            stored = {piece.object.sha256: piece.object.bytes for tensor in tensors for piece in tensor.slices}
            predicted = predict_sizes(spec, model, 1, 4).state_bytes
            assert sum(stored.values()) == pytest.approx(predicted, rel=0.02), stage
