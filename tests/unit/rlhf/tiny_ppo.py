"""A tiny PPO: two layers of width 16 on a vocabulary of 24, the plain engine, prompts of one to four tokens."""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from pydantic import TypeAdapter
from torch import nn

from recipes.stages.algorithms import TextAlgorithm
from recipes.stages.lora import Lora
from recipes.stages.optim import AdamW
from recipes.stages.rollout import Rollout
from recipes.stages.sharding import Shard
from recipes.stages.updates import TokenUpdates
from rlhf.algorithm import algorithm_of
from rlhf.algorithms.scoring import ScoreStatistics
from rlhf.experience import ExperienceMaker
from rlhf.iterations import RlSource
from rlhf.objective import RlObjective
from rlhf.policy import Learner
from rlhf.text.policy import PolicyModels, Role, Route
from rlhf.text.reward_inputs import same_tokens
from rlhf.text.rewards import JudgeTerm, TextReward
from rlhf.text.sampling import TextPolicy, TextSources
from tests.observers import Quiet
from trainers.data.batches import BatchPlan
from trainers.data.dataset import BuildReport, Dataset
from trainers.data.layouts.packed import Packed
from trainers.data.layouts.prompts import Prompts
from trainers.engine.build import build_engine
from trainers.engine.protocol import Engine, ParameterGroup
from trainers.inference.generation import SamplingSettings
from trainers.inference.rollouts import LocalRollouts, RolloutEngine
from trainers.models.decoder import build_decoder
from trainers.models.lora import add_adapter
from trainers.models.protocol import TokenizerFacts
from trainers.runtime import distributed
from trainers.runtime.distributed import Ranks
from trainers.runtime.precision import unit_roundoff

OpenRollouts = Callable[[Engine, int], RolloutEngine]
"""Opens what samples from the policy under an engine; the seed keys the draws."""
VOCABULARY, WIDTH, EOS, PAD = 24, 16, 0, 1
CPU = torch.device("cpu")


@dataclass
class Listener(Quiet):
    """Remembers what it hears."""

    heard: list[tuple[int, Mapping[str, float]]] = field(default_factory=list)
    stop_at: int | None = None
    """Ask to stop once the loop has heard of that many steps."""
    steps_done: int = 0

    def phase(self, name: str, **progress: float) -> None:
        """Remember how far the loop is."""
        self.steps_done = int(progress.get("step", self.steps_done))

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Remember."""
        self.heard.append((step, dict(values)))

    def stop_requested(self) -> bool:
        """From the chosen step on."""
        return self.stop_at is not None and self.steps_done >= self.stop_at


@dataclass
class TinyPpo:
    """The parts of one PPO."""

    models: PolicyModels
    engine: Engine
    source: RlSource[Any]
    objective: RlObjective
    listener: Listener
    settings: TokenUpdates

    def run(self, first: int = 0, last: int | None = None) -> list[dict[str, float]]:
        """Steps as the loop runs them, without checkpoints; returns each step's loss sums."""
        done = []
        for step in range(first, self.source.steps_planned if last is None else last):
            batches = self.source.micro_batches(step)
            total = sum(self.objective.weight(batch) for batch in batches)
            sums: dict[str, float] = {}
            for batch in batches:
                output = self.objective.loss(self.engine.module, batch)
                self.engine.backward(output.loss_sum / total)
                for name, (value, _) in output.metrics.items():
                    sums[name] = sums.get(name, 0.0) + float(value)
            self.engine.step({"actor": 0.01} | ({} if self.settings.value_model is None else {"critic": 0.01}))
            done.append(sums)
            if self.source.after_step(step + 1, sums) is not None:
                break
        return done

    def parameters(self) -> dict[str, torch.Tensor]:
        """Copies of all parameters."""
        return {name: tensor.clone() for name, tensor in self.engine.full_parameters()}


