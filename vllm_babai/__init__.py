"""vLLM plugin and checkpoint formats for lattice-quantized language models.

Importing this package imports neither vllm nor CUDA; vLLM calls :func:`register` through its plugin entry point.
"""

__version__ = "0.1.0"


def register() -> None:
    """Make the quantization method ``babai`` known to vLLM (entry point ``vllm.general_plugins``). Idempotent."""
    from vllm_babai.plugin.config import register_config

    register_config()
