"""A tiny DDPO: a network of one level on images of 4x4 pixels and the plain engine, of two classes or of captions."""

from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from recipes.models.images.ddpm import Ddpm
from recipes.models.images.vae import Vae
from recipes.stages.algorithms import Ddpo
from recipes.stages.ddpo import RuleReward
from recipes.stages.lora import Lora
from recipes.stages.optim import AdamW
from recipes.stages.sharding import Shard
from rlhf.algorithm import algorithm_of
from rlhf.experience import ExperienceMaker
from rlhf.images.conditions import CaptionPrompts, ClassPrompts, ImagePrompts
from rlhf.images.policy import ImageModels
from rlhf.images.rewards import rule_scorer
from rlhf.images.sampling import ImagePolicy
from rlhf.iterations import RlSource
from rlhf.objective import RlObjective
from rlhf.policy import Learner
from tests.observers import Quiet
from trainers.data.batches import Texts
from trainers.data.dataset import BuildReport, Dataset
from trainers.data.layouts.images import Images
from trainers.engine.build import build_engine, parameter_group
from trainers.models.images.build import Blueprint
from trainers.models.images.latents import LatentCodec
from trainers.models.images.protocol import ImageFacts
from trainers.models.images.text_encoder import TextEncoder, TextStates
from trainers.runtime.distributed import Ranks
from trainers.runtime.precision import unit_roundoff
from trainers.tasks.image_start import adapt

CPU = torch.device("cpu")
KL = Vae(family="vae", type="autoencoder_kl", width=8, depth=2, latent=4, likelihood="gaussian")
CAPTIONS = ("thin", "a thick stroke", "", "thin", "a wide one", "thick and long")


@dataclass
class Listener(Quiet):
    """Remembers what it hears."""

    heard: list[dict[str, float]] = field(default_factory=list)
    stop_at: int | None = None
    steps_done: int = 0

    def phase(self, name: str, **progress: float) -> None:
        self.steps_done = int(progress.get("step", self.steps_done))

    def metrics(self, step: int, values: Any) -> None:
        self.heard.append(dict(values))

    def stop_requested(self) -> bool:
        return self.stop_at is not None and self.steps_done >= self.stop_at


class Words(TextEncoder):
    """Stands for a text encoder: a letter is a token, and its state a row of a table."""

    width, longest = 6, None

    def __init__(self) -> None:
        self.tokenization = SimpleNamespace(  # type: ignore[assignment]
            eos_id=1, pad_id=0, encode_batch=lambda texts, special: [[ord(c) % 30 + 2 for c in text] for text in texts]
        )
        self._table = torch.randn(32, self.width, generator=torch.Generator().manual_seed(2))
        self.reads = 0

    def states(self, texts: Texts) -> TextStates:
        self.reads += 1
        return TextStates(self._table[texts.input_ids_BT], texts.attention_mask_BT)


def captioned_set(folder: Path, captions: tuple[str, ...] = CAPTIONS) -> Dataset:
    """Images of two classes with captions, one of them empty and one twice."""
    count = len(captions)
    (folder / "rows.txt").write_text("".join(f"row {number}\n" for number in range(count)))
    images, labels = np.zeros((count, 1, 4, 4), dtype=np.uint8), np.arange(count, dtype=np.int64) % 2
    return Dataset(
        "d" * 64,
        Images,
        BuildReport(count, {"captions": len(set(captions))}),
        {"images": images, "labels": labels},
        classes=("a", "b"),
        captions=captions,
        row_ids_path=folder / "rows.txt",
    )


def caption_prompts(folder: Path, images: int = 12, samples: int = 3, seed: int = 0) -> CaptionPrompts:
    """Prompts of the small set."""
    return CaptionPrompts(captioned_set(folder), Words(), images=images, samples=samples, seed=seed)


@dataclass
class TinyDdpo:
    """The parts of one DDPO, put together as its stage does."""

    engine: Any
    source: RlSource[Any]
    objective: RlObjective
    policy: ImagePolicy
    listener: Listener

    def run(self, first: int = 0, last: int | None = None, sign: float = 1.0, rate: float = 3e-3) -> int:
        """Steps as the loop runs them; returns how many."""
        for step in range(first, self.source.steps_planned if last is None else last):
            batches = self.source.micro_batches(step)
            total = sum(self.objective.weight(batch) for batch in batches)
            for batch in batches:
                self.engine.backward(sign * self.objective.loss(self.engine.module, batch).loss_sum / total)
            self.engine.step({"actor": rate})
            if self.source.after_step(step + 1, {}) is not None:
                return step + 1
        return step + 1

    def parameters(self) -> dict[str, torch.Tensor]:
        """Copies of all parameters."""
        return {name: tensor.clone() for name, tensor in self.engine.full_parameters()}


def build(
    images: int = 12,
    micro_batch: int = 6,
    guidance: float = 1.0,
    direction: Any = "more",
    prompts: ImagePrompts | None = None,
    lora: Lora | None = None,
    listener: Listener | None = None,
    precision: Any = "fp32",
    in_latents: bool = False,
    **settings: Any,
) -> TinyDdpo:
    """The network is of two classes, with `prompts` of captions; further arguments are settings of the algorithm.

    In latents it predicts the noise over all 20 steps: untrained, it takes the values far out of any range.
    """
    if in_latents:
        facts = ImageFacts(1, 8, 8, ("a", "b"))
        autoencoder: Any = Blueprint(KL, facts).build(0)
        codec, noising = LatentCodec(autoencoder, 1.0), {"prediction": "epsilon", "sampling_steps": 20}
    else:
        facts, codec, noising = ImageFacts(1, 4, 4, ("a", "b")), None, {"prediction": "v", "betas": "cosine"}
    architecture = Ddpm(
        family="ddpm",
        block_out_channels=[8],
        layers_per_block=1,
        norm_num_groups=4,
        timesteps=20,
        class_conditional=prompts is None,
        guidance=guidance,
        **{"sampling_steps": 4, **noising},
    )
    ppo = Ddpo(**{"name": "ddpo", "iterations": 3, "optimizer": AdamW(lr=3e-3), **settings})
    blueprint = Blueprint(architecture, facts, codec, None if prompts is None else Words())
    actor: Any
    reference: Any
    actor, reference = (blueprint.build(5) for _ in range(2))
    if lora is not None:
        adapt(actor, lora, seed=3)
    models = ImageModels(actor, reference if lora is None else None, 0.01)
    group = parameter_group("actor", models, ppo.optimizer)
    engine = build_engine(models, [group], Shard(engine="plain", precision=precision), clip=1.0, device=CPU)
    trained = [name for name, _ in group.parameters]
    assert all(name.startswith("networks.actor.") for name in trained)
    listener = listener or Listener()
    roundoff = unit_roundoff(precision, CPU)
    learner = Learner(engine, micro_batch, roundoff, Ranks(0, 1, 0, CPU), 0, listener)
    score = rule_scorer(RuleReward(rule="ink", direction=direction))
    policy = ImagePolicy(learner, images, prompts or ClassPrompts([0, 1], ("a", "b"), images), score)
    algorithm = algorithm_of(ppo)
    source = RlSource(ExperienceMaker(policy, algorithm, ppo, learner), trained)
    return TinyDdpo(engine, source, RlObjective(policy, algorithm, roundoff), policy, listener)
