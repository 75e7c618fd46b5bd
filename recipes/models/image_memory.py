"""Predicted sizes of a stage of pictures: parameters exactly, memory from what layers keep for the backward (pure).

A contract test compares the parameters with the built networks and the kept values with what torch keeps.
"""

from dataclasses import dataclass, field

from recipes.data.images import PictureFacts
from recipes.models.image_models import Classifier, Ddpm, Gan, ImageArchitecture, Vae
from recipes.models.memory import MOMENT_BYTES, Sizes, weights_bytes
from recipes.stages.finetune import FinetuneImages
from recipes.stages.lora import Lora
from recipes.stages.pretrain import PretrainImages
from recipes.stages.rl import PpoImages
from recipes.stages.sharding import FP32_BYTES

CAPTION_TOKENS = 32
"""Tokens of a caption that memory is predicted with."""
PROJECTIONS = ("to_q", "to_k", "to_v", "to_out.0")
"""Linear modules of a diffusion's attention, which adapters go on."""


@dataclass(frozen=True)
class TextSizes:
    """A text encoder as the diffusion that it conditions sees it."""

    width: int
    parameters: int
    """Of the whole language model: its files are taken over as they are."""


@dataclass
class Tally:
    """Counts a network layer by layer."""

    parameters: int = 0
    kept: int = field(default=0)
    """Values for each sample that layers keep for the backward pass: their inputs."""
    projections: list[tuple[str, int, int]] = field(default_factory=list)
    """Name, inputs and outputs of the attention's linear modules."""

    def linear(self, inputs: int, outputs: int, *, positions: int = 1, has_bias: bool = True) -> None:
        """Count a fully connected layer."""
        self.parameters += inputs * outputs + outputs * has_bias
        self.kept += inputs * positions

    def conv(self, inputs: int, outputs: int, area: int, size: int = 3) -> None:
        """Count a convolution over inputs of `area` pixels."""
        self.parameters += size * size * inputs * outputs + outputs
        self.kept += inputs * area

    def norm(self, channels: int, area: int) -> None:
        """Count a group norm and the activation after it."""
        self.parameters += 2 * channels
        self.kept += 2 * channels * area

    def activation(self, values: int) -> None:
        """Count an activation."""
        self.kept += values

    def residual(self, inputs: int, outputs: int, area: int, embedding: int = 0) -> None:
        """Count diffusers' ResnetBlock2D; `embedding` is the width of the time embedding, 0 for none."""
        self.norm(inputs, area)
        self.conv(inputs, outputs, area)
        if embedding:
            self.linear(embedding, outputs)
        self.norm(outputs, area)
        self.conv(outputs, outputs, area)
        if inputs != outputs:
            self.conv(inputs, outputs, area, size=1)

    def attention(self, channels: int, area: int, heads: int) -> None:
        """Count self-attention over pixels."""
        self.norm(channels, area)
        for name in PROJECTIONS:
            self.linear(channels, channels, positions=area)
            self.projections.append((name, channels, channels))
        self.kept += 3 * channels * area + 2 * heads * area * area

    def transformer(self, channels: int, area: int, heads: int, text_width: int) -> None:
        """Count diffusers' Transformer2DModel: attention over pixels, over the caption, a gated feed-forward."""
        self.norm(channels, area)
        self.conv(channels, channels, area, size=1)
        for keys, positions, stretch in ((channels, area, area), (text_width, CAPTION_TOKENS, CAPTION_TOKENS)):
            self.norm(channels, area)
            for name in PROJECTIONS:
                inputs = keys if name in ("to_k", "to_v") else channels
                self.linear(
                    inputs, channels, positions=area if inputs == channels else positions, has_bias=name == "to_out.0"
                )
                self.projections.append((name, inputs, channels))
            self.kept += channels * (area + 2 * stretch) + 2 * heads * area * stretch
        self.norm(channels, area)
        self.linear(channels, 8 * channels, positions=area)
        self.activation(12 * channels * area)
        self.linear(4 * channels, channels, positions=area)
        self.conv(channels, channels, area, size=1)


def predict_picture_sizes(
    stage: PretrainImages | FinetuneImages,
    architecture: ImageArchitecture,
    facts: PictureFacts,
    autoencoder: Vae | None,
    text: TextSizes | None,
    workers: int,
    micro_batch: int,
) -> Sizes:
    """The stage's sizes on `workers` workers of `micro_batch` pictures.

    `architecture` is what it builds or starts from, `autoencoder` that of a latent diffusion, `text` reads captions.
    """
    lora = stage.adapters
    net = tally(architecture, facts, autoencoder, text)
    trainable, kept, frozen = net.parameters, net.kept, 0
    if lora is not None:
        trainable, frozen = num_lora_parameters(net, lora), net.parameters
        kept += _kept_by_adapters(net, lora, facts)
    if autoencoder is not None:
        encoding = tally(autoencoder, facts, None)
        frozen, kept = frozen + encoding.parameters, kept + encoding.kept
    if text is not None:
        frozen += text.parameters
    averaged = 0
    if lora is None and getattr(architecture, "ema_decay", None) is not None:
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


