"""A workshop for a file of tests."""

import pytest

from tests.integration.rlhf.workshop import Workshop, open_workshop


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    """A tiny chat model, preferences and prompts, and what the file's tests made before."""
    return open_workshop(tmp_path_factory.mktemp("workshop"), width=16)
