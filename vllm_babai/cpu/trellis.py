"""CPU backend of `babai::trellis_matmul`.

Few tokens: a kernel for every number of bits decodes a tile, a row to a vector lane, and multiplies it with up to
MOST_TOKENS tokens. Many: some blocks at a time are decoded to a dense matrix in the cache, for PyTorch's matmul.

A pair of columns takes two shifts, or, multiply, and; then two conversions from fp16 and, for each token, two
multiplications with addition give 16 rows of both columns, which are added at the end.
"""

from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import NamedTuple

import numba
import numpy as np
import torch
from llvmlite import ir
from numba import prange
from torch import Tensor

from vllm_babai.compiled import compiled
from vllm_babai.cpu.ir import F32x16, I32x16, compile_function, fma, new_function, offset
from vllm_babai.cpu.loops import _call
from vllm_babai.format.trellis.code import MASK, MOST_BITS, MULTIPLIERS, TILE_COLUMNS, TILE_ROWS
from vllm_babai.format.trellis.window import TrellisWindow
from vllm_babai.llvm import I16, I64, constant, load, splat, store
from vllm_babai.ops.trellis import TrellisTensors, check_sizes, words_in_lines

MOST_TOKENS = 4  # in one pass of a tile's kernel: their 8 sums, and what decodes, fit in AVX-512's vector registers
DECODE_TOKENS = 16  # from here on, a dense matrix is decoded and multiplied
DECODED_BLOCKS = 16  # at a time: 256 rows of 4096 columns are 4 MiB
WORD_BYTES = 4 * TILE_ROWS
F16x16, F16x32 = ir.VectorType(ir.HalfType(), 16), ir.VectorType(ir.HalfType(), 32)
I16x16, I64x8 = ir.VectorType(I16, 16), ir.VectorType(I64, 8)


class MultiplyArguments(NamedTuple):
    """Of the function that `_multiply_module` makes."""

    words: ir.Value
    before: ir.Value
    x: ir.Value
    x_stride: ir.Value
    sums: ir.Value


class DecodeArguments(NamedTuple):
    """Of the function that `_decode_module` makes."""

    words: ir.Value
    before: ir.Value
    scales: ir.Value
    weight: ir.Value
    stride: ir.Value


@cache
def multiply_kernel(bits: int, tokens: int) -> int:
    """Address of the kernel that multiplies a tile of so many bits a pair with so many tokens."""
    return compile_function(_multiply_module(bits, tokens))


@cache
def decode_kernel(bits: int) -> int:
    """Address of the kernel that decodes a tile."""
    return compile_function(_decode_module(bits))


def _multiply_module(bits: int, tokens: int) -> ir.Module:
    """multiply(words, before, x, x_stride, sums): sums[token, row, parity] += Σ x[token, column] · value[row, column].

    The columns of a sum are the even ones or the odd ones. x: float32, from the tile's first column on; its stride is
    in bytes. before: the word before the tile of every row.
    """
    builder, args = new_function(f"trellis_multiply_{bits}_{tokens}", MultiplyArguments)
    rows_of_x = [builder.add(args.x, builder.mul(args.x_stride, I64(token))) for token in range(tokens)]
    chains = 2 if tokens == 1 else 1  # an addition waits for the one before it
    totals = [[constant(F32x16, 0.0)] * (2 * chains) for _ in range(tokens)]
    for pair, word in _pairs(builder, args.words, args.before, bits):
        values = _both_columns(builder, word)
        for token, row in enumerate(rows_of_x):
            both = splat(builder, load(builder, offset(builder, row, 8 * pair), I64), I64x8)
            activations = builder.bitcast(both, F32x16)
            for half, value in enumerate(values):
                total = 2 * (pair % chains) + half
                totals[token][total] = fma(builder, value, activations, totals[token][total])
    for token, found in enumerate(totals):
        for half in range(2):
            address = offset(builder, args.sums, 2 * WORD_BYTES * token + WORD_BYTES * half)
            total = found[half] if chains == 1 else builder.fadd(found[half], found[2 + half])
            store(builder, builder.fadd(total, load(builder, address, F32x16)), address)
    builder.ret_void()
    return builder.module


