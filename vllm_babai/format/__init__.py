"""Checkpoint formats: encode and decode lattice points. Needs torch and numpy only, neither vllm nor triton."""

from vllm_babai.format.config import CheckpointConfig, LayerScheme
from vllm_babai.format.errors import FormatError
from vllm_babai.format.lattice import LatticeWeight, integer_range
from vllm_babai.format.overflow import Overflow, decode_overflow, read_header
from vllm_babai.format.packing import BIT_WIDTHS, pack, packed_bytes, unpack
from vllm_babai.format.ssqr import SSQR

FORMATS = {"ssqr": SSQR}

__all__ = [
    "BIT_WIDTHS",
    "FORMATS",
    "SSQR",
    "CheckpointConfig",
    "FormatError",
    "LatticeWeight",
    "LayerScheme",
    "Overflow",
    "decode_overflow",
    "integer_range",
    "pack",
    "packed_bytes",
    "read_header",
    "unpack",
]
