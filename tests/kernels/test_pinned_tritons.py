"""The executed PTX of `test_compiled.py`, by the Tritons that vLLM installs on a GPU; a process for each."""

import subprocess
import sys
from pathlib import Path

import pytest
from tritons import PINNED, environment

SUITE = Path(__file__).with_name("test_compiled.py")
# By architecture, dtype, columns, groups, tokens and bits: scales by row and by group, both kinds of matrix
# instructions and the one-token path; then overflow of 32 bits, and the decoder.
SAMPLE = "test_product and (1-4] or 11-4] or 16-5] or 64-4]) or test_heavy_overflow and sm_90-3 or test_coded"


@pytest.mark.parametrize("version", PINNED)
@pytest.mark.parametrize("chosen", [SAMPLE, pytest.param("", id="all", marks=pytest.mark.long)])
def test_executed_ptx(version: str, chosen: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-k", chosen, "-p", "no:cacheprovider", str(SUITE)]
    child = subprocess.run(
        command, env=environment(version, TRITON_CACHE_DIR=str(tmp_path)), capture_output=True, text=True
    )
    assert child.returncode == 0, child.stdout[-8000:] + child.stderr[-2000:]


def test_the_version_on_the_path_is_the_one_that_compiles() -> None:
    for version in PINNED:
        command = [sys.executable, "-c", "import triton; print(triton.__version__)"]
        child = subprocess.run(command, env=environment(version), capture_output=True, text=True)
        assert child.stdout.strip() == version, child.stderr
