"""States of another shape: whichever item of a reward model's, a GAN's, a moving average's or a stream's is left out
of a resume, the result is another one.
"""

import contextlib
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from recipes.errors import StageError
from recipes.models.images.gan import Gan
from recipes.stages.lora import Lora
from recipes.stages.optim import AdamW
from recipes.stages.sharding import Shard
from rlhf.text.reward_model import RewardObjective, ScoreModel
from trainers.checkpoint import checkpoint as checkpoint_module
from trainers.data.batches import ImageBatch, PairBatch, SequenceBatch
from trainers.data.dataset import BuildReport, Dataset
from trainers.data.layouts.stream import Stream
from trainers.data.streams import LaneStates, StreamBatches
from trainers.engine.build import build_engine, parameter_group
from trainers.engine.joint import BASE
from trainers.engine.protocol import STATE_GROUPS
from trainers.models.families import build_language_model
from trainers.models.images.build import Blueprint
from trainers.models.images.protocol import ImageFacts
from trainers.models.load import stock_class
from trainers.models.lora import add_adapter
from trainers.models.protocol import TokenizerFacts
from trainers.models.token_losses import CarriedTokenLosses
from trainers.objectives.carried_language_model import CarriedLanguageModelObjective
from trainers.store.store import Store
from trainers.training.moving_average import MovingAverage
from trainers.training.optimiser_step import Phase
from trainers.training.steps import GROUP, PlannedBatches

sys.path.insert(0, str(Path(__file__).parent))
from state_items import LOOP, Made, Part, Poisoned, items, leave_out, train_once

sys.path.pop(0)

CPU = torch.device("cpu")
STEPS = 6


@dataclass(frozen=True)
class Drawn:
    """A plan whose rows are drawn from the step: two micro-batches of two."""

    batch: Callable[[torch.Generator, torch.Tensor, int], Any]

    def micro_batches(self, step: int) -> list[Any]:
        generator = torch.Generator().manual_seed(step)
        return [self.batch(generator, torch.arange(first, first + 2), step) for first in (4 * step, 4 * step + 2)]

    def drawn(self, steps: int) -> dict[str, Any]:
        return {}


def plain_engine(module: torch.nn.Module) -> Any:
    module.train()
    group = parameter_group(GROUP, module, AdamW(lr=1e-2))
    return build_engine(module, [group], Shard(engine="plain", precision="fp32"), clip=1.0, device=CPU)


def pair_batch(generator: torch.Generator, rows_B: torch.Tensor, step: int) -> PairBatch:
    sides = [torch.randint(2, 24, (2, 5), generator=generator) for _ in range(2)]
    chosen, rejected = (SequenceBatch(ids, torch.ones_like(ids).bool(), torch.ones_like(ids).bool()) for ids in sides)
    return PairBatch(chosen, rejected, rows_B)


