"""What every ingredient of the quantizer is worth: `python tests/benchmarks/quality.py [--out FOLDER] [options]`.

Quantizes a model at several sizes with each ingredient alone and with all of them, evaluates the results against the
original, and writes `quality.json`, `quality.md` and `quality.png` to the folder. What is in `quality.json` already is
not measured again, so an interrupted study goes on; a folder with rows of another model or text is refused. Without
other options: the demonstration's model and texts.
"""

import argparse
import json
import runpy
import tempfile
import time
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch
from zlib import crc32

from harness import DEMO, RESULTS, command_line, markdown, panels, save_plot
from reference import peers

from vllm_babai import offline

REPORT = "babai_report.json"
RATES = (2.1, 2.6, 3.1, 3.6, 4.1)
WIDTHS = (2, 3, 4)
HEADINGS = ("format", "ingredients", "bits", "perplexity", "loss, nats", "KL, nats", "seconds")
PLAIN: dict[str, Any] = {"sensitivity": False, "drift": False, "column_steps": False, "paths": 1}
CODE_UNAWARE = {"vllm_babai.offline.scales.hptq.RELATIVE_PRICE": 0.0}


@dataclass(frozen=True)
class Case:
    """A way to quantize. options: fields of QuantizeOptions unlike the defaults. constants: full names in our modules,
    and what stands there meanwhile: another value of a constant, or another function.
    """

    format: str
    name: str
    options: dict[str, Any] = field(default_factory=dict)
    constants: dict[str, Any] = field(default_factory=dict)
    sizes: tuple[float, ...] = RATES


CASES = [
    Case("hptq", "plain", PLAIN, CODE_UNAWARE),
    Case("hptq", "code-aware rounding", PLAIN),
    Case("hptq", "sensitivity", PLAIN | {"sensitivity": True}, CODE_UNAWARE),
    Case("hptq", "drift", PLAIN | {"drift": True}, CODE_UNAWARE),
    Case("hptq", "16 paths", PLAIN | {"paths": 16}, CODE_UNAWARE),
    Case("hptq", "column steps", PLAIN | {"column_steps": True}, CODE_UNAWARE),
    Case("hptq", "all"),
    Case("ssqr", "plain, one width", PLAIN, sizes=WIDTHS),
    Case("ssqr", "sensitivity, one width", PLAIN | {"sensitivity": True}, sizes=WIDTHS),
    Case("ssqr", "drift, one width", PLAIN | {"drift": True}, sizes=WIDTHS),
    Case("ssqr", "16 paths, one width", PLAIN | {"paths": 16}, sizes=WIDTHS),
    Case("ssqr", "all, one width", sizes=WIDTHS),
    Case("ssqr", "all, planned widths"),
]


@dataclass(frozen=True)
class Row:
    """One measurement; loss, divergence and their standard errors in nats per token. predicted: loss, by the reports of
    the linears. cpu_seconds: of all threads, quantizing; neither was noted at first.
    """

    format: str
    name: str
    asked: float
    bits: float
    perplexity: float
    loss: float
    loss_error: float
    divergence: float
    divergence_error: float
    seconds: float
    cpu_seconds: float | None = None
    predicted: float | None = None


@dataclass(frozen=True)
class Material:
    """What every case gets alike."""

    model: Path
    calibration: Path
    evaluation: Path
    samples: int
    windows: int
    length: int


def options_of(case: Case, size: float, material: Material) -> offline.QuantizeOptions:
    """How a case is quantized at one size."""
    if case.format == "hptq":
        asked: dict[str, Any] = {"rate": size}
    else:
        asked = {"bits": int(size)} if case.sizes == WIDTHS else {"target_bits": size}
    return offline.QuantizeOptions(
        format=case.format,  # type: ignore[arg-type]
        calibration=str(material.calibration),
        samples=material.samples,
        sequence_length=material.length,
        **case.options,
        **asked,
    )


def measure(case: Case, size: float, material: Material) -> Row:
    """Quantize and evaluate one case at one size."""
    from vllm_babai.offline.tools.evaluate import evaluate  # takes seconds; --help needs none

    options = options_of(case, size, material)
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        for name, value in case.constants.items():
            stack.enter_context(patch(name, value))
        started, cpu_started = time.perf_counter(), time.process_time()
        out = offline.quantize(material.model, Path(folder) / "out", options)
        seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - cpu_started
        report = json.loads((out / REPORT).read_text())
        bits = report["bits_per_weight"]
        found = evaluate(
            out, material.evaluation, window=material.length, samples=material.windows, against=material.model
        )
    c = found.comparison
    assert c is not None
    errors = (c.loss, c.loss_error, c.divergence, c.divergence_error)
    predicted = sum(layer["predicted_error"] for layer in report["layers"]) / 2
    return Row(
        case.format,
        case.name,
        size,
        bits,
        found.perplexity,
        *errors,
        seconds=round(seconds, 1),
        cpu_seconds=round(cpu_seconds, 1),
        predicted=predicted,
    )


