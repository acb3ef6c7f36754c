"""The inputs of decoder blocks while they wait for the backward pass: in memory where they fit, else on disk."""

import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

from vllm_babai.errors import QuantizationError
from vllm_babai.offline.model.writing import save_atomically

# Share of the free memory that waiting inputs may take. A choice: the rest is for one block, its gradients and batches.
SHARE_OF_MEMORY = 0.5
GIGABYTE = 1e9
MEMINFO, CGROUP = Path("/proc/meminfo"), Path("/sys/fs/cgroup")


@dataclass
class WaitingInputs:
    """A tensor [sequences, length, hidden] for every block, in the dtype of the model's forward pass.

    size: bytes of all together. folder: where they wait, None for in memory.
    """

    size: int
    folder: Path | None
    _kept: dict[int, Tensor] = field(default_factory=dict)

    @classmethod
    def plan(cls, hidden: Tensor, blocks: int, folder: Path, processes: int = 1) -> "WaitingInputs":
        """Decide where they wait, before anything is computed. Raises QuantizationError where no place is large enough.

        hidden: inputs of the first block; all are as large. processes: that share the memory and the disk, with as much
        to keep each.
        """
        size = processes * blocks * hidden.nbytes
        memory, disk = available_memory(), shutil.disk_usage(folder).free
        if size <= SHARE_OF_MEMORY * memory:
            return cls(size, None)
        if size > disk:
            raise QuantizationError(
                f"measuring sensitivity needs {_gigabytes(size)} for the inputs of {blocks} blocks, but {folder} has "
                f"{_gigabytes(disk)} and memory {_gigabytes(memory)} free: free some, use fewer --samples or a shorter "
                "--sequence-length, or --no-sensitivity"
            )
        return cls(size, folder)

    def __str__(self) -> str:
        place = "in memory" if self.folder is None else f"on disk in {self.folder}"
        return f"inputs of blocks wait {place} for the backward pass: {_gigabytes(self.size)}"

    def put(self, index: int, hidden: Tensor) -> None:
        """Keep a copy of the inputs of a block."""
        if self.folder is None:
            self._kept[index] = hidden.clone()
        else:
            save_atomically(self._file(self.folder, index), {"hidden": hidden})

    def take(self, index: int) -> Tensor:
        """The inputs of a block, which are then no longer kept."""
        if self.folder is None:
            return self._kept.pop(index)
        file = self._file(self.folder, index)
        hidden = load_file(file)["hidden"]
        file.unlink()
        return hidden

    @staticmethod
    def _file(folder: Path, index: int) -> Path:
        return folder / f"inputs-{index:05}.safetensors"


def available_memory() -> int:
    """Bytes that this process can still allocate: free memory, within the limit of a container (cgroup v2)."""
    free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if MEMINFO.exists():
        fields = dict(line.split(":") for line in MEMINFO.read_text().splitlines())
        free = 1024 * int(fields["MemAvailable"].split()[0])
    if (CGROUP / "memory.max").exists() and (most := (CGROUP / "memory.max").read_text().strip()) != "max":
        free = min(free, int(most) - int((CGROUP / "memory.current").read_text()))
    return max(free, 0)


def _gigabytes(size: float) -> str:
    return f"{size / GIGABYTE:.2f} GB"
