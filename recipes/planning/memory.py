"""Predicted sizes from arithmetic alone: parameters, memory for each worker by part, bytes of a commit (pure).

Parameter counts are exact (a contract test compares them with transformers); memory is an upper estimate of what
training holds at once. The host buffer of a save is counted separately: on a GPU it takes none of the device's memory.
"""

from dataclasses import asdict, dataclass, field, replace

from recipes.models.known_models import Sized
from recipes.stages.answers import Counts, Held
from recipes.stages.base import TextStage
from recipes.stages.sharding import FP32_BYTES, MAX_BUCKET, Shard

MOMENT_BYTES = 8
CHUNK_ELEMENTS = 2**21
"""Logits that exist at once where the loss of all tokens is taken; 8 MB in fp32 stay in a CPU's cache."""
KEPT_STATES = 2
"""Committed states that a running stage keeps; while one is written there is one more."""


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes of one worker by part, where training runs: in the device's memory, or in the host's."""

    weights: int = 0
    gradients: int = 0
    optimizer: int = 0
    """Masters and moments."""
    averages: int = 0
    """A moving average of the weights."""
    buffers: int = 0
    """What is held for a moment: reduced gradients, gathered weights, copies of the largest tensor."""
    activations: int = 0
    logits: int = 0
    cache: int = 0
    """Keys and values of what is being written, and what a process that samples holds."""
    loading: int = 0
    """What reading and writing the model take beyond a step."""

    @property
    def state(self) -> int:
        """What there is whatever the batch is."""
        return self.total - self.activations - self.logits - self.cache

    @property
    def total(self) -> int:
        """All of it."""
        return sum(asdict(self).values())


@dataclass(frozen=True, slots=True)
class Sizes:
    """A stage's predicted sizes."""

    parameters: int
    trainable_parameters: int
    memory: Memory
    """Where training runs: the device's memory, or that of the host."""
    artifact_bytes: int
    state_bytes: int
    save_buffer_bytes: int
    """Host memory of one worker besides what trains: its share of the state, copied there to be written while training
    continues, and what it keeps whole (the best policy so far), which the first worker copies there too."""
    host_bytes: int = 0
    """Host memory of one worker on a GPU: the model that it reads before the GPU gets it, or what a save copies."""
    memory_per_worker_bytes: int = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "memory_per_worker_bytes", self.memory.total)

    @property
    def cpu_worker_bytes(self) -> int:
        """Host memory of one worker that trains on CPUs."""
        return self.memory_per_worker_bytes + self.save_buffer_bytes

    @property
    def disk_bytes(self) -> int:
        """Most that the stage's commits occupy at once: its states, one being written, and the artifact."""
        return self.artifact_bytes + (KEPT_STATES + 1) * self.state_bytes


def predict_sizes(
    stage: TextStage,
    architecture: Sized,
    vocab_size: int,
    workers: int,
    micro_batch: int,
    further_parameters: int = 0,
    *,
    on_gpu: bool = False,
) -> Sizes:
    """The stage's sizes on `workers` workers of `micro_batch` samples; further parameters: `KnownModel`'s."""
    full = architecture.num_parameters(vocab_size) + further_parameters
    held = stage.held(language_counts(stage, architecture, vocab_size, further_parameters))
    working = _activations(
        stage, architecture, vocab_size, micro_batch, _drawn_at_once(stage, workers, micro_batch), on_gpu
    )
    working = replace(working, cache=working.cache + stage.sampler_bytes(full))
    largest = vocab_size * architecture.shape().width
    if held.trainable and stage.adapters is None:
        # The backward pass and the optimiser hold a few copies of the largest tensor for a moment.
        working = replace(working, buffers=3 * largest * FP32_BYTES)
    return sizes_of(stage.shard, held, workers, parameters=full, working=working, largest=largest, on_gpu=on_gpu)


def language_counts(stage: TextStage, architecture: Sized, vocab_size: int, further_parameters: int = 0) -> Counts:
    """Parameters of the stage's language model with every head, and of its adapter."""
    lora = stage.adapters
    return Counts(
        full=architecture.num_parameters(vocab_size) + further_parameters,
        scored=architecture.num_parameters(vocab_size, "score"),
        valued=architecture.num_parameters(vocab_size, "value"),
        adapter=lora.num_parameters(architecture.linears()) if lora is not None else 0,
        width=architecture.shape().width,
    )


