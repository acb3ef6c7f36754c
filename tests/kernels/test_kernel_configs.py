"""Configuration tables, and the device layout's own checks. Nothing is launched."""

from pathlib import Path

import pytest
import torch

from vllm_babai.format import BIT_WIDTHS, FormatError, Overflow, pack, packed_bytes
from vllm_babai.triton_kernels import device_layout
from vllm_babai.triton_kernels.configs import BUCKETS, FOLDER, Config, Entry, Table, Target, bucket, table_for
from vllm_babai.triton_kernels.layout import MAX_M_TILES, Geometry

NOTHING = Overflow(*(torch.empty(0, dtype=torch.int32) for _ in range(3)))


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.json")), ids=lambda path: path.stem)
def test_shipped_tables_are_complete(path: Path) -> None:
    table = Table.read(path)
    assert 1 < table.dequantize_from <= MAX_M_TILES * BUCKETS[-1] + 1
    for bits in BIT_WIDTHS:
        for tokens in BUCKETS:
            assert table.lookup(bits, tokens, 100, 100).warps in (1, 2, 4, 8)


def test_blackwell_s_wide_tiles_of_odd_widths_stay_below_the_tensor_memory() -> None:
    """Triton 3.7.1 and 3.8 give every slot of a block sums of its own in tensor memory, which it has for 64 rows on.

    With 16 slots, as 3 and 5 bits have, these are 544 or 576 columns of 512 for 64 tokens, and 1056 for 128 rows: such
    a kernel is a trap. Tiles of fewer rows or warps use the older matrix instructions.
    """
    table = Table.read(FOLDER / "sm_100.json")
    for entry in table.entries:
        slots = Geometry(entry.bits, 4096, 4096).slots
        in_tensor_memory = entry.config.rows >= 64 and entry.config.warps >= 4
        columns = entry.config.rows // 64 * entry.tokens // 2 * slots + 64
        assert not in_tensor_memory or columns <= 512, f"{entry}: {columns} columns of tensor memory"


@pytest.mark.parametrize(
    ("architecture", "used"), [("sm_90", "sm_90"), ("sm_87", "sm_86"), ("sm_121", "sm_120"), ("sm_75", "sm_80")]
)
def test_unknown_gpus_take_the_next_older_architecture(architecture: str, used: str) -> None:
    target = Target("cuda", architecture, "Unheard-of GPU", 100)
    assert table_for(target) == Table.read(FOLDER / f"{used}.json")


def test_lookup_takes_the_nearest_shape(tmp_path: Path) -> None:
    small, large = Config(64, 2, 4, 8), Config(128, 4, 3, 2)
    entries = (Entry(4, 1, 1024, 1024, small), Entry(4, 1, 28672, 4096, large), Entry(4, 8, 28672, 4096, small))
    table = Table(257, entries)
    assert table.lookup(4, 1, 2048, 1024) == small
    assert table.lookup(4, 1, 14336, 4096) == large
    with pytest.raises(LookupError, match="2 bits and 1 tokens"):
        table.lookup(2, 1, 64, 64)
    odd = Entry(2, 1, 1024, 1024, large, grouped=small)
    table = Table(257, (*entries, odd))
    assert table.lookup(2, 1, 1024, 1024) == large
    assert table.lookup(2, 1, 1024, 1024, groups=8) == small
    assert table.lookup(4, 1, 28672, 4096, groups=8) == large.for_groups(8) != large
    table.write(tmp_path / "table.json")
    assert Table.read(tmp_path / "table.json") == table


def test_buckets() -> None:
    assert [bucket(m) for m in (1, 2, 8, 9, 64, 65, 300)] == [1, 8, 8, 16, 64, 64, 64]


def test_a_configuration_must_divide_the_padded_rows() -> None:
    with pytest.raises(ValueError, match="48 rows"):
        Config(48, 2, 2, 2)


def test_layout_errors() -> None:
    qweight, scales = pack(torch.zeros(4, 96, dtype=torch.int16), 4), torch.ones(4, 1).bfloat16()
    with pytest.raises(FormatError, match="does not hold rows"):
        device_layout(qweight[:, 1:], scales, NOTHING, 4, 96, "cpu")
    with pytest.raises(ValueError, match="scales are"):
        device_layout(qweight, scales[:3], NOTHING, 4, 96, "cpu")
    with pytest.raises(ValueError, match="multiple of 32"):
        device_layout(qweight, scales.expand(-1, 4), NOTHING, 4, 96, "cpu")
    with pytest.raises(ValueError, match="kernels for"):
        device_layout(qweight, scales, NOTHING, 6, 96, "cpu")
    outside = Overflow(*(torch.tensor([4], dtype=torch.int32) for _ in range(3)))
    with pytest.raises(FormatError, match="leaves the matrix"):
        device_layout(qweight, scales, outside, 4, 96, "cpu")


@pytest.mark.parametrize("bits", BIT_WIDTHS)
def test_layout_takes_the_bits_that_it_says(bits: int) -> None:
    """Exactly `bits` for a weight where the sizes are whole, 16 bits for an overflow entry, row starts aside."""
    rows, columns = 128, 1024
    low = -(1 << (bits - 1))
    qweight = pack(torch.full((rows, columns), low, dtype=torch.int16), bits)
    place = torch.arange(0, rows * columns, 97, dtype=torch.int32)
    overflow = Overflow(place // columns, place % columns, torch.full_like(place, -3))
    layout = device_layout(qweight, torch.ones(rows, 1).bfloat16(), overflow, bits, columns, "cpu")
    assert layout.dense.nbytes == rows * packed_bytes(columns, bits)
    assert layout.entries.nbytes == 2 * len(place)
    assert not layout.dense.any()  # fields hold z − low
