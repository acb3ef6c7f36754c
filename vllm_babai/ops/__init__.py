"""The custom ops `babai::matmul`, `lookup`, `coded_matmul` and `trellis_matmul`, their tensors, and their backends.

Importing it registers the ops with PyTorch; it needs neither vllm nor a GPU. `ops.backends` says what runs on which
type of device; a backend is a package of its own.
"""

from vllm_babai.ops import coded, lookup, matmul, trellis

__all__ = ["coded", "lookup", "matmul", "trellis"]
