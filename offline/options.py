"""Options of a quantization run."""

import re
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

import torch

from vllm_babai.errors import QuantizationError
from vllm_babai.format import BIT_WIDTHS
from vllm_babai.format.config import GROUP_SIZES
from vllm_babai.offline.solver.factor import ORDERS, Order


@dataclass(frozen=True)
class QuantizeOptions:
    """What `babai quantize` takes. Raises QuantizationError that names the option at fault.

    bits: dense bits per weight. overflow: share of weights stored sparsely. group_size: input features per scale, −1
    for one scale per output row. target_bits: bits per weight of the whole model, everything counted, by which bits and
    overflow are chosen for every linear. These four are SSQR's; HPTQ's are rate: bits per weight, everything counted,
    and column_steps: a step per column in linears where that is predicted to pay.
    order: of nearest plane. paths: that it keeps in every row, each taking its share of the time; 1: Babai's algorithm,
    to the letter. calibration: file or hub dataset; samples × sequence_length tokens of it are used (0: 2048, or what
    the model's positions allow). damping: λ over the Hessian's mean diagonal. drift: correct weights for what the
    quantized linears before have done, which takes a second copy of the calibration inputs.
    sensitivity: weigh tokens, rows and linears by how much the loss minds their errors, which takes one backward pass.
    ignore: regular expressions; linears that one of them finds by full name stay as they are. lm_head: bits of the
    linear that makes logits, a width for SSQR, a rate for HPTQ; None: it stays as it is. No plan counts it, and
    `ignore` does not name it. device, dtype: of the model's forward pass; 'auto' is CUDA where there is one, and
    bfloat16 there, float32 on the CPU.
    """

    format: Literal["ssqr", "hptq"] = "ssqr"
    bits: int = 4
    overflow: float = 0.01
    rate: float = 3.125
    column_steps: bool = True
    target_bits: float | None = None
    group_size: int = -1
    order: Order = "activation"
    paths: int = 16
    calibration: str = "NeelNanda/pile-10k"
    samples: int = 128
    sequence_length: int = 0
    damping: float = 0.01
    drift: bool = True
    sensitivity: bool = True
    ignore: list[str] = field(default_factory=list)
    lm_head: float | None = None
    device: str = "auto"
    dtype: str = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        _check("--bits", self.bits in BIT_WIDTHS, f"one of {BIT_WIDTHS}", self.bits)
        _check("--overflow", 0 <= self.overflow <= 0.2, "from 0 to 0.2", self.overflow)
        _check("--rate", 1 <= self.rate <= 8, "from 1 to 8", self.rate)
        if self.target_bits is not None:
            _check("--target-bits", 2 <= self.target_bits <= 8.5, "from 2 to 8.5", self.target_bits)
            _check("--target-bits", self.group_size == -1, "used without --group-size", self.target_bits)
            _check("--target-bits", self.sensitivity, "used with --sensitivity", self.target_bits)
        _check("--group-size", self.group_size in GROUP_SIZES, f"one of {GROUP_SIZES}", self.group_size)
        _check("--order", self.order in ORDERS, f"one of {', '.join(ORDERS)}", self.order)
        _check("--paths", 1 <= self.paths <= 1024, "from 1 to 1024", self.paths)
        _check("--samples", self.samples > 0, "positive", self.samples)
        _check("--sequence-length", self.sequence_length >= 0, "positive", self.sequence_length)
        _check("--damping", 0 <= self.damping <= 1, "from 0 to 1", self.damping)
        if self.lm_head is not None and self.format == "ssqr":
            _check("--lm-head", self.lm_head in BIT_WIDTHS, f"one of {BIT_WIDTHS} in SSQR", self.lm_head)
        elif self.lm_head is not None:
            _check("--lm-head", 1 <= self.lm_head <= 8, "from 1 to 8", self.lm_head)
        for pattern in self.ignore:
            try:
                re.compile(pattern)
            except re.error as error:
                raise QuantizationError(f"--ignore {pattern} is not a regular expression: {error}") from error

    def to_dict(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)

    @property
    def planned_rate(self) -> float | None:
        """Bits per weight that a plan shares out among the linears; None where each gets the same."""
        return self.rate if self.format == "hptq" else self.target_bits

    def of_head(self) -> "QuantizeOptions":
        """Options by which the head alone is quantized: `lm_head` is the bits, or the rate."""
        assert self.lm_head is not None
        return replace(self, bits=int(self.lm_head)) if self.format == "ssqr" else replace(self, rate=self.lm_head)

    def resolve_device(self) -> torch.device:
        """The device to compute on. Raises QuantizationError when CUDA is asked for and missing."""
        if self.device == "auto":
            return torch.device("cuda" if torch.cuda.is_available() else "cpu")
        if self.device.startswith("cuda") and not torch.cuda.is_available():
            raise QuantizationError("--device cuda: there is no CUDA device; use cpu or auto")
        _check("--device", self.device.split(":")[0] in ("cpu", "cuda"), "auto, cpu or cuda", self.device)
        return torch.device(self.device)

    def resolve_dtype(self, device: torch.device) -> torch.dtype:
        """The dtype of the model's forward pass."""
        if self.dtype == "auto":
            return torch.float32 if device.type == "cpu" else torch.bfloat16
        return torch_dtype(self.dtype)

    def ignores(self, linear: str) -> bool:
        """Whether the linear with this full name stays as it is."""
        return any(re.search(pattern, linear) for pattern in self.ignore)


def torch_dtype(name: str) -> torch.dtype:
    """torch.bfloat16 for 'bfloat16'. Raises QuantizationError for anything that is not a floating point dtype."""
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise QuantizationError(f"--dtype {name} is not a floating point type: use float32, bfloat16 or float16")
    return dtype


def _check(option: str, holds: bool, wanted: str, value: object) -> None:
    if not holds:
        raise QuantizationError(f"{option} must be {wanted}, not {value}")
