"""Many visits an expert, and fp32: the weights are dequantized to a workspace, then multiplied block by block of rows.

vLLM captures launches in graphs and plans them ahead, so nothing here may ask how many visits an expert has got.
`torch.nn.functional.grouped_mm` leaves that on the device, too, but wants the weights of all experts at once: 5 GB of
bf16 for gate and up of 160 experts of 1536 × 5120. Hence a kernel that takes those that the workspace holds.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from vllm_babai.triton_kernels.configs import Target
from vllm_babai.triton_kernels.experts.route import Routing
from vllm_babai.triton_kernels.layout import ROW_ALIGNMENT
from vllm_babai.triton_kernels.unpack import matrix_product, round_to

PRODUCT_BLOCK = 128  # rows of a block of visits, a choice: what matrix instructions of sm_90 are fastest with
WARPS = 8


class Operands(NamedTuple):
    """Pointers. x: [visits / per_row, k]. weight: [rows, k], of the workspace. y: [visits, n], in any type.

    owners, visits: as of `Routing`. bias: [experts, n]; x again where there is none.
    """

    x: Tensor
    weight: Tensor
    y: Tensor
    owners: Tensor
    visits: Tensor
    bias: Tensor


class Sizes(NamedTuple):
    """Integers of a layer. n: out_features of an expert. k: in_features. own_rows: of one expert, with padding."""

    n: int
    k: int
    own_rows: int


class Product(NamedTuple):
    """Compile-time constants. rows, tokens: of an output tile. columns: of a turn. stages: of the pipeline.

    even_k: columns divides in_features. backend: of `Target`. biased: there is a bias.
    """

    rows: int
    tokens: int
    columns: int
    stages: int
    even_k: bool
    backend: str
    biased: bool


@triton.jit(do_not_specialize=["first_row", "last_row", "per_row"])
def product_kernel(operands, sizes, first_row, last_row, per_row, PRODUCT: tl.constexpr):
    """One output tile, if its expert's rows are in the workspace.

    operands, sizes: as above. first_row, last_row: of all experts' rows, those that the workspace holds; both are
    multiples of the rows of a tile. per_row: visits that share a row of x. PRODUCT: `Product`.
    Grid: [blocks · row tiles of an expert].
    """
    ROWS: tl.constexpr = PRODUCT.rows
    TOKENS: tl.constexpr = PRODUCT.tokens
    COLUMNS: tl.constexpr = PRODUCT.columns
    row_tiles = tl.cdiv(sizes.n, ROWS)
    block = tl.program_id(0) // row_tiles  # tiles of the same rows of x are neighbours, and read them from the cache
    own_row = tl.program_id(0) % row_tiles * ROWS
    owner = tl.load(operands.owners + block)
    row = owner * sizes.own_rows + own_row
    if (owner >= 0) & (row >= first_row) & (row < last_row):
        columns = tl.arange(0, COLUMNS)
        visits = tl.load(operands.visits + block * TOKENS + tl.arange(0, TOKENS))
        tokens = tl.maximum(visits, 0) // per_row  # in the place of a visit that is not there any will do
        rows = (row - first_row).to(tl.int64) + tl.arange(0, ROWS)
        x_ptrs = operands.x + tokens.to(tl.int64)[:, None] * sizes.k + columns[None, :]
        weight_ptrs = operands.weight + rows[None, :] * sizes.k + columns[:, None]
        total = tl.zeros((TOKENS, ROWS), tl.float32)
        for column in tl.range(0, sizes.k, COLUMNS, num_stages=PRODUCT.stages):
            if PRODUCT.even_k:
                x = tl.load(x_ptrs + column)
                weight = tl.load(weight_ptrs + column)
            else:
                x = tl.load(x_ptrs + column, mask=(column + columns < sizes.k)[None, :], other=0.0)
                weight = tl.load(weight_ptrs + column, mask=(column + columns < sizes.k)[:, None], other=0.0)
            total = matrix_product(x, weight, total, PRODUCT.backend)
        outputs = own_row + tl.arange(0, ROWS)
        y_ptrs = operands.y + visits.to(tl.int64)[:, None] * sizes.n + outputs[None, :]
        if PRODUCT.biased:
            bias = tl.load(operands.bias + owner * sizes.n + outputs, mask=outputs < sizes.n, other=0.0)
            total += bias.to(tl.float32)[None, :]
        y = round_to(total, operands.y.dtype.element_ty, PRODUCT.backend)
        tl.store(y_ptrs, y, mask=(visits >= 0)[:, None] & (outputs < sizes.n)[None, :])


def product(in_features: int, dtype: torch.dtype, target: Target, *, biased: bool) -> Product:
    """Compile-time constants for x of `dtype`. The pipeline takes 96 KiB, which every GPU has but gfx942."""
    columns = 128 // dtype.itemsize
    stages = 2 if target.backend == "hip" else 3
    return Product(ROW_ALIGNMENT, PRODUCT_BLOCK, columns, stages, in_features % columns == 0, target.backend, biased)


def multiply_grouped(
    x: Tensor,
    per_row: int,
    routing: Routing,
    sizes: Sizes,
    bias: Tensor | None,
    parts: Callable[[torch.dtype], Iterator[Tensor]],
) -> Tensor:
    """x [visits / per_row, in_features] bf16, fp16 or fp32 → y [visits, out_features] in x's dtype, a row a visit.

    per_row: visits that share a row of x. bias: [experts, out_features]. parts(dtype): the weights of all experts in
    that dtype, some rows after the other, multiples of ROW_ALIGNMENT. Rows of visits that belong to no expert here are
    left as they are. Deterministic. fp16 goes through bf16: fp16 has no room for small scales times large integers.
    """
    inputs = x.to(torch.bfloat16) if x.dtype == torch.float16 else x
    form = product(sizes.k, inputs.dtype, Target.of(x.device), biased=bias is not None)
    y = x.new_empty(len(x) * per_row, sizes.n)
    grid = (len(routing.owners) * -(-sizes.n // form.rows),)
    first = 0
    for weight in parts(inputs.dtype):
        last = first + len(weight)
        product_kernel[grid](
            Operands(inputs, weight, y, routing.owners, routing.visits, inputs if bias is None else bias),
            sizes,
            first,
            last,
            per_row,
            PRODUCT=form,
            num_warps=WARPS,
            enable_fp_fusion=True,
        )
        first = last
    return y
