"""Numbers that follow from a recipe: micro-batch and accumulation (pure)."""

from recipes.stages.base import MAX_AUTO_MICRO_BATCH


def micro_batches(
    global_batch: int, workers: int, micro_batch: int | str = "auto", *, at_most: int = MAX_AUTO_MICRO_BATCH
) -> tuple[int, int]:
    """Micro-batch and accumulation so that workers x micro-batch x accumulation = global batch; raises ValueError."""
    if global_batch % workers:
        raise ValueError(f"global_batch ({global_batch}) cannot be divided among {workers} workers")
    share = global_batch // workers
    if micro_batch == "auto":
        micro = max(size for size in range(1, min(share, at_most) + 1) if share % size == 0)
    else:
        micro = int(micro_batch)
        if share % micro:
            raise ValueError(
                f"micro_batch ({micro}) must divide each worker's share of the batch "
                f"({global_batch} / {workers} = {share})"
            )
    return micro, share // micro
