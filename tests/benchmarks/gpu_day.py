"""All that is to be measured on a GPU, in one command: `python tests/benchmarks/gpu_day.py [--out FOLDER]`.

Runs the steps below in order of value, each in a process of its own and under its own time limit, 25 minutes in all.
After every step `day.json` says how it ended, and the step's JSON, log and plots lie in the folder. The same command
goes on where it stopped: what has passed is not run again. `gpu_tables.py` then fills the tables of the READMEs.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from harness import RESULTS, command_line, machine, report, table

from vllm_babai.files import write_atomically

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
MINUTES = 25
GRACE = 5  # seconds from SIGTERM to SIGKILL
PASSED, FAILED, LATE, LEFT_OUT = "passed", "failed", "out of time", "left out"


@dataclass(frozen=True)
class Step:
    """One thing to find out. command: with `{out}` for the folder of the day. limit: seconds. needs: programs."""

    name: str
    shows: str
    command: tuple[str, ...]
    limit: int
    needs: tuple[str, ...] = ()


@dataclass(frozen=True)
class Outcome:
    """How a step ended. seconds: that it took. why: of a step that has not passed."""

    status: str
    seconds: float
    why: str = ""


def script(name: str, *arguments: str) -> tuple[str, ...]:
    """Command of a script next to this one."""
    return (sys.executable, str(HERE / name), *arguments)


def check(what: str, *arguments: str) -> tuple[str, ...]:
    """Command of one of the checks, with its figures in a file of that name."""
    return script("gpu_checks.py", what, "--json", f"{{out}}/{what}.json", *arguments)


SANITIZER = ("compute-sanitizer", "--error-exitcode", "9", "--tool")
STEPS = (
    Step("machine", "driver, compiler, Python.h; versions of torch, triton and vLLM", check("machine"), 20),
    Step("products", "every width, bucket, group size and dtype against the dense product", check("products"), 200),
    Step(
        "kernels",
        "speed beside cuBLAS, Marlin, Humming and others, M = 1 … 4096",
        script("kernels.py", "--out", "{out}", "--bits", "4", "3", "--tokens", "1", "16", "64", "128", "256", "1024"),
        220,
    ),
    Step(
        "experts",
        "mixtures of experts, right and how fast, beside vLLM's bf16 and Marlin",
        script("expert_kernels.py", "--json", "{out}/experts.json"),
        80,
    ),
    Step(
        "serving",
        "vLLM at 8B shapes, compiled: bf16, 4 and 3 bits, GPTQ-Marlin",
        script("gpu_serving.py", "{out}"),
        330,
    ),
    Step("replays", "100,000 replays of a graph: bitwise equal, counters zero", check("replays"), 40),
    Step("profile", "launches, device and host time of a product", check("profile"), 40),
    Step(
        "tune",
        "fastest launch configurations; an interrupted run goes on",
        (sys.executable, "-m", "vllm_babai.offline.cli", "tune", "--out", "{out}/config.json"),
        150,
    ),
    Step("coded", "HPTQ that stays coded, with the strides of its results", check("coded"), 40),
    Step(
        "gate",
        "registers, spills and instructions with this Triton",
        (sys.executable, str(ROOT / "tests" / "kernels" / "gate.py"), "{architecture}"),
        60,
    ),
    Step("memcheck", "accesses out of bounds", (*SANITIZER, "memcheck", *check("sanitized")), 50, (SANITIZER[0],)),
    Step("racecheck", "races in shared memory", (*SANITIZER, "racecheck", *check("sanitized")), 50, (SANITIZER[0],)),
    Step(
        "requantized",
        "another rate in the same folder, served from vLLM's cache",
        script("gpu_serving.py", "{out}", "--requantized"),
        110,
    ),
    Step("quantize", "minutes, memory, threads and disk to quantize", script("gpu_quantize.py", "{out}"), 110),
)


class Day:
    """The folder of a day: `day.json` and what the steps leave."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.file = folder, folder / "day.json"
        known = json.loads(self.file.read_text())["steps"] if self.file.exists() else {}
        self.outcomes = {name: Outcome(**outcome) for name, outcome in known.items()}

    def add(self, step: Step, outcome: Outcome) -> None:
        """Keep how a step ended."""
        self.outcomes[step.name] = outcome
        steps = {name: asdict(outcome) for name, outcome in self.outcomes.items()}
        write_atomically(self.file, json.dumps({"machine": machine(), "steps": steps}, indent=1) + "\n")

    def run(self, steps: Sequence[Step], seconds: float) -> None:
        """Run the steps that have not passed, for so many seconds in all."""
        end = time.monotonic() + seconds
        for step in steps:
            if step.name in self.outcomes and self.outcomes[step.name].status == PASSED:
                continue
            missing = [program for program in step.needs if not shutil.which(program)]
            left = min(step.limit, end - time.monotonic())
            if missing:
                outcome = Outcome(LEFT_OUT, 0.0, f"there is no {' and no '.join(missing)} here")
            elif left <= 0:
                outcome = Outcome(LATE, 0.0, "the time for the day was over: run it again")
            else:
                print(f"{step.name}: {step.shows} (at most {left:.0f} seconds)", flush=True)
                outcome = self._run(step, left)
            self.add(step, outcome)
            print(f"{step.name}: {outcome.status}, {outcome.seconds:.0f} s {outcome.why}", flush=True)

    def _run(self, step: Step, limit: float) -> Outcome:
        places = {"{out}": str(self.folder), "{architecture}": _architecture()}
        command = [_filled(argument, places) for argument in step.command]
        log = self.folder / f"{step.name}.log"
        started = time.monotonic()
        with log.open("w") as output:
            process = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=output, start_new_session=True)
            try:
                status = process.wait(limit)
            except BaseException as stopped:  # out of time, or Ctrl-C: nothing goes on running on the GPU
                _end(process)
                if not isinstance(stopped, subprocess.TimeoutExpired):
                    raise
                return Outcome(LATE, time.monotonic() - started, f"stopped after {limit:.0f} s, see {log.name}")
        seconds = time.monotonic() - started
        if status:
            return Outcome(FAILED, seconds, f"exit status {status}, see {log.name}")
        return Outcome(PASSED, seconds)


