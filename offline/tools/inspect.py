"""What a quantized folder holds, layer by layer; every stored tensor is decoded and checked on the way."""

from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from vllm_babai.errors import QuantizationError
from vllm_babai.format import LatticeWeight, Weight, share_beyond
from vllm_babai.format.checksums import SUMS, changed_files, digest_of, read_sums
from vllm_babai.offline.model.checkpoint import REPORT, Checkpoint, find_folder, open_checkpoint, read_json
from vllm_babai.offline.model.complete import CompleteCheckpoint, check_complete, read_scheme
from vllm_babai.offline.model.dense import count_stored, stored_linears
from vllm_babai.offline.model.expert_report import ExpertsReport
from vllm_babai.progress import counting_progress


@dataclass(frozen=True)
class LinearSummary:
    """One linear as stored. bytes: of all its tensors. entropy: of its integers, zeroth order, bits per weight.
    redundancy: bits_per_weight − entropy; below 0 where the code does better by knowing rows and columns apart.
    largest: of the integers. A trellis has no integers, and None for these three.
    overflow_rate: share of integers beyond the dense range, None where there is none. relative_error: from the report,
    None where the folder has none.
    """

    name: str
    rows: int
    columns: int
    bytes: int
    bits_per_weight: float
    entropy: float | None
    redundancy: float | None
    largest: int | None
    overflow_rate: float | None
    relative_error: float | None


@dataclass(frozen=True)
class Inspection:
    """All linears of a folder, and totals over them. checkpoint_bytes: all weight files.

    digest: of everything in the folder but the report, as SHA256SUMS has it; None in older checkpoints.
    experts: of every layer that has some, from the report.
    """

    format: str
    linears: list[LinearSummary]
    bits_per_weight: float
    quantized_weights: int
    checkpoint_bytes: int
    digest: str | None
    experts: list[ExpertsReport] = field(default_factory=list)


def inspect(folder: str | Path) -> Inspection:
    """Decode every quantized linear of a folder, and compare every other tensor with its checksum.

    Raises QuantizationError when it is not quantized, and like `stored_linears` when it is incomplete or corrupt.
    """
    checkpoint = open_checkpoint(folder)
    scheme = read_scheme(checkpoint)
    if scheme is None:
        raise QuantizationError(f"{folder} is not quantized: make a checkpoint with `babai quantize`")
    checkpoint = check_complete(checkpoint)
    if not checkpoint.linears:
        raise QuantizationError(f"{folder} holds no quantized linear: config.json leaves out all of them (ignore)")
    errors, experts = _reported_errors(checkpoint), _reported_experts(checkpoint)
    linears = []
    with counting_progress() as progress, progress.phase("decoding", count_stored(checkpoint), "linears") as phase:
        for name, weight, parts, dense_range in stored_linears(checkpoint):
            linears.append(_summarize(name, weight, parts, dense_range, errors.get(name)))
            phase.advance()
    _read_others(checkpoint)
    weights = sum(linear.rows * linear.columns for linear in linears)
    rate = 8 * sum(linear.bytes for linear in linears) / max(weights, 1)
    digest = digest_of(read_sums(checkpoint.folder)) if (checkpoint.folder / SUMS).exists() else None
    return Inspection(scheme.format, linears, rate, weights, checkpoint.bytes(), digest, experts)


def verify(folder: str | Path) -> str:
    """Compare every file of a quantized checkpoint with SHA256SUMS, and that with the report; returns its digest.

    Raises QuantizationError that names all files which are not what was written, and FormatError without SHA256SUMS.
    """
    folder = find_folder(folder)
    sums = read_sums(folder)
    digest, report = digest_of(sums), folder / REPORT
    present = {"config.json", *(path.relative_to(folder).as_posix() for path in folder.rglob("*.safetensors"))}
    added = [f"{name} (not in {SUMS})" for name in sorted(present - sums.keys())]
    if changed := [*changed_files(folder, sums), *added]:
        raise QuantizationError(f"{folder} is not as it was written: {', '.join(changed)} changed; copy it again")
    if report.is_file() and read_json(report).get("digest") != digest:
        raise QuantizationError(f"{report} is of another checkpoint than {folder / SUMS}: copy both again")
    return digest


def integer_counts(folder: str | Path) -> dict[int, int]:
    """How often every integer occurs in all quantized linears of a folder. Raises QuantizationError for a trellis."""
    total: dict[int, int] = {}
    for name, weight, _, _ in stored_linears(open_checkpoint(folder)):
        if not isinstance(weight, LatticeWeight):
            raise QuantizationError(f"{name} is stored as a trellis: it has no integers to plot")
        values, counts = weight.integers.unique(return_counts=True)
        for value, count in zip(values.tolist(), counts.tolist(), strict=True):
            total[value] = total.get(value, 0) + count
    return dict(sorted(total.items()))


def _read_others(checkpoint: CompleteCheckpoint) -> None:
    for name in checkpoint.files:
        if checkpoint.is_kept(name):
            checkpoint.read(name)


def _summarize(
    name: str, weight: Weight, parts: dict[str, Tensor], dense_range: tuple[int, int] | None, error: float | None
) -> LinearSummary:
    size = sum(part.nbytes for part in parts.values())
    integers = weight.integers if isinstance(weight, LatticeWeight) else None
    rows, columns = weight.shape
    rate, entropy = 8 * size / (rows * columns), None if integers is None else _entropy(integers)
    return LinearSummary(
        name=name,
        rows=rows,
        columns=columns,
        bytes=size,
        bits_per_weight=rate,
        entropy=entropy,
        redundancy=None if entropy is None else rate - entropy,
        largest=None if integers is None else int(integers.abs().max()),
        overflow_rate=None if integers is None or dense_range is None else share_beyond(integers, dense_range),
        relative_error=error,
    )


def _entropy(integers: Tensor) -> float:
    counts = integers.unique(return_counts=True)[1].double()
    share = counts / counts.sum()
    return float(-(share * torch.log2(share)).sum())


def _reported_experts(checkpoint: Checkpoint) -> list[ExpertsReport]:
    path = checkpoint.folder / REPORT
    try:
        return [ExpertsReport(**each) for each in read_json(path).get("experts", [])] if path.is_file() else []
    except TypeError as error:
        raise QuantizationError(f"{path} is not a report of `babai quantize`: copy it again, or remove it") from error


def _reported_errors(checkpoint: Checkpoint) -> dict[str, float]:
    path = checkpoint.folder / REPORT
    if not path.is_file():
        return {}
    layers = read_json(path).get("layers")
    try:
        return {str(layer["name"]): float(layer["relative_error"]) for layer in layers}  # type: ignore[union-attr]
    except (KeyError, TypeError, ValueError) as error:
        raise QuantizationError(f"{path} is not a report of `babai quantize`: copy it again, or remove it") from error