class ShareOfOne(nn.Module):
    """A "backbone" whose only state is the share of one token so far; as a reward it wants that token."""

    TOKEN = 7

    @property
    def base_model(self) -> nn.Module:
        """Itself, as transformers' bare models are."""
        return self

    def forward(self, input_ids: torch.Tensor, **_: Any) -> Any:
        """Hidden states of width 16 that all hold the share."""
        seen = (input_ids == self.TOKEN).float().cumsum(dim=1) / torch.arange(1, input_ids.shape[1] + 1)
        return SimpleNamespace(last_hidden_state=seen[:, :, None].expand(-1, -1, 16))


def prompt_set(rows: int = 40) -> Dataset:
    """Prompts of one to four tokens."""
    generator = np.random.default_rng(0)
    prompts = [generator.integers(2, VOCABULARY, size=1 + row % 4) for row in range(rows)]
    report = BuildReport(rows, {"sequences": rows})
    arrays = {
        "prompt_ids": np.concatenate(prompts).astype(np.int32),
        "prompt_offsets": np.cumsum([0, *map(len, prompts)]),
    }
    return Dataset("d" * 64, Prompts, report, arrays, PAD)


def text_set(rows: int = 12) -> Dataset:
    """Packed sequences of two to eight tokens, so that shares of a batch differ in their number of targets."""
    generator = np.random.default_rng(1)
    lengths = np.array([2 + 5 * row % 7 for row in range(rows)])
    is_real_NT = np.arange(8) < lengths[:, None]
    arrays = {
        "input_ids": np.where(is_real_NT, generator.integers(2, VOCABULARY, size=is_real_NT.shape), PAD).astype(
            np.int32
        ),
        "segment_ids": is_real_NT.astype(np.int32),
        "loss_mask": is_real_NT & (np.arange(8) > 0),
    }
    report = BuildReport(rows, {"sequences": rows})
    return Dataset("e" * 64, Packed, report, arrays, PAD)


def tiny_model(
    seed: int = 0, kind: str = "llama", width: int = WIDTH, vocabulary: int = VOCABULARY, layers: int = 2
) -> nn.Module:
    """A causal language model with random weights."""
    architecture = {
        "type": kind,
        "num_hidden_layers": layers,
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_attention_heads": width // 8,
        "num_key_value_heads": width // 8,
        "max_position_embeddings": 64,
        "initializer_range": 1.2 / width**0.5,
    }
    if kind == "gpt2":
        architecture = {"type": kind, "n_layer": 2, "n_embd": 16, "n_head": 2, "n_positions": 64}
    return build_decoder(architecture, TokenizerFacts(vocabulary, EOS, PAD), seed=seed, device=CPU)


def tiny_models(
    lora: bool, temperature: float, kind: str = "llama", has_critic: bool = True, **sizes: int
) -> PolicyModels:
    """Every role: with LoRA on one network, else each on its own."""
    policy, judge = tiny_model(kind=kind, **sizes), tiny_model(seed=1, kind=kind, **sizes)
    networks: dict[str, nn.Module]
    routes: dict[Role, Route]
    if lora:
        for name in ("actor", "critic") if has_critic else ("actor",):
            add_adapter(policy, Lora(r=4), seed=3, name=name)
        networks = {"policy": policy, "judge": judge.base_model}
        routes = {
            "actor": Route("policy", ("actor",)),
            "critic": Route("policy", ("critic",)),
            "reference": Route("policy"),
            "reward": Route("judge"),
        }
    else:
        networks = {
            "policy": policy,
            "reference": copy.deepcopy(policy),
            "critic": copy.deepcopy(judge.base_model),
            "judge": judge.base_model,
        }
        routes = {
            "actor": Route("policy"),
            "critic": Route("critic"),
            "reference": Route("reference"),
            "reward": Route("judge"),
        }
    if not has_critic:
        networks.pop("critic", None)
        del routes["critic"]
    width = sizes.get("width", WIDTH)
    value_head, score_head = nn.Linear(width, 1), nn.Linear(width, 1, bias=False)
    with torch.no_grad():
        generator = torch.Generator().manual_seed(5)
        for head in (value_head, score_head):
            head.weight.copy_(torch.randn(head.weight.shape, generator=generator) * 0.2)
        value_head.bias.zero_()
    vocabulary = sizes.get("vocabulary", VOCABULARY)
    models = PolicyModels(
        networks, routes, value_head if has_critic else None, score_head, temperature, same_tokens((EOS,)), vocabulary
    )
    for frozen in ([] if lora else [models.networks["reference"]]) + [models.networks["judge"], score_head]:
        frozen.requires_grad_(False)
    return models


