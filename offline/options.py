"""Options of a quantization run."""

import re
from collections.abc import Collection
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any, Literal

import torch
from typer import Option

from vllm_babai.errors import QuantizationError
from vllm_babai.format import BIT_WIDTHS
from vllm_babai.format.config import GROUP_SIZES
from vllm_babai.offline.ranks import rank_device
from vllm_babai.offline.solver.factor import ORDERS, Order

# Bits per weight that a model can have in the trellis form: half of `code.FEWEST_BITS` and `code.MOST_BITS`, and what a
# row of a small model takes besides.
TRELLIS_RATES = (1.25, 5.0)
# Bits per weight that may be asked for, by format.
RATES = {"ssqr": (2, 8.5), "hptq": (1, 8), "trellis": TRELLIS_RATES}
TRELLIS_DEFAULT = 3.125  # without --target-bits: a choice, the size of other tools' 3-bit groups of 128
DTYPES = ("float32", "bfloat16", "float16", "float64")
SEEDS = (-(2**63), 2**64 - 1)  # what torch.Generator takes
# Options that not every format has → the formats that have them.
FORMATS_OF = {
    "bits": ("ssqr",),
    "overflow": ("ssqr",),
    "target_bits": ("ssqr", "trellis"),
    "group_size": ("ssqr",),
    "rate": ("hptq",),
    "column_steps": ("hptq",),
    "embedding": ("ssqr", "hptq"),
}


