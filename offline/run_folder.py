"""The folder that a run writes: one safetensors file per part, complete or not there.

While a run lasts its files lie in `OUT.partial`; a file appears there under its name only when it is whole, and the
folder takes the name OUT only when the checkpoint is. An interrupted run is therefore a set of finished parts.
"""

import hashlib
import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from vllm_babai.errors import QuantizationError
from vllm_babai.files import write_atomically
from vllm_babai.format import CheckpointConfig
from vllm_babai.offline.model.checkpoint import REPORT, Checkpoint
from vllm_babai.offline.model.walk import Part, part_file
from vllm_babai.offline.model.writing import (
    copy_companions,
    partial_folder,
    publish,
    save_atomically,
    write_config,
    write_index,
)
from vllm_babai.offline.options import QuantizeOptions
from vllm_babai.offline.plan.plan import PlannedLinear
from vllm_babai.offline.prepare import Prepared
from vllm_babai.offline.scales.linear import LayerReport

RUN = "babai_run.json"
PLAN = "babai_plan.json"


@dataclass(frozen=True)
class RunFolder:
    """A run's folder while the run lasts. checkpoint: the original. parts: see `offline.model.walk`."""

    out: Path
    partial: Path
    checkpoint: Checkpoint
    parts: list[Part]
    options: QuantizeOptions

    @property
    def sensitivity(self) -> Path:
        """Folder in which the sensitivity of every block is kept while the run lasts."""
        return self.partial / "sensitivity"

    def write_plan(self, plan: list[PlannedLinear]) -> None:
        """Keep what was planned before the first block; the sensitivity is complete by then."""
        write_atomically(self.partial / PLAN, json.dumps([asdict(linear) for linear in plan]))

    def read_plan(self) -> list[PlannedLinear] | None:
        """What was planned, or None when nothing is yet."""
        path = self.partial / PLAN
        return [PlannedLinear(**linear) for linear in json.loads(path.read_text())] if path.is_file() else None

    def has(self, part: Part) -> bool:
        """Whether the part is already quantized."""
        return (self.partial / part.file).is_file() and self._report_file(part).is_file()

    def read(self, part: Part) -> dict[str, Tensor]:
        """All tensors of a finished part."""
        return load_file(self.partial / part.file)

    def read_reports(self, part: Part) -> list[LayerReport]:
        """Reports of a finished part's linears."""
        return [LayerReport(**report) for report in json.loads(self._report_file(part).read_text())]

    def write(self, part: Part, quantized: dict[str, Tensor], reports: list[LayerReport]) -> None:
        """Write a part: its quantized linears, and whatever else it holds in the original checkpoint as it was."""
        replaced = {f"{report.name}.weight" for report in reports}
        kept = [name for name in self.checkpoint.files if name.startswith(f"{part.name}.") and name not in replaced]
        write_atomically(self._report_file(part), json.dumps([asdict(report) for report in reports]))
        save_atomically(self.partial / part.file, {name: self.checkpoint.read_kept(name) for name in kept} | quantized)

    def finish(self, config: CheckpointConfig) -> Path:
        """Write what is in no part, the index, config and report; give the folder its name."""
        checkpoint, count = self.checkpoint, len(self.parts) + 1
        inside = tuple(f"{part.name}." for part in self.parts)
        rest = self.partial / part_file(count, count)
        save_atomically(rest, {n: checkpoint.read_kept(n) for n in checkpoint.files if not n.startswith(inside)})
        files = [*(self.partial / part.file for part in self.parts), rest]
        write_index(self.partial, files)
        copy_companions(checkpoint, self.partial)
        write_config(self.partial, checkpoint.config() | {"quantization_config": config.to_dict()})
        layers = [asdict(report) for part in self.parts for report in self.read_reports(part)]
        report = {"options": self.options.to_dict(), **_totals(layers, files), "layers": layers}
        (self.partial / REPORT).write_text(json.dumps(report, indent=2) + "\n")
        for part in self.parts:
            self._report_file(part).unlink()
        shutil.rmtree(self.sensitivity, ignore_errors=True)
        (self.partial / PLAN).unlink(missing_ok=True)
        (self.partial / RUN).unlink()
        publish(self.partial, self.out)
        return self.out

    def _report_file(self, part: Part) -> Path:
        return (self.partial / part.file).with_suffix(".report.json")


def open_run(out: Path, prepared: Prepared, options: QuantizeOptions, *, resume: bool, overwrite: bool) -> RunFolder:
    """Make the partial folder, or open an interrupted run's.

    Raises QuantizationError when OUT exists and `overwrite` is not given, when an interrupted run is there and neither
    `resume` nor `overwrite` is given, or when the interrupted run had other options or another model.
    """
    checkpoint = prepared.model.checkpoint
    if out.exists() and not overwrite:
        raise QuantizationError(f"{out} exists: choose another folder, or pass --overwrite")
    partial = partial_folder(out)
    run = {"options": options.to_dict(), "model": _fingerprint(checkpoint)}
    if partial.exists() and not resume and not overwrite:
        raise QuantizationError(
            f"{partial} holds an interrupted run: pass --resume to go on, --overwrite to start again"
        )
    if partial.exists() and resume and (partial / RUN).is_file():
        earlier = json.loads((partial / RUN).read_text())
        if earlier != run:
            raise QuantizationError(
                f"--resume: the interrupted run in {partial} had other {_differences(earlier, run)}"
            )
    else:
        if partial.exists():
            shutil.rmtree(partial)
        partial.mkdir(parents=True)
        write_atomically(partial / RUN, json.dumps(run))
    return RunFolder(out, partial, checkpoint, prepared.parts, options)


def _totals(layers: list[dict[str, Any]], files: list[Path]) -> dict[str, Any]:
    weights = sum(layer["rows"] * layer["columns"] for layer in layers)
    bits = sum(layer["bits_per_weight"] * layer["rows"] * layer["columns"] for layer in layers)
    return {
        "quantized_weights": weights,
        "bits_per_weight": bits / weights,
        "checkpoint_bytes": sum(path.stat().st_size for path in files),
        "seconds": sum(layer["seconds"] for layer in layers),
    }


def _fingerprint(checkpoint: Checkpoint) -> str:
    """Tells one model's files from another's: hash of config.json and of every tensor's file and that file's size."""
    digest = hashlib.sha256((checkpoint.folder / "config.json").read_bytes())
    for name, path in sorted(checkpoint.files.items()):
        digest.update(f"{name} {path.name} {path.stat().st_size}".encode())
    return digest.hexdigest()


def _differences(earlier: dict[str, Any], now: dict[str, Any]) -> str:
    if earlier["model"] != now["model"]:
        return "model files"
    changed = [key for key, value in now["options"].items() if earlier["options"].get(key) != value]
    return ", ".join(f"--{key.replace('_', '-')} ({earlier['options'].get(key)})" for key in changed)
