"""Predicted sizes from arithmetic alone: parameters, memory for each worker, bytes of a commit (pure).

Parameter counts are exact (a contract test compares them with transformers); memory is an upper estimate of what
training holds at once: weights, gradients, optimiser state, activations, logits, and in PPO the frozen models and the
rollout's cache. The host buffer of a save stands beside it: on a GPU it takes none of the device's memory.
"""

from dataclasses import dataclass
from typing import Literal

from recipes.models.architecture import Architecture, Gpt2, Llama, Qwen3, architecture_shape
from recipes.models.encoder import Bert
from recipes.models.encoder_decoder import T5, Bart
from recipes.models.rnn import Rnn
from recipes.stages.base import Counts
from recipes.stages.evaluate import Evaluate
from recipes.stages.finetune import Finetune
from recipes.stages.lora import Lora
from recipes.stages.pretrain import Pretrain
from recipes.stages.reward import Reward
from recipes.stages.rl import PpoStage
from recipes.stages.sharding import FP32_BYTES, MAX_BUCKET, Shard

Head = Literal["lm", "score", "value"]
LanguageStage = Pretrain | Finetune | Reward | PpoStage | Evaluate

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
    """Host memory of one worker beside what trains: its share of the state, copied there to be written beside training,
    and what it keeps whole (the best policy so far), which the first worker copies there, too."""

    @property
    def cpu_worker_bytes(self) -> int:
        """Host memory of one worker that trains on CPUs."""
        return self.memory_per_worker_bytes + self.save_buffer_bytes

    @property
    def disk_bytes(self) -> int:
        """Most that the stage's commits occupy at once: its states, one being written, and the artifact."""
        return self.artifact_bytes + (KEPT_STATES + 1) * self.state_bytes


def num_parameters(architecture: Architecture, vocab_size: int, head: Head = "lm") -> int:
    """Parameters of the model with one head; tied embeddings are counted once."""
    shape = architecture_shape(architecture)
    width, vocabulary = shape.width, vocab_size
    inner = shape.heads * shape.head_dim
    inner_kv = shape.kv_heads * shape.head_dim
    match architecture:
        case Rnn():
            gates, state = (4 if architecture.type == "lstm" else 3), architecture.hidden_size
            inputs = width + (shape.layers - 1) * state
            body = vocabulary * width + gates * state * (inputs + shape.layers * (state + 2))
            body += 0 if width == state else state * width
        case Bert():
            block = 4 * (width * width + width) + 2 * width * shape.intermediate + shape.intermediate + width
            rows = vocabulary + architecture.max_position_embeddings + architecture.type_vocab_size
            body = (rows + 2) * width + shape.layers * (block + 4 * width)
            # The head of masked tokens has a layer, a norm and a bias of its own.
            body += width * width + 3 * width + vocabulary if head == "lm" else 0
        case T5() | Bart():
            return _encoder_decoder_parameters(architecture, vocabulary, head)
        case Gpt2():
            assert shape.positions is not None
            attention = width * 3 * width + 3 * width + width * width + width
            feed_forward = 2 * width * shape.intermediate + shape.intermediate + width
            body = (
                (vocabulary + shape.positions) * width
                + shape.layers * (attention + feed_forward + 4 * width)
                + 2 * width
            )
        case Llama() | Qwen3():
            attention = width * inner + 2 * width * inner_kv + inner * width
            if architecture.attention_bias:
                attention += inner + 2 * inner_kv + width
            if isinstance(architecture, Qwen3):
                attention += 2 * shape.head_dim
            feed_forward = 3 * width * shape.intermediate
            if isinstance(architecture, Llama) and architecture.mlp_bias:
                feed_forward += 2 * shape.intermediate + width
            body = vocabulary * width + shape.layers * (attention + feed_forward + 2 * width) + width
    if head == "lm":
        return body + (0 if shape.tied else vocabulary * width)
    return body + width + (1 if head == "value" else 0)


