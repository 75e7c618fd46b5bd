"""Low-rank adapters of a recipe."""

from typing import Literal

from recipes.fields import Strict, meaning


class Lora(Strict):
    """LoRA (Hu et al. 2021) by peft; DoRA (Liu et al. 2024) with `dora`."""

    r: int = meaning(8, ge=1, le=4096, description="Rank of the update.")
    alpha: int = meaning(16, ge=1, le=65536, description="Scale: the update is multiplied by alpha / r.")
    dropout: float = meaning(0.0, ge=0, lt=1, description="Dropout on the adapter's input; always off in RLHF.")
    target_modules: Literal["all-linear"] | list[str] = meaning(
        "all-linear", description="Names of the linear modules that get an adapter, or all-linear (the head excluded)."
    )
    dora: bool = meaning(False, description="Weight-decomposed adaptation.")
    rank_stabilised: bool = meaning(False, description="Scale by alpha / sqrt(r) (Kalajdzievski 2023).")
