"""HPTQ → dense + sparse, decoded once at load, or → segments that stay entropy coded."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from vllm_babai.format import HPTQ, MOST_OVERFLOW, FormatError, LatticeWeight, column_factors
from vllm_babai.format.entropy.hptq import Coded, bands, decode_band, read_blob
from vllm_babai.format.entropy.segments import cut_segments, stack_segments
from vllm_babai.plugin.readers.reader import Reader, StoredLinear, Weight, Window, check_shape
from vllm_babai.plugin.residency import DUMMY_SCALE, CodedWeight, PackedWeight

DUMMY_BITS = 4
DUMMY_SPREAD = 2.0  # of Gaussian integers, whose entropy is then 3.05 bits


@dataclass(frozen=True)
class CodedWindow:
    """A window of a linear whose streams are still coded. scales: bfloat16 [rows of the window, groups]."""

    coded: Coded
    window: Window
    scales: Tensor


class HPTQReader(Reader[CodedWindow, Weight]):
    """Reads HPTQ; a piece is a window of a blob that was checked and not yet decoded."""

    form = HPTQ

    @property
    def column_multiple(self) -> int:
        """Columns that begin with a whole group."""
        return max(1, self.scheme.group_size)

    def read(self, linear: StoredLinear) -> list[CodedWindow]:
        """See `Reader`. Scales become those of rows, so that one matrix can be stacked with another."""
        blob, scales = linear.tensors["codes"], linear.tensors["scales"]
        rows, columns = linear.shape
        coded, groups = read_blob(blob, linear.shape, linear.name), self.scheme.groups(columns)
        if scales.shape != (1, groups):
            check_shape("scales", scales, (rows, groups))
        coded.check_scales(scales)
        by_row = scales.expand(rows, -1)
        return [CodedWindow(coded, window, by_row[window.rows, self.groups(window)]) for window in linear.windows]


class HPTQPackedReader(HPTQReader[PackedWeight]):
    """Decodes to dense + sparse, of the fewest bits that leave little overflow."""

    residency = "packed"

    def dummy(self, rows: int, columns: int) -> PackedWeight:
        """See `Reader`. The configuration does not tell the rate; that of about 3 bits takes DUMMY_BITS in memory."""
        return PackedWeight.dummy(DUMMY_BITS, rows, columns, self.scheme.groups(columns))

    def stack(self, pieces: Sequence[CodedWindow]) -> PackedWeight:
        """See `Reader`: all pieces share one bit width."""
        from vllm_babai.format.dense_sparse.split import Band, split

        input_scales = _common_input_scales(pieces)
        columns = pieces[0].window.columns
        every = [
            Band(rows.stop - rows.start, partial(decode_band, piece.coded, rows, piece.window.columns))
            for piece in pieces
            for rows in bands(piece.coded, piece.window.rows)
        ]
        bits, qweight, overflow = split(every, columns.stop - columns.start, MOST_OVERFLOW)
        return PackedWeight(bits, qweight, torch.cat([piece.scales for piece in pieces]), overflow, input_scales)


class HPTQCodedReader(HPTQReader[CodedWeight]):
    """Keeps the streams that the checkpoint stores, cut in segments."""

    residency = "coded"

    def dummy(self, rows: int, columns: int) -> CodedWeight:
        """See `Reader`: of about 3 bits, in one linear."""
        integers = torch.randn(rows, columns).mul_(DUMMY_SPREAD).round_().short()
        scales = torch.full((1, self.scheme.groups(columns)), DUMMY_SCALE, dtype=torch.bfloat16)
        stored = HPTQ.encode(LatticeWeight(integers, scales))
        whole = Window(slice(0, rows), slice(0, columns))
        return self.stack(self.read(StoredLinear(stored.tensors(), (rows, columns), [whole])))

    def stack(self, pieces: Sequence[CodedWindow]) -> CodedWeight:
        """See `Reader`."""
        input_scales = _common_input_scales(pieces)
        matrix = stack_segments([cut_segments(piece.coded, *piece.window) for piece in pieces])
        return CodedWeight(matrix, torch.cat([piece.scales for piece in pieces]), input_scales)


def _common_input_scales(pieces: Sequence[CodedWindow]) -> Tensor | None:
    """Factors of the columns, bfloat16 [in], or None.

    Raises FormatError for linears whose columns have different steps: the layer has one input to scale.
    """
    every = [None if piece.coded.exponents is None else piece.coded.exponents[piece.window.columns] for piece in pieces]
    if len({None if exponents is None else exponents.numpy().tobytes() for exponents in every}) > 1:
        raise FormatError(
            "vLLM fuses them, but their columns have different steps; `babai convert --to dense` makes them servable"
        )
    return None if every[0] is None else column_factors(every[0])
