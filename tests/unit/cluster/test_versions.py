"""A node whose libraries differ from the driver's takes no part."""

import pytest

from cluster.ray_group import require_one_version
from cluster.worker import PACKAGES, installed_versions
from recipes.errors import CapacityError


def test_the_node_and_every_package_that_differs_are_named() -> None:
    ours = installed_versions()
    assert ours.keys() == {"python", *PACKAGES}
    assert ours["torch"] != "absent"
    require_one_version(ours, {"10.0.0.1": dict(ours), "10.0.0.2": dict(ours)})
    differs = {**ours, "transformers": "absent", "torch": "1.0"}
    with pytest.raises(CapacityError) as refused:
        require_one_version(ours, {"10.0.0.1": dict(ours), "10.0.0.2": differs})
    said = str(refused.value)
    assert all(word in said for word in ("10.0.0.2", "transformers absent", "torch 1.0", ours["torch"]))
    assert "10.0.0.1" not in said
    assert "peft" not in said
