"""Whether a language model's files hold every layer that its `config.json` announces, by the names of the tensors."""

import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from recipes.models.architecture import TYPES

_LAYER = re.compile(r"(?P<stack>(?:.*?\.)?(?:layers?|h|block))\.(?P<number>\d+)\.(?P<name>.+?)")
"""A tensor of a stack of layers; of stacks within each other (T5's) the outer one."""


def missing_layers(config: Mapping[str, Any], names: Collection[str]) -> Iterator[str]:
    """Say what the files lack of the announced layers, and what they hold beyond them."""
    stacks: dict[str, dict[int, set[str]]] = {}
    for name in names:
        match = _LAYER.fullmatch(name)
        if match is not None:
            stacks.setdefault(match["stack"], {}).setdefault(int(match["number"]), set()).add(match["name"])
    for stack, layers in sorted(stacks.items()):
        announced = _announced(config, stack)
        if announced is None:
            continue
        # The first of T5's layers has a tensor more; every other one has what any of them has.
        common = set().union(*(found for number, found in layers.items() if number > 0 or announced == 1))
        for number in range(announced):
            lacking = sorted(common - layers.get(number, set()))
            if lacking:
                yield (
                    f"{stack}.{number} lacks {len(lacking)} of {len(common)} tensors, as {lacking[0]}; config.json "
                    f"announces {announced} layers"
                )
        beyond = [number for number in sorted(layers) if number >= announced]
        if beyond:
            yield f"the files hold {stack}.{beyond[0]}; config.json announces {announced} layers"


def _announced(config: Mapping[str, Any], stack: str) -> int | None:
    """Layers of a stack, known by its path in the files; None where that is not known."""
    known = TYPES.get(str(config.get("model_type")))
    count = None if known is None or known.architecture is None else known.architecture.num_layers_of(config, stack)
    return count if type(count) is int and count > 0 else None
