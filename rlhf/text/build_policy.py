"""From a stage's inputs to the models of a policy that writes: what they share, what learns, what they start from."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from recipes.models.model_kinds import ModelKind
from recipes.stages.lora import Lora
from recipes.stages.rl import RlText
from recipes.stages.sharding import Shard
from rlhf.algorithms.scoring import ScoreStatistics
from rlhf.text.policy import PolicyModels, Role, Route
from rlhf.text.reward_inputs import Reading
from trainers.models.load import head_name
from trainers.models.lora import add_adapter, is_adapter_key, modules_in, put_adapter, start_names
from trainers.models.saved_modules import saved_paths
from trainers.models.stack import load_exact, load_stack
from trainers.runtime.precision import dtype_of
from trainers.runtime.randomness import stream_seed
from trainers.store.adapters import Weights

ACTOR, CRITIC, REWARD = "actor", "critic", "reward"
"""Names of the adapters."""
POLICY, JUDGE, REFERENCE = "policy", "judge", "reference"
"""Names of the networks: the actor's, the reward model's own, the frozen copy of the actor's start."""


@dataclass(frozen=True)
class RewardSource:
    """What a reward model is opened from; its adapter, where it was trained as one, and by digest what that lies on."""

    weights: Weights
    adapter: Path | None
    lies_on: tuple[str, ...]
    statistics: ScoreStatistics


@dataclass(frozen=True)
class SharedModels:
    """The models, which parameters learn for whom, and peft's configuration of the actor's adapter."""

    models: PolicyModels
    actor_parameters: tuple[tuple[str, nn.Parameter], ...]
    critic_parameters: tuple[tuple[str, nn.Parameter], ...]
    peft_config: Any


def build_models(
    spec: RlText,
    actor: Weights,
    reward: RewardSource | None,
    *,
    reading: Reading | None,
    num_tokens: int,
    seed: int,
    device: torch.device,
) -> SharedModels:
    """Load and connect the models, whole and equal on every rank.

    With LoRA the actor's start is frozen, its own adapters on it, and serves as the reference; a reward model trained
    as an adapter on that very model, and a critic that starts from it, are adapters too. Without LoRA each is a
    separate network, and in those that learn the adapters they start with are merged in fp32. Where the reward has no
    reward model (`reward` and `reading` are None) none is built.
    """
    if spec.lora is None:
        wiring = _separate_networks(actor, reward, spec, device)
    else:
        wiring = _adapters(actor, reward, spec.lora, spec, seed, device)
    if wiring.score_head is not None:
        wiring.score_head.requires_grad_(False)
    value_head = None if spec.critic_start is None else _value_head(spec.critic_start, wiring, reward)
    temperature = spec.rollout.temperature
    models = PolicyModels(
        wiring.networks, wiring.routes, value_head, wiring.score_head, temperature, reading, num_tokens
    )
    learning = [(name, parameter) for name, parameter in models.named_parameters() if parameter.requires_grad]
    critic = tuple(pair for pair in learning if _is_critics(pair[0]))
    return SharedModels(models, tuple(pair for pair in learning if pair not in critic), critic, wiring.peft_config)


@dataclass(frozen=True)
class _Wiring:
    """The networks, and which network and adapters play each role."""

    networks: dict[str, nn.Module]
    routes: dict[Role, Route]
    score_head: nn.Linear | None
    peft_config: Any = None
    """Of the actor's adapter."""


def _separate_networks(actor: Weights, reward: RewardSource | None, spec: RlText, device: torch.device) -> _Wiring:
    """A network for each: actor, and critic where there is one, learn; reference and reward model are frozen."""
    policy: Any = load_exact(actor, "language_model", device=device)
    reference = copy.deepcopy(policy).requires_grad_(False)
    networks: dict[str, nn.Module] = {POLICY: policy, REFERENCE: reference}
    routes: dict[Role, Route] = {"actor": Route(POLICY), "reference": Route(REFERENCE)}
    score_head = None
    if reward is not None:
        judge, judge_on = _load_frozen(reward.weights, "score_model", spec.shard, device)
        networks[JUDGE], score_head = judge.base_model, _head(judge)
        routes["reward"] = Route(JUDGE, judge_on)
    if (start := spec.critic_start) is not None:
        networks[CRITIC] = (
            load_exact(reward.weights, "score_model", device=device).base_model
            if start == "reward" and reward is not None
            else copy.deepcopy(policy.base_model)
        )
        routes["critic"] = Route(CRITIC)
    return _Wiring(networks, routes, score_head)


