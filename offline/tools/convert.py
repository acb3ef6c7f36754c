"""Quantized checkpoints in another form: the other format, dense, or the layout of other engines."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vllm_babai.errors import QuantizationError
from vllm_babai.files import write_atomically
from vllm_babai.format import (
    BIT_WIDTHS,
    FORMATS,
    HPTQ,
    MOST_OVERFLOW,
    SSQR,
    CheckpointConfig,
    LatticeWeight,
    integer_range,
    share_beyond,
)
from vllm_babai.format.config import is_babai, restored
from vllm_babai.offline.model.checkpoint import REPORT, Checkpoint, open_checkpoint, read_json
from vllm_babai.offline.model.complete import CompleteCheckpoint, check_complete
from vllm_babai.offline.model.dense import count_stored, dense_tensors, stored_linears
from vllm_babai.offline.model.place import MADE, check_place, check_room, claim
from vllm_babai.offline.model.served import fused_with
from vllm_babai.offline.model.writing import (
    copy_companions,
    save_atomically,
    seal,
    write_config,
    write_index,
)
from vllm_babai.offline.tools import export
from vllm_babai.progress import Tick, counting_progress

ConvertFile = Callable[
    [list[str], Tick], dict[str, Tensor]
]  # tensors of one file, by their names; ticks for each linear
Encode = Callable[[LatticeWeight, str], dict[str, Tensor]]  # a linear's tensors, by what stands after its name


def convert(
    source: str | Path,
    out: str | Path,
    to: str,
    dtype: torch.dtype,
    *,
    clip_overflow: bool = False,
    overwrite: bool = False,
) -> Path:
    """Write a quantized checkpoint as `to`: ssqr or hptq, lossless both ways, or dense weights in `dtype`, or in the
    layout of compressed-tensors, where `clip_overflow` says that overflow may be clipped.

    HPTQ becomes SSQR of the widths that it was converted from, else of the smallest whose overflow stays within
    MOST_OVERFLOW. Dense weights are exact in float32, and rounded once in other dtypes. One file at a time is in
    memory. Raises QuantizationError when `source` is not quantized, is corrupt, has column steps and is to be SSQR, or
    OUT exists. A trellis becomes dense only: it has no integers.
    """
    out = check_place(Path(out), source, overwrite=overwrite)
    checkpoint = open_checkpoint(source)
    config = checkpoint.config()
    if "quantization_config" not in config:
        raise QuantizationError(f"{source} is not quantized: it has no quantization_config")
    checkpoint = check_complete(checkpoint)
    config = restored(config)
    run = {"command": "convert", "options": {"to": to, "dtype": str(dtype)}, "model": str(checkpoint.folder)}
    if to == "dense":
        del config["quantization_config"]
        config["dtype" if "dtype" in config else "torch_dtype"] = str(dtype).removeprefix("torch.")
        convert_file: ConvertFile = partial(_dense, checkpoint, dtype)
    elif to == export.NAME:
        scheme = CheckpointConfig.from_dict(config["quantization_config"])
        config["quantization_config"] = export.exported_config(checkpoint, scheme)
        export.check_exportable(checkpoint, scheme, clip_overflow)
        convert_file = partial(_reencoded, checkpoint, partial(export.packed, scheme))
    else:
        scheme = _target_config(checkpoint, CheckpointConfig.from_dict(config["quantization_config"]), to)
        config["quantization_config"] = scheme.to_dict()
        convert_file = partial(_reencoded, checkpoint, partial(_encode, scheme))
    needed = _dense_bytes(checkpoint, dtype) if to == "dense" else checkpoint.bytes()
    check_room(out.parent, needed, "the converted checkpoint")
    with claim(out, checkpoint.folder, run, overwrite=overwrite) as place:
        _write(checkpoint, place.partial, config, convert_file)
        if to in ("dense", export.NAME):
            write_atomically(place.partial / MADE, json.dumps(run) + "\n")
        place.complete()
        return place.publish([])


def _write(checkpoint: Checkpoint, folder: Path, config: dict[str, Any], convert_file: ConvertFile) -> None:
    """Write a folder file by file, each under the name that it has in the original."""
    files = sorted(set(checkpoint.files.values()))
    written = [folder / path.relative_to(checkpoint.folder) for path in files]
    with counting_progress() as progress, progress.phase("converting", count_stored(checkpoint), "linears") as phase:
        for path, new in zip(files, written, strict=True):
            names = sorted(name for name, file in checkpoint.files.items() if file == path)
            save_atomically(new, convert_file(names, phase.advance))
    write_index(folder, written)
    companions = copy_companions(checkpoint, folder)
    if not is_babai(config):
        write_config(folder, config)
        return
    digest = seal(folder, config, written, companions)
    if (checkpoint.folder / REPORT).is_file():
        report = read_json(checkpoint.folder / REPORT) | {"digest": digest}
        write_atomically(folder / REPORT, json.dumps(report, indent=2) + "\n")


def _dense(checkpoint: Checkpoint, dtype: torch.dtype, names: list[str], tick: Tick) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for name, tensor in dense_tensors(checkpoint, names):
        tensors[name] = tensor.to(dtype) if tensor.is_floating_point() else tensor
        if name not in checkpoint.files:  # it was stored in another form
            tick()
    return tensors


def _dense_bytes(checkpoint: CompleteCheckpoint, dtype: torch.dtype) -> int:
    kept = (math.prod(checkpoint.shape(name)) for name in checkpoint.files if checkpoint.is_kept(name))
    return dtype.itemsize * (sum(kept) + sum(math.prod(shape) for shape in checkpoint.linears.values()))


def _reencoded(checkpoint: Checkpoint, encode: Encode, names: list[str], tick: Tick) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    replaced: set[str] = set()
    for linear, weight, parts, _ in stored_linears(checkpoint, names):
        assert isinstance(weight, LatticeWeight)  # else it was refused before
        tensors |= {f"{linear}.{key}": tensor for key, tensor in encode(weight, linear).items()}
        replaced |= {f"{linear}.{key}" for key in parts}
        tick()
    return tensors | {name: checkpoint.read(name) for name in names if name not in replaced}


def _encode(config: CheckpointConfig, weight: LatticeWeight, linear: str) -> dict[str, Tensor]:
    bits = config.scheme(linear).bits
    if config.format == "ssqr" and bits is not None:
        return SSQR.encode(weight, bits, linear).tensors()
    scales = weight.scales
    if (scales == scales[:1, :1]).all():
        scales = scales[:1, :1].clone()
    return HPTQ.encode(LatticeWeight(weight.integers, scales, weight.column_exponents), linear=linear).tensors()


def _target_config(checkpoint: Checkpoint, config: CheckpointConfig, to: str) -> CheckpointConfig:
    """The converted checkpoint's config; SSQR widths stay in that of HPTQ, to be taken up on the way back."""
    if to not in FORMATS:
        raise QuantizationError(f"--to {to} is unknown: use dense, {export.NAME}, {' or '.join(FORMATS)}")
    if config.format == "trellis":
        raise QuantizationError(
            "a trellis has no integers to convert: convert --to dense, or quantize the original again"
        )
    if to == "trellis":
        raise QuantizationError("a trellis cannot hold integers: quantize the original with --format trellis")
    config = replace(config, format=to, residency="packed")
    if to != "ssqr" or config.bits is not None:
        return config
    widths = _smallest_widths(checkpoint)
    shared = {linear: max(widths.get(name, 0) for name in fused_with(linear)) for linear in widths}
    common = max(set(shared.values()), key=list(shared.values()).count)
    overrides = {n: {"bits": bits} for n, bits in shared.items() if bits != common or n in config.overrides}
    return replace(config, bits=common, overrides=overrides)


def _smallest_widths(checkpoint: Checkpoint) -> dict[str, int]:
    """Linear → dense bits. Raises QuantizationError for steps by column, which SSQR does not hold."""
    widths: dict[str, int] = {}
    with counting_progress() as progress, progress.phase("choosing bits", count_stored(checkpoint), "linears") as phase:
        for linear, weight, _, _ in stored_linears(checkpoint):
            assert isinstance(weight, LatticeWeight)
            if weight.column_exponents is not None:
                raise QuantizationError(
                    f"{linear}: its columns have steps of their own, which SSQR does not hold; "
                    "quantize with --no-column-steps, or convert --to dense"
                )
            widths[linear] = smallest_width(weight.integers)
            phase.advance()
    return widths


def smallest_width(integers: Tensor) -> int:
    """The fewest dense bits that leave a share of overflow of no more than MOST_OVERFLOW."""
    for bits in BIT_WIDTHS:
        if share_beyond(integers, integer_range(bits)) <= MOST_OVERFLOW:
            return bits
    return BIT_WIDTHS[-1]