def _encoder_decoder_parameters(architecture: T5 | Bart, vocabulary: int, head: Head) -> int:
    """Parameters with the tied head; these types make no other one here, so a scalar head is counted as a column."""
    width = architecture.d_model
    linear = sum(
        count * (inputs * outputs + (outputs if isinstance(architecture, Bart) else 0))
        for (inputs, outputs), count in _encoder_decoder_linears(architecture).values()
    )
    if isinstance(architecture, T5):
        norms = 2 * architecture.num_layers + 3 * architecture.decoder_layers + 2
        biases = 2 * architecture.relative_attention_num_buckets * architecture.num_heads
        body = vocabulary * width + linear + norms * width + biases
    else:
        norms = 2 * architecture.encoder_layers + 3 * architecture.decoder_layers + 2
        positions = 2 * (architecture.max_position_embeddings + 2)
        body = (vocabulary + positions) * width + linear + norms * 2 * width
    return body + {"lm": 0, "score": width, "value": width + 1}[head]


def _encoder_decoder_linears(architecture: T5 | Bart) -> dict[str, tuple[tuple[int, int], int]]:
    """Inputs and outputs of every kind of linear module, by part and name, and how many of it there are."""
    width = architecture.d_model
    found: dict[str, tuple[tuple[int, int], int]] = {}
    if isinstance(architecture, T5):
        inner, wide = architecture.num_heads * architecture.d_kv, architecture.d_ff
        attention = {"q": (width, inner), "k": (width, inner), "v": (width, inner), "o": (inner, width)}
        inputs = ("wi_0", "wi_1") if architecture.is_gated else ("wi",)
        for part, count, attentions in (
            ("encoder", architecture.num_layers, ("self",)),
            ("decoder", architecture.decoder_layers, ("self", "cross")),
        ):
            found |= {f"{part}.{kind}.{name}": (size, count) for kind in attentions for name, size in attention.items()}
            found |= {f"{part}.{name}": ((width, wide), count) for name in inputs}
            found[f"{part}.wo"] = ((wide, width), count)
        return found
    names = ("q_proj", "k_proj", "v_proj", "out_proj")
    for part, count, attentions, wide in (
        ("encoder", architecture.encoder_layers, ("self",), architecture.encoder_ffn_dim),
        ("decoder", architecture.decoder_layers, ("self", "cross"), architecture.decoder_ffn_dim),
    ):
        found |= {f"{part}.{kind}.{name}": ((width, width), count) for kind in attentions for name in names}
        found |= {f"{part}.fc1": ((width, wide), count), f"{part}.fc2": ((wide, width), count)}
    return found


def linear_sizes(architecture: Architecture) -> dict[str, tuple[int, int]]:
    """Inputs and outputs of one layer's linear modules; gpt2's two `c_proj` under their places; none in an RNN.

    An encoder-decoder has two kinds of layer: here stand those of the decoder, which has the encoder's and more.
    """
    if isinstance(architecture, Rnn):
        return {}
    if isinstance(architecture, T5 | Bart):
        found = _encoder_decoder_linears(architecture).items()
        return {name.removeprefix("decoder."): size for name, (size, _) in found if name.startswith("decoder.")}
    shape = architecture_shape(architecture)
    width, inner, inner_kv = shape.width, shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    if isinstance(architecture, Bert):
        return {
            "query": (width, width),
            "key": (width, width),
            "value": (width, width),
            "attention.output.dense": (width, width),
            "intermediate.dense": (width, shape.intermediate),
            "output.dense": (shape.intermediate, width),
        }
    if isinstance(architecture, Gpt2):
        return {
            "attn.c_attn": (width, 3 * width),
            "attn.c_proj": (width, width),
            "mlp.c_fc": (width, shape.intermediate),
            "mlp.c_proj": (shape.intermediate, width),
        }
    return {
        "q_proj": (width, inner),
        "k_proj": (width, inner_kv),
        "v_proj": (width, inner_kv),
        "o_proj": (inner, width),
        "gate_proj": (width, shape.intermediate),
        "up_proj": (width, shape.intermediate),
        "down_proj": (shape.intermediate, width),
    }


