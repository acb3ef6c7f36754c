"""What the compiled loops of the entropy code are called with. Needs no numba, which takes NamedTuples as they are.

numba's cache on disk refers to these classes by module and name, and cannot be read when one has moved: keep them
importable from here.
"""

from typing import NamedTuple

import numpy as np

from vllm_babai.format.tiling import Tile

__all__ = ["Code", "Stream", "Tile", "padded"]


class Code(NamedTuple):
    """How integers become symbols and symbols become bits; one for a whole matrix.

    table: uint32, of `tables.encoder_table` [contexts, ESCAPE + 1] or of `tables.decoder_table` [contexts · TOTAL].
    offset: subtracted from every integer. shift: low bits that are stored as they are. lanes: rANS states of a tile.
    """

    table: np.ndarray
    offset: int
    shift: int
    lanes: int


class Stream(NamedTuple):
    """Words begin … end − 1 of `words`, uint16, which holds at least 2 · lanes more words after `end`."""

    words: np.ndarray
    begin: int
    end: int


def padded(words: np.ndarray, lanes: int) -> np.ndarray:
    """A writable copy of words, uint16, with the room at its end that a `Stream` needs."""
    return np.concatenate((words, np.zeros(2 * lanes, np.uint16)))
