"""Values that no model may have are found in any of the working precisions."""

import pytest
import torch

from trainers.runtime.precision import is_finite


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_one_value_that_is_not_finite_is_found(dtype: torch.dtype) -> None:
    tensor = torch.linspace(-3, 3, 1001).to(dtype)
    assert is_finite(tensor)
    assert is_finite(tensor[:0])
    for value in (float("nan"), float("inf"), float("-inf")):
        assert not is_finite(tensor.index_fill(0, torch.tensor([517]), value).view(7, 143))
