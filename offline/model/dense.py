"""From a checkpoint, dense or quantized, back to dense weights."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils.logging import disable_progress_bar

from vllm_babai.errors import QuantizationError
from vllm_babai.format import FORMATS, FormatError, Weight
from vllm_babai.format.config import QUANT_METHOD
from vllm_babai.offline.model.checkpoint import Checkpoint, open_checkpoint
from vllm_babai.offline.model.complete import check_complete
from vllm_babai.offline.model.skeleton import architecture, load_config
from vllm_babai.offline.model.source import open_source
from vllm_babai.offline.model.view import gather, stored_names

Stored = tuple[str, Weight, dict[str, Tensor], tuple[int, int] | None]


def count_stored(checkpoint: Checkpoint) -> int:
    """How many quantized linears a checkpoint holds. Raises QuantizationError like `check_complete`."""
    return len(check_complete(checkpoint).linears)


def stored_linears(checkpoint: Checkpoint, names: list[str] | None = None) -> Iterator[Stored]:
    """Quantized linears of a checkpoint: name, weight, stored tensors, and dense range where the format has one.

    names: only linears one of whose tensors is among these. Raises QuantizationError like `check_complete`, and one
    that names a linear whose stored form is corrupt.
    """
    checked = check_complete(checkpoint)
    if checked.scheme is None:
        return
    form = FORMATS[checked.scheme.format]
    first, *_ = keys = tuple(form.dtypes)
    for name in sorted(checkpoint.files) if names is None else names:
        linear, _, key = name.rpartition(".")
        if key == first and linear in checked.linears:
            parts = {key: checkpoint.read(f"{linear}.{key}") for key in keys}
            try:
                stored = form.from_tensors(parts)
                point, dense_range = stored.decode(checked.linears[linear], linear), stored.dense_range
            except FormatError as error:
                raise QuantizationError(f"{linear}: {error}") from error
            yield linear, point, parts, dense_range


def dense_tensors(checkpoint: Checkpoint, names: list[str] | None = None) -> Iterator[tuple[str, Tensor]]:
    """Name and value of every tensor of the dense model; quantized linears are dequantized exactly, in float32.

    Experts that transformers knows by one tensor for all of them become that tensor. names: only tensors stored under
    these names. Raises QuantizationError like `stored_linears`, and for NaN.
    """
    checked = check_complete(checkpoint)
    names = sorted(checked.files) if names is None else names
    replaced = set()
    gathering = {name: source for source in checked.gathered for name in stored_names(source)}
    found: dict[str, Tensor] = {}
    for linear, weight, parts, _ in stored_linears(checked, names):
        replaced |= {f"{linear}.{key}" for key in parts}
        name = f"{linear}.weight"
        if name not in gathering:
            yield name, weight.dequantize()
            continue
        found[name] = weight.dequantize()
        if found.keys() >= (of_module := set(stored_names(gathering[name]))):
            yield from gather(gathering[name], {one: found.pop(one) for one in of_module}).items()
    for name in names:
        if name not in replaced:
            tensor = checked.read(name)
            if tensor.is_floating_point() and not torch.isfinite(tensor.float()).all():
                raise QuantizationError(f"{name} has NaN or Inf in {checked.files[name]}")
            yield name, tensor


def load_dense(folder: str | Path, device: torch.device) -> nn.Module:
    """A checkpoint, dense, in FP8, MXFP4 or quantized by babai, as a transformers model in float32 and eval mode.

    Raises QuantizationError like `dense_tensors`, and for a model that does not predict the next token.
    """
    checkpoint = open_checkpoint(folder)
    quantization = checkpoint.config().get("quantization_config")
    if isinstance(quantization, dict) and quantization.get("quant_method") != QUANT_METHOD:
        checkpoint = open_source(checkpoint)
    config = load_config(checkpoint)
    state = {name: tensor.float() for name, tensor in dense_tensors(checkpoint)}
    kind: Any = architecture(config, checkpoint)
    disable_progress_bar()
    model = kind.from_pretrained(None, config=config, state_dict=state, dtype=torch.float32)
    return model.to(device).eval().requires_grad_(False)
