"""What builds tiny trainings, as fixtures."""

from collections.abc import Callable
from types import SimpleNamespace

import pytest

from tests.unit.rlhf.tiny_ppo import TinyPpo, build_tiny_ppo, text_set, tiny_model


@pytest.fixture(scope="session")
def tiny_ppo() -> Callable[..., TinyPpo]:
    """Build a tiny PPO."""
    return build_tiny_ppo


@pytest.fixture(scope="session")
def tiny_language() -> SimpleNamespace:
    """What a tiny fine-tuning is built of: a model by seed, and a packed set."""
    return SimpleNamespace(model=tiny_model, text=text_set)
