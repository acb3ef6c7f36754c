"""What is refused before it is believed: damage in what a rank takes, tensors of another linear, size bombs."""

import struct
import time
import tracemalloc
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vllm_babai.format import HPTQ, SSQR, FormatError, LatticeWeight, LayerScheme
from vllm_babai.format.checks import name_crc
from vllm_babai.format.dense_sparse import overflow
from vllm_babai.format.entropy import hptq
from vllm_babai.plugin.readers.reader import StoredLinear, Window
from vllm_babai.plugin.readers.ssqr import SSQRReader

ROWS, COLUMNS = 300, 2560  # 3 × 3 tiles
NAME, OTHER = "model.layers.3.mlp.up_proj", "model.layers.3.mlp.gate_proj"
NUMBERS = st.sampled_from([0, 1, 2, 31, 32, 33, 127, 255, 1000, 2**15, 2**16 - 1, 2**24, 2**31, 2**32 - 1])
MOST_SECONDS, MOST_BYTES = 2.0, 16 << 20  # a refusal, or the decoding of a blob of a few kilobytes


def point(rows: int = ROWS, columns: int = COLUMNS, groups: int = 1) -> LatticeWeight:
    generator = torch.Generator().manual_seed(0)
    integers = (4 * torch.randn(rows, columns, generator=generator)).round().short()
    return LatticeWeight(integers, (torch.rand(rows, groups, generator=generator) + 0.5).bfloat16())


STORED = {groups: SSQR.encode(point(groups=groups), 3, NAME) for groups in (1, 20)}


def windows(ranks: int, by: str) -> list[Window]:
    """What each of several ranks takes."""
    if by == "rows":
        size = ROWS // ranks
        return [Window(slice(rank * size, (rank + 1) * size), slice(0, COLUMNS)) for rank in range(ranks)]
    size = COLUMNS // ranks
    return [Window(slice(0, ROWS), slice(rank * size, (rank + 1) * size)) for rank in range(ranks)]


def read(stored: SSQR, window: Window, group_size: int = -1, name: str = NAME) -> None:
    reader = SSQRReader(LayerScheme(3, group_size))
    reader.read(StoredLinear(stored.tensors(), (ROWS, COLUMNS), [window], name))


