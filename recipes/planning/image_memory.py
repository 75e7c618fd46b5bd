"""Predicted sizes of a stage of images: parameters exactly, memory from what layers keep for the backward (pure)."""

from recipes.data.images import ImageSetFacts
from recipes.models.images.architecture import ImageArchitecture
from recipes.models.images.ddpm import Ddpm
from recipes.models.images.tally import Tally, TextSizes
from recipes.planning.memory import MOMENT_BYTES, Sizes, weights_bytes
from recipes.stages.finetune import FinetuneImages
from recipes.stages.lora import Lora
from recipes.stages.pretrain import PretrainImages
from recipes.stages.rl import PpoImages
from recipes.stages.sharding import FP32_BYTES


def predict_image_sizes(
    stage: PretrainImages | FinetuneImages,
    architecture: ImageArchitecture,
    facts: ImageSetFacts,
    autoencoder: ImageArchitecture | None,
    text: TextSizes | None,
    workers: int,
    micro_batch: int,
) -> Sizes:
    """The stage's sizes on `workers` workers of `micro_batch` images.

    `architecture` is what it builds or starts from, `autoencoder` that of a latent diffusion, `text` reads captions.
    """
    lora = stage.adapters
    net = architecture.tally(facts, autoencoder, text)
    trainable, kept, frozen = net.parameters, net.kept, 0
    if lora is not None:
        trainable, frozen = lora.num_parameters(net.projections), net.parameters
        kept += _kept_by_adapters(net, lora, facts)
    if autoencoder is not None:
        encoding = autoencoder.tally(facts)
        frozen, kept = frozen + encoding.parameters, kept + encoding.kept
    if text is not None:
        frozen += text.parameters
    averaged = 0
    if lora is None and architecture.averaging is not None:
        averaged = FP32_BYTES * trainable
    memory = weights_bytes(stage.shard, trainable, frozen, workers) + averaged + FP32_BYTES * micro_batch * kept
    weight_bytes = stage.shard.value_bytes
    masters = trainable * (FP32_BYTES + MOMENT_BYTES)
    return Sizes(
        parameters=trainable + frozen,
        trainable_parameters=trainable,
        memory_per_worker_bytes=memory,
        artifact_bytes=(trainable + frozen) * weight_bytes,
        state_bytes=masters + averaged,
        save_buffer_bytes=-(-masters // workers) + averaged,
    )


def _kept_by_adapters(net: Tally, lora: Lora, facts: ImageSetFacts) -> int:
    return sum(linear.outputs + lora.r for linear in net.projections) * facts.height * facts.width


def predict_tuning_sizes(
    stage: PpoImages,
    actor: Ddpm,
    facts: ImageSetFacts,
    autoencoder: ImageArchitecture | None,
    text: TextSizes | None,
    workers: int,
    micro_batch: int,
) -> Sizes:
    """The sizes of a reward-tuned diffusion: the network and its frozen start, all steps of a micro-batch.

    With adapters the network without them is the start.
    """
    rollout = stage.rollout
    net = actor.tally(facts, autoencoder, text)
    trainable, kept = net.parameters, net.kept
    frozen = trainable
    stored = trainable
    if stage.lora is not None:
        trainable = stage.lora.num_parameters(net.projections)
        kept += _kept_by_adapters(net, stage.lora, facts)
        stored += trainable
    if autoencoder is not None:
        encoder = autoencoder.tally(facts).parameters
        frozen, stored = frozen + encoder, stored + encoder
    steps = rollout.steps or actor.sampling_steps
    if text is not None:
        frozen, stored = frozen + text.parameters, stored + text.parameters
    is_conditional = actor.class_conditional or text is not None
    is_guided = is_conditional and (actor.guidance if rollout.guidance is None else rollout.guidance) != 1
    trajectory = facts.channels * facts.height * facts.width * (steps + 1)
    images = micro_batch * (steps - 1) * (2 if is_guided else 1)
    memory = weights_bytes(stage.shard, trainable, frozen, workers) + FP32_BYTES * images * kept
    memory += FP32_BYTES * 2 * rollout.images_per_iteration * trajectory  # of all workers, and their own part
    weight_bytes = stage.shard.value_bytes
    masters = trainable * (FP32_BYTES + MOMENT_BYTES)
    best = trainable * weight_bytes if stage.ppo.kl_limit is not None else 0  # of the best iteration so far
    return Sizes(
        parameters=trainable + frozen,
        trainable_parameters=trainable,
        memory_per_worker_bytes=memory,
        artifact_bytes=stored * weight_bytes,
        state_bytes=masters + best,
        save_buffer_bytes=-(-masters // workers) + 2 * best,
    )