def sizes_of(
    shard: Shard,
    held: Held,
    workers: int,
    *,
    parameters: int,
    working: Memory,
    averaged_bytes: int = 0,
    largest: int = 0,
    on_gpu: bool = False,
) -> Sizes:
    """The sizes of a stage of any model, from what it holds, what a step takes besides, and a moving average.

    `largest`: elements of the largest tensor, which ZeRO 3 gathers whole.
    """
    masters = held.trainable * (FP32_BYTES + MOMENT_BYTES)
    best = held.trainable * shard.value_bytes if held.keeps_best else 0
    state = _state(shard, held, workers, largest)
    memory = replace(
        state,
        averages=averaged_bytes,
        buffers=state.buffers + working.buffers,
        activations=working.activations,
        logits=working.logits,
        cache=working.cache,
    )
    save_buffer = -(-masters // workers) + 2 * best + averaged_bytes
    read = (held.trainable + held.frozen) * FP32_BYTES
    offloaded = masters // workers if shard.offload == "cpu" else 0
    return Sizes(
        parameters=parameters,
        trainable_parameters=held.trainable,
        memory=_with_loading(memory, shard, held, on_gpu),
        artifact_bytes=held.stored * shard.value_bytes if held.stored else 1 << 20,
        state_bytes=masters + best + averaged_bytes,
        save_buffer_bytes=save_buffer,
        host_bytes=max(read, save_buffer + offloaded) if on_gpu else 0,
    )


def _state(shard: Shard, held: Held, workers: int, largest: int) -> Memory:
    """Weights, gradients and optimiser state of one worker (Rajbhandari et al. 2020, figure 1)."""
    zero, trainable, everything = shard.zero_stage, held.trainable, held.trainable + held.frozen
    shares = [workers if zero >= stage else 1 for stage in (1, 2, 3)]
    is_bf16 = shard.precision == "bf16"
    has_masters = is_bf16 or zero > 0
    optimizer = trainable * (MOMENT_BYTES + (FP32_BYTES if has_masters else 0)) / shares[0]
    # In bf16 gradients are summed up in fp32.
    gradients = trainable * (shard.value_bytes + (FP32_BYTES if is_bf16 else 0)) / shares[1]
    buffers = min(MAX_BUCKET, trainable) * FP32_BYTES if zero > 0 else 0
    if zero == 3:
        buffers += min(everything, min(MAX_BUCKET, trainable) + largest) * shard.value_bytes
    return Memory(
        weights=int(everything * shard.value_bytes / shares[2]),
        gradients=int(gradients),
        optimizer=0 if shard.offload == "cpu" else int(optimizer),
        buffers=buffers,
    )


def _with_loading(memory: Memory, shard: Shard, held: Held, on_gpu: bool) -> Memory:
    """Add what reading and writing the model take beyond a step.

    On CPUs weights are made or read in fp32, and in bf16 these stay in the process (measured). ZeRO 3 has the model
    whole on every worker, next to its share, while it is read, while answers are drawn, and when it is written.
    """
    everything = held.trainable + held.frozen
    if shard.precision == "bf16" and not on_gpu:
        return replace(memory, loading=everything * FP32_BYTES)
    if shard.zero_stage < 3:
        return memory
    whole = memory.state - memory.buffers + memory.cache + everything * shard.value_bytes
    return replace(memory, loading=max(0, whole - memory.total))


def _drawn_at_once(stage: TextStage, workers: int, micro_batch: int) -> int:
    """Answers that a worker writes at once: its share of an iteration's."""
    batch = stage.batch()
    return micro_batch if batch is None else max(1, batch.written * batch.samples // workers)


def _activations(
    stage: TextStage,
    architecture: Sized,
    vocab_size: int,
    micro_batch: int,
    drawn: int,
    on_gpu: bool,
) -> Memory:
    """Activations kept for the backward pass, logits with their gradient, keys and values of `drawn` answers."""
    shape = architecture.shape()
    value_bytes = stage.shard.value_bytes
    passed = stage.forward()
    length, copies = passed.length, passed.copies
    # torch's kernels on GPUs keep no scores of attention, but the mask that all layers share.
    per_token = architecture.kept_per_token(length, keeps_scores=not on_gpu)
    mask = 2 * micro_batch * copies * length * length * value_bytes if on_gpu else 0
    if stage.adapters is not None:
        per_token = int(1.6 * per_token)  # an adapter's outputs are kept as well as those of its base
    layers = 2 if stage.shard.gradient_checkpointing or not passed.has_backward else shape.layers
    kept = copies * micro_batch * length * (layers * per_token + shape.layers * shape.width) * value_bytes
    logits = 0 if passed.logits == "none" else 3 * passed.scored * micro_batch * length * vocab_size * FP32_BYTES
    if passed.logits == "chunks":
        logits = min(logits, 3 * CHUNK_ELEMENTS * FP32_BYTES)
    cache = 0
    if passed.has_cache:
        cache = 2 * drawn * length * shape.layers * shape.kv_heads * shape.head_dim * value_bytes
    return Memory(activations=kept + mask, logits=logits, cache=cache)
