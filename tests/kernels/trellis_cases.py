"""Random weights in the trellis form, and what their products are held against."""

import numpy as np
import torch
from torch import Tensor

from vllm_babai.format.trellis.blob import TrellisWeight
from vllm_babai.format.trellis.code import MOST_BITS, TILE_COLUMNS, TILE_ROWS
from vllm_babai.format.trellis.window import cut_window
from vllm_babai.ops.trellis import TrellisTensors
from vllm_babai.triton_kernels import multiply_trellis, trellis_layout

EVERY = tuple(range(2, MOST_BITS + 1))  # bits that a pair may have


def random_trellis(rows: int, columns: int, bits: tuple[int, ...] = EVERY) -> TrellisWeight:
    """Tiles of any of these bits, rows in any order, random words."""
    generator = np.random.default_rng(rows + columns)
    blocks, tiles = -(-rows // TILE_ROWS), -(-columns // TILE_COLUMNS)
    rates = generator.choice(bits, (blocks, tiles)).astype(np.uint8)
    places = np.arange(TILE_ROWS * blocks)
    order = np.concatenate([generator.permutation(span) for span in np.split(places, range(256, len(places), 256))])
    words = generator.integers(0, 1 << 32, TILE_ROWS * int(rates.sum()), dtype=np.uint32)
    return TrellisWeight(
        (rows, columns), rates, order, 300.0, generator.integers(0, 40, len(order)).astype(np.uint8), words
    )


def layout_of(weight: TrellisWeight, rows: slice | None = None, columns: slice | None = None) -> TrellisTensors:
    """The device layout of a window of a weight, all of it by default."""
    rows, columns = rows or slice(0, weight.shape[0]), columns or slice(0, weight.shape[1])
    return trellis_layout(cut_window(weight, rows, columns), torch.device("cpu"))


def check(weight: TrellisWeight, x: Tensor, rows: slice | None = None, columns: slice | None = None) -> Tensor:
    """The product is no further from the float64 one than 1.5 times a bf16 product of the dequantized weight.

    rows, columns: the window that is held.
    """
    rows, columns = rows or slice(0, weight.shape[0]), columns or slice(0, weight.shape[1])
    y = multiply_trellis(x, layout_of(weight, rows, columns))
    dense = weight.dequantize()[rows, columns].double()
    exact = x.double() @ dense.t()
    bf16 = x.bfloat16() @ dense.bfloat16().t()
    assert y.shape == exact.shape and y.dtype == x.dtype
    assert torch.isfinite(y).all()
    tolerance = 1.5 * (bf16 - exact).norm() + 1e-30
    assert (y - exact).norm() <= tolerance, f"error {(y - exact).norm():.3e}, allowed {tolerance:.3e}"
    return y
