"""The checkpoint that is quantized, read in floating point whatever it was published in."""

from typing import Any

from vllm_babai.errors import QuantizationError
from vllm_babai.offline.model.checkpoint import Checkpoint
from vllm_babai.offline.model.fp8 import open_fp8

NAMES = {
    "awq": "AWQ",
    "bitsandbytes": "bitsandbytes",
    "compressed-tensors": "compressed-tensors",
    "gguf": "GGUF",
    "gptq": "GPTQ",
    "modelopt": "ModelOpt (FP8 or NVFP4)",
    "modelopt_fp4": "ModelOpt (NVFP4)",
}


def open_source(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint as the quantizer reads it: in floating point.

    Raises QuantizationError that names the format of a checkpoint that is quantized in another than FP8 or MXFP4.
    """
    quantization = quantization_of(checkpoint)
    if quantization is None:
        return checkpoint
    method = quantization.get("quant_method")
    if method == "fp8":
        return open_fp8(checkpoint, quantization.get("weight_block_size"))
    if method == "mxfp4":
        from vllm_babai.offline.model.mxfp4 import open_mxfp4  # what it needs of transformers takes long to import

        return open_mxfp4(checkpoint)
    name = NAMES.get(str(method), method)
    raise QuantizationError(
        f"{checkpoint.folder} is already quantized ({name}); start from the original weights, in bf16, FP8 or MXFP4"
    )


def quantization_of(checkpoint: Checkpoint) -> dict[str, Any] | None:
    """The quantization_config of a checkpoint or of the language model in it; None where there is none."""
    config = checkpoint.config()
    every = (config, *(value for value in config.values() if isinstance(value, dict)))
    return next((one["quantization_config"] for one in every if one.get("quantization_config")), None)
