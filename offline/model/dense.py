"""From a checkpoint, dense or quantized, back to dense weights."""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoConfig
from transformers.utils.logging import disable_progress_bar

from vllm_babai.errors import QuantizationError
from vllm_babai.format import FORMATS, CheckpointConfig, Format, FormatError, LatticeWeight
from vllm_babai.format.config import QUANT_METHOD
from vllm_babai.offline.model.checkpoint import Checkpoint, open_checkpoint
from vllm_babai.offline.model.fp8 import open_source
from vllm_babai.offline.model.streamed import model_class

Stored = tuple[str, LatticeWeight, dict[str, Tensor], tuple[int, int] | None]


def count_stored(checkpoint: Checkpoint) -> int:
    """How many quantized linears a checkpoint holds. Raises QuantizationError like `stored_linears`."""
    form = _stored_format(checkpoint)
    return 0 if form is None else sum(name.endswith(f".{next(iter(form.dtypes))}") for name in checkpoint.files)


def stored_linears(checkpoint: Checkpoint, names: list[str] | None = None) -> Iterator[Stored]:
    """Quantized linears of a checkpoint: name, lattice point, stored tensors, and dense range where the format has one.

    names: only linears one of whose tensors is among these. Raises QuantizationError that names a linear whose stored
    form is corrupt or incomplete.
    """
    form = _stored_format(checkpoint)
    if form is None:
        return
    first, *_ = keys = tuple(form.dtypes)
    for name in sorted(checkpoint.files) if names is None else names:
        linear, _, key = name.rpartition(".")
        if key == first:
            parts = {key: checkpoint.read(f"{linear}.{key}") for key in keys}
            try:
                stored = form.from_tensors(parts)
                yield linear, stored.decode(), parts, stored.dense_range
            except FormatError as error:
                raise QuantizationError(f"{linear}: {error}") from error


def _stored_format(checkpoint: Checkpoint) -> type[Format] | None:
    """What the checkpoint's linears are stored as; None where it is not quantized."""
    raw = checkpoint.config().get("quantization_config")
    if raw is None:
        return None
    try:
        return FORMATS[CheckpointConfig.from_dict(raw).format]
    except (FormatError, KeyError) as error:
        raise QuantizationError(f"{checkpoint.folder}: its quantization_config cannot be read: {error}") from error


def dense_tensors(checkpoint: Checkpoint, names: list[str] | None = None) -> Iterator[tuple[str, Tensor]]:
    """Name and value of every tensor of the dense model; quantized linears are dequantized exactly, in float32.

    names: only tensors stored under these names. Raises QuantizationError like `stored_linears`.
    """
    names = sorted(checkpoint.files) if names is None else names
    replaced = set()
    for linear, weight, parts, _ in stored_linears(checkpoint, names):
        replaced |= {f"{linear}.{key}" for key in parts}
        yield f"{linear}.weight", weight.dequantize()
    yield from ((name, checkpoint.read(name)) for name in names if name not in replaced)


def load_dense(folder: str | Path, device: torch.device) -> nn.Module:
    """A checkpoint, dense, in FP8 or quantized by babai, as a transformers model in float32 and eval mode."""
    checkpoint = open_checkpoint(folder)
    if checkpoint.config().get("quantization_config", {}).get("quant_method") != QUANT_METHOD:
        checkpoint = open_source(checkpoint)
    config = AutoConfig.from_pretrained(checkpoint.folder)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    state = {name: tensor.float() for name, tensor in dense_tensors(checkpoint)}
    disable_progress_bar()
    model = model_class(config).from_pretrained(None, config=config, state_dict=state, dtype=torch.float32)
    return model.to(device).eval().requires_grad_(False)