def write_table(rows: list[Row], path: Path) -> None:
    cells = []
    for row in rows:
        loss = f"{row.loss:.4f} ± {row.loss_error:.4f}"
        divergence = f"{row.divergence:.4f} ± {row.divergence_error:.4f}"
        sizes = (f"{row.bits:.3f}", f"{row.perplexity:.4f}", loss, divergence, f"{row.seconds:.0f}")
        cells.append((row.format.upper(), row.name, *sizes))
    path.write_text(markdown(HEADINGS, cells))


def plot(rows: list[Row], path: Path, with_peers: bool) -> None:
    figure, axes = panels(2, sharey=True)
    for panel, form in zip(axes, ("hptq", "ssqr"), strict=True):
        for name in dict.fromkeys(row.name for row in rows if row.format == form):
            points = sorted((row.bits, row.loss) for row in rows if (row.format, row.name) == (form, name))
            panel.plot(*zip(*points, strict=True), marker=".", label=name, linewidth=2 if name.startswith("all") else 1)
        for name, points in peers().items() if with_peers else ():
            panel.plot(*zip(*points, strict=True), marker="x", linestyle=":", label=name)
        panel.set(title=form.upper(), xlabel="bits per weight, everything counted", yscale="log")
        panel.legend(fontsize="small")
    axes[0].set_ylabel("loss against the original, nats per token")
    save_plot(figure, path)


def demonstration_texts(folder: Path) -> tuple[Path, Path]:
    """The demonstration's calibration and evaluation texts as files."""
    text = runpy.run_path(str(DEMO / "text.py"))
    paths = folder / "calibration.jsonl", folder / "evaluation.jsonl"
    for path, modules in zip(paths, ("CALIBRATION_MODULES", "EVALUATION_MODULES"), strict=True):
        text["write_jsonl"](path, text[modules])
    return paths


def take_material(parser: argparse.ArgumentParser, samples: int, windows: int) -> None:
    """Options for what every case gets, by default the demonstration's model and texts. samples, windows: defaults."""
    parser.add_argument("--model", type=Path, default=DEMO / "stdlib-6m")
    parser.add_argument("--calibration", type=Path)
    parser.add_argument("--evaluation", type=Path)
    parser.add_argument("--samples", type=int, default=samples)
    parser.add_argument("--windows", type=int, default=windows)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--out", type=Path, default=RESULTS)


def hold_to(material: Material, path: Path) -> None:
    """Note beside a file of rows what they are measured with, or exit where that was something else."""
    noted = path.with_suffix(".material.json")
    own = asdict(material)
    for name in ("model", "calibration", "evaluation"):
        files = sorted(own[name].glob("*.safetensors")) if name == "model" else [own[name]]
        own[name] = [crc32(file.read_bytes()) for file in files]
    if not noted.exists():
        noted.write_text(json.dumps(own, indent=1) + "\n")
    elif others := [name for name, value in json.loads(noted.read_text()).items() if own[name] != value]:
        raise SystemExit(f"{path} holds rows of another {', '.join(others)}: choose another --out")


def measure_missing(wanted: Iterable[tuple[Case, float]], options: argparse.Namespace, path: Path) -> list[Row]:
    """Rows of a file, with those added that it did not have, each written as soon as it is measured."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [Row(**row) for row in json.loads(path.read_text())] if path.exists() else []
    done = {(row.format, row.name, row.asked) for row in rows}
    with tempfile.TemporaryDirectory() as folder:
        calibration, evaluation = demonstration_texts(Path(folder))
        material = Material(
            options.model,
            options.calibration or calibration,
            options.evaluation or evaluation,
            options.samples,
            options.windows,
            options.length,
        )
        hold_to(material, path)
        for case, size in wanted:
            if (case.format, case.name, size) not in done:
                rows.append(measure(case, size, material))
                print(rows[-1], flush=True)
                path.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    return rows


def main() -> None:
    parser = command_line(__doc__)
    take_material(parser, samples=64, windows=80)
    parser.add_argument("--sizes", type=float, nargs="+", help="bits per weight to measure; without it, all")
    parser.add_argument("--only", default="", help="cases whose format and name contain this")
    parser.add_argument("--no-peers", action="store_true", help="leave the other tools' points out of the plot")
    options = parser.parse_args()
    cases = (case for case in CASES if options.only in f"{case.format} {case.name}")
    wanted = ((case, size) for case in cases for size in case.sizes if not options.sizes or size in options.sizes)
    rows = measure_missing(wanted, options, options.out / "quality.json")
    order = {(case.format, case.name): index for index, case in enumerate(CASES)}
    rows.sort(key=lambda row: (order.get((row.format, row.name), len(order)), row.asked))
    write_table(rows, options.out / "quality.md")
    plot(rows, options.out / "quality.png", with_peers=not options.no_peers)


if __name__ == "__main__":
    main()
