"""Predicted sizes from arithmetic alone: parameters, memory for each worker by part, bytes of a commit (pure).

Parameter counts are exact (a contract test compares them with transformers); memory is an upper estimate of what
training holds at once. The host buffer of a save is counted separately: on a GPU it takes none of the device's memory.
"""

from dataclasses import asdict, dataclass, field, replace

from recipes.models.known_models import SizedModel
from recipes.stages.answers import Counts, Held
from recipes.stages.base import StageBase
from recipes.stages.lora import QUANTISED_BYTES
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
    mapped_bytes: int = 0
    """Pages of files that one worker maps for a moment, its share of the first saved state, which is read back. They
    are resident, but the kernel takes them back where memory is short."""
    memory_per_worker_bytes: int = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "memory_per_worker_bytes", self.memory.total)

    @property
    def cpu_worker_bytes(self) -> int:
        """Host memory of one worker that trains on CPUs."""
        return self.memory_per_worker_bytes + self.save_buffer_bytes

    @property
    def resident_bytes(self) -> int:
        """What one worker that trains on CPUs is seen to take at most: that and the pages of files."""
        return self.cpu_worker_bytes + self.mapped_bytes

    @property
    def disk_bytes(self) -> int:
        """Most that the stage's commits occupy at once: its states, one being written, and the artifact."""
        return self.artifact_bytes + (KEPT_STATES + 1) * self.state_bytes


