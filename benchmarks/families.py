"""Steps per CPU second of each family of pictures against the loop that a user would write by hand, in one run.

    python benchmarks/families.py [--families vae gan encoder_decoder ...] [--steps 60] [--rounds 3] [--size 8]

Both sides train the same networks from the same weights with AdamW on the same digits in batches of 64 on one process.
By hand: a DataLoader over a TensorDataset, zero_grad, backward, clip, step, in the form of PyTorch's vae and dcgan
examples and diffusers' unconditional one; noise from torch's generator. Ours: the loop with the plain engine, whose
batches follow from the seed, whose noise has a seed per sample, and which notes every step's metrics. No side evaluates
or saves. Seconds are the process's own on the CPU, so that a busy machine slows neither side. Sides take turns; the
figure is the median of the rounds' ratios. `encoder_decoder` is in translation.py, with transformers' Seq2SeqTrainer as
a third side.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import translation
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from recipes.image_data import Digits
from recipes.image_models import Classifier, Ddpm, Gan, Vae
from recipes.optim import AdamW
from recipes.sharding import Shard
from trainers.data.batches import BatchPlan
from trainers.data.image_sets import ImageDataset, ImageRequest, materialise_images
from trainers.engine.build import build_engine, parameter_group
from trainers.families.build import Blueprint
from trainers.families.protocol import ImageFacts
from trainers.image_stage import ImageBatches
from trainers.loop import Cadence, LoopState, Phase, SourceState, train
from trainers.objectives.images import ImageObjective
from trainers.precision import use_fast_matmul
from trainers.store.store import Store

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

    def save(self, engine: Any, loop: LoopState, source: SourceState) -> None: ...

    def restore(self, engine: Any) -> None:
        return None

    def check(self) -> None: ...

    def flush(self) -> None: ...


def ours(name: str, dataset: ImageDataset, steps: int) -> float:
    """Steps per CPU second of the loop."""
    family = Blueprint(ARCHITECTURES[name], ImageFacts.of(dataset)).build(0)
    phases = []
    for part in family.phases():
        group = parameter_group("model", part.module, AdamW(lr=LR))
        engine = build_engine(part.module, [group], Shard(engine="plain"), clip=CLIP, device=torch.device("cpu"))
        engine.module.train()
        phases.append(Phase(part.name, engine, ImageObjective(part.loss_name), lambda step: {"model": LR}))
    first, *further = phases
    plan = BatchPlan(dataset, 0, BATCH, 1, 0, BATCH)
    source = ImageBatches(plan, steps, [phase.engine for phase in phases], None, family.averaged)
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


def by_hand(name: str, dataset: ImageDataset, steps: int) -> float:
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


def measure_translation(store: Store, folder: str, steps: int, rounds: int) -> None:
    """Measure a translation's three sides in turn and print them."""
    work = translation.Translation(store)
    measured = []
    for round_steps in (3, *[steps] * rounds):
        plain = translation.by_hand(work, round_steps)
        trainer = translation.by_trainer(work, round_steps, f"{folder}/trainer")
        measured.append((translation.ours(work, round_steps, Quiet()), plain, trainer))
    fast, plain, trainer = (statistics.median(side) for side in zip(*measured[1:], strict=True))
    ratios = [statistics.median(one[0] / one[side] for one in measured[1:]) for side in (1, 2)]
    print(
        f"{'translation':<11} ours {fast:7.1f} steps/s  by hand {plain:7.1f} steps/s  ratio {ratios[0]:.2f}  "
        f"Seq2SeqTrainer {trainer:7.1f} steps/s  ratio {ratios[1]:.2f}",
        flush=True,
    )


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    families = [*ARCHITECTURES, "encoder_decoder"]
    parser.add_argument("--families", nargs="+", default=families, choices=families)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--size", type=int, help="pixels of a side; the default is 28 for the vae, else 8")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    use_fast_matmul(torch.device("cpu"))
    with tempfile.TemporaryDirectory() as folder:
        store = Store.open(f"{folder}/store")
        for name in arguments.families:
            if name == "encoder_decoder":
                measure_translation(store, folder, arguments.steps, arguments.rounds)
                continue
            source = Digits(source="digits", size=arguments.size or SIZES[name])
            dataset = materialise_images(ImageRequest(source, Path(folder), 0), store)
            ours(name, dataset, 3)
            by_hand(name, dataset, 3)
            rounds = []
            for _ in range(arguments.rounds):
                plain = by_hand(name, dataset, arguments.steps)
                rounds.append((ours(name, dataset, arguments.steps), plain))
            ratio = statistics.median(mine / plain for mine, plain in rounds)
            fast, plain = (statistics.median(side) for side in zip(*rounds, strict=True))
            print(f"{name:<11} ours {fast:7.1f} steps/s  by hand {plain:7.1f} steps/s  ratio {ratio:.2f}", flush=True)


if __name__ == "__main__":
    main()
