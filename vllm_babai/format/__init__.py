"""Checkpoint formats: encode and decode quantized weights. Needs neither vllm nor triton, numba only to code."""

from vllm_babai.errors import FormatError
from vllm_babai.format.base import Format, Weight
from vllm_babai.format.config import CheckpointConfig, LayerScheme
from vllm_babai.format.dense_sparse.overflow import Overflow, decode_overflow, read_header
from vllm_babai.format.dense_sparse.packing import pack, packed_bytes, unpack
from vllm_babai.format.dense_sparse.ssqr import SSQR
from vllm_babai.format.entropy.hptq import HPTQ, predicted_bytes
from vllm_babai.format.lattice import BIT_WIDTHS, MOST_OVERFLOW, LatticeWeight, integer_range, share_beyond
from vllm_babai.format.registry import FORMATS
from vllm_babai.format.steps import column_factors, step_exponents
from vllm_babai.format.trellis.blob import Trellis, TrellisWeight

__all__ = [
    "BIT_WIDTHS",
    "FORMATS",
    "HPTQ",
    "MOST_OVERFLOW",
    "SSQR",
    "CheckpointConfig",
    "Format",
    "FormatError",
    "LatticeWeight",
    "LayerScheme",
    "Overflow",
    "Trellis",
    "TrellisWeight",
    "Weight",
    "column_factors",
    "decode_overflow",
    "integer_range",
    "pack",
    "packed_bytes",
    "predicted_bytes",
    "read_header",
    "share_beyond",
    "step_exponents",
    "unpack",
]
