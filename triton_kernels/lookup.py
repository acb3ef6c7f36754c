"""Rows of a dense + sparse weight, dequantized: an embedding's look-up reads no more than the rows asked for.

As in `dequantize`, two launches: the dense part, then the overflow over it.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from vllm_babai.ops.layout import DeviceLayout
from vllm_babai.triton_kernels.arguments import UNITS, arguments
from vllm_babai.triton_kernels.configs import Target
from vllm_babai.triton_kernels.dequantize import dequantize_form, write_block, write_entries
from vllm_babai.triton_kernels.dispatch import check_sizes
from vllm_babai.triton_kernels.layout import geometry_of
from vllm_babai.triton_kernels.unpack import load_words

TOKENS = tl.constexpr(16)  # of a program; a choice, not measured


@triton.jit
def _rows_of(ids_ptr, tokens, sizes, program):
    """Tokens of a program, the rows that they ask for, and whether there is such a token and such a row."""
    token = program * TOKENS + tl.arange(0, TOKENS)
    row = tl.load(ids_ptr + token, mask=token < tokens, other=-1)
    inside = (row >= 0) & (row < sizes.n)
    return token, tl.where(inside, row, 0).to(tl.int32), inside


@triton.jit(do_not_specialize=["tokens"])
def dense_rows_kernel(layer, ids_ptr, out_ptr, tokens, sizes, FORM: tl.constexpr):
    """Dequantize one column block of the rows of some tokens.

    layer: `Layer`. ids_ptr: int64 [tokens]. out_ptr: [tokens, k]. sizes: `Sizes`. FORM: of `dequantize`.
    Grid: [column blocks, tokens / TOKENS].
    """
    ROWS: tl.constexpr = UNITS.value.tile_rows
    PAIRS: tl.constexpr = UNITS.value.pairs
    TILE_WORDS: tl.constexpr = ROWS * PAIRS
    block = tl.program_id(0)
    token, rows, inside = _rows_of(ids_ptr, tokens, sizes, tl.program_id(1))
    tile = rows // ROWS * tl.cdiv(sizes.k, FORM.block_columns) + block
    first = tile * (FORM.words * TILE_WORDS) + rows % ROWS * PAIRS
    words = load_words(layer.dense + first[:, None] + tl.arange(0, PAIRS)[None, :], FORM.words, TILE_WORDS)
    write_block(layer, words, out_ptr + token.to(tl.int64) * sizes.k, rows, inside, block, sizes, FORM)


@triton.jit(do_not_specialize=["tokens"])
def overflow_rows_kernel(layer, ids_ptr, out_ptr, tokens, sizes, FORM: tl.constexpr):
    """Write the overflowing weights of one panel of the rows of some tokens.

    Arguments as of `dense_rows_kernel`. Grid: [tokens / TOKENS, panels].
    """
    panel = tl.program_id(1)
    token, rows, inside = _rows_of(ids_ptr, tokens, sizes, tl.program_id(0))
    end = tl.load(layer.starts + panel * sizes.padded_rows + rows + 1, mask=inside, other=0)
    write_entries(layer, out_ptr + token.to(tl.int64) * sizes.k, rows, end, panel, sizes, FORM)


def look_up(ids: Tensor, layout: DeviceLayout, bits: int, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """See `Backend`. A GPU cannot refuse an id: what is looked up for one that has no row is undefined."""
    geometry = geometry_of(bits, shape[1], shape[0])
    check_sizes(layout, geometry)
    flat = ids.reshape(-1).long()
    out = torch.empty(len(flat), shape[1], dtype=dtype, device=ids.device)
    if len(flat):
        layer, sizes = arguments(layout, geometry)
        form = dequantize_form(geometry, len(layout.scales), Target.of(ids.device).backend)
        programs = triton.cdiv(len(flat), TOKENS.value)
        dense_rows_kernel[(geometry.column_blocks, programs)](
            layer, flat, out, len(flat), sizes, FORM=form, num_warps=1, enable_fp_fusion=True
        )
        if layout.entries.numel():
            overflow_rows_kernel[(programs, geometry.panels)](
                layer, flat, out, len(flat), sizes, FORM=form, num_warps=1, enable_fp_fusion=True
            )
    return out.view(*ids.shape, shape[1])
