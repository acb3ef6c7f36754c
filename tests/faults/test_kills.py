"""What ends a run before its time: Ctrl-C at every change of the file system, SIGTERM, files that cannot be written.

Each leaves either nothing or what `--resume` goes on with, to the same bytes. Kills without a trace, at every step, are
in `tests/unit/test_place.py`.
"""

import gc
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

OPTIONS = ("--samples", "2", "--sequence-length", "32", "--paths", "1", "--no-drift")
# Bytes that a file may have: less than a report, than config.json, than a part, than the tokenizer.
LIMITS = (300, 2000, 12_000, 60_000)


def contents(folder: Path) -> dict[str, Any]:
    """All files of a checkpoint; of its report what does not depend on the clock."""
    found: dict[str, Any] = {path.name: path.read_bytes() for path in folder.iterdir()}
    report = json.loads(found.pop("babai_report.json"))
    report["seconds"] = [layer.pop("seconds") for layer in report["layers"]] and None
    return found | {"report": report}


@pytest.fixture(scope="module")
def whole(source: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What a run gives that nothing interrupts; made by the first test that needs it."""
    found: dict[str, Any] = {}

    def make(babai: Any) -> dict[str, Any]:
        if not found:
            out = tmp_path_factory.mktemp("whole") / "out"
            assert babai("quantize", source, out, "--calibration", text, *OPTIONS).status == 0
            found.update(contents(out))
        return found

    return make


@contextmanager
def interrupted_at(step: int) -> Iterator[None]:
    """Get SIGINT, as by Ctrl-C, at the change of the file system of this number."""
    gc.collect()  # else folders of earlier tests are removed within this one's steps, by a destructor: it drops signals
    count = [0]

    def counted(change: Callable[..., Any]) -> Callable[..., Any]:
        def changed(*args: Any, **kwargs: Any) -> Any:
            count[0] += 1
            if count[0] == step:
                os.kill(os.getpid(), signal.SIGINT)
            return change(*args, **kwargs)

        return changed

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # what runs in the background may ignore it
    try:
        with pytest.MonkeyPatch.context() as patch:
            for name in ("replace", "rename", "unlink", "rmdir", "mkdir"):
                patch.setattr(f"os.{name}", counted(getattr(os, name)))
            yield
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("every", [7, pytest.param(1, marks=pytest.mark.long)])
def test_ctrl_c_at_any_step(
    every: int, source: Path, text: Path, tmp_path: Path, babai: Any, figures: Any, whole: Any
) -> None:
    wanted, step, status = whole(babai), 1, 130
    arguments = ("--calibration", text, *OPTIONS)
    while status == 130:
        out = tmp_path / str(step) / "out"
        out.parent.mkdir()
        with interrupted_at(step):
            found = babai("quantize", source, out, *arguments)
        status = found.status
        assert found.traceback is None, found
        if status == 130:
            assert "goes on where it stopped with --resume" in found.error
            assert babai("quantize", source, out, *arguments, "--resume").status == 0, f"step {step}"
            figures["SIGINT", "harmless"] += 1
        assert contents(out) == wanted, f"step {step}"
        assert [path.name for path in out.parent.iterdir()] == ["out"], f"step {step}"
        shutil.rmtree(out.parent)
        step += every
    assert status == 0 and step > 20


@pytest.mark.long
def test_sigterm(source: Path, text: Path, tmp_path: Path, babai: Any, figures: Any, whole: Any) -> None:
    out = tmp_path / "out"
    arguments = ["quantize", str(source), str(out), "--calibration", str(text), *OPTIONS]
    process = subprocess.Popen([sys.executable, "-m", "vllm_babai.offline.cli", *arguments])
    while not any((tmp_path / "out.partial").glob("*.safetensors")):
        assert process.poll() is None, "the run ended before it could be told to"
        time.sleep(0.002)
    process.send_signal(signal.SIGTERM)
    assert process.wait() in (0, -signal.SIGTERM)
    assert babai(*arguments, "--resume" if not out.exists() else "--overwrite").status == 0
    assert contents(out) == whole(babai)
    figures["SIGTERM", "harmless"] += 1


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """No file may be longer: what a full disk, or a user's quota, is to a program that writes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("limit", [pytest.param(LIMITS[0], marks=pytest.mark.long), *LIMITS[1:]])
def test_files_that_cannot_be_written(
    limit: int, source: Path, text: Path, tmp_path: Path, babai: Any, figures: Any, whole: Any
) -> None:
    wanted, out = whole(babai), tmp_path / "out"
    arguments = ("quantize", source, out, "--calibration", text, *OPTIONS)
    with files_of_at_most(limit):
        found = babai(*arguments)
    figures["no room for a file", "refused by name" if found.refused else "traceback"] += 1
    assert found.refused, found
    assert str(out) in found.error and not out.exists()
    assert babai(*arguments, "--resume").status == 0
    assert contents(out) == wanted
