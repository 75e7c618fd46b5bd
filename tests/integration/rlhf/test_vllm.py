"""vLLM for real: it samples by the learner's weights, and an update that went wrong ends the stage.

One small llama under an engine, one process of vLLM for each way of sending. Skipped where `make setup-vllm` was not
run.
"""

import os
import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from recipes.errors import StageError
from recipes.stages.lora import Lora
from recipes.stages.rollout_engines import VllmEngine, vllm_folder, vllm_version
from recipes.stages.sharding import Shard
from rlhf.text.build_policy import ACTOR
from rlhf.text.served import ServedActor
from tests.observers import Quiet
from trainers.data.batches import PromptBatch
from trainers.engine.build import build_engine
from trainers.engine.protocol import Engine, ParameterGroup
from trainers.inference.generation import SamplingSettings
from trainers.inference.rollouts import Sampled, SampleKey
from trainers.inference.vllm_rollouts import Limits, VllmRollouts
from trainers.models.decoder import build_decoder
from trainers.models.lora import active_adapters, add_adapter
from trainers.models.protocol import TokenizerFacts

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(vllm_version() is None, reason=f"no vLLM in {vllm_folder()}: make setup-vllm"),
]
VOCABULARY, EOS, PAD, NEW = 96, 0, 1, 12
KEYS: list[SampleKey] = [(0, 0), (1, 0), (0, 1), (2, 0)]
Change = Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]


class Network(nn.Module):
    """A policy where the engine looks for it."""

    def __init__(self, policy: nn.Module) -> None:
        super().__init__()
        self.networks = nn.ModuleDict({"policy": policy})


class Served(ServedActor):
    """Writes other tensors than the learner has, where a test says so."""

    def write_whole(self, folder: Path, tensors: Mapping[str, Tensor]) -> None:
        super().write_whole(folder, CHANGES[-1](tensors))

    def write_adapter(self, folder: Path, tensors: Mapping[str, Tensor]) -> None:
        super().write_adapter(folder, CHANGES[-1](tensors))


CHANGES: list[Change] = [lambda tensors: tensors]


class Setup:
    """A policy under an engine, and vLLM."""

    def __init__(self, lora: bool) -> None:
        architecture = {
            "type": "llama",
            "num_hidden_layers": 2,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "max_position_embeddings": 64,
            "initializer_range": 0.15,
        }
        self.network: Any = build_decoder(
            architecture, TokenizerFacts(VOCABULARY, EOS, PAD), seed=0, device=torch.device("cpu")
        )
        config = add_adapter(self.network, Lora(r=4), seed=3, name=ACTOR) if lora else None
        module = Network(self.network)
        learning = tuple((name, p) for name, p in module.named_parameters() if p.requires_grad)
        shard = Shard(engine="plain", precision="fp32")
        self.engine: Engine = build_engine(
            module, [ParameterGroup("actor", learning)], shard, clip=1.0, device=torch.device("cpu")
        )
        self.adapters = (ACTOR,) if lora else ()
        served = Served(self.engine, self.network, torch.float32, self.adapters, config, lora)
        self.rollouts = VllmRollouts(
            self.engine, served, VllmEngine(name="vllm", cache_gib=0.1), Limits("float32", 40, 1), 0, Quiet()
        )

    @torch.no_grad()
    def learn(self) -> None:
        """Change every weight that learns."""
        generator = torch.Generator().manual_seed(self.engine.steps_applied + 7)
        for name, parameter in self.network.named_parameters():
            if parameter.requires_grad:
                scale = 0.3 if "lora_B" in name else 0.02
                parameter.add_(scale * torch.randn(parameter.shape, generator=generator))

    def answers(self) -> Sampled:
        """Responses to four prompts, two of which are one."""
        rows = [[5, 6, 7, 8], [9, 10], [5, 6, 7, 8], [20, 21, 22]]
        width = max(len(row) for row in rows)
        ids = torch.tensor([[PAD] * (width - len(row)) + row for row in rows])
        mask = torch.tensor([[False] * (width - len(row)) + [True] * len(row) for row in rows])
        sampling = SamplingSettings(NEW, 0.8, (EOS,), PAD, VOCABULARY - 2)
        prompts = PromptBatch(ids, mask, torch.tensor([0, 1, 0, 2]))
        return self.rollouts.generate(prompts, KEYS, sampling, lambda share: None)

    @torch.no_grad()
    def gap(self, drawn: Sampled) -> float:
        """The largest difference of the learner's log-probabilities to vLLM's."""
        largest = 0.0
        rows = [[5, 6, 7, 8], [9, 10], [5, 6, 7, 8], [20, 21, 22]]
        for row, prompt in enumerate(rows):
            length = int(drawn.response_mask_BR[row].sum())
            ids = torch.tensor([prompt + drawn.tokens_BR[row, :length].tolist()])
            with active_adapters(self.network, self.adapters):
                logits = self.network(input_ids=ids).logits[0, len(prompt) - 1 : -1, : VOCABULARY - 2] / 0.8
            own = logits.log_softmax(dim=1).gather(1, drawn.tokens_BR[row, :length, None])[:, 0]
            largest = max(largest, float((own - drawn.logprobs_BR[row, :length]).abs().max()))
        return largest