def num_lora_parameters(net: Tally, lora: Lora) -> int:
    """Parameters of an adapter on the attention of a diffusion's network."""
    names = PROJECTIONS if lora.target_modules == "all-linear" else lora.target_modules
    return sum(
        lora.r * (inputs + outputs) + (outputs if lora.dora else 0)
        for name, inputs, outputs in net.projections
        if name in names
    )


def _kept_by_adapters(net: Tally, lora: Lora, facts: PictureFacts) -> int:
    return sum(outputs + lora.r for _, _, outputs in net.projections) * facts.height * facts.width


def predict_tuning_sizes(
    stage: PpoImages,
    actor: Ddpm,
    facts: PictureFacts,
    autoencoder: Vae | None,
    text: TextSizes | None,
    workers: int,
    micro_batch: int,
) -> Sizes:
    """The sizes of a reward-tuned diffusion: the network and its frozen start, all steps of a micro-batch.

    With adapters the network without them is the start.
    """
    rollout = stage.rollout
    net = tally(actor, facts, autoencoder, text)
    trainable, kept = net.parameters, net.kept
    frozen = trainable
    stored = trainable
    if stage.lora is not None:
        trainable = num_lora_parameters(net, stage.lora)
        kept += _kept_by_adapters(net, stage.lora, facts)
        stored += trainable
    if autoencoder is not None:
        encoder = tally(autoencoder, facts, None).parameters
        frozen, stored = frozen + encoder, stored + encoder
    steps = rollout.steps or actor.sampling_steps
    if text is not None:
        frozen, stored = frozen + text.parameters, stored + text.parameters
    is_conditional = actor.class_conditional or text is not None
    is_guided = is_conditional and (actor.guidance if rollout.guidance is None else rollout.guidance) != 1
    trajectory = facts.channels * facts.height * facts.width * (steps + 1)
    pictures = micro_batch * (steps - 1) * (2 if is_guided else 1)
    memory = weights_bytes(stage.shard, trainable, frozen, workers) + FP32_BYTES * pictures * kept
    memory += FP32_BYTES * 2 * rollout.pictures_per_iteration * trajectory  # of all workers, and their own part
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


