"""Five minutes of `tests/benchmarks/soak.py`: no wrong token, no unexpected status, a server that ends when told."""

import subprocess
import sys
from pathlib import Path

import pytest

SOAK = Path(__file__).parents[1] / "benchmarks" / "soak.py"


@pytest.mark.long
def test_many_hasty_and_rude_clients() -> None:
    command = [sys.executable, str(SOAK), "--minutes", "5", "--clients", "8"]
    found = subprocess.run(command, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout[-3000:] + found.stderr[-3000:]
