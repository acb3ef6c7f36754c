"""CPU backend of `babai::matmul`: device layout, and the way to multiply that is fastest for a number of tokens.

- Few tokens: the weights are decoded again for every few of them, and the overflow is summed on its own.
- Many: block by block, a tile is expanded to bfloat16 integers in the cache, overflow included, and serves hundreds of
  tokens. Integers above 2⁸ are rounded to bfloat16 there.
- Many on a processor with AMX: the dequantized weight goes to PyTorch's matmul.

Layout: `dense` int32 [tiles, words, 64], see `vllm_babai.cpu.kernel`; `scales` float32 [groups, 64 · tiles]; `entries`
int32, by tile and block of 128 columns, excess · 2¹⁶ + place in [128 columns, 64 rows]; `offsets` int32
[tiles · blocks + 1], first entry of every block. Three bits are stored in fields of four and five in fields of eight,
which then hold most of the overflow as well.
"""

from collections.abc import Callable

import numba
import numpy as np
import torch
from torch import Tensor

from vllm_babai.cpu.kernel import (
    BLOCK_COLUMNS,
    LANES,
    TILE_ROWS,
    Arithmetic,
    Bfloat16,
    Float32,
    dense_kernels,
    dequantize_kernel,
    expand_kernel,
    has_bfloat16,
    insert_kernel,
    overflow_kernels,
    weights_per_word,
)
from vllm_babai.cpu.loops import dequantize_tiles, run_expanded_tiles, run_tiles, tokens_in_lanes
from vllm_babai.format import Overflow, integer_range, unpack
from vllm_babai.ops.layout import DeviceLayout, check_shapes

FIELD_WIDTH = {2: 2, 3: 4, 4: 4, 5: 8, 8: 8}  # bits of the checkpoint → bits of a field
# By bits: tokens from which expanding is faster than decoding. Measured on an AMD EPYC (Zen 5, AVX512-BF16) with
# `python tests/benchmarks/cpu_matmul.py --tokens …` for every width.
EXPAND_TOKENS = {2: 17, 3: 24, 4: 17, 5: 6, 8: 6}
DEQUANTIZE_TOKENS = 64  # with AMX: from here on, a dequantized matmul. A choice: no processor with AMX was measured.
DEQUANTIZE_TILES = 2  # dequantized at a time, to stay in the cache; a choice that was not measured


def _start_threads() -> None:
    """Let numba have as many threads as torch.

    numba would count the processors that its importer may use, and vLLM binds that thread to one. Starting its threads,
    it sets OpenMP's number of threads, which is torch's as well; that is put back.
    """
    threads = torch.get_num_threads()
    numba.config.NUMBA_NUM_THREADS = max(numba.config.NUMBA_NUM_THREADS, threads)
    numba.get_num_threads()
    torch.set_num_threads(threads)


_start_threads()


def device_layout(
    qweight: Tensor, scales: Tensor, overflow: Overflow, bits: int, in_features: int, device: torch.device
) -> DeviceLayout:
    """Arrange a linear for the kernels of this module.

    qweight: uint8 [out, packed_bytes(in, bits)]. scales: bfloat16 [out, groups]. overflow: of the same out × in.
    Raises ValueError for a group size that is no multiple of 16.
    """
    width = FIELD_WIDTH[bits]
    integers = overflow.added_to(unpack(qweight, bits, in_features))
    fields = integers.clamp(*integer_range(width))
    entries, offsets = _overflow_by_block(integers - fields)
    return DeviceLayout(_words(fields, width), _group_scales(scales, in_features), entries, offsets)


def matmul(
    x: Tensor, dense: Tensor, scales: Tensor, entries: Tensor, offsets: Tensor, bits: int, out_features: int
) -> Tensor:
    """x [..., in_features] in bfloat16, float16 or float32 → x Wᵀ [..., out_features] in the same dtype.

    Raises ValueError when the layout is of other sizes than the arguments say.
    """
    layout = DeviceLayout(dense, scales, entries, offsets)
    check_sizes(layout, bits, x.shape[-1], out_features)
    numba.set_num_threads(min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS))
    tokens = x.reshape(-1, x.shape[-1])
    multiply = _way_to_multiply(len(tokens), x.dtype, bits)
    y = multiply(tokens, layout, FIELD_WIDTH[bits], out_features)
    return y.view(*x.shape[:-1], out_features)


