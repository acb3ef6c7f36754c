"""The custom ops `babai::matmul`, `coded_matmul` and `trellis_matmul`, their tensors, and the backends that run them.

Importing it registers the ops with PyTorch; it needs neither vllm nor a GPU. `ops.backends` says what runs on which
type of device; a backend is a package of its own.
"""

from vllm_babai.ops import coded, matmul, trellis

__all__ = ["coded", "matmul", "trellis"]
