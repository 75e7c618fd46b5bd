"""Steps per CPU second of families against the loop that a user would write by hand, in one run.

    python benchmarks/families.py [--families vae gan ddpm classifier lstm masked_lm translation] [--steps 60]

Both sides train the same networks from the same weights with AdamW on the same digits in batches of 64 on one process.
By hand: a DataLoader over a TensorDataset, zero_grad, backward, clip, step, in the form of PyTorch's vae and dcgan
examples and diffusers' unconditional one; noise from torch's generator. Ours: the loop with the plain engine, whose
batches follow from the seed, whose noise has a seed per sample, and which notes every step's metrics. `text_rows.py`
and `translation.py` have the families of text, with transformers' Trainer as a further side where it has the model. No
side evaluates or saves. Seconds are the process's own on the CPU, so that a busy machine slows neither side. Sides take
turns; the figure is the median of the rounds' ratios.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import translation
from text_rows import PEERS, Words, read_words
from text_rows import ours as text_ours
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from recipes.data.images import Digits
from recipes.models.images.classifier import Classifier
from recipes.models.images.ddpm import Ddpm
from recipes.models.images.gan import Gan
from recipes.models.images.vae import Vae
from recipes.stages.optim import AdamW
from recipes.stages.sharding import Shard
from trainers.checkpoint.loop_state import LoopState, SourceState
from trainers.data.batches import BatchPlan
from trainers.data.dataset import Dataset
from trainers.data.layouts.images import Images
from trainers.data.materialise import DataRequest, materialise
from trainers.engine.build import build_engine, parameter_group
from trainers.models.images.build import Blueprint
from trainers.models.images.protocol import ImageFacts
from trainers.runtime.precision import use_fast_matmul
from trainers.store.store import Store
from trainers.training.loop import Cadence, train
from trainers.training.optimiser_step import Phase
from trainers.training.steps import PlannedBatches

BATCH, LR, CLIP = 64, 1e-3, 1.0
ARCHITECTURES: dict[str, Any] = {
    "classifier": Classifier(family="classifier", width=32, depth=2, features=64),
    "vae": Vae(family="vae", type="mlp", width=400, depth=1, latent=20, binarize=True),
    "gan": Gan(family="gan", width=32, depth=2, latent=32),
    "ddpm": Ddpm(family="ddpm", block_out_channels=[32, 64], layers_per_block=1),
}


SIZES = {"classifier": 8, "vae": 28, "gan": 8, "ddpm": 8}
"""The VAE has the size of PyTorch's example, 784-400-20; the others that of the digits."""


class Quiet:
    """An observer that hears nothing, and a checkpoint that keeps nothing."""

    def phase(self, name: str, **progress: float) -> None: ...

    def metrics(self, step: int, values: Mapping[str, float]) -> None: ...

    def stop_requested(self) -> bool:
        return False

    def notify(self, text: str) -> None:
        pass

    def answers_stops(self, has_unsaved: Any) -> AbstractContextManager[None]:
        return nullcontext()

    def save(self, engine: Any, loop: LoopState, source: SourceState) -> None: ...

    def restore(self, engine: Any) -> None:
        return None

    def check(self) -> None: ...

    def flush(self) -> None: ...


def ours(name: str, dataset: Dataset, steps: int) -> float:
    """Steps per CPU second of the loop."""
    family = Blueprint(ARCHITECTURES[name], ImageFacts.of(dataset)).build(0)
    phases = []
    for part in family.phases():
        group = parameter_group("model", part.module, AdamW(lr=LR))
        engine = build_engine(
            part.module, [group], Shard(engine="plain", precision="fp32"), clip=CLIP, device=torch.device("cpu")
        )
        engine.module.train()
        phases.append(Phase(part.name, engine, part.objective, lambda step: {"model": LR}))
    first, *further = phases
    plan = BatchPlan(dataset, 0, BATCH, 1, 0, BATCH)
    source = PlannedBatches(plan, steps)
    started = time.process_time()
    train(
        first.engine,
        first.objective,
        source,
        learning_rates=first.learning_rates,
        cadence=Cadence(10**9, 10**9),
        checkpoint=Quiet(),
        evaluate=None,
        observer=Quiet(),
        seed=0,
        further=further,
    )
    return steps / (time.process_time() - started)


