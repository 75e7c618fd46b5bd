"""From a recipe's shard to an engine."""

import torch
from torch import nn

from recipes.optim import AdamW
from recipes.sharding import Shard
from trainers.architectures.decoder import TokenizerFacts, build_decoder
from trainers.engine.build import build_engine, parameter_group

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
    shard = Shard(engine="plain", zero=0, gradient_checkpointing=True)
    build_engine(module, [group], shard, clip=1.0, device=device)
    assert [network.is_gradient_checkpointing for network in networks] == [True, True]
