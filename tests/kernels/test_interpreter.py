"""Runs `interpreted.py`, `interpreted_trellis.py` and `interpreted_experts.py`, in processes of their own.

Triton's interpreter has to be switched on before the kernels are defined.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.mark.parametrize(
    ("suite", "chosen"),
    [
        ("interpreted.py", "test_widths"),
        ("interpreted.py", "test_overflow"),
        ("interpreted.py", "not test_widths and not test_overflow"),
        ("interpreted_trellis.py", "test"),
        ("interpreted_experts.py", "test"),
    ],
)
def test_kernels_in_the_interpreter(suite: str, chosen: str) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-k", chosen, "-p", "no:cacheprovider", str(HERE / suite)]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    child = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert child.returncode == 0, child.stdout[-8000:] + child.stderr[-2000:]
