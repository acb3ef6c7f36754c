"""`deploy/setup.sh` on a GPU machine that lacks something: it says what, before it installs anything."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SETUP = Path(__file__).parents[2] / "deploy" / "setup.sh"


@pytest.fixture
def machine(tmp_path: Path) -> Path:
    """A checkout with nothing but the script, and a folder `bin` of the only programs that there are."""
    (tmp_path / "deploy").mkdir()
    shutil.copyfile(SETUP, tmp_path / "deploy" / "setup.sh")
    (tmp_path / "pyproject.toml").touch()
    programs = tmp_path / "bin"
    programs.mkdir()
    for name in ("bash", "cat", "dirname", "flock", "grep", "head", "sha256sum"):
        (programs / name).symlink_to(shutil.which(name) or pytest.fail(f"no {name}"))
    return tmp_path


def program(machine: Path, name: str, body: str) -> None:
    path = machine / "bin" / name
    path.write_text(f"#!/bin/bash\n{body}\n")
    path.chmod(0o755)


def set_up(machine: Path) -> subprocess.CompletedProcess:
    environment = {"PATH": str(machine / "bin"), "PYTHON": str(machine / "bin" / "python"), "HOME": os.environ["HOME"]}
    command = [str(machine / "bin" / "bash"), "deploy/setup.sh"]
    return subprocess.run(command, cwd=machine, env=environment, capture_output=True, text=True)


def gpu_with_driver(machine: Path, version: str) -> None:
    program(machine, "nvidia-smi", f'[[ $1 == --list-gpus ]] && echo "GPU 0: H100" || echo "{version}"')


def test_everything_that_is_missing_is_named_at_once(machine: Path) -> None:
    gpu_with_driver(machine, "550.54.15")
    program(machine, "python", f'[[ $2 == *Python.h* ]] && exit 1; exec {sys.executable} "$@"')
    result = set_up(machine)
    assert result.returncode != 0
    lines = result.stderr.splitlines()
    assert len(lines) == 3, result.stderr
    assert "driver" in lines[0] and "580" in lines[0] and "550.54.15" in lines[0]
    assert "gcc" in lines[1]
    assert "Python.h" in lines[2] and "python3-dev" in lines[2]
    assert not (machine / ".venv").exists()


@pytest.mark.parametrize("version", ["", "[N/A]", "No devices were found"])
def test_an_unreadable_driver_version_counts_as_missing(machine: Path, version: str) -> None:
    gpu_with_driver(machine, version)
    program(machine, "gcc", "")
    program(machine, "python", f'[[ $2 == *Python.h* ]] && exit 0; exec {sys.executable} "$@"')
    result = set_up(machine)
    assert result.returncode != 0
    assert result.stderr.count("\n") == 1 and "driver" in result.stderr
