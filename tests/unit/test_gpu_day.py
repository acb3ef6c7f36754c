"""The day on a GPU without one: made-up steps under real time limits, checks in Triton's interpreter, filled tables."""

import json
import os
import subprocess
import sys
from pathlib import Path

import gpu_day
import gpu_tables
import psutil
import pytest
from gpu_checks import error_of
from gpu_day import FAILED, LATE, LEFT_OUT, MINUTES, PASSED, STEPS, Day, Step
from harness import machine

from vllm_babai.triton_kernels.configs import Config, Entry, Table

CHECKS = Path(gpu_day.__file__).with_name("gpu_checks.py")


def python(name: str, code: str, limit: int = 30, needs: tuple[str, ...] = ()) -> Step:
    return Step(name, "", (sys.executable, "-c", code, "{out}"), limit, needs)


def test_steps_run_under_their_limits_and_the_rest_goes_on(tmp_path: Path) -> None:
    started = tmp_path / "started"
    child = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time, os, sys; "
    child += "open(sys.argv[1], \"w\").write(str(os.getpid())); time.sleep(600)', sys.argv[1] + '/started'])"
    steps = [
        python("good", "import sys; open(sys.argv[1] + '/made', 'a').write('x'); print('said')"),
        python("slow", child, limit=8),
        python("bad", "raise SystemExit('wrong')"),
        python("nowhere", "", needs=("no-such-program",)),
    ]
    Day(tmp_path).run(steps, 60)
    outcomes = {
        name: outcome["status"] for name, outcome in json.loads((tmp_path / "day.json").read_text())["steps"].items()
    }
    assert outcomes == {"good": PASSED, "slow": LATE, "bad": FAILED, "nowhere": LEFT_OUT}
    assert "said" in (tmp_path / "good.log").read_text() and "wrong" in (tmp_path / "bad.log").read_text()
    running = [one.pid for one in psutil.process_iter(["status"]) if one.info["status"] != psutil.STATUS_ZOMBIE]
    assert int(started.read_text()) not in running, "what a late step has started still runs"


def test_the_same_command_goes_on_where_it_stopped(tmp_path: Path) -> None:
    count = "import sys; open(sys.argv[1] + '/{0}', 'a').write('x'); raise SystemExit({1})"
    steps = [python("good", count.format("good", 0)), python("bad", count.format("bad", 1))]
    Day(tmp_path).run(steps, 0)
    assert {outcome.status for outcome in Day(tmp_path).outcomes.values()} == {LATE}
    for _ in range(2):
        Day(tmp_path).run(steps, 60)
    assert (tmp_path / "good").read_text() == "x" and (tmp_path / "bad").read_text() == "xx"


def test_the_steps_fit_the_day_and_name_scripts_that_there_are(tmp_path: Path) -> None:
    assert sum(step.limit for step in STEPS) <= 60 * MINUTES
    assert len({step.name for step in STEPS}) == len(STEPS)
    for step in STEPS:
        for argument in step.command:
            assert not argument.endswith(".py") or Path(argument).exists()


def test_checks_in_the_interpreter(tmp_path: Path) -> None:
    command = [sys.executable, str(CHECKS), "sanitized", "--small", "--json", str(tmp_path / "found.json")]
    child = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert child.returncode == 0, child.stdout + child.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    assert all(one["right"] for one in found["results"]) and len(found["results"]) >= 12
    assert found["machine"]["torch"]


def test_a_wrong_product_shows() -> None:
    import torch

    weight, x = torch.randn(64, 32), torch.randn(4, 32)
    assert error_of(x.bfloat16() @ weight.bfloat16().t(), x, weight) == pytest.approx(1.0)
    y = x @ weight.t()
    y[2, 3] += 1
    assert error_of(y, x, weight) > 1.5


@pytest.fixture
def day(tmp_path: Path) -> Path:
    """The folder of a made-up day."""
    folder = tmp_path / "day"
    folder.mkdir()
    found = machine() | {"gpu": "Made-up GPU", "vllm": "0.32.0"}
    timing = {"layer": "down", "out_features": 1000, "in_features": 2000, "bytes": 10**6, "error": None}
    timings = [
        timing | {"kernel": kernel, "tokens": m, "seconds": seconds}
        for m, kernel, seconds in ((1, "cuBLAS bf16", 4e-6), (1, "babai 4 bits", 1e-6), (64, "babai 4 bits", 2e-6))
    ]
    experts = [
        {"mixture": "Mixture", "kernel": kernel, "tokens": m, "seconds": seconds}
        for kernel, m, seconds in (("vLLM bf16", 1, 3e-6), ("babai 4 bits", 1, 1e-6), ("babai 4 bits", 8, 2e-6))
    ]
    files = {
        "day": {"machine": found, "steps": {"kernels": {"status": LATE, "seconds": 250.0, "why": ""}}},
        "Made-up_GPU": {"machine": found, "gpu": "Made-up GPU", "copy_bandwidth": 2e12, "timings": timings},
        "experts": {"machine": found, "results": experts},
        "serving": {"machine": found, "results": {"bf16": {"tpot_ms": 8.25, "throughput": 1500.0}}},
    }
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    Table(129, (Entry(4, 1, 64, 64, Config(64, 2, 3, 4)),)).write(folder / "config.json")
    return folder


def test_tables_are_filled_from_the_day(day: Path, tmp_path: Path) -> None:
    text = "".join(f"before\n<!-- gpu: {name} -->\nnothing yet\n<!-- end -->\n" for name in gpu_tables.TABLES)
    once = gpu_tables.fill(text, gpu_tables.read_day(day))
    assert "| down | babai 4 bits | 4.00 (50%) |  |" in once
    assert "| bf16 | 8.25 | 1500 |" in once
    assert "| Mixture | babai 4 bits | 3.00 |  |" in once
    assert once.count("Made-up GPU, vLLM 0.32.0") == 3 and once.count("nothing yet") == 1  # nothing was quantized
    assert gpu_tables.fill(once, gpu_tables.read_day(day)) == once
    results, configs = tmp_path / "results", tmp_path / "configs"
    configs.mkdir()
    written = gpu_tables.keep(gpu_tables.read_day(day), day, results, configs)
    assert {path.name for path in written} == {"day.json", "experts.json", "serving.json", "Made-up_GPU.json"}
    assert Table.read(configs / "Made-up_GPU.json").dequantize_from == 129


def test_the_readmes_have_places_for_all_tables() -> None:
    text = "".join(readme.read_text() for readme in gpu_tables.READMES)
    for name in gpu_tables.TABLES:
        assert f"<!-- gpu: {name} -->\n" in text


def test_a_folder_without_a_day_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"gpu_day.py --out"):
        gpu_tables.read_day(tmp_path)
