"""The models of a policy that writes as one module: who shares which network, and what each says of responses.

Shapes: B samples, R response tokens, T tokens of prompt and response, N response tokens of all rows, D width.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from rlhf.algorithms.logprobs import Entropy, action_states, chosen_logprobs, last_real_position
from rlhf.text.responses import Responses
from rlhf.text.reward_inputs import Reading
from trainers.data.batches import TokenBatch
from trainers.models.forward_forms import can_share_rows, head_logits
from trainers.models.lora import active_adapters, adapter_layers, is_adapter_key
from trainers.models.merged_adapters import adapted_parameter, folded_adapter
from trainers.models.shared_rows import SharedRows
from trainers.models.token_losses import token_losses

Role = Literal["actor", "critic", "reference", "reward"]

LOGITS_PER_CHUNK = 1 << 26
"""Logits that exist at once, in numbers, where nothing learns."""
FOLDED_BYTES = 2 << 30
"""Most bytes of adapted weights that are copied for sampling."""


@dataclass(frozen=True)
class Route:
    """The network that plays a role, and the adapters that are on meanwhile."""

    network: str
    adapters: tuple[str, ...] = ()


class PolicyModels(nn.Module):
    """Actor, reference and, where there are any, reward model and critic over as few networks as their weights allow.

    With LoRA one frozen network serves all: under the adapters of actor, critic and reward model, and without them
    as the reference; what its start had learned as adapters is on throughout. Under ZeRO-3 every forward is collective:
    all ranks ask the same roles equally often.
    """

    def __init__(
        self,
        networks: Mapping[str, nn.Module],
        routes: Mapping[Role, Route],
        value_head: nn.Module | None,
        score_head: nn.Module | None,
        temperature: float,
        reading: Reading | None,
        num_tokens: int,
    ) -> None:
        super().__init__()
        self.networks = nn.ModuleDict(dict(networks))
        self.routes = dict(routes)
        self.value_head = value_head
        self.score_head = score_head
        self.temperature = temperature
        self._reading = reading
        self._num_tokens = num_tokens
        switch_dropout_off(self)
        self._adapter_layers = {name: adapter_layers(network) for name, network in networks.items()}
        self.sharing = frozenset(name for name, network in networks.items() if can_share_rows(network))
        """Networks that read a prompt once for all its responses."""

    def forward(
        self,
        responses: Responses,
        roles: tuple[Role, ...],
        entropy: Entropy,
        max_tokens: int,
        text: TokenBatch | None = None,
    ) -> dict[str, Tensor]:
        """Ask the roles one after the other; `max_tokens` bounds a response and is the same on every rank.

        With `text` the actor's summed loss on it is there too; all ranks have some or none has.
        Gives the fields of `ModelOutputs` that the roles fill, in a form that sharded engines find their tensors in.
        """
        answers: dict[str, Tensor] = {}
        masks = (responses.attention_mask_BT, responses.action_mask_BT)
        rows = self._shared((role for role in roles if role != "reward"), responses.input_ids_BT, *masks)
        for role in roles:
            with self.playing(role) as network:
                match role:
                    case "actor":
                        logprobs, entropies = self._logprobs(network, responses, rows, entropy, max_tokens)
                        answers["logprobs_BA"] = logprobs
                        if entropies is not None:
                            answers["entropy_BA"] = entropies
                    case "reference":
                        logprobs, _ = self._logprobs(network, responses, rows, "none", max_tokens)
                        answers["reference_logprobs_BA"] = logprobs
                    case "critic":
                        hidden_BTD = backbone_states(network, responses.input_ids_BT, rows)
                        states_ND = action_states(hidden_BTD, responses.action_mask_BT)
                        assert self.value_head is not None
                        values_N = self.value_head(states_ND)[:, 0].float()
                        answers["values_BA"] = spread(values_N, responses.action_mask_BA)
                    case "reward":
                        assert self._reading is not None
                        assert self.score_head is not None
                        read = self._reading(responses)
                        judged = self._shared(
                            ("reward",), read.input_ids_BT, read.attention_mask_BT, read.response_mask_BT
                        )
                        hidden_BTD = backbone_states(network, read.input_ids_BT, judged)
                        answers["scores_B"] = last_scores(hidden_BTD, read.attention_mask_BT, self.score_head)
        if text is not None:
            with self.playing("actor") as network:
                answers["text_loss"] = token_losses(
                    network, text.input_ids_BT, text.segment_ids_BT, text.position_ids_BT, text.loss_mask_BT
                )
        return answers

    @contextmanager
    def playing(self, role: Role) -> Iterator[nn.Module]:
        """Give the role's network with the role's adapters on."""
        route = self.routes[role]
        network = self.networks[route.network]
        with active_adapters(network, route.adapters, self._adapter_layers[route.network]):
            yield network

    def _shared(self, roles: Iterable[Role], ids_BT: Tensor, real_BT: Tensor, own_BT: Tensor) -> SharedRows | None:
        """How rows are read whose beginnings, up to what is their own, are equal; None: each as it is."""
        names = {self.routes[role].network for role in roles}
        return SharedRows.of(ids_BT, real_BT, own_BT) if names and names <= self.sharing else None

    def policy_names(self) -> list[str]:
        """Names of the parameters that learn and that the actor samples by."""
        route = self.routes["actor"]
        others = {adapter for other in self.routes.values() for adapter in other.adapters} - {*route.adapters}
        return [
            name
            for name, parameter in self.named_parameters()
            if parameter.requires_grad
            and name.startswith(f"networks.{route.network}.")
            and not any(is_adapter_key(name, adapter) for adapter in others)
        ]

    @contextmanager
    def sampling(self) -> Iterator[nn.Module]:
        """Give the actor's network to generate from, every parameter being whole: its adapters lie in the weights.

        That takes a second copy of the adapted weights; past `FOLDED_BYTES` the adapters stay beside them, and where
        the weights are not fp32, so that rounding would take of the updates.
        """
        route = self.routes["actor"]
        network, layers = self.networks[route.network], self._adapter_layers[route.network]
        adapted = [adapted_parameter(layer) for layer in layers.values()]
        folded_bytes = sum(parameter.nbytes for parameter in adapted)
        is_exact = all(parameter.dtype == torch.float32 for parameter in adapted)
        if not route.adapters or not is_exact or folded_bytes > FOLDED_BYTES:
            with self.playing("actor"):
                yield network
        else:
            with folded_adapter(network, route.adapters, layers):
                yield network

    def _logprobs(
        self, network: nn.Module, responses: Responses, rows: SharedRows | None, entropy: Entropy, max_tokens: int
    ) -> tuple[Tensor, Tensor | None]:
        states_ND = action_states(backbone_states(network, responses.input_ids_BT, rows), responses.action_mask_BT)
        tokens_N = responses.input_ids_BT[responses.action_mask_BT]
        head = network.get_output_embeddings()  # type: ignore[operator]
        largest = len(responses.input_ids_BT) * max_tokens * int(head.out_features)
        logprobs_N, entropy_N = chosen_logprobs(
            token_head(network, self._num_tokens),
            states_ND,
            tokens_N,
            self.temperature,
            entropy,
            num_chunks=1 + largest // LOGITS_PER_CHUNK,
        )
        mask_BA = responses.action_mask_BA
        return spread(logprobs_N, mask_BA), None if entropy_N is None else spread(entropy_N, mask_BA)


def token_head(network: nn.Module, num_tokens: int) -> Callable[[Tensor], Tensor]:
    """The head's logits of the ids that have a token: sampling draws no others, so that no others have a share."""
    return lambda states: head_logits(network, states)[..., :num_tokens]


