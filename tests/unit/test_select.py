"""Selection by histogram is selection."""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from vllm_babai.offline.scales.select import kth_smallest

FLOATS = st.one_of(st.just(0.0), st.sampled_from([1.0, 1.00001, -1.0]), st.floats(width=32, allow_nan=False))


@settings(deadline=None, max_examples=200)
@given(
    values=arrays.arrays(np.float32, arrays.array_shapes(min_dims=1, max_dims=2, max_side=40), elements=FLOATS),
    data=st.data(),
)
def test_it_is_kthvalue(values: np.ndarray, data: st.DataObject) -> None:
    k = data.draw(st.integers(1, values.size))
    tensor = torch.from_numpy(values)
    assert kth_smallest(tensor, k) == float(tensor.flatten().kthvalue(k).values)


def test_many_values_of_which_few_are_positive() -> None:
    values = (torch.randn(300, 1000, generator=torch.Generator().manual_seed(0)) - 2).clamp_min(0)
    for k in (1, 200_000, 296_000, 299_999, 300_000):
        assert kth_smallest(values, k) == float(values.flatten().kthvalue(k).values)
