"""The folder that a run writes: one safetensors file per decoder block, complete or not there.

While a run lasts its files lie in `OUT.partial`; a file appears there under its name only when it is whole, and the
folder takes the name OUT only when the checkpoint is. An interrupted run is therefore a set of finished blocks.
"""

import hashlib
import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from vllm_babai.errors import QuantizationError
from vllm_babai.files import write_atomically
from vllm_babai.format import CheckpointConfig
from vllm_babai.offline.model.checkpoint import INDEX, Checkpoint
from vllm_babai.offline.model.streamed import StreamedModel
from vllm_babai.offline.options import QuantizeOptions
from vllm_babai.offline.plan.plan import PlannedLinear
from vllm_babai.offline.scales.linear import LayerReport

REPORT = "babai_report.json"
RUN = "babai_run.json"
PLAN = "babai_plan.json"


@dataclass(frozen=True)
class PartialOutput:
    """A run's folder while the run lasts."""

    out: Path
    partial: Path
    model: StreamedModel
    options: QuantizeOptions

    @property
    def parts(self) -> list[str]:
        """Full names of what has a file of its own: the decoder blocks, then the head where it is quantized."""
        blocks = [self.model.block_name(i) for i in range(len(self.model.blocks))]
        return blocks if self.options.lm_head is None else [*blocks, self.model.head_name]

    def block_file(self, index: int) -> Path:
        """File of a decoder block, or of the head, which counts as one; index −1 is everything outside of them."""
        count = len(self.parts) + 1
        return self.partial / f"model-{index % count + 1:05}-of-{count:05}.safetensors"

    @property
    def sensitivity_folder(self) -> Path:
        """Where the sensitivity of every block is kept while the run lasts."""
        return self.partial / "sensitivity"

    def write_plan(self, plan: list[PlannedLinear]) -> None:
        """Keep what was planned before the first block; the sensitivity is complete by then."""
        write_atomically(self.partial / PLAN, json.dumps([asdict(linear) for linear in plan]))

    def read_plan(self) -> list[PlannedLinear] | None:
        """What was planned, or None when nothing is yet."""
        path = self.partial / PLAN
        return [PlannedLinear(**linear) for linear in json.loads(path.read_text())] if path.is_file() else None

    def has_block(self, index: int) -> bool:
        """Whether the block is already quantized."""
        return self.block_file(index).is_file() and self._report_file(index).is_file()

    def read_block(self, index: int) -> dict[str, Tensor]:
        """All tensors of a finished block."""
        return load_file(self.block_file(index))

    def read_reports(self, index: int) -> list[LayerReport]:
        """Reports of a finished block."""
        return [LayerReport(**report) for report in json.loads(self._report_file(index).read_text())]

    def write_block(self, index: int, quantized: dict[str, Tensor], reports: list[LayerReport]) -> None:
        """Write a block: its quantized linears, and whatever else the original block holds as it was."""
        checkpoint, prefix = self.model.checkpoint, f"{self.parts[index]}."
        replaced = {f"{report.name}.weight" for report in reports}
        kept = {name: checkpoint.read(name) for name in checkpoint.files if name.startswith(prefix)}
        tensors = {name: tensor for name, tensor in kept.items() if name not in replaced} | quantized
        write_atomically(self._report_file(index), json.dumps([asdict(report) for report in reports]))
        save_atomically(self.block_file(index), tensors)

    def finish(self, config: CheckpointConfig) -> Path:
        """Write what is not a block, the index, config and report; give the folder its name."""
        checkpoint, indices = self.model.checkpoint, range(len(self.parts))
        inside = tuple(f"{name}." for name in self.parts)
        save_atomically(
            self.block_file(-1), {n: checkpoint.read(n) for n in checkpoint.files if not n.startswith(inside)}
        )
        files = [self.block_file(i) for i in indices] + [self.block_file(-1)]
        write_index(self.partial, files)
        copy_companions(checkpoint, self.partial)
        write_config(self.partial, checkpoint.config() | {"quantization_config": config.to_dict()})
        layers = [asdict(report) for i in indices for report in self.read_reports(i)]
        report = {"options": self.options.to_dict(), **_totals(layers, files), "layers": layers}
        (self.partial / REPORT).write_text(json.dumps(report, indent=2) + "\n")
        for i in indices:
            self._report_file(i).unlink()
        shutil.rmtree(self.sensitivity_folder, ignore_errors=True)
        (self.partial / PLAN).unlink(missing_ok=True)
        (self.partial / RUN).unlink()
        publish(self.partial, self.out)
        return self.out

    def _report_file(self, index: int) -> Path:
        return self.block_file(index).with_suffix(".report.json")


def open_output(
    out: Path, model: StreamedModel, options: QuantizeOptions, *, resume: bool, overwrite: bool
) -> PartialOutput:
    """Make the partial folder, or open an interrupted run's.

    Raises QuantizationError when OUT exists and is not to be overwritten, when an interrupted run is there and it was
    not said what to do with it, or when its options or model were others.
    """
    if out.exists() and not overwrite:
        raise QuantizationError(f"{out} exists: choose another folder, or pass --overwrite")
    partial = partial_folder(out)
    run = {"options": options.to_dict(), "model": _fingerprint(model.checkpoint)}
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
    return PartialOutput(out, partial, model, options)


def partial_folder(out: Path) -> Path:
    """Where files lie until OUT is complete."""
    return out.with_name(out.name + ".partial")


def publish(partial: Path, out: Path) -> None:
    """Give a complete folder its name, in place of what has it now."""
    if out.exists():
        old = out.with_name(out.name + ".old")
        out.rename(old)
        partial.rename(out)
        shutil.rmtree(old)
    else:
        partial.rename(out)


def write_index(folder: Path, files: list[Path]) -> None:
    """model.safetensors.index.json over `files`."""
    from safetensors import safe_open

    weight_map: dict[str, str] = {}
    total = 0
    for path in files:
        total += path.stat().st_size
        with safe_open(path, framework="pt") as file:
            weight_map |= dict.fromkeys(file.keys(), path.name)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def write_config(folder: Path, config: dict[str, Any]) -> None:
    """config.json."""
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def copy_companions(checkpoint: Checkpoint, folder: Path) -> None:
    """Copy tokenizer, chat template, generation config and model code: all small files that are not weights."""
    skipped = {"config.json", INDEX, REPORT, "README.md"}
    for path in checkpoint.folder.iterdir():
        if path.suffix in {".json", ".jinja", ".txt", ".model", ".py", ".tiktoken"} and path.name not in skipped:
            shutil.copyfile(path, folder / path.name)


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


def save_atomically(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write a safetensors file that is there whole or not at all."""
    unfinished = path.with_suffix(".tmp")
    save_file(tensors, unfinished, metadata={"format": "pt"})
    unfinished.chmod(0o644)  # safetensors makes files that only their owner can read
    os.replace(unfinished, path)