def predict_sizes(
    stage: StageBase, model: SizedModel, workers: int, micro_batch: int, *, on_gpu: bool = False
) -> Sizes:
    """The stage's sizes on `workers` workers of `micro_batch` samples."""
    held = stage.held(counts_of(stage, model))
    shard, masters = stage.shard, held.trainable * (FP32_BYTES + MOMENT_BYTES)
    best = held.trainable * shard.value_bytes if held.keeps_best else 0
    averages = FP32_BYTES * held.trainable if model.keeps_average and stage.adapters is None else 0
    memory = replace(
        _quantised(_state(stage, held, workers, model.largest_tensor, on_gpu), stage, model, workers),
        averages=averages,
        activations=_activations(stage, model, micro_batch, on_gpu),
        logits=_logits(stage, model, micro_batch),
        cache=_cache(stage, model, workers, micro_batch),
    )
    save_buffer = -(-masters // workers) + 2 * best + averages
    read = (held.trainable + held.frozen) * FP32_BYTES
    offloaded = masters // workers if shard.offload == "cpu" else 0
    return Sizes(
        parameters=model.num_parameters() + model.fixed_parameters,
        trainable_parameters=held.trainable,
        memory=_with_loading(memory, shard, held, on_gpu),
        artifact_bytes=held.stored * shard.value_bytes if held.stored else 1 << 20,
        state_bytes=masters + best + averages,
        save_buffer_bytes=save_buffer,
        host_bytes=max(read, save_buffer + offloaded) if on_gpu else 0,
        mapped_bytes=(masters + best + averages) // workers,
    )


def counts_of(stage: StageBase, model: SizedModel) -> Counts:
    """Parameters of the stage's model with every head, and of its adapter."""
    lora, adapter, saved = stage.adapters, 0, 0
    if lora is not None:
        linears, end = model.linears(), model.end
        saved = 0 if end is None else lora.num_saved(linears, end, is_tied=model.is_tied)
        adapter = saved + lora.num_parameters(linears, end) + lora.num_on_experts(model.experts())
    return Counts(
        full=model.num_parameters(),
        scored=model.num_parameters("score"),
        valued=model.num_parameters("value"),
        adapter=adapter,
        width=model.width,
        fixed=model.fixed_parameters,
        saved=saved,
    )


def _state(stage: StageBase, held: Held, workers: int, largest: int, on_gpu: bool) -> Memory:
    """Weights, gradients and optimiser state of one worker (Rajbhandari et al. 2020, figure 1)."""
    shard = stage.shard
    zero, trainable, everything = shard.zero_stage, held.trainable, held.trainable + held.frozen
    shares = [workers if zero >= stage else 1 for stage in (1, 2, 3)]
    has_masters = shard.precision == "bf16" or zero in (1, 2)  # else the optimiser works on the weights themselves
    optimizer = trainable * (MOMENT_BYTES + (FP32_BYTES if has_masters else 0)) / shares[0]
    buffers = 0 if zero == 0 else _buckets(zero, on_gpu) * min(MAX_BUCKET, trainable) * FP32_BYTES
    if zero == 3:
        buffers += min(everything, min(MAX_BUCKET, trainable) + largest) * shard.value_bytes
    if trainable and (stage.adapters is None or stage.adapters.modules_to_save):
        # The backward pass and the optimiser hold a few copies of the largest tensor for a moment.
        buffers += 3 * largest * FP32_BYTES
    return Memory(
        weights=int(everything * shard.value_bytes / shares[2]),
        gradients=int(trainable * FP32_BYTES / shares[1]),  # summed up in fp32
        optimizer=0 if shard.offload == "cpu" else int(optimizer),
        buffers=buffers,
    )


def _quantised(memory: Memory, stage: StageBase, model: SizedModel, workers: int) -> Memory:
    """Let the base's linear modules take the bytes of few bits, which every worker has whole."""
    if stage.adapters is None or stage.adapters.quantize is None:
        return memory
    values = sum(linear.count * linear.inputs * linear.outputs for linear in model.linears())
    shared = stage.shard.value_bytes / (workers if stage.shard.zero_stage == 3 else 1)
    return replace(memory, weights=memory.weights + int(values * (QUANTISED_BYTES[stage.adapters.quantize] - shared)))


def _buckets(zero: int, on_gpu: bool) -> int:
    """Copies of a bucket that DeepSpeed makes in a step, each of which stays in a CPU process (`MALLOC_*`).

    The flattened gradients that are reduced, the updated weights that are gathered, and from stage 2 on the bucket that
    gradients are collected in (`reduce_ipg_grads`, `all_gather_dp_groups`). A GPU's allocator uses one place for all.
    """
    return 1 if on_gpu else 2 if zero == 1 else 3


def _with_loading(memory: Memory, shard: Shard, held: Held, on_gpu: bool) -> Memory:
    """Add what reading and writing the model take beyond a step.

    On CPUs weights are made or read in fp32, and the place of those that the engine copies stays with the process: in
    bf16 and under ZeRO 3 of all, else of those that are trained. ZeRO 3 has the model whole on every worker, next to
    its share, while it is read, while answers are drawn, and when it is written.
    """
    everything, zero = held.trainable + held.frozen, shard.zero_stage
    if not on_gpu:
        copied = everything if shard.precision == "bf16" or zero == 3 else held.trainable
        return replace(memory, loading=copied * FP32_BYTES)
    if zero < 3:
        return memory
    whole = memory.state - memory.buffers + memory.cache + everything * shard.value_bytes
    return replace(memory, loading=max(0, whole - memory.total))


def _activations(stage: StageBase, model: SizedModel, micro_batch: int, on_gpu: bool) -> int:
    """Bytes kept for the backward pass, and samples that wait to be learnt from."""
    passed, lora, value_bytes = stage.forward(), stage.adapters, stage.shard.value_bytes
    recomputes = stage.shard.gradient_checkpointing or not passed.has_backward
    # torch's kernels on GPUs keep no scores of attention, but the mask that all layers share.
    kept = model.kept(passed.length, keeps_scores=not on_gpu, recomputes=recomputes)
    mask = 2 * passed.length**2 if on_gpu and model.vocab_size else 0
    if lora is not None:
        linears = model.linears()
        # In a CPU process outputs of base and adapter leave places between what is kept, too small for what follows.
        outputs = 0 if on_gpu else sum(linear.count * linear.outputs for linear in lora.adapted(linears))
        kept += model.positions(passed.length) * (lora.inner_values(linears) + outputs)
    waiting = passed.waiting * model.sample_values(passed.length)
    return (micro_batch * passed.copies * (kept + mask) + waiting) * value_bytes


def _logits(stage: StageBase, model: SizedModel, micro_batch: int) -> int:
    """Bytes of logits with their gradient."""
    passed = stage.forward()
    if passed.logits == "none":
        return 0
    logits = 3 * passed.scored * micro_batch * passed.length * model.vocab_size * FP32_BYTES
    return min(logits, 3 * CHUNK_ELEMENTS * FP32_BYTES) if passed.logits == "chunks" else logits


def _cache(stage: StageBase, model: SizedModel, workers: int, micro_batch: int) -> int:
    """Keys and values of the answers that a worker writes at once (its share of an iteration's); what else samples."""
    passed, batch = stage.forward(), stage.batch()
    if not passed.has_cache:
        return 0
    drawn = micro_batch if batch is None else max(1, batch.written * batch.samples // workers)
    return drawn * model.cached(passed.length) * stage.shard.value_bytes + stage.sampler_bytes(model.num_parameters())
