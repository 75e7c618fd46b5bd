"""Sampling with preallocated keys and values, against a cache that copies itself for each token, in one run.

    python benchmarks/sampling.py [--rounds 5] [--rows 128] [--prompt 20 80] [--new 48] [--layers 4] [--width 128]
                                  [--vocabulary 2048] [--dtype float32] [--threads 1]

The defaults are the quickstart's shape; memory is allocated as in a rank's process. `ours` is
`trainers.inference.generation.generate`; `copying` the same with transformers' DynamicCache and a mask for each token;
`transformers` the model's own `generate`, sampling. Prompts are random and padded on the left; sides take turns; tokens
per second of CPU time. `ours` and `copying` must draw the same tokens.
"""

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cluster.rank_process import rank_environment
from trainers.inference import continuation
from trainers.inference.continuation import prompt_bias
from trainers.inference.generation import SamplingSettings, generate
from trainers.models.decoder import build_decoder
from trainers.models.protocol import TokenizerFacts

EOS, PAD = 0, 1


class CopyingCache:
    """Keys and values in transformers' DynamicCache."""

    def __init__(self, model: Any, max_new_tokens: int, pixels_ICHW: Tensor | None = None) -> None:
        from transformers import DynamicCache

        self._model, self._cache = model, DynamicCache(config=model.config)

    def read(self, prompt_ids_BP: Tensor, prompt_mask_BP: Tensor) -> Tensor:
        """Read the prompts."""
        self._seen_BK = prompt_mask_BP
        self._positions_B1 = self._seen_BK.sum(1, keepdim=True) - 1
        positions = (self._seen_BK.long().cumsum(1) - 1).clamp_(min=0)
        return self._forward(prompt_ids_BP, positions, prompt_bias(self._seen_BK, self._model.dtype))

    def advance(self, tokens_B: Tensor) -> Tensor:
        """Append a position."""
        self._positions_B1 = self._positions_B1 + 1
        self._seen_BK = torch.cat([self._seen_BK, torch.ones_like(self._seen_BK[:, :1])], dim=1)
        allowed, dtype = self._seen_BK[:, None, None, :], self._model.dtype
        bias = torch.zeros(allowed.shape, dtype=dtype).masked_fill_(~allowed, torch.finfo(dtype).min)
        return self._forward(tokens_B[:, None], self._positions_B1, bias)

    def keep(self, rows: Tensor) -> None:
        """Select in the cache."""
        self._cache.batch_select_indices(rows)
        self._seen_BK, self._positions_B1 = self._seen_BK[rows], self._positions_B1[rows]

    def _forward(self, input_ids: Tensor, position_ids: Tensor, bias: Tensor) -> Tensor:
        keys = {"position_ids": position_ids, "past_key_values": self._cache, "use_cache": True}
        output = self._model.base_model(input_ids=input_ids, attention_mask=bias, **keys)
        last: Tensor = output.last_hidden_state[:, -1]
        return last


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in {"rounds": 5, "rows": 128, "new": 48, "layers": 4, "width": 128}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--prompt", type=int, nargs=2, default=(20, 80))
    parser.add_argument("--vocabulary", type=int, default=2048)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    if "MALLOC_MMAP_MAX_" not in os.environ:
        environment = rank_environment(os.environ, {}, options.threads, has_gpu=False)
        os.execve(sys.executable, [sys.executable, *sys.argv], environment)
    torch.set_num_threads(options.threads)

    model: Any = build_decoder(
        {
            "type": "llama",
            "hidden_size": options.width,
            "intermediate_size": options.width * 11 // 4,
            "num_hidden_layers": options.layers,
            "num_attention_heads": max(options.width // 32, 1) if options.width < 512 else options.width // 64,
            "max_position_embeddings": options.prompt[1] + options.new,
            "tie_word_embeddings": True,
        },
        TokenizerFacts(options.vocabulary, EOS, PAD),
        seed=0,
        device=torch.device("cpu"),
    )
    model = model.to(getattr(torch, options.dtype)).eval()
    ids, mask, uniforms = inputs(options)
    settings = SamplingSettings(options.new, 1.0, (EOS,), PAD, num_tokens=options.vocabulary)
    cached = continuation.KeyValueCache

    def ours(cache: Any) -> Tensor:
        continuation.KeyValueCache = cache  # type: ignore[misc]
        try:
            return generate(model, ids, mask, settings, uniforms).tokens_BR
        finally:
            continuation.KeyValueCache = cached  # type: ignore[misc]

    def theirs() -> Tensor:
        keys = {"do_sample": True, "top_k": 0, "pad_token_id": PAD, "max_new_tokens": options.new}
        made: Tensor = model.generate(input_ids=ids, attention_mask=mask.long(), **keys)
        return made[:, ids.shape[1] :]

    sides = {"ours": lambda: ours(cached), "copying": lambda: ours(CopyingCache), "transformers": theirs}
    measure(sides, options.rounds)


def inputs(options: argparse.Namespace) -> tuple[Tensor, Tensor, np.ndarray]:
    """Random prompts of random lengths, left-padded to the longest; a uniform number per token."""
    numbers = np.random.default_rng(0)
    shortest, longest = options.prompt
    lengths = torch.from_numpy(numbers.integers(shortest, longest + 1, options.rows))
    lengths[0] = longest
    mask = torch.arange(longest)[None, :] >= longest - lengths[:, None]
    ids = torch.from_numpy(numbers.integers(2, options.vocabulary, (options.rows, longest))).masked_fill(~mask, PAD)
    return ids, mask, numbers.random((options.rows, options.new))


def measure(sides: dict[str, Callable[[], Tensor]], rounds: int) -> None:
    """Let the sides take turns; print what each took."""
    rates: dict[str, list[float]] = {name: [] for name in sides}
    made: dict[str, Tensor] = {}
    for turn in range(rounds + 1):
        for name, side in sides.items():
            began = time.process_time()
            made[name] = side()
            if turn:  # the first one warms up
                rates[name].append(int((made[name] != PAD).sum()) / (time.process_time() - began))
    medians = {name: statistics.median(found) for name, found in rates.items()}
    for name, median in medians.items():
        ratios = [our / rate for our, rate in zip(rates["ours"], rates[name], strict=True)]
        spread = f"ours is x{medians['ours'] / median:.2f} [{min(ratios):.2f}-{max(ratios):.2f}]"
        print(f"{name:14} {median:8.0f} tokens/CPU s   {spread}")
    print(f"tokens of ours and copying are equal: {bool((made['ours'] == made['copying']).all())}")


if __name__ == "__main__":
    main()
