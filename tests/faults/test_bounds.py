"""The compiled loops of the formats: no blob, however crafted, makes them leave an array.

Bodies are changed at any place and signed anew, so that the loops meet what a checksum keeps from them. numba's bounds
checks are in code that is compiled with them, so a process of its own runs these tests again, with loops compiled anew:
an access out of bounds is then an IndexError, which nothing here expects. The vector instructions of HPTQ's decoder
have no such checks; their words end where a page begins that cannot be read.
"""

import ctypes
import mmap
import os
import random
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba
import numpy as np
import pytest
import torch

from vllm_babai.compiled import compiled
from vllm_babai.errors import FormatError
from vllm_babai.format import HPTQ, SSQR, LatticeWeight
from vllm_babai.format.dense_sparse import overflow
from vllm_babai.format.entropy import code, hptq, vectors
from vllm_babai.format.trellis import blob as trellis

UNIT = Path(__file__).parents[1] / "unit"
FORMATS = ("format_checks", "format_overflow", "format_ssqr", "format_trellis", "hptq")  # tests that decode
BODIES = 60  # of each kind; in the long run ten times as many
UNREADABLE = 0  # PROT_NONE, for which Python has no name


def point(rows: int, columns: int) -> LatticeWeight:
    generator = torch.Generator().manual_seed(0)
    integers = (4 * torch.randn(rows, columns, generator=generator)).round().short()
    return LatticeWeight(integers, torch.ones(rows, 1).bfloat16())


def make_trellis() -> torch.Tensor:
    """A linear of two tiles of each rate."""
    chance = np.random.default_rng(0)
    rates = np.arange(2, 10, dtype=np.uint8).reshape(4, 2)
    words = chance.integers(0, 1 << 32, 16 * int(rates.sum()), np.uint32)
    order, exponents = np.arange(64), np.arange(64, dtype=np.uint8)
    return trellis.Trellis.encode(trellis.TrellisWeight((64, 128), rates, order, 1.0, exponents, words)).trellis


def decode_codes(blob: torch.Tensor) -> object:
    """The integers of an HPTQ blob."""
    return hptq.decode_integers(hptq.read_blob(blob))


Make, Decode = Callable[[], torch.Tensor], Callable[[torch.Tensor], object]
BLOBS: dict[str, tuple[Make, Any, Decode]] = {
    "overflow": (lambda: SSQR.encode(point(150, 64), 3).overflow, overflow.HEADER, overflow.decode_overflow),
    "one lane": (lambda: HPTQ.encode(point(40, 64)).codes, hptq.HEADER, decode_codes),
    "32 lanes": (lambda: HPTQ.encode(point(256, 2048)).codes, hptq.HEADER, decode_codes),
    "trellis": (make_trellis, trellis.HEADER, lambda blob: trellis.read_trellis(blob).dequantize()),
}


def change(raw: bytearray, header: Any, kind: str, chance: random.Random) -> None:
    """Change some bytes after the header, most of them in the tables near it, and sign all anew."""
    last = min(len(raw), header.size + 64) if chance.random() < 0.5 else len(raw)
    for _ in range(chance.choice((1, 1, 2, 8))):
        raw[chance.randrange(header.size, last)] = chance.choice((0, 1, 0x7F, 0x80, 0xFF, chance.randrange(256)))
    *fields, _ = header.unpack_from(raw)
    end = len(raw)
    if kind == "trellis":  # one span of rows, whose words have a CRC of their own
        end = header.size + 4 + 2 * 64 + 4
        raw[end - 4 : end] = zlib.crc32(raw[end:]).to_bytes(4, "little")
    crc = zlib.crc32(raw[header.size : end], zlib.crc32(header.pack(*fields, 0)))
    raw[: header.size] = header.pack(*fields, crc)


def before_a_guard(words: np.ndarray, lanes: int) -> np.ndarray:
    """As `code.padded`, but the page after the last word cannot be read: a loop that does ends the process."""
    room = code.padded(words, lanes)
    pages = -(-room.nbytes // mmap.PAGESIZE)
    memory = mmap.mmap(-1, (pages + 1) * mmap.PAGESIZE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.mprotect(ctypes.c_void_p(address + pages * mmap.PAGESIZE), mmap.PAGESIZE, UNREADABLE) == 0
    guarded = np.frombuffer(memory, np.uint16, len(room), pages * mmap.PAGESIZE - room.nbytes)
    guarded[:] = room
    return guarded


@pytest.mark.parametrize("bodies", [BODIES, pytest.param(10 * BODIES, marks=pytest.mark.long)])
@pytest.mark.parametrize("kind", sorted(BLOBS))
def test_bodies_of_any_bytes(kind: str, bodies: int, monkeypatch: pytest.MonkeyPatch, figures: Any) -> None:
    for module in (hptq, vectors):
        monkeypatch.setattr(module, "padded", before_a_guard)
    make, header, decode = BLOBS[kind]
    sound = make().numpy().tobytes()
    decode(torch.frombuffer(bytearray(sound), dtype=torch.uint8))
    refused = 0
    for number in range(bodies):
        raw = bytearray(sound)
        change(raw, header, kind, random.Random(number))
        try:
            decode(torch.frombuffer(raw, dtype=torch.uint8))
        except FormatError:
            refused += 1
    figures[f"crafted blob, {kind}", "refused by name"] += refused
    figures[f"crafted blob, {kind}", "harmless"] += bodies - refused
    assert refused > bodies // 4


@compiled
def beyond(array):
    return array[len(array)]


@pytest.mark.skipif(numba.config.BOUNDSCHECK != 1, reason="runs in the process that has bounds checks")
def test_bounds_are_checked() -> None:
    with pytest.raises(IndexError):
        beyond(np.zeros(3))


def run_with_checks(cache: Path, *tests: Path) -> None:
    """Run tests in a process that compiles all loops anew, with bounds checks."""
    environment = os.environ | {"NUMBA_BOUNDSCHECK": "1", "NUMBA_CACHE_DIR": str(cache)}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", "not with_checks"]
    found = subprocess.run([*command, *map(str, tests)], env=environment, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout[-3000:] + found.stderr[-1000:]
    assert "skipped" not in found.stdout


@pytest.mark.long
def test_loops_with_checks(tmp_path: Path) -> None:
    run_with_checks(tmp_path, Path(__file__), *(UNIT / f"test_{name}.py" for name in FORMATS))
