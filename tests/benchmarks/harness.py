"""What the benchmarks share: the loop over rounds, medians with their spread, the machine, tables, plots and JSON.

A figure is the median over rounds. In a round every candidate runs once, one after the other, so that all meet the same
machine: its clock rate, its temperature, its other processes. A ratio is taken within each round, and its median shown.
Why, and what to look after before measuring: tests/README.md.
"""

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console
from rich.table import Table

DEMO = Path(__file__).parents[2] / "deploy" / "demo"
RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "triton", "vllm", "transformers", "numba")
TABLE_WIDTH = 160  # characters, where the output is not a terminal
PANEL, DPI = (7.0, 4.5), 150  # inches and dots per inch of a plot, as `babai predict --plot` draws it
STDOUT = Path("-")
JSON_HELP = "write all figures and the machine to FILE, or as the only output"

Result = TypeVar("Result")


@dataclass(frozen=True)
class Median:
    """Median of one figure over the rounds, with its quartiles; with its extremes if there were fewer than four."""

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, figures: Sequence[float]) -> "Median":
        if len(figures) < 4:
            return cls(statistics.median(figures), min(figures), max(figures))
        low, value, high = statistics.quantiles(figures, n=4, method="inclusive")
        return cls(value, low, high)

    def text(self, digits: int = 2, factor: float = 1) -> str:
        """`1.65 (1.62–1.66)`, or the figure alone where there is no spread to show."""
        value, low, high = (f"{factor * figure:.{digits}f}" for figure in (self.value, self.low, self.high))
        return value if low == high else f"{value} ({low}–{high})"


def ratio(numerators: Sequence[float], denominators: Sequence[float]) -> Median:
    """Median of the ratios within each round."""
    return Median.of([above / below for above, below in zip(numerators, denominators, strict=True)])


@dataclass
class Times:
    """Seconds of one candidate, round by round. cpu: of all threads of this process."""

    wall: list[float]
    cpu: list[float]

    def time(self, candidate: Callable[[], object]) -> None:
        """Run the candidate once and note how long it took."""
        wall, cpu = time.perf_counter(), time.process_time()
        candidate()
        self.wall.append(time.perf_counter() - wall)
        self.cpu.append(time.process_time() - cpu)


def time_rounds(
    candidates: Mapping[str, Callable[[], object]], rounds: int, least_seconds: float = 0.0
) -> dict[str, Times]:
    """Time every candidate once a round, after one call each that does not count: it compiles and fills caches.

    rounds: at least so many, and more until they took ``least_seconds`` for each candidate.
    """
    for candidate in candidates.values():
        candidate()
    times = {name: Times([], []) for name in candidates}
    started, done = time.perf_counter(), 0
    while done < rounds or time.perf_counter() - started < least_seconds * len(candidates):
        for name, candidate in candidates.items():
            times[name].time(candidate)
        done += 1
    return times


def alternate(candidates: Mapping[str, Callable[[], Result]], rounds: int) -> dict[str, list[Result]]:
    """Call every candidate once a round, for candidates that measure themselves; their results in order of rounds."""
    results: dict[str, list[Result]] = {name: [] for name in candidates}
    for _ in range(rounds):
        for name, candidate in candidates.items():
            results[name].append(candidate())
    return results


def command_line(description: str, rounds: int | None = None) -> argparse.ArgumentParser:
    """Parser of a benchmark. description: the script's docstring. rounds: default of `--rounds`, of one that times."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    if rounds is not None:
        parser.add_argument("--rounds", type=int, default=rounds, help="to take the median of (default: %(default)s)")
        parser.add_argument("--json", type=Path, nargs="?", const=STDOUT, metavar="FILE", help=JSON_HELP)
    return parser


def machine() -> dict[str, Any]:
    """What a figure depends on besides the code: CPU, cores, threads, load, GPU, versions."""
    import torch

    cpu = _cpu()
    return {
        "cpu": cpu.get("model name", platform.machine()),  # virtual machines often hide all of it but family and model
        "family": cpu.get("cpu family"),
        "model": cpu.get("model"),
        "avx512_vbmi2": "avx512_vbmi2" in cpu.get("flags", "").split(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 2),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        **{name: _version(name) for name in PACKAGES},
    }


def _cpu() -> dict[str, str]:
    """Fields of /proc/cpuinfo, of the first core; none where there is no such file."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().split("\n\n")[0].splitlines() if path.exists() else []
    return {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def table(title: str, headings: Iterable[str], left: int = 1) -> Table:
    """Empty table; the first ``left`` columns are names, the others figures."""
    drawn = Table(title=title, title_justify="left")
    for index, heading in enumerate(headings):
        drawn.add_column(heading, justify="left" if index < left else "right")
    return drawn


def markdown(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Table for a README."""
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def report(results: Any, tables: Sequence[Table], json_file: Path | None) -> None:
    """Print the tables under a line that states the machine, and write the figures as JSON.

    json_file: of `--json`; STDOUT prints the JSON and nothing else.
    """
    found = machine()
    text = json.dumps({"machine": found, "results": results}, indent=1, ensure_ascii=False, default=asdict)
    if json_file == STDOUT:
        print(text)
        return
    console = Console()
    console = console if console.is_terminal else Console(width=TABLE_WIDTH)
    console.print(", ".join(f"{name} {value}" for name, value in found.items() if value is not None), highlight=False)
    for drawn in tables:
        console.print(drawn)
    if json_file:
        json_file.write_text(text + "\n")


def panels(count: int = 1, **how: Any) -> tuple[Any, list[Any]]:
    """Figure and its panels side by side, for `save_plot`. how: keywords of ``matplotlib.pyplot.subplots``."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    size = (PANEL[0] * min(count, 2), PANEL[1])
    figure, axes = plt.subplots(1, count, figsize=size, layout="constrained", squeeze=False, **how)
    for panel in axes[0]:
        panel.grid(alpha=0.3, which="both")
    return figure, list(axes[0])


def save_plot(figure: Any, path: Path) -> None:
    """Write a figure of `panels` as PNG."""
    import matplotlib.pyplot as plt

    figure.savefig(path, dpi=DPI)
    plt.close(figure)