def by_hand(name: str, dataset: Dataset, steps: int) -> float:
    """Steps per CPU second of a plain loop over the same networks."""
    family: Any = Blueprint(ARCHITECTURES[name], ImageFacts.of(dataset)).build(0)
    images = torch.from_numpy(np.asarray(dataset.images_NCHW, dtype=np.float32) / 255)
    data = TensorDataset(images, torch.from_numpy(np.array(dataset.labels_N)))
    loader = DataLoader(data, batch_size=BATCH, shuffle=True, drop_last=True)
    step_of = {"classifier": classifier_step, "vae": vae_step, "gan": gan_step, "ddpm": ddpm_step}[name]
    networks = [family.discriminator, family.generator] if name == "gan" else [family.net]
    optimizers = [torch.optim.AdamW(network.parameters(), lr=LR) for network in networks]
    family.module.train()
    done = 0
    started = time.process_time()
    while done < steps:
        for batch, labels in loader:
            step_of(family, optimizers, batch, labels)
            done += 1
            if done == steps:
                break
    return steps / (time.process_time() - started)


def update(optimizer: torch.optim.Optimizer, loss: torch.Tensor, network: nn.Module) -> float:
    """Backward, clip, step; the loss is read, as examples print it."""
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(network.parameters(), CLIP)
    optimizer.step()
    return float(loss.detach())


def classifier_step(family: Any, optimizers: list[Any], images: torch.Tensor, labels: torch.Tensor) -> None:
    """Cross-entropy."""
    logits, _ = family.net(images)
    update(optimizers[0], functional.cross_entropy(logits, labels), family.net)


def vae_step(family: Any, optimizers: list[Any], images: torch.Tensor, labels: torch.Tensor) -> None:
    """PyTorch's vae example, dynamically binarised."""
    targets = torch.bernoulli(images)
    mean, log_variance = family.net.posterior(2 * targets - 1)
    raw = family.net.raw_pixels(mean + torch.randn_like(mean) * (0.5 * log_variance).exp())
    loss = functional.binary_cross_entropy_with_logits(raw, targets, reduction="sum")
    loss = loss - 0.5 * (1 + log_variance - mean.pow(2) - log_variance.exp()).sum()
    update(optimizers[0], loss / len(images), family.net)


def gan_step(family: Any, optimizers: list[Any], images: torch.Tensor, labels: torch.Tensor) -> None:
    """PyTorch's dcgan example."""
    real, size = 2 * images - 1, (len(images), family.settings.latent)
    drawn = family.generator(torch.randn(size), None)
    loss = functional.softplus(-family.discriminator(real, None)).mean()
    loss = loss + functional.softplus(family.discriminator(drawn.detach(), None)).mean()
    update(optimizers[0], loss, family.discriminator)
    loss = functional.softplus(-family.discriminator(family.generator(torch.randn(size), None), None)).mean()
    update(optimizers[1], loss, family.generator)


def ddpm_step(family: Any, optimizers: list[Any], images: torch.Tensor, labels: torch.Tensor) -> None:
    """diffusers' unconditional example."""
    clean = 2 * images - 1
    noise = torch.randn_like(clean)
    steps = torch.randint(0, family.settings.timesteps, (len(clean),))
    predicted = family.net(family.scheduler.add_noise(clean, noise, steps), steps).sample
    update(optimizers[0], functional.mse_loss(predicted, noise), family.net)


def measure(name: str, sides: Mapping[str, Callable[[int], float]], steps: int, rounds: int) -> None:
    """Let the sides take turns and print the ratios of the first to each of the others."""
    for side in sides.values():
        side(3)
    found = [{label: side(steps) for label, side in reversed(sides.items())} for _ in range(rounds)]
    mine, *others = sides
    told = [f"{label} {statistics.median(line[label] for line in found):7.1f} steps/s" for label in sides]
    for other in others:
        ratio = statistics.median(line[mine] / line[other] for line in found)
        told.append(f"ratio to {other} {ratio:.2f}")
    print(f"{name:<11} {'  '.join(told)}", flush=True)


def main() -> None:
    """Measure and print."""
    names = [*ARCHITECTURES, *PEERS, "translation"]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--families", nargs="+", default=names, choices=names)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--size", type=int, help="pixels of a side; the default is 28 for the vae, else 8")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    use_fast_matmul(torch.device("cpu"))
    with tempfile.TemporaryDirectory() as folder:
        store = Store.open(f"{folder}/store")
        words: Words | None = None
        for name in arguments.families:
            sides: dict[str, Callable[[int], float]]
            if name == "translation":
                sides = translation.sides(store, f"{folder}/trainer", Quiet())
            elif name in PEERS:
                words = words or read_words(Path(folder), store)
                sides = {"ours": partial(text_ours, name, words, quiet=Quiet())}
                sides |= {label: partial(peer, words) for label, peer in PEERS[name].items()}
            else:
                source = Digits(source="digits", size=arguments.size or SIZES[name])
                dataset = materialise(DataRequest(source, Path(folder), Images(), 0), store)
                sides = {"ours": partial(ours, name, dataset), "by hand": partial(by_hand, name, dataset)}
            measure(name, sides, arguments.steps, arguments.rounds)


if __name__ == "__main__":
    main()
