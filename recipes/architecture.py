"""Architectures; the transformers families' own keys come from a table generated from the pinned library."""

from typing import Literal

from recipes.fields import Strict, meaning


class Architecture(Strict):
    family: Literal["decoder"] = meaning(description="Decoder-only transformer.")
    type: Literal["llama", "qwen3", "gpt2"] = meaning(description="transformers' model_type.")