@settings(deadline=None, max_examples=60)
@given(
    data=st.data(),
    by=st.sampled_from(["rows", "columns"]),
    ranks=st.sampled_from([1, 2, 4, 5]),
    groups=st.sampled_from([1, 20]),
)
def test_every_rank_notices_damage_in_what_it_takes(data: st.DataObject, by: str, ranks: int, groups: int) -> None:
    window = data.draw(st.sampled_from(windows(ranks, by)))
    row = data.draw(st.integers(window.rows.start, window.rows.stop - 1), "row")
    column = data.draw(st.integers(window.columns.start, window.columns.stop - 1), "column")
    group_size = -1 if groups == 1 else COLUMNS // groups
    read(STORED[groups], window, group_size)
    for name, place in (("qweight", column * 3 // 8), ("scales", 2 * (column * groups // COLUMNS))):
        damaged = getattr(STORED[groups], name).clone()
        damaged.view(torch.uint8)[row, place] ^= 1 << data.draw(st.integers(0, 7), "bit")
        with pytest.raises(FormatError, match="qweight or scales are corrupt: their CRC"):
            read(replace(STORED[groups], **{name: damaged}), window, group_size)


@pytest.mark.parametrize("by", ["rows", "columns"])
def test_no_rank_takes_the_dense_part_of_another_linear(by: str) -> None:
    other = SSQR.encode(replace(point(), integers=point().integers.flip(0)), 3, NAME)
    for window in windows(2, by):
        for name in ("qweight", "scales"):
            tensor = getattr(other, name) if name == "qweight" else other.scales.flip(0)
            with pytest.raises(FormatError, match="qweight or scales are corrupt"):
                read(replace(STORED[1], **{name: tensor}), window)


def test_checks_of_tiles_cost_next_to_nothing() -> None:
    whole, large = ROWS * COLUMNS, 4096 * 4096
    assert 32 * overflow.tiling(ROWS, COLUMNS).count / whole < 0.001
    assert 32 * overflow.tiling(4096, 4096).count / large < 0.00025
    assert 32 * overflow.tiling(256, 256).count / 256**2 < 0.001


@pytest.mark.parametrize("form", [SSQR, HPTQ])
def test_swapped_linears_are_refused(form: type[SSQR] | type[HPTQ]) -> None:
    stored = form.encode(point(40, 64), 4, NAME)
    stored.decode(linear=NAME)
    stored.decode()
    stored.decode(linear="language_model." + NAME)
    form.encode(point(40, 64), 4).decode(linear=OTHER)
    for other in (OTHER, NAME.replace("3", "4"), "lm_head"):
        with pytest.raises(FormatError, match="belongs to another linear"):
            stored.decode(linear=other)


@pytest.mark.parametrize("by", ["rows", "columns"])
def test_every_rank_refuses_another_linear(by: str) -> None:
    for window in windows(2, by):
        with pytest.raises(FormatError, match="overflow belongs to another linear"):
            read(STORED[1], window, name=OTHER)


def test_names() -> None:
    assert name_crc("") == 0
    assert name_crc("lm_head") == name_crc("language_model.lm_head") == zlib.crc32(b"lm_head")
    assert name_crc("model.layers.12.mlp.experts.3.up_proj") == zlib.crc32(b"12.mlp.experts.3.up_proj")


def as_version_2(stored: SSQR) -> SSQR:
    """The same linear as it was stored before tiles had CRCs."""
    raw = stored.overflow.numpy().tobytes()
    fields = list(overflow.HEADER.unpack_from(raw))
    tables = fields[3] + fields[4]
    count = overflow.tiling(*fields[7:9]).count
    body = raw[overflow.HEADER.size :]
    body = body[:tables] + body[tables + 4 * count :]
    dense = stored.qweight.numpy().tobytes() + stored.scales.view(torch.uint8).numpy().tobytes()
    fields[1], fields[10], fields[11] = 2, zlib.crc32(dense), 0
    fields[11] = zlib.crc32(body, zlib.crc32(overflow.HEADER.pack(*fields)))
    return replace(
        stored, overflow=torch.frombuffer(bytearray(overflow.HEADER.pack(*fields) + body), dtype=torch.uint8)
    )


def test_version_2_is_read_and_checked_where_it_is_taken_whole() -> None:
    old = as_version_2(STORED[1])
    assert torch.equal(old.decode(linear=OTHER).integers, point().integers)
    for window in (*windows(1, "rows"), *windows(2, "rows"), *windows(2, "columns")):
        read(old, window)
    damaged = old.scales.clone()
    damaged[7] *= 2
    for check in (
        replace(old, scales=damaged).decode,
        lambda: read(replace(old, scales=damaged), windows(1, "rows")[0]),
    ):
        with pytest.raises(FormatError, match="qweight or scales are corrupt: their CRC"):
            check()


@pytest.mark.parametrize("bad", [0.0, -0.0, float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("form", [SSQR, HPTQ])
def test_scales_that_are_none_are_refused(form: type[SSQR] | type[HPTQ], bad: float) -> None:
    weight = point(40, 64)
    weight.scales[11] = bad
    with pytest.raises(FormatError, match="scales are corrupt: some are 0 or not finite"):
        form.encode(weight, 4).decode()


@pytest.mark.parametrize("form", [SSQR, HPTQ])
def test_scales_may_have_a_sign(form: type[SSQR] | type[HPTQ]) -> None:
    weight = point(40, 64)
    weight.scales[11] = -0.5
    assert torch.equal(form.encode(weight, 4).decode().scales, weight.scales)


@contextmanager
def little() -> Iterator[None]:
    """Assert that what is done takes little time and memory."""
    started = time.process_time()
    tracemalloc.start()
    try:
        yield
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert time.process_time() - started < MOST_SECONDS
    assert peak < MOST_BYTES


def signed(header: struct.Struct, fields: list[int | bytes], body: bytes) -> Tensor:
    """A blob with a right CRC, which is the last field."""
    crc = zlib.crc32(body, zlib.crc32(header.pack(*fields[:-1], 0)))
    return torch.frombuffer(bytearray(header.pack(*fields[:-1], crc) + body), dtype=torch.uint8)


BLOBS = {
    "overflow": (overflow.HEADER, SSQR.encode(point(40, 64), 4).overflow.numpy().tobytes()),
    "codes": (hptq.HEADER, HPTQ.encode(point(40, 64)).codes.numpy().tobytes()),
}
LIMITS = {  # of the fields after the magic bytes, exclusive
    "overflow": [2**8] * 4 + [2**16] * 2 + [2**32] * 5,
    "codes": [2**8] * 5 + [2**32] * 2 + [2**16] * 2 + [2**15] + [2**32] * 3,
}
CODECS = {
    "overflow": lambda blob, shape: replace(SSQR.encode(point(40, 64), 4), overflow=blob).decode(shape),
    "codes": lambda blob, shape: HPTQ(blob, point(40, 64).scales).decode(shape),
}


@settings(deadline=None, max_examples=300)
@given(
    kind=st.sampled_from(sorted(BLOBS)),
    data=st.data(),
    shape=st.sampled_from([None, (40, 64)]),
    kept=st.sampled_from([0, 16, 200, None]),
)
def test_headers_of_any_numbers_take_little(
    kind: str, data: st.DataObject, shape: tuple[int, int] | None, kept: int | None
) -> None:
    header, raw = BLOBS[kind]
    fields: list[int | bytes] = list(header.unpack_from(raw))
    for index in data.draw(st.sets(st.integers(2, len(fields) - 2), min_size=1, max_size=4), "fields"):
        fields[index] = data.draw(NUMBERS, str(index)) % LIMITS[kind][index - 1]
    with little(), suppress(FormatError):
        CODECS[kind](signed(header, fields, raw[header.size :][:kept]), shape)


def test_a_matrix_without_rows_takes_little() -> None:
    header, raw = BLOBS["codes"]
    fields: list[int | bytes] = list(header.unpack_from(raw))
    fields[6:8] = 0, 2**24
    with little(), pytest.raises(FormatError, match="no encoder writes"):
        CODECS["codes"](signed(header, fields, raw[header.size :]), None)


@pytest.mark.parametrize("rows", [40, 2**24, 2**32 - 1])
@pytest.mark.parametrize("columns", [64, 2**24, 2**32 - 1])
@pytest.mark.parametrize("tile", [(1, 1), (128, 64), (2**15, 1), (2**16 - 1, 2**16 - 1)])
@pytest.mark.parametrize("kind", sorted(BLOBS))
def test_blobs_of_48_bytes_are_refused(kind: str, tile: tuple[int, int], columns: int, rows: int) -> None:
    if kind == "overflow":
        fields = [b"BBOV", 3, 4, 1, 1, *tile, rows, columns, 2**32 - 1, 0, 0]
    else:
        fields = [b"BBHQ", 2, 0, 1, 1, 1, rows, columns, *tile, 0, 0, 0, 0]
    header = BLOBS[kind][0]
    with little(), pytest.raises(FormatError):
        CODECS[kind](signed(header, fields, bytes(48 - header.size)), None)


@pytest.mark.parametrize("kind", sorted(BLOBS))
def test_the_expected_shape_is_checked_before_the_body(kind: str) -> None:
    header, raw = BLOBS[kind]
    blob = signed(header, list(header.unpack_from(raw)), b"")
    with pytest.raises(FormatError, match=f"the layer is 41 × 64, but {kind} is of 40 × 64"):
        CODECS[kind](blob, (41, 64))
