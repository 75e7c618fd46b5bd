"""From a recipe's shard to an engine, and the share of its state that a rank saves."""

import pytest
import torch
from torch import nn

from recipes.stages.optim import AdamW
from recipes.stages.sharding import Shard
from trainers.engine.build import build_engine, parameter_group
from trainers.models.decoder import build_decoder
from trainers.models.protocol import TokenizerFacts
from trainers.runtime import distributed

TINY = {
    "family": "decoder",
    "type": "llama",
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}


def test_every_network_of_a_module_recomputes() -> None:
    """An actor and a critic of their own: both save the memory."""
    device = torch.device("cpu")
    networks = [build_decoder(TINY, TokenizerFacts(32, 0, 1), seed=seed, device=device) for seed in (0, 1)]
    module = nn.ModuleDict({"actor": networks[0], "critic": networks[1]})
    group = parameter_group("model", module, AdamW(lr=1e-3))
    shard = Shard(engine="plain", precision="fp32", gradient_checkpointing=True)
    build_engine(module, [group], shard, clip=1.0, device=device)
    assert [network.is_gradient_checkpointing for network in networks] == [True, True]


@pytest.mark.parametrize("ranks", [1, 2, 3, 7])
def test_every_rank_saves_as_much_of_what_all_hold(ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Large matrices and small biases in turn: what a rank saves is even in bytes, and all of it is saved once."""
    module = nn.Sequential(*(nn.Linear(40, 40) for _ in range(3)))
    module.register_parameter("empty", nn.Parameter(torch.zeros(0, 4)))
    group = parameter_group("model", module, AdamW(lr=1e-3))
    shard = Shard(engine="plain", precision="fp32")
    engine = build_engine(module, [group], shard, clip=1.0, device=torch.device("cpu"))
    wanted = {name: value.detach().flatten() for name, value in module.named_parameters()}
    sizes, found = [], {name: [] for name in wanted}
    for rank in range(ranks):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        monkeypatch.setattr(distributed, "world_size", lambda: ranks)
        pieces = list(engine.state_out())
        sizes.append(sum(piece.values.numel() for piece in pieces))
        for piece in pieces:
            if piece.group == "param":
                assert piece.start == sum(values.numel() for values in found[piece.name])
                found[piece.name].append(piece.values)
    assert all(found.values())
    assert max(sizes) - min(sizes) <= 3
    assert all(torch.equal(torch.cat(found[name]), values) for name, values in wanted.items())
