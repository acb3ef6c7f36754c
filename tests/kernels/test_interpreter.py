"""Runs `interpreted.py`: Triton's interpreter has to be switched on before the kernels are defined, hence a process."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SUITE = Path(__file__).with_name("interpreted.py")


@pytest.mark.parametrize("chosen", ["test_widths", "test_overflow", "not test_widths and not test_overflow"])
def test_kernels_in_the_interpreter(chosen: str) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-k", chosen, "-p", "no:cacheprovider", str(SUITE)]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    child = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert child.returncode == 0, child.stdout[-8000:] + child.stderr[-2000:]
