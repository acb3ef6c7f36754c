"""From the stored tensors of a linear layer to the integers and scales that this rank multiplies with.

One `Reader` per checkpoint format says which tensors a linear has and how a window is cut out of them.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vllm_babai.format import (
    BIT_WIDTHS,
    MOST_OVERFLOW,
    FormatError,
    LayerScheme,
    Overflow,
    decode_overflow,
    packed_bytes,
    read_header,
)
from vllm_babai.format.dense_sparse.ssqr import dense_crc
from vllm_babai.format.entropy.hptq import Coded, bands, decode_band, read_blob
from vllm_babai.format.entropy.segments import SegmentedMatrix, cut_segments, stack_segments
from vllm_babai.format.steps import column_factors
from vllm_babai.plugin.parameter import Part


class Window(NamedTuple):
    """Rows and columns of a stored linear that a rank takes."""

    rows: slice
    columns: slice


@dataclass(frozen=True)
class StoredLinear:
    """One linear as it lies in the checkpoint: its tensors by name, its size, and the windows that this rank takes."""

    tensors: dict[str, Tensor]
    shape: tuple[int, int]
    windows: list[Window]

    @property
    def taken_whole(self) -> bool:
        """Whether the windows cover the linear."""
        rows, columns = self.shape
        taken = sum(w.rows.stop - w.rows.start for w in self.windows)
        return taken == rows and all(w.columns == slice(0, columns) for w in self.windows)


@dataclass(frozen=True)
class RankWeight:
    """The part of a linear layer that a rank holds, dense + sparse.

    bits: of the dense part. qweight: uint8 [out, packed_bytes(in, bits)]. scales: bfloat16 [out, groups].
    overflow: of the same out × in. input_scales: bfloat16 [in], to multiply the inputs with, or None.
    """

    bits: int
    qweight: Tensor
    scales: Tensor
    overflow: Overflow
    input_scales: Tensor | None = None

    @classmethod
    def stack(cls, weights: Sequence["RankWeight"]) -> "RankWeight":
        """Put linears of the same bits below each other."""
        first_rows = accumulate((len(w.qweight) for w in weights), initial=0)
        overflow = Overflow(
            torch.cat([w.overflow.rows + first for w, first in zip(weights, first_rows, strict=False)]),
            torch.cat([w.overflow.columns for w in weights]),
            torch.cat([w.overflow.excess for w in weights]),
        )
        qweight, scales = torch.cat([w.qweight for w in weights]), torch.cat([w.scales for w in weights])
        return cls(weights[0].bits, qweight, scales, overflow)


@dataclass(frozen=True)
class CodedWindow:
    """A window of a linear whose streams are yet to be decoded. scales: bfloat16 [rows of the window, groups]."""

    coded: Coded
    window: Window
    scales: Tensor


@dataclass(frozen=True)
class CodedWeight:
    """The part of a linear layer that a rank holds, entropy coded.

    scales: bfloat16 [out, groups]. input_scales: bfloat16 [in], to multiply the inputs with, or None.
    """

    segments: SegmentedMatrix
    scales: Tensor
    input_scales: Tensor | None


@dataclass(frozen=True)
class Reader:
    """What the plugin has to know of one checkpoint format.

    tensors: dtype by name of those that a linear has. read(linear, scheme): a piece for each window, or FormatError.
    stack: puts pieces of the layer below each other, and makes of them what the rank holds, or FormatError.
    column_multiple(scheme): where columns are divided among ranks, each takes a multiple of this.
    """

    tensors: dict[str, torch.dtype]
    read: Callable[[StoredLinear, LayerScheme], list[Any]]
    stack: Callable[[list[Any]], Any]
    column_multiple: Callable[[LayerScheme], int]


def read_ssqr(linear: StoredLinear, scheme: LayerScheme) -> list[RankWeight]:
    """Check the tensors of an SSQR linear against the layer and each other, then cut the windows out of them."""
    qweight, scales, blob = (linear.tensors[name] for name in ("qweight", "scales", "overflow"))
    bits, (rows, columns) = _dense_bits(scheme), linear.shape
    header = read_header(blob)
    if (header.rows, header.columns, header.bits) != (rows, columns, bits):
        raise FormatError(
            f"the layer is {rows} × {columns} with {bits} bits, "
            f"but overflow is of {header.rows} × {header.columns} with {header.bits} bits"
        )
    _check_shape("qweight", qweight, (rows, packed_bytes(columns, bits)))
    _check_shape("scales", scales, (rows, scheme.groups(columns)))
    if linear.taken_whole and dense_crc(qweight, scales) != header.dense_crc:
        raise FormatError("qweight or scales are corrupt: their CRC does not match the one in overflow")
    weights = []
    for window in linear.windows:
        first, last = window.columns.start, window.columns.stop
        packed = slice(first * bits // 8, packed_bytes(last, bits))
        overflow = decode_overflow(blob, *window)
        scales_of_window = scales[window.rows, _groups(window, scheme)]
        weights.append(RankWeight(bits, qweight[window.rows, packed], scales_of_window, overflow))
    return weights


def ssqr_column_multiple(scheme: LayerScheme) -> int:
    """Columns that begin with a whole byte and a whole group."""
    whole_bytes = 8 // math.gcd(8, _dense_bits(scheme))
    return whole_bytes if scheme.group_size == -1 else math.lcm(whole_bytes, scheme.group_size)


def read_hptq(linear: StoredLinear, scheme: LayerScheme) -> list[CodedWindow]:
    """Check the tensors of an HPTQ linear against the layer and each other; its streams stay coded.

    The scales of the result are per row, those of one matrix can then be stacked with another's.
    """
    blob, scales = linear.tensors["codes"], linear.tensors["scales"]
    coded, (rows, columns) = read_blob(blob), linear.shape
    stored, groups = coded.shape, scheme.groups(columns)
    if (stored.rows, stored.columns) != (rows, columns):
        raise FormatError(f"the layer is {rows} × {columns}, but codes is of {stored.rows} × {stored.columns}")
    if scales.shape != (1, groups):
        _check_shape("scales", scales, (rows, groups))
    coded.check_scales(scales)
    by_row = scales.expand(rows, -1)
    return [CodedWindow(coded, window, by_row[window.rows, _groups(window, scheme)]) for window in linear.windows]


def hptq_column_multiple(scheme: LayerScheme) -> int:
    """Columns that begin with a whole group."""
    return max(1, scheme.group_size)


def pack_windows(parts: Sequence[CodedWindow]) -> RankWeight:
    """Linears below each other, dense + sparse with the fewest bits that leave little overflow. Raises FormatError."""
    from vllm_babai.format.dense_sparse.split import Band, split

    input_scales = common_input_scales(parts)
    columns = parts[0].window.columns
    every = [
        Band(rows.stop - rows.start, partial(decode_band, part.coded, rows, part.window.columns))
        for part in parts
        for rows in bands(part.coded, part.window.rows)
    ]
    bits, qweight, overflow = split(every, columns.stop - columns.start, MOST_OVERFLOW)
    return RankWeight(bits, qweight, torch.cat([part.scales for part in parts]), overflow, input_scales)


def segment_windows(parts: Sequence[CodedWindow]) -> CodedWeight:
    """Linears below each other, with the streams that they are stored in. Raises FormatError."""
    input_scales = common_input_scales(parts)
    segments = stack_segments([cut_segments(part.coded, *part.window) for part in parts])
    return CodedWeight(segments, torch.cat([part.scales for part in parts]), input_scales)


def common_input_scales(parts: Sequence[CodedWindow]) -> Tensor | None:
    """Factors of the columns, bfloat16 [in], or None.

    Raises FormatError when the columns of linears have other steps: the layer has one input to scale.
    """
    every = [None if part.coded.exponents is None else part.coded.exponents[part.window.columns] for part in parts]
    if len({None if exponents is None else exponents.numpy().tobytes() for exponents in every}) > 1:
        raise FormatError(
            "vLLM fuses them, but their columns have different steps; `babai convert --to dense` makes them servable"
        )
    return None if every[0] is None else column_factors(every[0])


HPTQ_TENSORS = {"codes": torch.uint8, "scales": torch.bfloat16}
READERS = {
    "ssqr": Reader(
        tensors={"qweight": torch.uint8, "scales": torch.bfloat16, "overflow": torch.uint8},
        read=read_ssqr,
        stack=RankWeight.stack,
        column_multiple=ssqr_column_multiple,
    ),
    "hptq": Reader(HPTQ_TENSORS, read=read_hptq, stack=pack_windows, column_multiple=hptq_column_multiple),
}
CODED_READERS = {
    "hptq": Reader(HPTQ_TENSORS, read=read_hptq, stack=segment_windows, column_multiple=hptq_column_multiple)
}


def read_layer(reader: Reader, parts: Mapping[str, list[Part]], sizes: Mapping[str, int], scheme: LayerScheme) -> Any:
    """What the reader makes of everything that a layer of one rank needs, from the parts that its parameters collected.

    parts: by tensor name. sizes: rows on this rank of each linear fused in the layer, by name, in order.
    Raises FormatError that names the linear for tensors that are missing, there twice, truncated or corrupt, or linears
    that do not go together.
    """
    for tensor_name, found in parts.items():
        _check_complete(tensor_name, found, sizes)
    by_tensor = [_group_by_tensor(found) for found in parts.values()]
    if len({len(groups) for groups in by_tensor}) > 1:
        raise FormatError(
            f"{', '.join(sizes)}: some of {', '.join(parts)} are fused in the checkpoint and some are not"
        )
    pieces: list[Any] = []
    for groups in zip(*by_tensor, strict=True):
        same_linear = groups[0]
        tensors = {name: group[0].tensor.cpu() for name, group in zip(parts, groups, strict=True)}
        shape = (sum(part.shape[0] for part in same_linear), same_linear[0].shape[1])
        linear = StoredLinear(tensors, shape, [Window(part.rows, part.columns) for part in same_linear])
        try:
            _check_dtypes(linear, reader)
            pieces += reader.read(linear, scheme)
        except FormatError as error:
            raise FormatError(f"{_linear_at(same_linear[0].destination, sizes)}: {error}") from error
    try:
        return reader.stack(pieces)
    except FormatError as error:
        raise FormatError(f"{', '.join(sizes)}: {error}") from error


def _check_complete(tensor_name: str, parts: list[Part], sizes: Mapping[str, int]) -> None:
    filled = 0
    for part in sorted(parts, key=lambda part: part.destination):
        if part.destination < filled:
            raise FormatError(f"{_linear_at(part.destination, sizes)}: the checkpoint has {tensor_name} twice")
        if part.destination > filled:
            break
        filled += part.rows.stop - part.rows.start
    if filled < sum(sizes.values()):
        raise FormatError(f"{_linear_at(filled, sizes)}: the checkpoint lacks {tensor_name}")


def _group_by_tensor(parts: list[Part]) -> list[list[Part]]:
    """Parts in the order of their rows; those cut from one stored tensor (linears fused on disk) together."""
    groups: dict[int, list[Part]] = {}
    for part in sorted(parts, key=lambda part: part.destination):
        groups.setdefault(id(part.tensor), []).append(part)
    return list(groups.values())


def _linear_at(row: int, sizes: Mapping[str, int]) -> str:
    """Name of the fused linear that holds this row of the layer."""
    last_rows = accumulate(sizes.values())
    return next(name for name, last in zip(sizes, last_rows, strict=True) if row < last)


def _dense_bits(scheme: LayerScheme) -> int:
    if scheme.bits not in BIT_WIDTHS:
        raise FormatError(f"bit width {scheme.bits} is unknown; this version reads {BIT_WIDTHS}")
    return scheme.bits


def _groups(window: Window, scheme: LayerScheme) -> slice:
    """Scales of a row that belong to the columns of a window."""
    if scheme.group_size == -1:
        return slice(1)
    return slice(scheme.groups(window.columns.start), scheme.groups(window.columns.stop))


def _check_shape(name: str, tensor: Tensor, shape: tuple[int, int]) -> None:
    if tensor.shape != shape:
        raise FormatError(f"{name} has shape {tuple(tensor.shape)}, but the layer needs {shape}")


def _check_dtypes(linear: StoredLinear, reader: Reader) -> None:
    for name, dtype in reader.tensors.items():
        if linear.tensors[name].dtype != dtype:
            raise FormatError(f"{name} has dtype {linear.tensors[name].dtype}, but the format needs {dtype}")