def _filled(argument: str, places: dict[str, str]) -> str:
    for place, value in places.items():
        argument = argument.replace(place, value)
    return argument


def _architecture() -> str:
    """Of this machine's GPU; sm_90 where there is none, for tests."""
    import torch

    if not torch.cuda.is_available():
        return "sm_90"
    return "sm_{}{}".format(*torch.cuda.get_device_capability())


def _end(process: subprocess.Popen) -> None:
    """End a process and all that it has started."""
    for how in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, how)
            process.wait(GRACE)
        except ProcessLookupError:
            break
        except subprocess.TimeoutExpired:
            continue
    process.wait()


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument(
        "--out", type=Path, default=RESULTS / "gpu-day", help="folder of the day (default: %(default)s)"
    )
    parser.add_argument("--minutes", type=float, default=MINUTES, help="in all (default: %(default)s)")
    parser.add_argument("--only", nargs="+", choices=[step.name for step in STEPS], help="run these steps alone")
    options = parser.parse_args()
    import torch

    if not torch.cuda.is_available():
        raise SystemExit("This measures a GPU, and there is none here.")
    day = Day(options.out)
    steps = [step for step in STEPS if not options.only or step.name in options.only]
    day.run(steps, 60 * options.minutes)
    drawn = table(f"the day in {options.out}", ("step", "shows", "ended", "seconds", "why"), left=3)
    for step in steps:
        outcome = day.outcomes[step.name]
        drawn.add_row(step.name, step.shows, outcome.status, f"{outcome.seconds:.0f}", outcome.why)
    report({name: asdict(outcome) for name, outcome in day.outcomes.items()}, [drawn], None)
    raise SystemExit(any(day.outcomes[step.name].status in (FAILED, LATE) for step in steps))


if __name__ == "__main__":
    main()
