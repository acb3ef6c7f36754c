"""Fill the READMEs from a day on a GPU: `python tests/benchmarks/gpu_tables.py [FOLDER]`.

FOLDER: of `gpu_day.py`. Copies its figures and plots to `results/<GPU>/` and the tuned table to
`triton_kernels/configs/<GPU>.json`, and writes the tables between `<!-- gpu: NAME -->` and `<!-- end -->` of
`README.md` and `tests/benchmarks/README.md`. What was not measured keeps the text that it has.
"""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from expert_kernels import BASELINE as EXPERTS_BASELINE
from harness import RESULTS, command_line, markdown
from kernels import BASELINE, Report, Timing

from vllm_babai.files import write_atomically
from vllm_babai.triton_kernels.configs import FOLDER, Table, file_name

ROOT = Path(__file__).parents[2]
READMES = (ROOT / "README.md", ROOT / "tests" / "benchmarks" / "README.md")
KEPT = ("day", "experts", "serving", "profile", "quantize")  # JSON files of a day besides the kernels'

Day = dict[str, Any]  # name of a JSON file → what it holds


def read_day(folder: Path) -> Day:
    """All JSON files of a day. Raises SystemExit where there was none, or none on a GPU."""
    day = {path.stem: json.loads(path.read_text()) for path in folder.glob("*.json")}
    gpu = day.get("day", {}).get("machine", {}).get("gpu")
    if not gpu:
        raise SystemExit(f"{folder} has no day.json of a GPU: run gpu_day.py --out {folder} on one first")
    return day


def gpu_of(day: Day) -> str:
    """Name of the card."""
    return day["day"]["machine"]["gpu"]


def versions(day: Day) -> str:
    """The line below a table: card, versions, command."""
    found = day["day"]["machine"]
    return f"{found['gpu']}, vLLM {found['vllm']}, torch {found['torch']}: `python tests/benchmarks/gpu_day.py`."


def kernel_report(day: Day) -> Report | None:
    """The timings of `kernels.py`, as far as it came."""
    found = day.get(file_name(gpu_of(day)))
    if found is None:
        return None
    return Report(found["gpu"], found["copy_bandwidth"], [Timing(**timing) for timing in found["timings"]])


def kernels_table(day: Day) -> str | None:
    """Times the speed of cuBLAS in bf16, by layer and kernel; at one token the share of the copy bandwidth, too."""
    timed = kernel_report(day)
    if timed is None:
        return None
    tokens = sorted({timing.tokens for timing in timed.timings})
    known = {(timing.layer, timing.kernel, timing.tokens): timing for timing in timed.timings}
    measured = {(layer, m) for layer, kernel, m in known if kernel == BASELINE}
    rows = []
    for layer, kernel in dict.fromkeys((timing.layer, timing.kernel) for timing in timed.timings):
        cells = []
        for m in tokens:
            timing = known.get((layer, kernel, m))
            if timing is None or (layer, m) not in measured:
                cells.append("")
            else:
                share = f" ({100 * timed.bandwidth(timing):.0f}%)" if m == 1 else ""
                cells.append(f"{timed.speedup(timing):.2f}{share}")
        rows.append([layer, kernel, *cells])
    title = f"Times the speed of cuBLAS in bf16; in brackets the share of {timed.copy_bandwidth / 1e12:.2f} TB/s.\n\n"
    return title + markdown(["layer", "kernel", *(f"M={m}" for m in tokens)], rows) + f"\n{versions(day)}\n"


def experts_table(day: Day) -> str | None:
    """Times the speed of vLLM's bf16 experts, by mixture and kernel."""
    if "experts" not in day:
        return None
    seconds = {(one["mixture"], one["kernel"], one["tokens"]): one["seconds"] for one in day["experts"]["results"]}
    tokens = sorted({m for _, _, m in seconds})
    rows = []
    for mixture, kernel in dict.fromkeys((mixture, kernel) for mixture, kernel, _ in seconds):
        cells = []
        for m in tokens:
            own, other = seconds.get((mixture, kernel, m)), seconds.get((mixture, EXPERTS_BASELINE, m))
            cells.append("" if own is None or other is None else f"{other / own:.2f}")
        rows.append([mixture, kernel, *cells])
    title = f"The experts of a layer, times the speed of {EXPERTS_BASELINE}.\n\n"
    return title + markdown(["mixture", "kernel", *(f"M={m}" for m in tokens)], rows) + f"\n{versions(day)}\n"


def serving_table(day: Day) -> str | None:
    """Milliseconds per token of one request and tokens per second of 64, of a model of 8B shapes."""
    if "serving" not in day:
        return None
    rows = [
        [name, f"{figure['tpot_ms']:.2f}", f"{figure['throughput']:.0f}"]
        for name, figure in day["serving"]["results"].items()
    ]
    return markdown(["8B shapes", "ms per token, 1 request", "tokens/s, 64 requests"], rows) + f"\n{versions(day)}\n"


def quantize_table(day: Day) -> str | None:
    """Minutes for models of 8 and 70 billion weights, with the peaks of the host."""
    if "quantize" not in day:
        return None
    found = day["quantize"]["results"]
    cells = [f"{found['minutes'][name]:.0f}" for name in ("8B", "70B")]
    cells += [f"{found['memory'] / 1e9:.1f}", f"{found['threads']:.0f}", f"{found['disk'] / 1e9:.1f}"]
    headings = ["minutes, 8B", "minutes, 70B", "host memory, GB", "threads", "disk, GB"]
    return markdown(headings, [cells]) + f"\nExtrapolated from {found['weights'] / 1e6:.0f}M weights. {versions(day)}\n"


TABLES: dict[str, Callable[[Day], str | None]] = {
    "kernels": kernels_table,
    "experts": experts_table,
    "serving": serving_table,
    "quantize": quantize_table,
}


def fill(text: str, day: Day) -> str:
    """The text of a README with its tables replaced by those of the day."""

    def replaced(section: re.Match[str]) -> str:
        made = TABLES[section["name"]](day)
        return section[0] if made is None else f"<!-- gpu: {section['name']} -->\n{made}<!-- end -->"

    return re.sub(r"<!-- gpu: (?P<name>\w+) -->\n.*?<!-- end -->", replaced, text, flags=re.DOTALL)


def keep(day: Day, folder: Path, results: Path, configs: Path) -> list[Path]:
    """Copy figures, plots and the tuned table of a day to where the repository has them; returns what was written."""
    name = file_name(gpu_of(day))
    target = results / name
    target.mkdir(parents=True, exist_ok=True)
    written = []
    for stem in (*KEPT, name):
        for path in (folder / f"{stem}.json", folder / f"{stem}.png"):
            if path.exists():
                written.append(Path(shutil.copyfile(path, target / path.name)))
    if (folder / "config.json").exists():
        Table.read(folder / "config.json").write(configs / f"{name}.json")
        written.append(configs / f"{name}.json")
    return written


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("folder", type=Path, nargs="?", default=RESULTS / "gpu-day")
    options = parser.parse_args()
    day = read_day(options.folder)
    for path in keep(day, options.folder, RESULTS, FOLDER):
        print(path)
    for readme in READMES:
        write_atomically(readme, fill(readme.read_text(), day))
        print(readme)


if __name__ == "__main__":
    main()
