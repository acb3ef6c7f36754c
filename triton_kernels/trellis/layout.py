"""The device layout of the trellis form: the file's words, and a list of the tiles by their bits, made once at load.

words: int32, see `ops.trellis.words_in_lines`.
starts: int32 [blocks, STARTS]: where the tiles of each number of bits begin in `tiles` (FEWEST_BITS first) and where
    the last ones end; then the first line of the block in `words`.
tiles: int32 [entries], of one block after the other, in a block sorted by bits: a tile's column in tiles, above
    LINE_BITS bits for its first line in the block's words. That line is the one before it, with the other part of its
    states. Every run of equal bits is a multiple of STEP long: after an odd tile it comes again, at the column beyond
    the last, where activations are zero.
places: int32 [blocks, TILE_ROWS]. scales: fp32 [blocks, TILE_ROWS]. As in the window.

A warp takes a block, or a share of its list. So all threads decode the same number of bits at the same time, in a loop
made for it that switches nothing, and two blocks whose tiles differ meet in no warp. The order of columns in a sum is
free; the list costs 32 bits a tile of 1024 weights, and four more for each run of odd length. Tiles in the order of
columns with a switch in the loop took 3.4 instructions a weight at 2 bits instead of 2.2.
"""

import numpy as np
import torch

from vllm_babai.format.trellis.code import FEWEST_BITS, MOST_BITS, TILE_COLUMNS
from vllm_babai.format.trellis.window import TrellisWindow
from vllm_babai.ops.trellis import TrellisTensors, words_in_lines
from vllm_babai.triton_kernels.trellis.arguments import LINE_BITS, STEP

MOST_TILES = 1 << (31 - LINE_BITS)  # in a row, the one of zeros included; their lines fit LINE_BITS


def trellis_layout(window: TrellisWindow, device: torch.device) -> TrellisTensors:
    """Arrange a window for the kernels. Raises ValueError for more columns than an entry can name."""
    tiles = window.rates.shape[1]
    if tiles >= MOST_TILES:
        raise ValueError(f"{tiles} tiles in a row of the trellis form; the kernels take fewer than {MOST_TILES}")
    entries, runs = _sorted_tiles(window.rates)
    lines, firsts = words_in_lines(window)
    starts = np.column_stack([runs, firsts])
    return TrellisTensors(
        torch.from_numpy(lines.reshape(-1)).to(device),
        torch.from_numpy(starts.astype(np.int32)).to(device),
        torch.from_numpy(entries).to(device),
        torch.from_numpy(window.places).to(device),
        torch.from_numpy(window.scales).to(device),
        window.rows,
        tiles * TILE_COLUMNS,
    )


def _sorted_tiles(rates: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Entries of all blocks, int32; where each run of equal bits begins and the last one ends, [blocks, runs + 1]."""
    tiles = rates.shape[1]
    bits = rates.astype(np.int64)
    lines = np.cumsum(bits, 1) - bits
    counts = np.stack([(bits == width).sum(1) for width in range(FEWEST_BITS, MOST_BITS + 1)], 1)
    padded = -(-counts // STEP) * STEP
    ends = np.cumsum(padded.reshape(-1)).reshape(padded.shape)
    begins = ends - padded

    order = np.argsort(bits, 1, kind="stable")
    column, line = order, np.take_along_axis(lines, order, 1)
    run = np.take_along_axis(bits, order, 1) - FEWEST_BITS
    within = np.arange(tiles) - np.take_along_axis(np.cumsum(counts, 1) - counts, run, 1)
    position = np.take_along_axis(begins, run, 1) + within
    entries = np.zeros(ends[-1, -1], np.int64)
    entries[position] = column << LINE_BITS | line
    odd = padded > counts
    entries[ends[odd] - 1] = tiles << LINE_BITS | entries[ends[odd] - 2] & ((1 << LINE_BITS) - 1)
    return entries.astype(np.int32), np.column_stack([begins, ends[:, -1]])
