"""The custom ops `babai::matmul` and `babai::coded_matmul`, the tensors they take, and the backends that run them.

Importing it registers the ops with PyTorch; it needs neither vllm nor a GPU. `ops.backends` says what runs on which
type of device; a backend is a package of its own.
"""

from vllm_babai.ops import coded, matmul

__all__ = ["coded", "matmul"]
