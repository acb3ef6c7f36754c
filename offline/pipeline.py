"""The run over a whole model: capture → factor → nearest plane → encode → checkpoint, block by block."""

from pathlib import Path
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor, nn
from transformers import AutoTokenizer

from vllm_babai.format import SSQR, CheckpointConfig, LayerScheme
from vllm_babai.offline.calibration import calibration_tokens
from vllm_babai.offline.capture import advance, hessian, shared_inputs
from vllm_babai.offline.checkpoint import open_checkpoint
from vllm_babai.offline.errors import QuantizationError
from vllm_babai.offline.factor import factorize
from vllm_babai.offline.layer import LayerReport, quantize_ssqr
from vllm_babai.offline.options import QuantizeOptions
from vllm_babai.offline.output import PartialOutput, open_output
from vllm_babai.offline.streamed_model import open_streamed


def quantize(
    model: str | Path, out: str | Path, options: QuantizeOptions, *, resume: bool = False, overwrite: bool = False
) -> Path:
    """Quantize a Hugging Face causal LM to a folder that vLLM serves; returns the folder.

    model: folder or hub name. out: folder to make; it appears when it is complete. resume: go on with an interrupted
    run of the same options. overwrite: replace `out`, and an interrupted run, if there is one. Memory: one decoder
    block and its calibration inputs. Raises QuantizationError for anything the user can mend.
    """
    checkpoint = open_checkpoint(model)
    device = options.resolve_device()
    streamed = open_streamed(checkpoint, device, options.resolve_dtype(device))
    selected = [name for i in range(len(streamed.blocks)) for name in streamed.linears(i) if not options.ignores(name)]
    if not selected:
        raise QuantizationError("--ignore excludes every linear of the model")
    output = open_output(Path(out), streamed, options, resume=resume, overwrite=overwrite)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint.folder)
    length = _sequence_length(options, checkpoint.config())
    tokens = calibration_tokens(tokenizer, options.calibration, options.samples, length, options.seed)
    hidden, arguments = streamed.first_inputs(tokens)
    with _progress() as progress:
        task = progress.add_task("", total=len(selected))
        for index in range(len(streamed.blocks)):
            block = streamed.load_block(index)
            linears = {n: m for n, m in _linears(block, streamed.block_name(index)).items() if not options.ignores(n)}
            progress.update(task, description=f"block {index + 1} of {len(streamed.blocks)}")
            if output.has_block(index):
                _restore(block, linears, output, index)
                progress.advance(task, len(linears))
            else:
                tensors, reports = _quantize_block(block, linears, hidden, arguments[index], options, progress, task)
                output.write_block(index, tensors, reports)
            if index + 1 < len(streamed.blocks):
                advance(block, hidden, arguments[index], device)
            del block, linears
    ignored = [n for i in range(len(streamed.blocks)) for n in streamed.linears(i) if options.ignores(n)]
    config = CheckpointConfig(options.format, options.bits, options.group_size, ["lm_head", *ignored])
    return output.finish(config)


def _quantize_block(
    block: nn.Module,
    linears: dict[str, nn.Linear],
    hidden: Tensor,
    arguments: dict[str, Any],
    options: QuantizeOptions,
    progress: Progress,
    task: Any,
) -> tuple[dict[str, Tensor], list[LayerReport]]:
    """Quantize a block's linears in the order in which they run, each group on the outputs of the groups before it."""
    tensors: dict[str, Tensor] = {}
    reports = []
    for group in (
        shared_inputs(block, linears, hidden[:1].to(next(block.parameters()).device), arguments) if linears else []
    ):
        covariance = hessian(block, linears[group[0]], group[0], hidden, arguments)
        try:
            factor = factorize(covariance, options.order, options.damping)
        except QuantizationError as error:
            raise QuantizationError(f"{', '.join(group)}: {error}") from error
        if factor.damping > options.damping:
            progress.console.print(f"{', '.join(group)}: damping raised to {factor.damping:g}")
        for name in group:
            scheme = LayerScheme(options.bits, options.group_size)
            quantized = quantize_ssqr(
                name, linears[name].weight, factor, options.order, scheme, options.overflow, options.seed
            )
            _replace(linears[name], quantized.weight.dequantize())
            tensors |= {f"{name}.{key}": tensor for key, tensor in quantized.stored.tensors().items()}
            reports.append(quantized.report)
            progress.advance(task)
    return tensors, reports


def _restore(block: nn.Module, linears: dict[str, nn.Linear], output: PartialOutput, index: int) -> None:
    """Give a block the weights that an interrupted run has already quantized."""
    stored = output.read_block(index)
    for name, linear in linears.items():
        parts = SSQR(*(stored[f"{name}.{key}"] for key in ("qweight", "scales", "overflow")))
        _replace(linear, parts.decode().dequantize())


def _replace(linear: nn.Linear, weight: Tensor) -> None:
    linear.weight.copy_(weight)


def _linears(block: nn.Module, name: str) -> dict[str, nn.Linear]:
    return {f"{name}.{n}": m for n, m in block.named_modules() if isinstance(m, nn.Linear)}


def _sequence_length(options: QuantizeOptions, config: dict[str, Any]) -> int:
    positions = config.get("max_position_embeddings") or 2048
    if options.sequence_length > positions:
        raise QuantizationError(
            f"--sequence-length {options.sequence_length} exceeds the model's {positions} positions"
        )
    return options.sequence_length or min(2048, positions)


def _progress() -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("linears"))
    return Progress(*columns, TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())