def _adapters(
    actor: Weights, reward: RewardSource | None, lora: Lora, spec: RlText, seed: int, device: torch.device
) -> _Wiring:
    """Adapters on the frozen policy; a reward model that is none on that very model keeps its own network.

    Where modules of the policy learn whole, what else lies on its start has a frozen copy of that.
    """
    policy: Any = load_stack(actor, "language_model", device=device)
    networks: dict[str, nn.Module] = {POLICY: policy}
    routes: dict[Role, Route] = {}
    saved, home = saved_paths(policy, lora.modules_to_save), POLICY
    if saved:
        home, networks[REFERENCE] = REFERENCE, copy.deepcopy(policy)
    start, score_head = start_names(len(actor.adapters)), None
    shared = reward.adapter if reward is not None and reward.lies_on == actor.stack else None
    if shared is not None and len(modules_in(shared)) > 1:  # more than its head differs from the policy's
        shared = None
    if shared is not None:
        score_head = _saved_head(put_adapter(networks[home], shared, REWARD))
        routes["reward"] = Route(home, (*start, REWARD))
    elif reward is not None:
        judge, judge_on = _load_frozen(reward.weights, "score_model", spec.shard, device)
        networks[JUDGE], score_head = judge.base_model, _head(judge)
        routes["reward"] = Route(JUDGE, judge_on)
    peft_config = add_adapter(policy, lora, seed=stream_seed(seed, ACTOR), name=ACTOR)
    routes |= {"actor": Route(POLICY, (*start, ACTOR)), "reference": Route(home, start)}
    critic = spec.critic_start
    if critic == "reward" and shared is not None:
        put_adapter(networks[home], shared, CRITIC)
        routes["critic"] = Route(home, (*start, CRITIC))
    elif critic is not None:
        place, on = (JUDGE, routes["reward"].adapters) if critic == "reward" else (home, start)
        on_critic = lora.model_copy(update={"modules_to_save": []})
        add_adapter(networks[place], on_critic, seed=stream_seed(seed, CRITIC), name=CRITIC)
        routes["critic"] = Route(place, (*on, CRITIC))
    for network in networks.values():
        for name, parameter in network.named_parameters():
            parameter.requires_grad_(is_adapter_key(name, ACTOR) or is_adapter_key(name, CRITIC))
    for path in saved:
        policy.get_submodule(path).requires_grad_(True)
    return _Wiring(networks, routes, score_head, peft_config)


def _value_head(start: Literal["actor", "reward"], wiring: _Wiring, reward: RewardSource | None) -> nn.Linear:
    """The head of a critic."""
    if start == "reward":
        assert wiring.score_head is not None
        assert reward is not None
        return _normalised_head(wiring.score_head, reward.statistics)
    policy: Any = wiring.networks[POLICY]
    return _zero_head(policy.config.hidden_size)


def network_tensors(tensors: Mapping[str, Tensor], network: str) -> dict[str, Tensor]:
    """The parameters of one network under its own names."""
    prefix = f"networks.{network}."
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _is_critics(name: str) -> bool:
    return name.startswith((f"networks.{CRITIC}.", "value_head.")) or is_adapter_key(name, CRITIC)


def _load_frozen(weights: Weights, kind: ModelKind, shard: Shard, device: torch.device) -> tuple[Any, tuple[str, ...]]:
    """A model that does not learn, and the adapters that it needs on: in fp32 they are merged into it."""
    is_exact = dtype_of(shard.precision) == torch.float32
    model: Any = (load_exact if is_exact else load_stack)(weights, kind, device=device)
    return model.requires_grad_(False), () if is_exact else start_names(len(weights.adapters))


def _head(judge: Any) -> nn.Linear:
    """A reward model's scalar head."""
    head: nn.Linear = getattr(judge, head_name(judge))
    return head


def _saved_head(heads: Mapping[str, Tensor]) -> nn.Linear:
    """The scalar head that an adapter's file brings."""
    (weight,) = heads.values()
    head = nn.Linear(weight.shape[1], 1, bias=False)
    with torch.no_grad():
        head.weight.copy_(weight)
    return head


@torch.no_grad()
def _normalised_head(score_head: nn.Linear, statistics: ScoreStatistics) -> nn.Linear:
    """The head of a critic that starts from the reward model: it gives normalised scores."""
    head = nn.Linear(score_head.in_features, 1)
    head.weight.copy_(score_head.weight.float() / statistics.std)
    head.bias.fill_(-statistics.mean / statistics.std)
    return head


@torch.no_grad()
def _zero_head(width: int) -> nn.Linear:
    """The head of a critic that starts from the actor: it gives 0 everywhere."""
    head = nn.Linear(width, 1)
    head.weight.zero_()
    head.bias.zero_()
    return head