def warm_up(layout: DeviceLayout, bits: int, in_features: int, out_features: int, dtype: torch.dtype) -> None:
    """Compile every way to multiply with activations of `dtype`."""
    for tokens in (1, 2, EXPAND_TOKENS[bits], DEQUANTIZE_TOKENS):
        matmul(torch.zeros(tokens, in_features, dtype=dtype), *layout, bits, out_features)


def check_sizes(layout: DeviceLayout, bits: int, in_features: int, out_features: int) -> None:
    """Raise ValueError when a layout is of other sizes."""
    tiles, words = -(-out_features // TILE_ROWS), -(-in_features // weights_per_word(FIELD_WIDTH[bits]))
    check_shapes(
        layout._asdict(),
        f"{out_features} × {in_features} with {bits} bits",
        dense=(tiles, words, TILE_ROWS),
        scales=(len(layout.scales), tiles * TILE_ROWS),
        offsets=(tiles * -(-in_features // BLOCK_COLUMNS) + 1,),
    )


def _words(fields: Tensor, width: int) -> Tensor:
    """Integers [out, in] in the range of `width` bits → int32 [tiles, words, 64], padded with zeros."""
    out_features, in_features = fields.shape
    per_word, half = weights_per_word(width), integer_range(width)[0]
    padded = torch.nn.functional.pad(fields, (0, -in_features % per_word, 0, -out_features % TILE_ROWS))
    grouped = padded.view(len(padded) // TILE_ROWS, TILE_ROWS, -1, per_word)
    words = torch.zeros(grouped.shape[:-1], dtype=torch.int32)
    for k in range(per_word):
        words |= (grouped[..., k].int() - half) << (16 * (k % 2) + width * (k // 2))
    return words.transpose(1, 2).contiguous()


def _overflow_by_block(excess: Tensor) -> tuple[Tensor, Tensor]:
    """What the fields lack, int16 [out, in] → entries and offsets."""
    rows, columns = torch.nonzero(excess, as_tuple=True)
    tiles, blocks = -(-excess.shape[0] // TILE_ROWS), -(-excess.shape[1] // BLOCK_COLUMNS)
    block = rows // TILE_ROWS * blocks + columns // BLOCK_COLUMNS
    place = columns % BLOCK_COLUMNS * TILE_ROWS + rows % TILE_ROWS
    places = BLOCK_COLUMNS * TILE_ROWS
    position, order = torch.sort(block * places + place)
    entries = excess[rows, columns][order].int() << 16 | (position % places).int()
    return entries, torch.searchsorted(position, torch.arange(tiles * blocks + 1) * places).int()


def _group_scales(scales: Tensor, in_features: int) -> Tensor:
    """Scales [out, groups] → float32 [groups, 64 · tiles], the group size a power of two where there are several."""
    groups = scales.shape[1]
    if groups > 1:
        group_size = in_features // groups
        power = group_size & -group_size
        if power < LANES:
            raise ValueError(f"the CPU kernels need a group size that is a multiple of {LANES}, not {group_size}")
        scales = scales.repeat_interleave(group_size // power, dim=1)
    return torch.nn.functional.pad(scales.float().t(), (0, -len(scales) % TILE_ROWS)).contiguous()


def group_shift(scales: Tensor, in_features: int) -> int:
    """Column >> shift is its group."""
    groups = scales.shape[0]
    return in_features.bit_length() if groups == 1 else (in_features // groups).bit_length() - 1


def _way_to_multiply(tokens: int, dtype: torch.dtype, bits: int) -> Callable[..., Tensor]:
    if tokens < EXPAND_TOKENS[bits] or isinstance(_arithmetic(dtype), Float32):
        return _multiply_packed
    amx = torch.cpu._is_amx_tile_supported()  # PyTorch's own matmul is then several times faster than any without
    return _multiply_dequantized if amx and tokens >= DEQUANTIZE_TOKENS else _multiply_expanded


def _arithmetic(dtype: torch.dtype) -> Arithmetic:
    return Bfloat16() if dtype == torch.bfloat16 and has_bfloat16() else Float32()


def _multiply_packed(x: Tensor, layout: DeviceLayout, width: int, out_features: int) -> Tensor:
    """For few tokens, see `run_tiles`."""
    if x.dtype == torch.float16:
        return _multiply_packed(x.float(), layout, width, out_features).half()
    arithmetic = _arithmetic(x.dtype)
    tokens, in_features = x.shape
    padded = _padded(x, layout.dense, width)
    activations = padded.float() if isinstance(arithmetic, Float32) else padded
    by_column = tokens_in_lanes(activations.float().numpy())
    y = torch.empty(tokens, out_features, dtype=x.dtype)
    run_tiles(
        (dense_kernels(arithmetic, width), overflow_kernels()[by_column.shape[2]]),
        (activations.data_ptr(), activations.stride(0) * activations.element_size(), by_column),
        arrays(layout),
        group_shift(layout.scales, in_features),
        (y.view(torch.uint16) if y.dtype == torch.bfloat16 else y).numpy(),
    )
    return y


def _padded(x: Tensor, dense: Tensor, width: int) -> Tensor:
    """x [tokens, in] with zeros up to the last word."""
    missing = dense.shape[1] * weights_per_word(width) - x.shape[1]
    return torch.nn.functional.pad(x, (0, missing)) if missing else x.contiguous()


def _multiply_expanded(x: Tensor, layout: DeviceLayout, width: int, out_features: int) -> Tensor:
    """For many tokens, see `run_expanded_tiles`."""
    padded = torch.nn.functional.pad(x, (0, -x.shape[1] % BLOCK_COLUMNS))
    by_block = padded.unflatten(1, (-1, BLOCK_COLUMNS)).transpose(0, 1).contiguous()
    y = torch.empty(len(x), out_features, dtype=x.dtype)
    run_expanded_tiles(
        (dense_kernels(Bfloat16(), 16), expand_kernel(width), insert_kernel()),
        16 // width,
        by_block.view(torch.uint16).numpy(),
        arrays(layout),
        y.view(torch.uint16).numpy(),
    )
    return y


def _multiply_dequantized(x: Tensor, layout: DeviceLayout, width: int, out_features: int) -> Tensor:
    """For many tokens on a processor with AMX: some tiles are dequantized at a time, for PyTorch's matmul."""
    in_features = x.shape[1]
    blocks = -(-in_features // BLOCK_COLUMNS)
    columns = layout.dense.shape[1] * weights_per_word(width)
    y = x.new_empty(len(x), out_features)
    for tile in range(0, len(layout.dense), DEQUANTIZE_TILES):
        dense, first_row = layout.dense[tile : tile + DEQUANTIZE_TILES], tile * TILE_ROWS
        offsets = layout.offsets[tile * blocks : (tile + len(dense)) * blocks + 1]
        weight = torch.empty(columns, len(dense) * TILE_ROWS, dtype=torch.float32)
        dequantize_tiles(
            dequantize_kernel(width),
            arrays(DeviceLayout(dense, layout.scales[:, first_row:], layout.entries, offsets)),
            group_shift(layout.scales, in_features),
            weight.numpy(),
        )
        rows = min(weight.shape[1], out_features - first_row)
        y[:, first_row : first_row + rows] = x @ weight[:in_features, :rows].to(x.dtype)
    return y


def arrays(layout: DeviceLayout) -> tuple[np.ndarray, ...]:
    """A layout as the loops take it."""
    return tuple(tensor.numpy() for tensor in layout)