@pytest.fixture(scope="module", params=[True, False], ids=["adapter", "whole"])
def setup(request: pytest.FixtureRequest) -> Iterator[Setup]:
    made = Setup(request.param)
    yield made
    made.rollouts.close()


@contextmanager
def written(change: Change) -> Iterator[None]:
    CHANGES.append(change)
    try:
        yield
    finally:
        CHANGES.pop()


def test_it_samples_by_the_learners_weights(setup: Setup) -> None:
    for iteration in range(2):
        version = setup.rollouts.sync(iteration)
        drawn, again = setup.answers(), setup.answers()
        assert drawn.version == version
        assert setup.gap(drawn) < 1e-4
        assert torch.equal(drawn.tokens_BR, again.tokens_BR)
        assert not torch.equal(drawn.tokens_BR[0], drawn.tokens_BR[2])  # one prompt, two draws
        assert int(drawn.tokens_BR.max()) < VOCABULARY - 2
        setup.learn()


def test_a_process_that_dies_is_replaced(setup: Setup) -> None:
    setup.rollouts.sync(5)
    before = setup.answers()
    process = setup.rollouts._process
    assert process is not None
    os.kill(process.pid, signal.SIGKILL)
    after = setup.answers()
    assert setup.rollouts._process is not process
    assert torch.equal(before.tokens_BR, after.tokens_BR)
    another = setup.rollouts._process
    assert another is not None
    os.kill(another.pid, signal.SIGKILL)
    setup.rollouts.sync(6)
    assert setup.gap(setup.answers()) < 1e-4


def dropped(tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if "layers.1.self_attn.q_proj" not in name}


def swapped(tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    other = {"0": "1", "1": "0"}

    def name_of(name: str) -> str:
        before, found, after = name.partition("layers.")
        return f"{before}{found}{other[after[0]]}{after[1:]}" if found else name

    return {name: tensors[name_of(name)] for name in tensors}


def stopped(tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """The second half of the layers is as it was."""
    return {name: tensor for name, tensor in tensors.items() if "layers.1." not in name}


@pytest.mark.parametrize("fault", ["dropped", "stale", "swapped", "stopped"])
def test_an_update_that_went_wrong_ends_the_stage(setup: Setup, fault: str) -> None:
    held: list[Mapping[str, Tensor]] = []

    def kept(tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        held.append({name: tensor.clone() for name, tensor in tensors.items()})
        return tensors

    with written(kept):
        setup.rollouts.sync(10)
    setup.learn()
    changes: dict[str, Change] = {
        "dropped": dropped, "stale": lambda tensors: held[-1], "swapped": swapped, "stopped": stopped,
    }  # fmt: skip
    with written(changes[fault]), pytest.raises(StageError, match="iteration 11") as error:
        setup.rollouts.sync(11)
    assert "iteration 10" in str(error.value)
    with pytest.raises(StageError):  # what it holds was not committed
        setup.answers()
    setup.rollouts.sync(12)
    assert setup.gap(setup.answers()) < 1e-4