def reward_part(listener: Any) -> Part:
    model_class = stock_class("llama", "score_model")
    sizes = {"num_hidden_layers": 1, "hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
    torch.manual_seed(0)
    network = model_class(model_class.config_class(vocab_size=24, num_labels=1, pad_token_id=0, **sizes))
    add_adapter(network, Lora(r=2, dropout=0.2), seed=3, heads=["score"])
    source = PlannedBatches(Drawn(pair_batch), STEPS)  # type: ignore[arg-type]
    return Part(plain_engine(ScoreModel(network)), source, RewardObjective(0.0), listener)


def image_batch(generator: torch.Generator, rows_B: torch.Tensor, step: int) -> ImageBatch:
    images = torch.rand(2, 1, 6, 5, generator=generator)
    return ImageBatch(images, torch.full((2,), -1), rows_B + 100, rows_B, step)


def gan_part(listener: Any) -> Part:
    """The generator skips a step that the discriminator takes, so that the two count differently."""
    architecture = Gan(family="gan", type="mlp", width=8, depth=1, latent=3)
    family = Blueprint(architecture, ImageFacts(1, 6, 5, ())).build(0)
    first, second = family.phases()
    engines = [plain_engine(part.module) for part in (first, second)]
    source = PlannedBatches(Drawn(image_batch), STEPS, average=MovingAverage(engines, 0.9, family.averaged))  # type: ignore[arg-type]
    objective = Poisoned(second.objective, listener, 0)
    further = Phase(second.name, engines[1], objective, lambda step: {GROUP: 1e-2})  # type: ignore[arg-type]
    return Part(engines[0], source, first.objective, listener, (further,))


def stream_part(listener: Any) -> Part:
    """An epoch has four steps: the state is saved within one."""
    keys = {"family": "rnn", "type": "lstm", "hidden_size": 8, "embedding_size": 8}
    model: Any = build_language_model(keys, TokenizerFacts(24, 0, 1), seed=0, device=CPU)
    tokens = np.random.default_rng(0).integers(2, 24, 2 * 4 * 4 + 1)
    report = BuildReport(1, {"sequences": 8})
    arrays = {"tokens": tokens, "is_first": np.arange(len(tokens)) % 10 == 0}
    source = StreamBatches(
        Dataset("d", Stream, report, arrays, 0), LaneStates(model.base_model.zero_state(2)), seed=0,
        sequence_length=4, global_batch=2, workers=1, rank=0, micro_batch=1, steps_planned=STEPS,
    )  # fmt: skip
    return Part(plain_engine(CarriedTokenLosses(model)), source, CarriedLanguageModelObjective(), listener)


def run(part: Part, uri: Path) -> Made:
    return train_once(part, uri, {GROUP: 1e-2}, 2)


COUNTS = [*(f"loop {name}" for name in LOOP), "engine steps_applied"]
SHAPES: dict[str, tuple[Callable[[Any], Part], tuple[str, ...], list[str]]] = {
    "reward": (reward_part, ("lora_A", "lora_B", "score."), COUNTS),
    "gan": (gan_part, ("discriminator.", "generator."), [*COUNTS, "engine first", "engine second", "tensors"]),
    "stream": (stream_part, ("backbone.",), [*COUNTS, "tensors"]),
}
"""How each is built, the parts of its parameters, and what it has to remember beside them and their moments."""


@pytest.fixture(scope="module")
def new_shape(tiny_ppo: Callable[..., Any]) -> Callable[..., Part]:
    listener = type(tiny_ppo().listener)
    return lambda kind, stop_at=None: SHAPES[kind][0](listener(stop_at=stop_at))


@pytest.fixture(scope="module")
def shapes_made(
    new_shape: Callable[..., Part], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[Made, Path]]:
    folder = tmp_path_factory.mktemp("shapes")
    made = {}
    for kind in SHAPES:
        run(new_shape(kind, stop_at=2), folder / kind)
        made[kind] = (run(new_shape(kind), folder / f"{kind}-straight"), folder / kind)
    return made


@pytest.mark.parametrize("kind", SHAPES)
def test_the_items_of_other_states_are_all_tried(
    new_shape: Callable[..., Part], shapes_made: dict[str, tuple[Made, Path]], tmp_path: Path, kind: str
) -> None:
    straight, made = shapes_made[kind]
    store = shutil.copytree(made, tmp_path / "store")
    manifest = Store.open(str(store)).latest_state("run", "stage")
    assert manifest is not None
    assert manifest.step == 3
    assert manifest.values["source"] == {}
    _, parts, others = SHAPES[kind]
    assert set(manifest.tensors) == {*STATE_GROUPS, *([checkpoint_module.SOURCE_GROUP] if "tensors" in others else [])}
    for entry in manifest.tensors["param"]:
        assert sum(part in entry.name for part in parts) == 1, entry.name
    if kind == "gan":
        counts = straight["steps applied"]
        assert (counts % BASE, counts // BASE) == (STEPS - 1, STEPS - 2), "they count alike: a mix-up is blind"
    assert run(new_shape(kind), store) == straight


@pytest.mark.parametrize(
    ("kind", "item"), [(kind, item) for kind, (_, parts, others) in SHAPES.items() for item in [*others, *items(parts)]]
)
def test_leaving_an_item_of_another_state_out_is_noticed(
    new_shape: Callable[..., Part],
    shapes_made: dict[str, tuple[Made, Path]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    item: str,
) -> None:
    straight, store = shapes_made[kind]
    part = new_shape(kind)
    leave_out(monkeypatch, item, part.source.state())
    with contextlib.suppress(StageError):  # a refusal is notice, too
        assert run(part, shutil.copytree(store, tmp_path / "store")) != straight
