"""Predicted sizes of a stage of images: parameters exactly, memory from what layers keep for the backward (pure)."""

from dataclasses import replace

from recipes.data.images import ImageSetFacts
from recipes.models.images.architecture import ImageArchitecture
from recipes.models.images.ddpm import Ddpm
from recipes.models.images.tally import Tally, TextSizes
from recipes.planning.memory import Memory, Sizes, sizes_of
from recipes.stages.answers import Held
from recipes.stages.finetune import FinetuneImages
from recipes.stages.lora import Lora
from recipes.stages.pretrain import PretrainImages
from recipes.stages.rl import RlImages
from recipes.stages.sharding import FP32_BYTES


def predict_image_sizes(
    stage: PretrainImages | FinetuneImages,
    architecture: ImageArchitecture,
    facts: ImageSetFacts,
    autoencoder: ImageArchitecture | None,
    text: TextSizes | None,
    workers: int,
    micro_batch: int,
    *,
    on_gpu: bool = False,
) -> Sizes:
    """The stage's sizes on `workers` workers of `micro_batch` images.

    `architecture` is what it builds or starts from, `autoencoder` that of a latent diffusion, `text` reads captions.
    """
    lora = stage.adapters
    net = architecture.tally(facts, autoencoder, text)
    held, kept = _held(net, lora, autoencoder, text, facts), net.kept
    if lora is not None:
        kept += _kept_by_adapters(net, lora, facts)
    if autoencoder is not None:
        kept += autoencoder.tally(facts).kept
    keeps_average = lora is None and architecture.averaging is not None
    return sizes_of(
        stage.shard,
        held,
        workers,
        parameters=held.trainable + held.frozen,
        working=Memory(activations=FP32_BYTES * micro_batch * kept),
        averaged_bytes=FP32_BYTES * held.trainable if keeps_average else 0,
        on_gpu=on_gpu,
    )


def _held(
    net: Tally,
    lora: Lora | None,
    autoencoder: ImageArchitecture | None,
    text: TextSizes | None,
    facts: ImageSetFacts,
) -> Held:
    """What is trained, kept and stored of a network and of what it works with, which stays as it is."""
    fixed = (0 if autoencoder is None else autoencoder.tally(facts).parameters) + (
        0 if text is None else text.parameters
    )
    if lora is None:
        return Held(net.parameters, fixed, net.parameters + fixed)
    adapter = lora.num_parameters(net.projections)
    return Held(adapter, net.parameters + fixed, adapter + net.parameters + fixed)


def _kept_by_adapters(net: Tally, lora: Lora, facts: ImageSetFacts) -> int:
    return sum(linear.outputs + lora.r for linear in net.projections) * facts.height * facts.width


def predict_tuning_sizes(
    stage: RlImages,
    actor: Ddpm,
    facts: ImageSetFacts,
    autoencoder: ImageArchitecture | None,
    text: TextSizes | None,
    workers: int,
    micro_batch: int,
    *,
    on_gpu: bool = False,
) -> Sizes:
    """The sizes of a reward-tuned diffusion: the network and its frozen start, all steps of a micro-batch.

    With adapters the network without them is the start.
    """
    rollout, lora = stage.rollout, stage.lora
    net = actor.tally(facts, autoencoder, text)
    held, kept = _held(net, lora, autoencoder, text, facts), net.kept
    held = replace(held, keeps_best=stage.algorithm.kl_limit is not None)
    if lora is None:
        held = replace(held, frozen=held.frozen + net.parameters)
    else:
        kept += _kept_by_adapters(net, lora, facts)
    steps = rollout.steps or actor.sampling_steps
    is_conditional = actor.class_conditional or text is not None
    is_guided = is_conditional and (actor.guidance if rollout.guidance is None else rollout.guidance) != 1
    trajectory = facts.channels * facts.height * facts.width * (steps + 1)
    images = micro_batch * (steps - 1) * (2 if is_guided else 1)
    working = images * kept + 2 * rollout.images_per_iteration * trajectory  # of all workers, and their own part
    return sizes_of(
        stage.shard,
        held,
        workers,
        parameters=held.trainable + held.frozen,
        working=Memory(activations=FP32_BYTES * working),
        on_gpu=on_gpu,
    )