def response_logprobs(network: nn.Module, responses: Responses, temperature: float, num_tokens: int) -> Tensor:
    """Log-probabilities [B, R] of the responses under a whole causal language model; zero outside of the response."""
    states_ND = action_states(backbone_states(network, responses.input_ids_BT), responses.action_mask_BT)
    tokens_N = responses.input_ids_BT[responses.action_mask_BT]
    head = token_head(network, num_tokens)
    logprobs_N, _ = chosen_logprobs(head, states_ND, tokens_N, temperature, "none")
    return spread(logprobs_N, responses.action_mask_BA)


def backbone_states(network: nn.Module, input_ids_BT: Tensor, rows: SharedRows | None = None) -> Tensor:
    """Last hidden states of right-padded rows: what stands after a row's end cannot be seen from before it.

    With `rows` their common beginnings are read once.
    """
    if rows is not None:
        read = network.base_model(**rows.inputs(input_ids_BT), use_cache=False)  # type: ignore[operator]
        return rows.spread(read.last_hidden_state)
    states: Tensor = network.base_model(  # type: ignore[operator]
        input_ids=input_ids_BT, attention_mask=None, use_cache=False
    ).last_hidden_state
    return states


def last_scores(hidden_BTD: Tensor, attention_mask_BT: Tensor, score_head: nn.Module) -> Tensor:
    """The scalar head at each row's last real token, in fp32."""
    rows_B = torch.arange(hidden_BTD.shape[0], device=hidden_BTD.device)
    scores: Tensor = score_head(hidden_BTD[rows_B, last_real_position(attention_mask_BT)])
    return scores[:, 0].float()


def spread(values_N: Tensor, mask_BR: Tensor) -> Tensor:
    """Values of all response tokens, row by row, as a table with zeros elsewhere."""
    return torch.zeros(mask_BR.shape, dtype=values_N.dtype, device=values_N.device).masked_scatter(mask_BR, values_N)


def switch_dropout_off(module: nn.Module) -> None:
    """In either mode: the ratio of two forwards then shows the update alone."""
    for part in module.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0
        for name, value in vars(part).items():
            if "dropout" in name and isinstance(value, float):
                setattr(part, name, 0.0)
