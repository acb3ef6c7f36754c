"""The harness of the benchmarks, on made-up candidates; and that every script starts."""

import json
import subprocess
import sys
from pathlib import Path

import harness
import pytest
from harness import Median, alternate, ratio, time_rounds

SHARED = ("harness", "server")
SCRIPTS = sorted(path for path in Path(harness.__file__).parent.glob("*.py") if path.stem not in SHARED)


def test_candidates_alternate() -> None:
    calls: list[str] = []
    found = alternate({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, rounds=3)
    assert calls == list("ababab")
    assert [len(results) for results in found.values()] == [3, 3]


@pytest.mark.parametrize(("rounds", "least_seconds", "expected"), [(4, 0.0, 4), (1, 0.05, None)])
def test_time_rounds_warms_up_and_goes_on_as_long_as_asked(
    rounds: int, least_seconds: float, expected: int | None
) -> None:
    calls: list[str] = []
    times = time_rounds({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, rounds, least_seconds)
    measured = {name: len(one.wall) for name, one in times.items()}
    assert measured == {name: len(one.cpu) for name, one in times.items()}
    assert measured["a"] == measured["b"] == len(calls) // 2 - 1  # the first call of each does not count
    assert measured["a"] == expected if expected else measured["a"] > 1
    assert min(times["a"].wall) >= 0


def test_median_has_quartiles_or_extremes() -> None:
    assert Median.of([5.0, 1.0, 2.0, 4.0, 3.0]) == Median(3.0, 2.0, 4.0)
    assert Median.of([3.0, 1.0, 2.0]) == Median(2.0, 1.0, 3.0)
    assert Median.of([1.2]).text() == "1.20"
    assert Median(0.002, 0.001, 0.004).text(1, factor=1000) == "2.0 (1.0–4.0)"


def test_ratio_is_taken_within_each_round() -> None:
    assert ratio([2.0, 20.0, 4.0], [1.0, 10.0, 2.0]) == Median(2.0, 2.0, 2.0)


def test_report_is_tables_or_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    drawn = harness.table("a title", ("name", "figure"))
    drawn.add_row("x", "1.5")
    harness.report({"x": Median.of([1.5])}, [drawn], tmp_path / "figures.json")
    printed = capsys.readouterr().out
    assert "a title" in printed and "1.5" in printed and "torch" in printed
    written = json.loads((tmp_path / "figures.json").read_text())
    assert written["results"] == {"x": {"value": 1.5, "low": 1.5, "high": 1.5}}
    assert {"cpu", "cores", "threads", "load", "vllm"} <= written["machine"].keys()
    harness.report({"x": 1}, [drawn], harness.STDOUT)
    assert json.loads(capsys.readouterr().out)["results"] == {"x": 1}


def test_markdown_is_a_table() -> None:
    assert harness.markdown(("a", "b"), [("1", "2")]) == "| a | b |\n| --- | --- |\n| 1 | 2 |\n"


@pytest.mark.long
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_every_script_says_what_it_measures(script: Path) -> None:
    child = subprocess.run([sys.executable, str(script), "--help"], capture_output=True, text=True)
    assert child.returncode == 0, child.stderr
    assert f"tests/benchmarks/{script.name}" in child.stdout
