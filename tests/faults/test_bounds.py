"""The compiled loops of the formats with numba's bounds checks on: no damaged blob makes them leave an array."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1] / "unit" / "test_format_checks.py"


@pytest.mark.long
def test_no_loop_leaves_its_arrays(tmp_path: Path) -> None:
    """Loops are compiled again, with checks; an access out of bounds is then an IndexError, which no test expects."""
    environment = os.environ | {"NUMBA_BOUNDSCHECK": "1", "NUMBA_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(TESTS)]
    found = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout[-3000:]