@dataclass(frozen=True)
class QuantizeOptions:
    """What `babai quantize` takes; an option's help stands beside its field, for the command line and for readers.

    Raises QuantizationError that names the option at fault.
    """

    format: Annotated[
        Literal["ssqr", "hptq", "trellis"], Option(help="Dense + sparse, entropy coded, or a trellis code.")
    ] = "ssqr"
    bits: Annotated[int, Option(help="SSQR: dense bits per weight: 2, 3, 4, 5 or 8.")] = 4
    overflow: Annotated[float, Option(help="SSQR: share of weights stored sparsely.")] = 0.01
    rate: Annotated[float, Option(help="HPTQ: bits per weight, everything counted.")] = 3.125
    # A step for every column is kept only in linears where it is predicted to lower the error.
    column_steps: Annotated[bool, Option(help="HPTQ: steps by column where they pay.")] = True
    # Everything is counted. Chosen are bits and overflow of every linear of SSQR, bits of every tile of a trellis.
    target_bits: Annotated[
        float | None,
        Option(help="SSQR, trellis: bits per weight of the whole model, shared out among linears; a trellis: 3.125."),
    ] = None
    group_size: Annotated[int, Option(help="Input features per scale: -1 (whole rows), 32, 64 or 128.")] = -1
    # The trellis's is always `reverse`: its streams run from the first column on.
    order: Annotated[Order, Option(help="SSQR, HPTQ: order of nearest plane.")] = "activation"
    # One path is Babai's algorithm to the letter; the time grows with their number.
    paths: Annotated[
        int, Option(help="Candidates that nearest plane keeps in a row; 1: one. The trellis keeps four times as many.")
    ] = 16
    calibration: Annotated[str, Option(help="Text: a .jsonl, .txt or .parquet file, or a dataset on the hub.")] = (
        "NeelNanda/pile-10k"
    )
    samples: Annotated[int, Option(help="Calibration sequences.")] = 128
    sequence_length: Annotated[int, Option(help="Tokens in each; 0: 2048, or fewer if the model has.")] = 0
    damping: Annotated[float, Option(help="Added to the Hessian's diagonal, as a share of its mean.")] = 0.01
    # It takes a second copy of the calibration inputs: those of the original model.
    drift: Annotated[bool, Option(help="Correct weights for errors of earlier linears.")] = True
    # It takes one backward pass over the calibration text.
    sensitivity: Annotated[bool, Option(help="Weigh errors by how much the loss minds them.")] = True
    # A pattern is searched for in a linear's full name.
    ignore: Annotated[list[str], Option(help="Regular expression of linears to leave as they are.")] = field(
        default_factory=list
    )
    # No plan counts head and embedding, and `ignore` does not apply to them.
    lm_head: Annotated[
        float | None,
        Option(
            help="Bits of lm_head, where it is not tied to the embedding: a width for SSQR, else a rate; "
            "without it, it stays as it is."
        ),
    ] = None
    # Where head and embedding are tied, these bits are for both.
    embedding: Annotated[
        float | None,
        Option(
            help="Bits of the embedding, and of lm_head where it is tied to it: a width for SSQR, else a rate; "
            "without it, it stays as it is."
        ),
    ] = None
    device: Annotated[str, Option(help="auto, cpu or cuda.")] = "auto"
    # auto: bfloat16 on CUDA, float32 on the CPU.
    dtype: Annotated[str, Option(help="Of the model's forward pass: auto, float32, bfloat16.")] = "auto"
    seed: Annotated[int, Option(help="Fixes the choice of calibration sequences.")] = 0

    def __post_init__(self) -> None:
        _check("--bits", self.bits in BIT_WIDTHS, f"one of {BIT_WIDTHS}", self.bits)
        _check("--overflow", 0 <= self.overflow <= 0.2, "from 0 to 0.2", self.overflow)
        _check_rate("--rate", self.rate, "hptq")
        if self.target_bits is not None:
            _check_rate("--target-bits", self.target_bits, "trellis" if self.format == "trellis" else "ssqr")
            _check("--target-bits", self.group_size == -1, "used without --group-size", self.target_bits)
            _check("--target-bits", self.sensitivity, "used with --sensitivity", self.target_bits)
        _check("--group-size", self.group_size in GROUP_SIZES, f"one of {GROUP_SIZES}", self.group_size)
        _check("--order", self.order in ORDERS, f"one of {', '.join(ORDERS)}", self.order)
        _check("--paths", 1 <= self.paths <= 1024, "from 1 to 1024", self.paths)
        _check("--samples", self.samples > 0, "positive", self.samples)
        _check("--sequence-length", self.sequence_length >= 0, "0 or more", self.sequence_length)
        _check("--damping", 0 <= self.damping <= 1, "from 0 to 1", self.damping)
        _check("--seed", SEEDS[0] <= self.seed <= SEEDS[1], f"from {SEEDS[0]} to {SEEDS[1]}", self.seed)
        if self.dtype != "auto":
            torch_dtype(self.dtype)
        for option, bits in (("--lm-head", self.lm_head), ("--embedding", self.embedding)):
            if bits is not None and self.format == "ssqr":
                _check(option, bits in BIT_WIDTHS, f"one of {BIT_WIDTHS} in SSQR", bits)
            elif bits is not None:
                _check_rate(option, bits, self.format)
        if self.embedding is not None:  # a row of a trellis is spread among those of its tile
            _check("--embedding", self.format != "trellis", "left out with --format trellis", self.embedding)
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
        if self.format == "hptq":
            return self.rate
        return self.target_bits or (TRELLIS_DEFAULT if self.format == "trellis" else None)

    @property
    def column_order(self) -> Order:
        """In which columns are decided."""
        return "reverse" if self.format == "trellis" else self.order

    @property
    def row_paths(self) -> int:
        """Candidates that nearest plane keeps in a row: a path of the trellis has a state to lose, and costs less."""
        return 4 * self.paths if self.format == "trellis" else self.paths

    def resolve_device(self) -> torch.device:
        """The device to compute on, of this rank where torchrun has started several.

        Raises QuantizationError when CUDA is asked for and missing.
        """
        if self.device == "auto":
            return rank_device(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
        _check(
            "--device", re.fullmatch(r"cpu|cuda(:\d{1,3})?", self.device) is not None, "auto, cpu or cuda", self.device
        )
        device = torch.device(self.device)
        if device.type == "cuda" and not torch.cuda.is_available():
            raise QuantizationError("--device cuda: there is no CUDA device; use cpu or auto")
        if (device.index or 0) >= max(1, torch.cuda.device_count()):
            raise QuantizationError(f"--device {self.device}: there are {torch.cuda.device_count()} CUDA devices")
        return rank_device(device)

    def resolve_dtype(self, device: torch.device) -> torch.dtype:
        """The dtype of the model's forward pass."""
        if self.dtype == "auto":
            return torch.float32 if device.type == "cpu" else torch.bfloat16
        return torch_dtype(self.dtype)

    def ignores(self, linear: str) -> bool:
        """Whether the linear with this full name stays as it is."""
        return any(re.search(pattern, linear) for pattern in self.ignore)


def torch_dtype(name: str) -> torch.dtype:
    """torch.bfloat16 for 'bfloat16'. Raises QuantizationError for anything but DTYPES."""
    if name not in DTYPES:
        raise QuantizationError(f"--dtype {name} is not among {', '.join(DTYPES)}")
    return getattr(torch, name)


def check_given(given: Collection[str], form: str) -> None:
    """Raise QuantizationError for an option that `form`, the format asked for, does not have.

    given: names of fields of QuantizeOptions that the user has set.
    """
    for name in given:
        formats = FORMATS_OF.get(name, (form,))
        if form not in formats:
            option = "--column-steps, --no-column-steps" if name == "column_steps" else f"--{name.replace('_', '-')}"
            raise QuantizationError(f"{option}: for --format {' or '.join(formats)} alone; leave it out with {form}")


def _check_rate(option: str, rate: float, form: str) -> None:
    (least, most), suffix = RATES[form], " with --format trellis" if form == "trellis" else ""
    _check(option, least <= rate <= most, f"from {least} to {most}{suffix}", rate)


def _check(option: str, holds: bool, wanted: str, value: object) -> None:
    if not holds:
        raise QuantizationError(f"{option} must be {wanted}, not {value}")
