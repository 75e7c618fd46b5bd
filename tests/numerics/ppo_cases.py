"""What one rank does in a case of PPO: straight on, a resume, a gradient."""

import hashlib
from typing import Any

import torch

from recipes.errors import Preempted
from recipes.stages.answers import Cadence
from recipes.stages.sharding import Shard
from tests.numerics.outcomes import Case
from tests.numerics.outcomes import Outcome as Found
from tests.unit.rlhf.tiny_ppo import Listener, TinyPpo, build_tiny_ppo
from trainers.checkpoint.checkpoint import StoreCheckpoint
from trainers.data.batches import build_batch
from trainers.runtime import distributed
from trainers.store.manifest import Layout
from trainers.store.store import Store
from trainers.training.loop import train
from trainers.training.outcome import Outcome

SETTINGS: dict[str, Any] = {
    "kl_limit": 50.0,
    "kl_controller": {"name": "adaptive", "target": 0.01, "horizon": 50},
}


def build(case: Case, stop_at: int | None = None) -> TinyPpo:
    """The PPO that a case names."""
    shard = Shard(**{"precision": "fp32", **{key: case[key] for key in ("engine", "zero", "precision") if key in case}})
    listener = Listener(stop_at=stop_at)
    settings = {**SETTINGS, "iterations": case.get("iterations", 1), **case.get("settings", {})}
    parts = {"lora": case.get("lora", True), "micro_batch": case.get("micro_batch", 2)}
    parts["with_text"] = settings.get("text_coef", 0.0) > 0
    return build_tiny_ppo(shard=shard, listener=listener, **parts, **settings)


def train_ppo(ppo: TinyPpo, store: Store, name: str, lease: int) -> Outcome:
    """Train as the stage does, saving between all iterations."""
    layout = Layout(workers=distributed.world_size(), micro_batch=2, accumulation=1)
    return train(
        ppo.engine,
        ppo.objective,
        ppo.source,
        learning_rates=lambda step: {"actor": 1e-2, "critic": 1e-2},
        cadence=Cadence(save_every=ppo.source.steps_per_iteration, evaluate_every=10**6),
        checkpoint=StoreCheckpoint(store, "ppo", name, "f" * 64, lease, layout, {}),
        evaluate=None,
        observer=ppo.listener,
        seed=0,
    )


def seen(ppo: TinyPpo) -> Found:
    """What a run left behind: what was heard, and a digest of all parameters."""
    digest = hashlib.sha256()
    for name, tensor in ppo.engine.full_parameters():
        digest.update(name.encode() + tensor.float().numpy().tobytes())
    heard = [[step, dict(values)] for step, values in ppo.listener.heard]
    for _, values in heard:
        values.pop("step_s", None)
    return {"heard": heard, "digest": digest.hexdigest()}


def summed_gradient(ppo: TinyPpo, batches: list[Any]) -> list[float]:
    """The gradient of a step's loss over all ranks, parameter by parameter."""
    (total,) = distributed.all_sum([sum(ppo.objective.weight(batch) for batch in batches)])
    for batch in batches:
        ppo.engine.backward(ppo.objective.loss(ppo.engine.module, batch).loss_sum / total)
    flat = torch.cat([p.grad.reshape(-1) for p in ppo.models.parameters() if p.requires_grad])
    return distributed.all_sum(flat.double().tolist())


def text_gradient(ppo: TinyPpo, step: int) -> list[float]:
    """The gradient of the mean loss over the step's whole text, row by row without packing; zero for the critic."""
    plan = ppo.source.experience.policy.sources.text
    text = build_batch(plan.dataset, plan.sample_ids(step))
    losses = []
    with ppo.models.playing("actor") as network:
        for ids, real in zip(text.input_ids_BT, text.segment_ids_BT > 0, strict=True):
            logits = network(input_ids=ids[real][None]).logits[0]
            losses.append(torch.nn.functional.cross_entropy(logits[:-1], ids[real][1:], reduction="none"))
    parameters = [p for p in ppo.models.parameters() if p.requires_grad]
    found = torch.autograd.grad(torch.cat(losses).mean(), parameters, allow_unused=True)
    filled = [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)]
    return torch.cat([gradient.reshape(-1) for gradient in filled]).double().tolist()


def run(case: Case) -> Found:
    """Run one case."""
    store = Store.open(case["store"])
    lease = store.take_lease("ppo", case["stage"]) if distributed.rank() == 0 else 1
    lease = int(distributed.broadcast_json(lease))
    match case["do"]:
        case "gradient":
            ppo = build(case)
            step = case.get("step", 0)
            gradient = summed_gradient(ppo, ppo.source.micro_batches(step))
            text = text_gradient(build(case), step) if case["settings"]["text_coef"] > 0 else []
            return {"gradient": gradient, "text": text}
        case "straight":
            ppo = build(case)
            train_ppo(ppo, store, case["stage"], lease)
            return seen(ppo)
        case "resume":
            first = build(case, stop_at=case["stop_at"])
            preempted = False
            try:
                train_ppo(first, store, case["stage"], lease)
            except Preempted:
                preempted = True
            first.engine.close()
            second = build(case)
            train_ppo(second, store, case["stage"], lease)
            return {**seen(second), "preempted": preempted}
    raise ValueError(case["do"])
