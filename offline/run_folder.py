"""The folder that a run writes: one safetensors file per part, complete or not there.

A file appears under its name only when it is whole, so an interrupted run is a set of finished parts. Where the folder
is meanwhile, and what becomes of it after a kill: `offline.model.place`.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from vllm_babai.files import write_atomically
from vllm_babai.format import CheckpointConfig
from vllm_babai.offline.card import describe_base, write_card
from vllm_babai.offline.model.checkpoint import REPORT, Checkpoint
from vllm_babai.offline.model.expert_report import ExpertsReport
from vllm_babai.offline.model.place import Place, check_room, claim, partial_of, place_of
from vllm_babai.offline.model.walk import Part, part_file
from vllm_babai.offline.model.writing import copy_companions, save_atomically, seal, write_index
from vllm_babai.offline.options import QuantizeOptions
from vllm_babai.offline.plan.plan import PlannedLinear
from vllm_babai.offline.plan.sensitivity import ROW_BLOCK
from vllm_babai.offline.prepare import Prepared
from vllm_babai.offline.scales.linear import LayerReport

PLAN = "babai_plan.json"
SENSITIVITY = "sensitivity"


@dataclass(frozen=True)
class RunFolder:
    """A run's folder while the run lasts. checkpoint: the original. parts: see `offline.model.walk`."""

    place: Place
    checkpoint: Checkpoint
    parts: list[Part]
    options: QuantizeOptions

    @property
    def partial(self) -> Path:
        """Where the files are while the run lasts."""
        return self.place.partial

    @property
    def sensitivity(self) -> Path:
        """Folder in which the sensitivity of every block is kept while the run lasts."""
        return self.partial / SENSITIVITY

    @property
    def is_complete(self) -> bool:
        """Whether the checkpoint is whole, as an interrupted run may have left it: then it is only published."""
        return self.place.is_complete

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
        return [LayerReport(**report) for report in json.loads(self._report_file(part).read_text())["layers"]]

    def read_experts(self, part: Part) -> list[ExpertsReport]:
        """Reports of a finished part's experts."""
        return [ExpertsReport(**report) for report in json.loads(self._report_file(part).read_text())["experts"]]

    def write(
        self,
        part: Part,
        quantized: dict[str, Tensor],
        reports: list[LayerReport],
        experts: Sequence[ExpertsReport] = (),
    ) -> None:
        """Write a part: its quantized linears, and whatever else it holds in the original checkpoint as it was."""
        inside = [name for name in self.checkpoint.files if name.startswith(f"{part.name}.")]
        kept = [name for name in inside if name not in part.replaced]
        report = {"layers": [asdict(each) for each in reports], "experts": [asdict(each) for each in experts]}
        write_atomically(self._report_file(part), json.dumps(report))
        save_atomically(self.partial / part.file, {name: self.checkpoint.read_kept(name) for name in kept} | quantized)

    def finish(self, config: CheckpointConfig) -> None:
        """Write what is in no part, the index, config, report and card: the checkpoint is then whole."""
        checkpoint, count = self.checkpoint, len(self.parts) + 1
        inside = tuple(f"{part.name}." for part in self.parts)
        replaced = {name for part in self.parts for name in part.replaced}
        kept = [n for n in checkpoint.files if not n.startswith(inside) and n not in replaced]
        rest = self.partial / part_file(count, count)
        save_atomically(rest, {name: checkpoint.read_kept(name) for name in kept})
        files = [*(self.partial / part.file for part in self.parts), rest]
        write_index(self.partial, files)
        companions = copy_companions(checkpoint, self.partial)
        whole = checkpoint.config() | {"quantization_config": config.to_dict()}
        digest = seal(self.partial, whole, files, companions)
        layers = [asdict(report) for part in self.parts for report in self.read_reports(part)]
        about = {"options": self.options.to_dict(), "base": describe_base(checkpoint)}
        report = about | _totals(layers, files) | {"digest": digest, "layers": layers}
        if experts := [asdict(each) for part in self.parts for each in self.read_experts(part)]:
            report["experts"] = experts
        write_atomically(self.partial / REPORT, json.dumps(report, indent=2) + "\n")
        write_card(self.partial, report)
        self.place.complete()

    def publish(self) -> Path:
        """Give the whole checkpoint its name, and remove what served the run alone."""
        return self.place.publish([*(self._report_file(part).name for part in self.parts), SENSITIVITY, PLAN])

    def _report_file(self, part: Part) -> Path:
        return (self.partial / part.file).with_suffix(".report.json")


@contextmanager
def open_run(
    out: Path, prepared: Prepared, options: QuantizeOptions, *, resume: bool, overwrite: bool
) -> Iterator[RunFolder]:
    """The run's folder, or that of an interrupted run, which no other process may have meanwhile but its own ranks: the
    first claims it, the others read there.

    Raises QuantizationError like `place.claim`, and where the disk has too little room for the checkpoint.
    """
    checkpoint = prepared.model.checkpoint
    run = {"command": "quantize", "options": options.to_dict(), "model": _fingerprint(checkpoint)}
    with ExitStack() as claimed:
        with prepared.ranks.together():
            if prepared.ranks.is_first:
                needed = _expected_bytes(prepared, options) + _sensitivity_bytes(prepared, options)
                written = sum(path.stat().st_size for path in partial_of(out.resolve()).rglob("*") if path.is_file())
                what = "the checkpoint, with what the run keeps meanwhile,"
                check_room(out.resolve().parent, needed - written * resume, what)
                place = claimed.enter_context(claim(out, checkpoint.folder, run, resume=resume, overwrite=overwrite))
        if not prepared.ranks.is_first:
            place = place_of(out, run)
        yield RunFolder(place, checkpoint, prepared.parts, options)


def _expected_bytes(prepared: Prepared, options: QuantizeOptions) -> int:
    """Bytes of the checkpoint to come, about: the original's, with the bits asked for in place of 16."""
    model, saved = prepared.model, 16 - (options.planned_rate or options.bits)
    weights = sum(part.weights(model) for part in prepared.parts)
    return model.checkpoint.bytes() - int(saved / 8 * weights)


def _sensitivity_bytes(prepared: Prepared, options: QuantizeOptions) -> int:
    """Bytes that the sensitivity takes until the run has ended, about: see `Sensitivity`."""
    if not options.sensitivity:
        return 0
    linears = (linear for part in prepared.blocks for linear in part.linears_of(prepared.model).values())
    tokens = prepared.inputs.hidden.shape[:2].numel() * prepared.ranks.count
    return sum(4 * (linear.out_features * ROW_BLOCK + tokens) for linear in linears)


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
