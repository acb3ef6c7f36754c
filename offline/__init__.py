"""The offline quantizer: capture → factor → nearest plane → encode → checkpoint."""

from typing import TYPE_CHECKING, Any

from vllm_babai.errors import QuantizationError

if TYPE_CHECKING:
    from vllm_babai.offline.options import QuantizeOptions
    from vllm_babai.offline.pipeline import quantize

__all__ = ["QuantizationError", "QuantizeOptions", "quantize"]


def __getattr__(name: str) -> Any:
    """Import on first use: transformers takes seconds, and `babai --help` does not need it."""
    if name == "QuantizeOptions":
        from vllm_babai.offline.options import QuantizeOptions

        return QuantizeOptions
    if name == "quantize":
        from vllm_babai.offline.pipeline import quantize

        return quantize
    raise AttributeError(f"module {__name__} has no attribute {name}")
