"""The custom op `babai::trellis_matmul`: x Wᵀ with a weight that the device holds as a trellis."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from vllm_babai.format.trellis.blob import block_starts
from vllm_babai.format.trellis.window import TrellisWindow
from vllm_babai.ops.backends import backend


class TrellisTensors(NamedTuple):
    """The part of a layer that a rank holds, on its device, see `vllm_babai.format.trellis.window`.

    words: int32 [words]. starts: int32 [blocks + 1], where the words of each block begin. rates: uint8 [blocks, tiles].
    before, places: int32 [blocks, 16]. scales: fp32 [blocks, 16]. out_features: rows of the layer.
    """

    words: Tensor
    starts: Tensor
    rates: Tensor
    before: Tensor
    places: Tensor
    scales: Tensor
    out_features: int

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All tensors, in order."""
        return self[:-1]


def trellis_tensors(window: TrellisWindow, device: torch.device) -> TrellisTensors:
    """Place a window on a device; nothing is rearranged."""
    return TrellisTensors(
        torch.from_numpy(window.words.view("int32")).to(device),
        torch.from_numpy(block_starts(window.rates).astype("int32")).to(device),
        torch.from_numpy(window.rates).to(device),
        torch.from_numpy(window.before.view("int32")).to(device),
        torch.from_numpy(window.places).to(device),
        torch.from_numpy(window.scales).to(device),
        window.rows,
    )


library = torch.library.Library("babai", "FRAGMENT")  # the op lives as long as this object
library.define(
    "trellis_matmul(Tensor x, Tensor words, Tensor starts, Tensor rates, Tensor before, Tensor places, Tensor scales,"
    " int out_features) -> Tensor"
)


def _trellis_matmul(x: Tensor, *fields: Any) -> Tensor:
    return backend(x.device.type).multiply_trellis(x, TrellisTensors(*fields))


def _trellis_matmul_fake(x: Tensor, *fields: Any) -> Tensor:
    return x.new_empty(*x.shape[:-1], TrellisTensors(*fields).out_features)


library.impl("trellis_matmul", _trellis_matmul, "CPU")
torch.library.register_fake("babai::trellis_matmul", _trellis_matmul_fake, lib=library)
