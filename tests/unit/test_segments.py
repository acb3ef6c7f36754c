"""Segments of HPTQ blobs: any window of any matrix decodes from them, and damage is noticed while they are sought."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vllm_babai.cpu.entropy import decode
from vllm_babai.format import FormatError
from vllm_babai.format.entropy.hptq import encode_integers, read_blob
from vllm_babai.format.entropy.segments import MAX_LANES, SEGMENT_WEIGHTS, SegmentedMatrix, cut_segments, stack_segments
from vllm_babai.ops.coded import coded_tensors

COLUMNS = 2100  # three tiles side by side
COARSE, FINE = (
    torch.round(sigma * torch.randn(rows, COLUMNS, generator=torch.Generator().manual_seed(rows))).short()
    for rows, sigma in ((90, 60.0), (300, 1.5))
)
CODED = [read_blob(encode_integers(matrix, 0)) for matrix in (COARSE, FINE)]


def decoded(segments: SegmentedMatrix, columns: int) -> Tensor:
    rows = len(segments.row_class)
    tensors = coded_tensors(segments, torch.ones(rows, 1).bfloat16(), torch.device("cpu"))
    return decode(tensors, torch.empty(rows, columns, dtype=torch.int16))


def bounds(size: int) -> st.SearchStrategy[slice]:
    return st.tuples(st.integers(0, size - 1), st.integers(1, size)).map(lambda ends: slice(min(ends), max(ends) + 1))


@settings(deadline=None, max_examples=40)
@given(rows=bounds(len(FINE) - 1), columns=bounds(COLUMNS - 1))
def test_windows(rows: slice, columns: slice) -> None:
    segments = cut_segments(CODED[1], rows, columns)
    assert torch.equal(decoded(segments, columns.stop - columns.start), FINE[rows, columns])


@settings(deadline=None, max_examples=20)
@given(coarse=bounds(len(COARSE) - 1), fine=bounds(len(FINE) - 1), columns=bounds(COLUMNS - 1))
def test_matrices_of_different_codes_below_each_other(coarse: slice, fine: slice, columns: slice) -> None:
    windows = zip(CODED, (coarse, fine), strict=True)
    segments = stack_segments([cut_segments(coded, rows, columns) for coded, rows in windows])
    assert CODED[0].shape.lanes != CODED[1].shape.lanes
    assert CODED[0].model.shift != CODED[1].model.shift
    expected = torch.cat([COARSE[coarse, columns], FINE[fine, columns]])
    assert torch.equal(decoded(segments, columns.stop - columns.start), expected)


def test_segments_are_short_and_take_the_words_of_the_window_alone() -> None:
    coded = CODED[1]
    whole = cut_segments(coded, slice(0, len(FINE)), slice(0, COLUMNS))
    half = cut_segments(coded, slice(0, len(FINE) // 2), slice(0, COLUMNS))
    assert FINE.numel() / len(whole.segments) > SEGMENT_WEIGHTS / 2
    assert (whole.segments["rows"] * whole.segments["columns"]).max() <= SEGMENT_WEIGHTS
    assert whole.states.shape == (len(whole.segments), MAX_LANES)
    assert len(whole.words) < coded.ends[-1]
    assert abs(len(half.words) - len(whole.words) / 2) < 0.02 * len(whole.words)


def refused(**damage: np.ndarray) -> None:
    with pytest.raises(FormatError, match="damaged stream"):
        cut_segments(replace(CODED[1], **damage), slice(0, len(FINE)), slice(0, COLUMNS))


@pytest.mark.parametrize("position", [0.01, 0.5, 0.99])
def test_damaged_streams_are_refused(position: float) -> None:
    words = CODED[1].words.copy()
    words[int(position * CODED[1].ends[-1])] ^= 1
    refused(words=words)


@pytest.mark.parametrize("missing", [1, 100, 30_000])
def test_streams_that_end_early_are_refused(missing: int) -> None:
    refused(ends=np.append(CODED[1].ends[:-1], CODED[1].ends[-1] - missing))
