"""From a PPO stage's inputs to its four models: what they share, what learns, what they start from."""

import copy
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from recipes.stages.kinds import PpoStage
from recipes.stages.lora import Lora
from rlhf.algorithms.scoring import ScoreStatistics
from rlhf.text.policy import PolicyModels, Role, Route
from rlhf.text.reward_inputs import Reading
from trainers.models.load import head_name, load_model
from trainers.models.lora import adapter_tensors, add_adapter, is_adapter_key
from trainers.training.randomness import stream_seed

ACTOR, CRITIC, REWARD = "actor", "critic", "reward"
"""Names of the adapters."""
POLICY, JUDGE, REFERENCE = "policy", "judge", "reference"
"""Names of the networks: the actor's, the reward model's own, the frozen copy of the actor's start."""


@dataclass(frozen=True)
class RewardSource:
    """Where the reward model is: whole, and as an adapter on a base of that digest if it was trained as one."""

    folder: Path
    adapter: Path | None
    base: str | None
    statistics: ScoreStatistics


@dataclass(frozen=True)
class SharedModels:
    """The four models, which parameters learn for whom, and peft's configuration of the actor's adapter."""

    models: PolicyModels
    actor_parameters: tuple[tuple[str, nn.Parameter], ...]
    critic_parameters: tuple[tuple[str, nn.Parameter], ...]
    peft_config: Any

    @property
    def trained(self) -> tuple[str, ...]:
        """Names of all parameters that learn."""
        return tuple(name for name, _ in (*self.actor_parameters, *self.critic_parameters))


def build_models(
    spec: PpoStage,
    actor: Path,
    actor_digest: str,
    reward: RewardSource,
    *,
    reading: Reading,
    num_tokens: int,
    seed: int,
    device: torch.device,
) -> SharedModels:
    """Load and connect the models, whole and equal on every rank.

    With LoRA the actor's start is frozen and serves as the reference; a reward model trained as an adapter on that very
    model, and a critic that starts from it, are adapters too. Without LoRA there are four networks.
    """
    policy: Any = load_model(actor, "language_model", device=device)
    if spec.lora is None:
        wiring = _separate_networks(policy, reward, spec.critic, device)
    else:
        wiring = _adapters(policy, actor_digest, reward, spec.lora, spec.critic, seed, device)
    wiring.score_head.requires_grad_(False)
    if spec.critic == "reward":
        value_head = _normalised_head(wiring.score_head, reward.statistics)
    else:
        value_head = _zero_head(policy.config.hidden_size)
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
    score_head: nn.Linear
    peft_config: Any = None
    """Of the actor's adapter."""


def _separate_networks(policy: Any, reward: RewardSource, critic: str, device: torch.device) -> _Wiring:
    """Four networks: two that learn, and the frozen reference and reward model."""
    reference = copy.deepcopy(policy).requires_grad_(False)
    judge, score_head = _load_judge(reward.folder, device)
    learner = copy.deepcopy(judge if critic == "reward" else policy.base_model).requires_grad_(True)
    networks = {POLICY: policy, REFERENCE: reference, JUDGE: judge, CRITIC: learner}
    routes: dict[Role, Route] = {
        "actor": Route(POLICY),
        "reference": Route(REFERENCE),
        "critic": Route(CRITIC),
        "reward": Route(JUDGE),
    }
    return _Wiring(networks, routes, score_head)


def _adapters(
    policy: Any, actor_digest: str, reward: RewardSource, lora: Lora, critic: str, seed: int, device: torch.device
) -> _Wiring:
    """Adapters on the frozen policy; a reward model that is none on that very model keeps its own network."""
    networks: dict[str, nn.Module] = {POLICY: policy}
    saved = None
    if reward.adapter is not None and reward.base == actor_digest:
        saved, saved_lora = load_file(reward.adapter / "adapter_model.safetensors"), _saved_lora(reward.adapter)
        score_head = _saved_head(saved)
        _put_adapter(policy, saved_lora, saved, REWARD)
        routes: dict[Role, Route] = {"reward": Route(POLICY, (REWARD,))}
    else:
        networks[JUDGE], score_head = _load_judge(reward.folder, device)
        routes = {"reward": Route(JUDGE)}
    peft_config = add_adapter(policy, lora, seed=stream_seed(seed, ACTOR), name=ACTOR)
    routes |= {"actor": Route(POLICY, (ACTOR,)), "reference": Route(POLICY)}
    if critic == "reward" and saved is not None:
        _put_adapter(policy, saved_lora, saved, CRITIC)
        routes["critic"] = Route(POLICY, (CRITIC,))
    else:
        place = JUDGE if critic == "reward" else POLICY
        add_adapter(networks[place], lora, seed=stream_seed(seed, CRITIC), name=CRITIC)
        routes["critic"] = Route(place, (CRITIC,))
    for network in networks.values():
        for name, parameter in network.named_parameters():
            parameter.requires_grad_(is_adapter_key(name, ACTOR) or is_adapter_key(name, CRITIC))
    return _Wiring(networks, routes, score_head, peft_config)


def network_tensors(tensors: Mapping[str, Tensor], network: str) -> dict[str, Tensor]:
    """The parameters of one network under its own names."""
    prefix = f"networks.{network}."
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _is_critics(name: str) -> bool:
    return name.startswith((f"networks.{CRITIC}.", "value_head.")) or is_adapter_key(name, CRITIC)


def _load_judge(folder: Path, device: torch.device) -> tuple[nn.Module, nn.Linear]:
    """The reward model's frozen backbone and its head."""
    network: Any = load_model(folder, "score_model", device=device).requires_grad_(False)
    return network.base_model, getattr(network, head_name(network))


def _saved_lora(adapter: Path) -> Lora:
    """The recipe's form of an adapter's configuration."""
    config = json.loads((adapter / "adapter_config.json").read_text())
    return Lora(
        r=config["r"],
        alpha=config["lora_alpha"],
        target_modules=sorted(config["target_modules"]),
        dora=config["use_dora"],
        rank_stabilised=config["use_rslora"],
    )


def _saved_head(saved: Mapping[str, Tensor]) -> nn.Linear:
    """The scalar head that an adapter's file brings."""
    (weight,) = [tensor for name, tensor in saved.items() if "lora_" not in name]
    head = nn.Linear(weight.shape[1], 1, bias=False)
    with torch.no_grad():
        head.weight.copy_(weight)
    return head


@torch.no_grad()
def _put_adapter(network: nn.Module, lora: Lora, saved: Mapping[str, Tensor], name: str) -> None:
    """Add an adapter that holds saved weights."""
    add_adapter(network, lora, seed=0, name=name)
    for key, parameter in adapter_tensors(dict(network.named_parameters()), name).items():
        parameter.copy_(saved[key])


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