def _decode_module(bits: int) -> ir.Module:
    """decode(words, before, scales, weight, stride): weight[column, row] = scale · value, float32; stride in bytes."""
    builder, args = new_function(f"trellis_decode_{bits}", DecodeArguments)
    scale = load(builder, args.scales, F32x16)
    for pair, word in _pairs(builder, args.words, args.before, bits):
        for column in range(2):
            address = builder.add(args.weight, builder.mul(args.stride, I64(2 * pair + column)))
            store(builder, builder.fmul(_one_column(builder, word, column), scale), address)
    builder.ret_void()
    return builder.module


def _pairs(builder: ir.IRBuilder, words: ir.Value, before: ir.Value, bits: int) -> Iterator[tuple[int, ir.Value]]:
    """Pair and word of two fp16 patterns, int32 of 16 rows, for every pair of a tile, one after the other."""
    stream = [load(builder, before, I32x16)]
    stream += [load(builder, offset(builder, words, WORD_BYTES * word), I32x16) for word in range(bits)]
    for pair in range(TILE_COLUMNS // 2):
        word, shift = divmod((pair + 1) * bits, 32)
        state = stream[word]
        if shift:
            upper = builder.shl(state, constant(I32x16, shift))
            state = builder.or_(upper, builder.lshr(stream[word + 1], constant(I32x16, 32 - shift)))
        scrambled = builder.mul(state, constant(I32x16, int(MULTIPLIERS[bits])))
        yield pair, builder.and_(scrambled, constant(I32x16, MASK))


def _both_columns(builder: ir.IRBuilder, word: ir.Value) -> list[ir.Value]:
    """Values of both columns side by side, float32: of rows 0 to 7, then of rows 8 to 15."""
    patterns = builder.bitcast(word, F16x32)
    halves = []
    for first in (0, TILE_ROWS):
        lanes = ir.Constant(I32x16, list(range(first, first + TILE_ROWS)))
        own = builder.shuffle_vector(patterns, ir.Constant(F16x32, ir.Undefined), lanes)
        halves.append(builder.fpext(own, F32x16))
    return halves


def _one_column(builder: ir.IRBuilder, word: ir.Value, column: int) -> ir.Value:
    """Values of the even column or the odd one, float32 of 16 rows."""
    pattern = builder.trunc(builder.lshr(word, constant(I32x16, 16 * column)), I16x16)
    return builder.fpext(builder.bitcast(pattern, F16x16), F32x16)


def trellis_layout(window: TrellisWindow, device: torch.device) -> TrellisTensors:
    """See `ops.backends.Backend`. starts: int32 [blocks], first lines. tiles: uint8 [blocks, tiles], as stored."""
    lines, firsts = words_in_lines(window)
    return TrellisTensors(
        torch.from_numpy(lines.reshape(-1)).to(device),
        torch.from_numpy(firsts.astype(np.int32)).to(device),
        torch.from_numpy(window.rates).to(device),
        torch.from_numpy(window.places).to(device),
        torch.from_numpy(window.scales).to(device),
        window.rows,
        window.rates.shape[1] * TILE_COLUMNS,
    )


def multiply_trellis(x: Tensor, trellis: TrellisTensors) -> Tensor:
    """x [..., in] in bfloat16, float16 or float32 → x Wᵀ [..., out] in the same; see `ops.backends.Backend`.

    Raises ValueError when the tensors do not fit each other, or x.
    """
    check_sizes(x, trellis, tiles=(len(trellis.starts), trellis.columns // TILE_COLUMNS))
    numba.set_num_threads(min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS))
    tokens = x.reshape(-1, x.shape[-1])
    multiply = _multiply_decoded if len(tokens) >= DECODE_TOKENS else _multiply_tiles
    return multiply(tokens, trellis).view(*x.shape[:-1], trellis.out_features)


def warm_up_trellis(trellis: TrellisTensors, in_features: int, dtype: torch.dtype) -> None:
    """See `ops.backends.Backend`: compiles the kernels of the rates that this layer has."""
    for tokens in (*range(1, MOST_TOKENS + 1), DECODE_TOKENS):
        multiply_trellis(torch.zeros(tokens, in_features, dtype=dtype), trellis)


def _kernels(rates: np.ndarray, address: Callable[[int], int]) -> np.ndarray:
    """Addresses by the bits of a pair, int64; 0 for bits that no tile has."""
    found = np.zeros(MOST_BITS + 1, np.int64)
    for bits in np.flatnonzero(np.bincount(rates.reshape(-1), minlength=MOST_BITS + 1)):
        found[bits] = address(int(bits))
    return found


def _multiply_tiles(x: Tensor, trellis: TrellisTensors) -> Tensor:
    words, starts, rates, places, scales = (tensor.numpy() for tensor in trellis.tensors)
    padded = np.zeros((len(x), rates.shape[1] * TILE_COLUMNS), np.float32)
    padded[:, : x.shape[1]] = x.float().numpy()
    y = torch.empty(len(x), trellis.out_features)
    for first in range(0, len(x), MOST_TOKENS):
        some = padded[first : first + MOST_TOKENS]
        kernels = _kernels(rates, partial(multiply_kernel, tokens=len(some)))
        run_tiles(kernels, some, words, starts, rates, places, scales, y[first : first + MOST_TOKENS].numpy())
    return y.to(x.dtype)


def _multiply_decoded(x: Tensor, trellis: TrellisTensors) -> Tensor:
    words, starts, rates, _, scales = (tensor.numpy() for tensor in trellis.tensors)
    kernels = _kernels(rates, decode_kernel)
    y = x.new_empty(len(x), trellis.out_features)
    for first in range(0, len(rates), DECODED_BLOCKS):
        some = slice(first, first + DECODED_BLOCKS)
        weight = torch.empty(rates.shape[1] * TILE_COLUMNS, len(rates[some]) * TILE_ROWS)
        decode_tiles(kernels, words, starts[some], rates[some], scales[some], weight.numpy())
        own = trellis.places[some].reshape(-1).long()
        y[:, own[own >= 0]] = (x @ weight[: x.shape[1]].to(x.dtype))[:, own >= 0]
    return y


@partial(compiled, parallel=True)
def run_tiles(kernels, x, words, starts, rates, places, scales, y):
    """y[token, row] = x Wᵀ for up to MOST_TOKENS tokens. x: float32 [tokens, tiles · TILE_COLUMNS]."""
    tokens, tiles = len(x), rates.shape[1]
    for block in prange(len(rates)):
        sums = np.zeros((tokens, TILE_ROWS, 2), np.float32)
        words_at = np.int64(words.ctypes.data) + WORD_BYTES * (np.int64(starts[block]) + 1)
        for tile in range(tiles):
            x_at = np.int64(x.ctypes.data) + 4 * TILE_COLUMNS * tile
            _call(kernels[rates[block, tile]], (words_at, words_at - WORD_BYTES, x_at, x.strides[0], sums.ctypes.data))
            words_at += WORD_BYTES * np.int64(rates[block, tile])
        for row in range(TILE_ROWS):
            place = places[block, row]
            if place >= 0:
                for token in range(tokens):
                    y[token, place] = (sums[token, row, 0] + sums[token, row, 1]) * scales[block, row]


@partial(compiled, parallel=True)
def decode_tiles(kernels, words, starts, rates, scales, weight):
    """weight[column, place] = scale · value, float32 [tiles · TILE_COLUMNS, blocks · TILE_ROWS], of some blocks."""
    for block in prange(len(rates)):
        words_at = np.int64(words.ctypes.data) + WORD_BYTES * (np.int64(starts[block]) + 1)
        weight_at = np.int64(weight.ctypes.data) + WORD_BYTES * block
        for tile in range(rates.shape[1]):
            column_at = weight_at + TILE_COLUMNS * tile * weight.strides[0]
            arguments = (words_at, words_at - WORD_BYTES, scales[block].ctypes.data, column_at, weight.strides[0])
            _call(kernels[rates[block, tile]], arguments)
            words_at += WORD_BYTES * np.int64(rates[block, tile])