def judged_alone(std: float = 0.5) -> TextReward:
    """The reward model as the only term."""
    return TextReward({"judge": 1.0}, [JudgeTerm("judge", ScoreStatistics(0.0, std), clip=5.0)])


def build_tiny_ppo(
    lora: bool = True,
    kind: str = "llama",
    name: str = "ppo",
    samples: int = 1,
    seed: int = 0,
    prompts: int = 8,
    prompt_rows: int = 40,
    max_new_tokens: int = 6,
    micro_batch: int = 4,
    temperature: float = 1.0,
    wants_one_token: bool = False,
    with_text: bool = False,
    shard: Shard | None = None,
    listener: Listener | None = None,
    sizes: Mapping[str, int] | None = None,
    reward: TextReward | None = None,
    open_rollouts: OpenRollouts = LocalRollouts,
    **settings: Any,
) -> TinyPpo:
    """Put PPO or the algorithm `name` together as its stage does, on this process's rank.

    Further arguments are settings of the algorithm; `samples` are responses to each prompt; `seed` is that
    of draws and orders.
    """
    written = {"name": name, "iterations": 3, "optimizer": AdamW(lr=1e-2), **settings}
    ppo: Any = TypeAdapter(TextAlgorithm).validate_python(written)
    algorithm = algorithm_of(ppo, max_new_tokens)
    has_critic = algorithm.needs_critic
    rollout = Rollout(
        max_new_tokens=max_new_tokens,
        prompts_per_iteration=prompts,
        samples_per_prompt=samples,
        temperature=temperature,
    )
    models = tiny_models(lora, temperature, kind, has_critic, **sizes or {})
    if wants_one_token:
        models.networks["judge"] = ShareOfOne()
        models.sharing -= {"judge"}
        nn.init.constant_(models.score_head.weight, 1 / 16)
    parameters = [(name, p) for name, p in models.named_parameters() if p.requires_grad]
    is_critic = {name: "critic" in name or "value_head" in name for name, _ in parameters}
    groups = [
        ParameterGroup("actor", tuple((n, p) for n, p in parameters if not is_critic[n])),
        ParameterGroup("critic", tuple((n, p) for n, p in parameters if is_critic[n])),
    ][: 1 + has_critic]
    shard = shard or Shard(engine="plain", precision="fp32")
    engine = build_engine(models, groups, shard, clip=1.0, device=CPU)
    vocabulary = (sizes or {}).get("vocabulary", VOCABULARY)
    sampling = SamplingSettings(max_new_tokens, temperature, (EOS,), PAD, vocabulary)
    listener = listener or Listener()
    roundoff = unit_roundoff(shard.precision, CPU)
    workers, rank = distributed.world_size(), distributed.rank()
    text = BatchPlan(text_set(), 0, ppo.text_batch, workers, rank, ppo.text_batch // workers) if with_text else None
    asked = BatchPlan(prompt_set(prompt_rows), seed, prompts, workers, rank, prompts // workers)
    learner = Learner(engine, micro_batch, roundoff, Ranks(rank, workers, 0, CPU), seed, listener)
    policy = TextPolicy(
        learner, open_rollouts(engine, seed), TextSources(asked, text), ppo, rollout, sampling, reward or judged_alone()
    )
    source = RlSource(ExperienceMaker(policy, algorithm, ppo, learner), [n for n, _ in parameters])
    return TinyPpo(models, engine, source, RlObjective(policy, algorithm, roundoff), listener, ppo)
