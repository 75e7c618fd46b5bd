"""Predicted sizes from arithmetic alone: parameters, memory for each worker, bytes of a commit (pure).

Parameter counts are exact (a contract test compares them with transformers); memory is an upper estimate of what
training holds at once: weights, gradients, optimiser state, activations, logits, and in PPO the frozen models and the
rollout's cache. The host buffer of a save is counted separately: on a GPU it takes none of the device's memory.
"""

from dataclasses import dataclass

from recipes.models.base import LanguageArchitecture
from recipes.stages.answers import Counts, Held
from recipes.stages.base import TextStage
from recipes.stages.sharding import FP32_BYTES, MAX_BUCKET, Shard

MOMENT_BYTES = 8
CHUNK_ELEMENTS = 2**21
"""Logits that exist at once where the loss of all tokens is taken; 8 MB in fp32 stay in a CPU's cache."""
KEPT_STATES = 2
"""Committed states that a running stage keeps; while one is written there is one more."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """A stage's predicted sizes."""

    parameters: int
    trainable_parameters: int
    memory_per_worker_bytes: int
    """Where training runs: the device's memory, or that of the host."""
    artifact_bytes: int
    state_bytes: int
    save_buffer_bytes: int
    """Host memory of one worker besides what trains: its share of the state, copied there to be written while training
    continues, and what it keeps whole (the best policy so far), which the first worker copies there too."""

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
    architecture: LanguageArchitecture,
    vocab_size: int,
    workers: int,
    micro_batch: int,
    further_parameters: int = 0,
) -> Sizes:
    """The stage's sizes on `workers` workers of `micro_batch` samples; further parameters: `KnownModel`'s."""
    shard = stage.shard
    full = architecture.num_parameters(vocab_size) + further_parameters
    scored = architecture.num_parameters(vocab_size, "score")
    valued = architecture.num_parameters(vocab_size, "value")
    lora = stage.adapters
    adapter = lora.num_parameters(architecture.linears()) if lora is not None else 0
    width = architecture.shape().width
    held = stage.held(Counts(full, scored, valued, adapter, width))
    working = _activation_bytes(stage, architecture, vocab_size, micro_batch)
    if held.trainable and lora is None:
        # The backward pass and the optimiser hold a few copies of the largest tensor for a moment.
        working += 3 * vocab_size * width * FP32_BYTES
    return sizes_of(shard, held, workers, parameters=full, working_bytes=working)


def sizes_of(
    shard: Shard, held: Held, workers: int, *, parameters: int, working_bytes: int, averaged_bytes: int = 0
) -> Sizes:
    """The sizes of a stage of any model, from what it holds, what a step takes besides, and a moving average."""
    masters = held.trainable * (FP32_BYTES + MOMENT_BYTES)
    best = held.trainable * shard.value_bytes if held.keeps_best else 0
    weights = weights_bytes(shard, held.trainable, held.frozen, workers)
    return Sizes(
        parameters=parameters,
        trainable_parameters=held.trainable,
        memory_per_worker_bytes=weights + averaged_bytes + working_bytes,
        artifact_bytes=held.stored * shard.value_bytes if held.stored else 1 << 20,
        state_bytes=masters + best + averaged_bytes,
        save_buffer_bytes=-(-masters // workers) + 2 * best + averaged_bytes,
    )


def weights_bytes(shard: Shard, trainable: int, frozen: int, workers: int) -> int:
    """Weights, gradients and optimiser state of one worker (Rajbhandari et al. 2020, figure 1)."""
    zero = shard.zero_stage
    shares = [workers if zero >= stage else 1 for stage in (1, 2, 3)]
    weight_bytes = shard.value_bytes
    has_masters = shard.precision == "bf16" or zero > 0
    optimizer = trainable * (MOMENT_BYTES + (FP32_BYTES if has_masters else 0)) / shares[0]
    if shard.offload == "cpu":
        optimizer = 0.0
    gradients = trainable * weight_bytes / shares[1]
    weights = (trainable + frozen) * weight_bytes / shares[2]
    if shard.precision == "bf16":
        # Gradients are summed up in fp32, and weights are made or read in fp32 first.
        gradients += trainable * FP32_BYTES / shares[1]
        weights += (trainable + frozen) * FP32_BYTES
    buckets = min(MAX_BUCKET, trainable) * FP32_BYTES if zero > 0 else 0
    return int(weights + gradients + optimizer + buckets)


def _activation_bytes(stage: TextStage, architecture: LanguageArchitecture, vocab_size: int, micro_batch: int) -> int:
    """Activations kept for the backward pass, logits with their gradient, and the rollout's key-value cache."""
    shape = architecture.shape()
    value_bytes = stage.shard.value_bytes
    passed = stage.forward()
    length, copies = passed.length, passed.copies
    per_token = architecture.kept_per_token(length)
    if stage.adapters is not None:
        per_token = int(1.6 * per_token)  # an adapter's outputs are kept as well as those of its base
    layers = 2 if stage.shard.gradient_checkpointing or not passed.has_backward else shape.layers
    kept = copies * micro_batch * length * (layers * per_token + shape.layers * shape.width) * value_bytes
    logits = 0 if passed.logits == "none" else 3 * micro_batch * length * vocab_size * FP32_BYTES
    if passed.logits == "chunks":
        logits = min(logits, 3 * CHUNK_ELEMENTS * FP32_BYTES)
    cache = 0
    if passed.has_cache:
        cache = 2 * micro_batch * length * shape.layers * shape.kv_heads * shape.head_dim * value_bytes
    return kept + logits + cache