def num_lora_parameters(architecture: Architecture, lora: Lora) -> int:
    """Parameters of one adapter over all layers (the head excluded)."""
    targets = lora.target_modules
    if isinstance(architecture, T5 | Bart):
        sizes = _encoder_decoder_linears(architecture)
    else:
        layers = architecture_shape(architecture).layers
        sizes = {name: (size, layers) for name, size in linear_sizes(architecture).items()}
    total = 0
    for name, ((inputs, outputs), count) in sizes.items():
        if targets == "all-linear" or name.rsplit(".", 1)[-1] in targets:
            total += count * (lora.r * (inputs + outputs) + (outputs if lora.dora else 0))
    return total


def predict_sizes(
    stage: LanguageStage,
    architecture: Architecture,
    vocab_size: int,
    workers: int,
    micro_batch: int,
    further_parameters: int = 0,
) -> Sizes:
    """The stage's sizes on `workers` workers of `micro_batch` samples; further parameters: `KnownModel`'s."""
    shard = stage.shard
    full = num_parameters(architecture, vocab_size) + further_parameters
    scored = num_parameters(architecture, vocab_size, "score")
    valued = num_parameters(architecture, vocab_size, "value")
    lora = stage.adapters
    adapter = num_lora_parameters(architecture, lora) if lora is not None else 0
    width = architecture_shape(architecture).width
    held = stage.held(Counts(full, scored, valued, adapter, width))
    trainable, frozen, stored = held.trainable, held.frozen, held.stored
    weight_bytes = shard.value_bytes
    memory = weights_bytes(shard, trainable, frozen, workers)
    if trainable and lora is None:
        # The backward pass and the optimiser hold a few copies of the largest tensor for a moment.
        memory += 3 * vocab_size * width * FP32_BYTES
    memory += _activation_bytes(stage, architecture, vocab_size, micro_batch)
    best = trainable * weight_bytes if held.keeps_best else 0
    masters = trainable * (FP32_BYTES + MOMENT_BYTES)
    return Sizes(
        parameters=full,
        trainable_parameters=trainable,
        memory_per_worker_bytes=memory,
        artifact_bytes=stored * weight_bytes if stored else 1 << 20,
        state_bytes=masters + best,
        save_buffer_bytes=-(-masters // workers) + 2 * best,
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


def _activation_bytes(stage: LanguageStage, architecture: Architecture, vocab_size: int, micro_batch: int) -> int:
    """Activations kept for the backward pass, logits with their gradient, and the rollout's key-value cache."""
    shape = architecture_shape(architecture)
    value_bytes = stage.shard.value_bytes
    passed = stage.forward()
    length, copies = passed.length, passed.copies
    per_token = 18 * shape.width + 5 * shape.intermediate + 2 * shape.heads * length
    if isinstance(architecture, T5 | Bart):
        per_token += 8 * shape.width + 4 * shape.heads * length  # cross-attention; scores with a bias of their own
    if stage.adapters is not None:
        per_token = int(1.6 * per_token)  # an adapter's outputs are kept beside those of its base
    layers = 2 if stage.shard.gradient_checkpointing or not passed.has_backward else shape.layers
    kept = copies * micro_batch * length * (layers * per_token + shape.layers * shape.width) * value_bytes
    logits = 0 if passed.logits == "none" else 3 * micro_batch * length * vocab_size * FP32_BYTES
    if passed.logits == "chunks":
        logits = min(logits, 3 * CHUNK_ELEMENTS * FP32_BYTES)
    cache = 0
    if passed.has_cache:
        cache = 2 * micro_batch * length * shape.layers * shape.kv_heads * shape.head_dim * value_bytes
    return kept + logits + cache
