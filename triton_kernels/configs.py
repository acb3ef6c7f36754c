"""Launch configurations: measured per GPU and kept under version control, with defaults by compute capability.

A table is a file `configs/<name>.json`; <name> is a GPU's name with underscores (written by `babai tune`) or its
architecture (`sm_90`, `gfx942`). A GPU without a table takes its architecture's, else that of the next older one.
"""

import json
import math
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path

import torch
import triton

from vllm_babai.files import write_atomically
from vllm_babai.triton_kernels.layout import ROW_ALIGNMENT, SMALLEST_ROWS

BUCKETS = (1, 8, 16, 32, 64)
FOLDER = Path(__file__).parent / "configs"


@dataclass(frozen=True)
class Config:
    """How the fused kernel is launched: rows of an output tile, warps, pipeline stages, programs a processor."""

    rows: int
    warps: int
    stages: int
    programs_per_sm: int

    def __post_init__(self) -> None:
        if self.rows < SMALLEST_ROWS or ROW_ALIGNMENT % self.rows:
            raise ValueError(f"configuration of {self.rows} rows; they must be {SMALLEST_ROWS}, 64 or {ROW_ALIGNMENT}")

    def for_groups(self, groups: int) -> "Config":
        """For so many scales a row; several take a second set of sums: fewer rows per warp, to fit the registers.

        Tiles of 32 rows are for 64 tokens: with two warps the sums spill (sm_100, 3 bits, Triton 3.7.1 and 3.8).
        """
        if groups == 1:
            return self
        return replace(self, rows=min(self.rows, 64), warps=max(self.warps, 4 if self.rows == SMALLEST_ROWS else 2))


@dataclass(frozen=True)
class Entry:
    """One line of a table: the configuration that was best for this bit width, bucket of tokens and shape.

    grouped: that for rows of several scales, where `Config.for_groups` would spill registers.
    """

    bits: int
    tokens: int
    out_features: int
    in_features: int
    config: Config
    grouped: Config | None = None

    def choice(self, groups: int) -> Config:
        """The configuration for so many scales a row."""
        return self.grouped if self.grouped and groups > 1 else self.config.for_groups(groups)


@dataclass(frozen=True)
class Table:
    """What is known of one GPU. dequantize_from: tokens from which dequantizing the whole weight first is faster."""

    dequantize_from: int
    entries: tuple[Entry, ...]

    def lookup(self, bits: int, tokens: int, out_features: int, in_features: int, groups: int = 1) -> Config:
        """The configuration of the nearest shape that the table has for `bits` and the bucket `tokens`.

        groups: scales of a row.
        """
        candidates = [entry for entry in self.entries if entry.bits == bits and entry.tokens == tokens]
        if not candidates:
            raise LookupError(f"configuration table has no entry for {bits} bits and {tokens} tokens")

        def distance(entry: Entry) -> float:
            return abs(math.log2(entry.out_features / out_features)) + abs(math.log2(entry.in_features / in_features))

        return min(candidates, key=distance).choice(groups)

    @classmethod
    def read(cls, path: Path) -> "Table":
        """Read a table from a file."""
        raw = json.loads(path.read_text())
        configs = [
            {name: Config(**entry[name]) for name in ("config", "grouped") if name in entry} for entry in raw["entries"]
        ]
        entries = (Entry(**entry | own) for entry, own in zip(raw["entries"], configs, strict=True))
        return cls(raw["dequantize_from"], tuple(entries))

    def write(self, path: Path) -> None:
        """Write the table to a file, one entry a line."""
        entries = [
            {name: value for name, value in asdict(entry).items() if value is not None} for entry in self.entries
        ]
        lines = ",\n".join("    " + json.dumps(entry) for entry in entries)
        write_atomically(path, f'{{\n  "dequantize_from": {self.dequantize_from},\n  "entries": [\n{lines}\n  ]\n}}\n')


@dataclass(frozen=True)
class Target:
    """What kernels are compiled for and launched on.

    backend: "cuda", "hip" or "interpreter". architecture: sm_90, gfx942 … name: as the driver calls the GPU.
    """

    backend: str
    architecture: str
    name: str
    processors: int

    @property
    def capability(self) -> int:
        """Compute capability of an NVIDIA GPU: 90 for sm_90."""
        return int(self.architecture[3:])

    @property
    def overlaps_launches(self) -> bool:
        """Whether a kernel may start before the one before it has ended: CUDA's programmatic dependent launch."""
        return self.backend == "cuda" and self.capability >= 90

    @classmethod
    @cache
    def of(cls, device: torch.device) -> "Target":
        """What computes tensors on `device`: a GPU, or Triton's interpreter when it is switched on."""
        if triton.knobs.runtime.interpret:
            return cls("interpreter", "sm_90", "interpreter", 4)
        if device.type != "cuda":
            raise RuntimeError(f"the Triton kernels need a GPU; the tensors are on {device}")
        properties = torch.cuda.get_device_properties(device)
        if torch.version.hip:
            backend, architecture = "hip", properties.gcnArchName.split(":")[0]
        else:
            backend, architecture = "cuda", f"sm_{properties.major}{properties.minor}"
        return cls(backend, architecture, properties.name, properties.multi_processor_count)


@cache
def table_for(target: Target) -> Table:
    """The configuration table of a target."""
    for name in (file_name(target.name), target.architecture):
        path = FOLDER / f"{name}.json"
        if path.exists():
            return Table.read(path)
    if target.backend == "hip":
        return Table.read(FOLDER / "gfx942.json")
    known = sorted(int(path.stem[3:]) for path in FOLDER.glob("sm_*.json"))
    nearest = max((version for version in known if version <= target.capability), default=known[0])
    return Table.read(FOLDER / f"sm_{nearest}.json")


@cache
def config_for(target: Target, bits: int, tokens: int, shape: tuple[int, int], groups: int) -> Config:
    """What the target's table has for a bucket of tokens; kept. shape: output × input features."""
    return table_for(target).lookup(bits, tokens, *shape, groups)


def file_name(gpu: str) -> str:
    """A GPU's name as the stem of its table's file."""
    return gpu.replace(" ", "_").replace("/", "_")


def bucket(m: int) -> int:
    """The bucket that m tokens are launched in; beyond the largest they are cut in tiles of it."""
    return next((tokens for tokens in BUCKETS if m <= tokens), BUCKETS[-1])
