"""The device layout of a dense + sparse weight: the tensors that the custom op `babai::matmul` takes for one linear."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor


class DeviceLayout(NamedTuple):
    """Made once at load from the hardware-neutral checkpoint. Each backend defines shapes and dtypes of its own.

    dense: the packed integers of the dense part. scales: their scales. entries, offsets: the overflow.
    """

    dense: Tensor
    scales: Tensor
    entries: Tensor
    offsets: Tensor


def check_shapes(tensors: Mapping[str, Any], layer: str, **shapes: tuple[int, ...]) -> None:
    """Compare a layout's tensors, by name, with the shapes that the op's other arguments demand, before a kernel reads.

    layer: those arguments in words. Raises ValueError for tensors of another layer, as a graph passes them that was
    compiled before the checkpoint was quantized again in the same folder.
    """
    wrong = [name for name, shape in shapes.items() if tensors[name].shape != shape]
    if wrong:
        found = ", ".join(f"{name} {list(tensors[name].shape)}, not {list(shapes[name])}" for name in wrong)
        raise ValueError(
            f"the weight does not belong to a linear of {layer}: it has {found}. If the checkpoint was quantized "
            "again, remove what vLLM compiled for it before: ~/.cache/vllm/torch_compile_cache"
        )
