"""What an evaluation of images refuses before it measures."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import trainers.evaluation.suites.images
from recipes.data.images import Digits
from recipes.errors import RequestError
from recipes.stages.evaluate import Evaluate
from trainers.evaluation.suite import Parts


@pytest.mark.parametrize(("held_out", "others"), [(1, 9), (9, 1)])
def test_too_few_images_are_named(monkeypatch: pytest.MonkeyPatch, held_out: int, others: int) -> None:
    def opened(context: Any, request: Any) -> list[int]:
        return [0] * (held_out if request.held_out else others)

    monkeypatch.setattr(trainers.evaluation.suites.images, "open_dataset", opened)
    spec = Evaluate(
        kind="evaluate",
        of=["gan"],
        suites=["images"],
        features="judge",
        images=Digits(source="digits", hold_out=0.2, limit=10),
    )
    context: Any = SimpleNamespace(data={}, base_dir=Path(), seed=0, ranks=SimpleNamespace(rank=0))
    with pytest.raises(RequestError, match=rf"\b{held_out} and {others}\b"):
        trainers.evaluation.suites.images.measure_images(spec, context, ["gan"], Parts(0, 1))