def tally(
    architecture: ImageArchitecture, facts: PictureFacts, autoencoder: Vae | None, text: TextSizes | None = None
) -> Tally:
    """Trained parameters, and values kept for each sample in the larger phase of a step."""
    net = Tally()
    match architecture:
        case Classifier():
            _encoder(net, architecture.type, facts, architecture.width, architecture.depth, architecture.features)
            net.linear(architecture.features, facts.classes)
        case Vae():
            if architecture.type == "autoencoder_kl":
                _autoencoder_kl(net, architecture, facts)
            else:
                width, depth, latent = architecture.width, architecture.depth, architecture.latent
                _encoder(net, architecture.type, facts, width, depth, 2 * latent)
                _decoder(net, architecture.type, facts, width, depth, latent)
            net.kept += 4 * facts.channels * facts.height * facts.width
        case Gan():
            return _gan(architecture, facts)
        case Ddpm():
            if autoencoder is not None:
                factor = autoencoder.reduction
                facts = PictureFacts(autoencoder.latent, facts.height // factor, facts.width // factor, facts.classes)
            _unet(net, architecture, facts, text)
    return net


def _levels(facts: PictureFacts, depth: int) -> list[tuple[int, int]]:
    """Height and width at each level; odd sizes are rounded up."""
    sizes = [(facts.height, facts.width)]
    for _ in range(depth):
        sizes.append((-(-sizes[-1][0] // 2), -(-sizes[-1][1] // 2)))
    return sizes


def _encoder(net: Tally, kind: str, facts: PictureFacts, width: int, depth: int, outputs: int) -> None:
    sizes = _levels(facts, depth)
    size, channels = facts.channels * facts.height * facts.width, facts.channels
    for level in range(depth):
        if kind == "mlp":
            net.linear(size, width)
            net.activation(width)
            size = width
            continue
        outer, (height, wide) = width << level, sizes[level + 1]
        net.conv(channels, outer, sizes[level][0] * sizes[level][1])
        net.norm(outer, height * wide)
        channels, size = outer, outer * height * wide
    net.linear(size, outputs)
    net.activation(outputs)


def _decoder(net: Tally, kind: str, facts: PictureFacts, width: int, depth: int, inputs: int) -> None:
    sizes = _levels(facts, depth)
    if kind == "mlp":
        for _ in range(depth):
            net.linear(inputs, width)
            net.activation(width)
            inputs = width
        net.linear(inputs, facts.channels * facts.height * facts.width)
        return
    inner = width << (depth - 1)
    net.linear(inputs, inner * sizes[-1][0] * sizes[-1][1])
    for level in reversed(range(depth)):
        outer, area = width << max(level - 1, 0), sizes[level][0] * sizes[level][1]
        net.conv(inner, outer, area)
        net.norm(outer, area)
        inner = outer
    net.conv(inner, facts.channels, facts.height * facts.width)


def _gan(architecture: Gan, facts: PictureFacts) -> Tally:
    generator, discriminator = Tally(), Tally()
    inputs, features = architecture.latent, 4 * architecture.width
    if architecture.class_conditional:
        generator.parameters += facts.classes * architecture.latent
        discriminator.parameters += facts.classes * features
        inputs *= 2
    _decoder(generator, architecture.type, facts, architecture.width, architecture.depth, inputs)
    _encoder(discriminator, architecture.type, facts, architecture.width, architecture.depth, features)
    discriminator.linear(features, 1)
    is_penalised = architecture.r1_gamma > 0 or architecture.loss == "wasserstein_gp"
    judged = discriminator.kept * (6 if is_penalised else 2)  # of real and of drawn ones; a gradient of a gradient
    return Tally(generator.parameters + discriminator.parameters, max(judged, generator.kept + discriminator.kept))


def _unet(net: Tally, architecture: Ddpm, facts: PictureFacts, text: TextSizes | None) -> None:
    """Count diffusers' UNet2DModel, or with a text encoder UNet2DConditionModel."""

    def attend(width: int, area: int) -> None:
        if text is None:
            net.attention(width, area, width // head)
        else:
            net.transformer(width, area, max(1, width // 8), text.width)

    channels, layers = architecture.block_out_channels, architecture.layers_per_block
    head = min(8, *channels)
    areas = [max(1, (facts.height >> level) * (facts.width >> level)) for level in range(len(channels))]
    embedding, last = 4 * channels[0], len(channels) - 1
    net.conv(facts.channels, channels[0], areas[0])
    net.linear(channels[0], embedding)
    net.linear(embedding, embedding)
    if architecture.class_conditional:
        net.parameters += (facts.classes + architecture.is_guidable) * embedding
    inputs = channels[0]
    for level, outputs in enumerate(channels):
        for layer in range(layers):
            net.residual(inputs if layer == 0 else outputs, outputs, areas[level], embedding)
            if level in architecture.attention_levels:
                attend(outputs, areas[level])
        if level < last:
            net.conv(outputs, outputs, areas[level])
        inputs = outputs
    for _ in range(2):
        net.residual(channels[-1], channels[-1], areas[-1], embedding)
    attend(channels[-1], areas[-1])
    before = channels[-1]
    for level in reversed(range(len(channels))):
        outputs = channels[level]
        for layer in range(layers + 1):
            skipped = channels[max(level - 1, 0)] if layer == layers else outputs
            net.residual((before if layer == 0 else outputs) + skipped, outputs, areas[level], embedding)
            if level in architecture.attention_levels:
                attend(outputs, areas[level])
        if level > 0:
            net.conv(outputs, outputs, areas[level - 1])
        before = outputs
    net.norm(channels[0], areas[0])
    net.conv(channels[0], facts.channels, areas[0])


def _autoencoder_kl(net: Tally, architecture: Vae, facts: PictureFacts) -> None:
    """Count diffusers' AutoencoderKL with one residual layer a level."""
    levels, latent = architecture.depth, architecture.latent
    channels = [architecture.width << level for level in range(levels)]
    areas = [max(1, (facts.height >> level) * (facts.width >> level)) for level in range(levels)]
    deep, area = channels[-1], areas[-1]
    net.conv(facts.channels, channels[0], areas[0])
    inputs = channels[0]
    for level, outputs in enumerate(channels):
        net.residual(inputs, outputs, areas[level])
        if level < levels - 1:
            net.conv(outputs, outputs, areas[level])
        inputs = outputs
    for _ in range(2):  # the middles of encoder and decoder
        net.residual(deep, deep, area)
        net.attention(deep, area, 1)
        net.residual(deep, deep, area)
    net.norm(deep, area)
    net.conv(deep, 2 * latent, area)
    net.conv(2 * latent, 2 * latent, area, size=1)
    net.conv(latent, latent, area, size=1)
    net.conv(latent, deep, area)
    inputs = deep
    for level in reversed(range(levels)):
        outputs = channels[level]
        net.residual(inputs, outputs, areas[level])
        net.residual(outputs, outputs, areas[level])
        if level > 0:
            net.conv(outputs, outputs, areas[level - 1])
        inputs = outputs
    net.norm(channels[0], areas[0])
    net.conv(channels[0], facts.channels, areas[0])
