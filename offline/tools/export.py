"""SSQR linears in the `pack-quantized` layout of compressed-tensors, which vLLM and transformers load by themselves.

The layout holds whole int32 words of 2, 4 or 8 bits per weight and a scale per row or group: SSQR's dense part, bit for
bit, but no overflow. It is written with the compressed-tensors library, and so is what that library reads.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vllm_babai.errors import QuantizationError
from vllm_babai.format import CheckpointConfig, LatticeWeight, integer_range
from vllm_babai.offline.model.checkpoint import Checkpoint
from vllm_babai.offline.model.complete import check_complete
from vllm_babai.offline.model.dense import count_stored, stored_linears
from vllm_babai.progress import counting_progress

NAME = "compressed-tensors"
WIDTHS = (2, 4, 8)  # those that fill a word; of 3 and 5 bits the library and vLLM leave different bits unused


@dataclass
class Clipped:
    """What clipping overflow costs over all linears: weights, how many are clipped, Σ(Ŵ − W)² and Σ W²."""

    weights: int = 0
    count: int = 0
    error: float = 0.0
    energy: float = 0.0

    def add(self, weight: LatticeWeight, bits: int) -> int:
        """Count a linear; returns how many of its integers are clipped."""
        exact, clipped = weight.dequantize(), clip(weight, bits).dequantize()
        count = int((exact != clipped).sum())
        self.weights += exact.numel()
        self.count += count
        self.error += float((exact - clipped).square().sum())
        self.energy += float(exact.square().sum())
        return count

    def __str__(self) -> str:
        share, error = self.count / max(self.weights, 1), self.error / max(self.energy, 1e-30)
        return f"{self.count:,} of {self.weights:,} integers clipped ({share:.3%}), relative squared error {error:.2e}"


def clip(weight: LatticeWeight, bits: int) -> LatticeWeight:
    """The nearest lattice point within the dense range."""
    return LatticeWeight(weight.integers.clamp(*integer_range(bits)), weight.scales)


def check_exportable(checkpoint: Checkpoint, config: CheckpointConfig, clip_overflow: bool) -> None:
    """Decode every linear, and note what clipping costs.

    Raises QuantizationError, before anything is written, for overflow unless it is to be clipped.
    """
    clipped = Clipped()
    with counting_progress() as progress, progress.phase("checking", count_stored(checkpoint), "linears") as phase:
        for linear, weight, _, _ in stored_linears(checkpoint):
            assert isinstance(weight, LatticeWeight)  # SSQR's
            bits = _width(config, linear)
            if clipped.add(weight, bits) and not clip_overflow:
                raise QuantizationError(
                    f"{linear} has integers beyond {bits} bits, which {NAME} cannot hold: quantize with --overflow 0"
                    " (a few may be left), or pass --clip and measure with `babai eval` what it costs"
                )
            phase.advance()
        if clipped.count:
            phase.note(f"{clipped}: measure with `babai eval`")


def exported_config(checkpoint: Checkpoint, config: CheckpointConfig) -> dict[str, Any]:
    """The quantization_config in the words of compressed-tensors.

    Raises QuantizationError for another format than SSQR, a width or a head that the layout does not hold, and where
    the library is missing.
    """
    if config.format != "ssqr":
        raise QuantizationError(f"--to {NAME} takes SSQR: quantize with --format ssqr, or convert --to ssqr first")
    if "lm_head" in config.overrides:
        raise QuantizationError(
            f"--to {NAME}: lm_head is quantized, which its readers do not expect: leave out --lm-head"
        )
    if config.embedding is not None:
        raise QuantizationError(
            f"--to {NAME}: {config.embedding} is quantized, which its readers do not expect: leave out --embedding"
        )
    library = _library()
    linears: dict[tuple[int, int], list[str]] = {}
    for linear in sorted(check_complete(checkpoint).linears):
        linears.setdefault((_width(config, linear), config.scheme(linear).group_size), []).append(linear)
    groups = {}
    for i, ((bits, group_size), names) in enumerate(sorted(linears.items())):
        grouped = group_size != -1
        arguments = library.QuantizationArgs(
            num_bits=bits,
            type="int",
            symmetric=True,
            strategy="group" if grouped else "channel",
            group_size=group_size if grouped else None,
        )
        targets = ["Linear"] if len(linears) == 1 else names
        groups[f"group_{i}"] = library.QuantizationScheme(targets=targets, weights=arguments)
    made = library.QuantizationConfig(
        config_groups=groups, format="pack-quantized", quantization_status="compressed", ignore=config.ignore
    )
    return made.model_dump(mode="json")


def packed(config: CheckpointConfig, weight: LatticeWeight, linear: str) -> dict[str, Tensor]:
    """A linear's tensors, by what stands after its name."""
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    bits = _width(config, linear)
    return {
        "weight_packed": pack_to_int32(clip(weight, bits).integers.to(torch.int8), bits),
        "weight_scale": weight.scales.contiguous(),
        "weight_shape": torch.tensor(weight.integers.shape),
    }


def _width(config: CheckpointConfig, linear: str) -> int:
    bits = config.scheme(linear).bits
    if bits not in WIDTHS:
        raise QuantizationError(f"{linear} has {bits} bits, and {NAME} takes {WIDTHS}: quantize with --bits 4")
    return bits


def _library() -> Any:
    """`compressed_tensors.quantization`, a requirement of vLLM. Raises QuantizationError where it is missing."""
    try:
        import compressed_tensors.quantization
    except ImportError as error:
        raise QuantizationError(f"--to {NAME} needs the package {NAME}: pip install {NAME}") from error
    return compressed_tensors.quantization
