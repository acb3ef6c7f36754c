"""The trellis form, which a rank holds as the checkpoint stores it: its tiles are cut out without decoding."""

from collections.abc import Sequence

import numpy as np

from vllm_babai.format import FormatError, Trellis
from vllm_babai.format.trellis.blob import read_trellis
from vllm_babai.format.trellis.code import TILE_COLUMNS, TILE_ROWS, root_mean_square
from vllm_babai.format.trellis.window import NO_ROW, TrellisWindow, cut_window, stack_windows
from vllm_babai.plugin.readers.reader import Reader, StoredLinear
from vllm_babai.plugin.residency import DUMMY_SCALE, TiledWeight

DUMMY_BITS = 6  # of a pair


class TrellisReader(Reader[TrellisWindow, TiledWeight]):
    """Reads the trellis form; a piece is a window of a linear."""

    form = Trellis
    residency = "tiled"

    @property
    def column_multiple(self) -> int:
        """Whole tiles."""
        return TILE_COLUMNS

    def read(self, linear: StoredLinear) -> list[TrellisWindow]:
        """See `Reader`."""
        weight = read_trellis(linear.tensors["trellis"], linear.shape, linear.name)
        return [cut_window(weight, window.rows, window.columns) for window in linear.windows]

    def stack(self, pieces: Sequence[TrellisWindow]) -> TiledWeight:
        """See `Reader`."""
        if len({piece.rates.shape[1] for piece in pieces}) > 1:
            raise FormatError("linears that vLLM fuses have different numbers of columns")
        return TiledWeight(stack_windows(pieces))

    def dummy(self, rows: int, columns: int) -> TiledWeight:
        """See `Reader`: random words, DUMMY_BITS a pair in every tile."""
        blocks, tiles = -(-rows // TILE_ROWS), -(-columns // TILE_COLUMNS)
        generator = np.random.default_rng(0)
        words = generator.integers(0, 1 << 32, blocks * tiles * DUMMY_BITS * TILE_ROWS, dtype=np.uint32)
        places = np.arange(blocks * TILE_ROWS, dtype=np.int32).reshape(blocks, TILE_ROWS)
        scale = np.float32(DUMMY_SCALE / root_mean_square())
        return TiledWeight(
            TrellisWindow(
                rows,
                np.full((blocks, tiles), DUMMY_BITS, np.uint8),
                words,
                np.zeros((blocks, TILE_ROWS), np.uint32),
                np.where(places < rows, places, NO_ROW).astype(np.int32),
                np.where(places < rows, scale, 0).astype(np.float32),
            )
        )
