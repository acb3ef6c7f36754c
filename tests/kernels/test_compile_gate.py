"""What the compilers make of the kernels for every GPU, against limits of the chips and the table `gate.json`.

Each architecture is compiled by `gate.py` in a process of its own, without a GPU and without the interpreter, by the
Tritons that vLLM installs on a GPU (3.7.1 with vLLM 0.32, 3.8 with vLLM 0.33) and the one that is installed: one
architecture of each kind by the first, sm_90 by the second, the rest of it among the long tests. After a change that
is meant to change the code: `python tests/kernels/gate.py --update`, with each version.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from tritons import FIRST, PINNED, TRITONS, environment

HERE = Path(__file__).parent
RECORDED = json.loads((HERE / "gate.json").read_text())
SHARED_MEMORY = {
    "sm_80": 166_912,
    "sm_86": 101_376,
    "sm_89": 101_376,
    "sm_90": 232_448,
    "sm_100": 232_448,
    "sm_120": 101_376,
    "gfx942": 65_536,
}
INSTRUCTIONS_PER_WEIGHT = {
    "4 bits, 1 token": 2.5,
    "3 bits, 1 token": 2.6,
    "trellis 2 bits, 1 token": 2.6,
    "trellis 3 bits, 1 token": 2.8,
    "experts, trellis 2 bits, 1 row": 2.6,
    "experts 4 bits, 1 row": 2.5,
    "experts 3 bits, 1 row": 2.6,
    "decode coded": 80,
    "multiply coded, 1 token": 80,
}
TENSOR_MEMORY = 512  # columns; more compiles to a trap

# sm_86 and sm_89 have the instructions of sm_80 and the shared memory of sm_120.
ALWAYS = [(FIRST, architecture) for architecture in ("sm_80", "sm_90", "sm_100", "sm_120")]
ALWAYS += [(version, "sm_90") for version in PINNED if version != FIRST]
SELDOM = [
    (version, architecture)
    for version in TRITONS
    for architecture in SHARED_MEMORY
    if (version, architecture) not in ALWAYS
]


def compiled(version: str, architecture: str, cache: Path, *options: str) -> dict[str, dict[str, float]]:
    """Case → measures, of `gate.py` under this Triton."""
    command = [sys.executable, str(HERE / "gate.py"), architecture, *options]
    child = subprocess.run(
        command, env=environment(version, TRITON_CACHE_DIR=str(cache)), capture_output=True, text=True
    )
    assert child.returncode == 0, child.stderr[-4000:]
    return json.loads(child.stdout)[architecture]


@pytest.mark.parametrize(
    ("version", "architecture"), [*ALWAYS, *(pytest.param(*case, marks=pytest.mark.long) for case in SELDOM)]
)
def test_compiled_kernels(version: str, architecture: str, tmp_path: Path) -> None:
    measured = compiled(version, architecture, tmp_path)
    recorded = RECORDED.get(version, {}).get(architecture)
    for case, found in measured.items():
        check_limits(architecture, case, found)
        if recorded:
            check_against_table(f"Triton {version}, {architecture}, {case}", found, recorded[case])
    if recorded:
        assert measured.keys() == recorded.keys()


@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("architecture", [name for name in SHARED_MEMORY if name.startswith("sm_")])
@pytest.mark.parametrize("version", [version for version in TRITONS if version == FIRST])
def test_every_kernel_that_a_shipped_table_can_choose(version: str, architecture: str, tmp_path: Path) -> None:
    for case, found in compiled(version, architecture, tmp_path, "--shipped").items():
        check_limits(architecture, case, found)


def check_limits(architecture: str, case: str, found: dict[str, float]) -> None:
    name = f"{architecture}, {case}"
    assert found["spills"] == 0, f"{name}: registers are spilled"
    assert found["shared"] <= SHARED_MEMORY[architecture], f"{name}: {found['shared']} bytes of shared memory"
    assert found["tensor_memory"] <= TENSOR_MEMORY, f"{name}: {found['tensor_memory']} columns of tensor memory"
    ceiling = INSTRUCTIONS_PER_WEIGHT.get(case, float("inf"))
    assert found.get("instructions_per_weight", 0) <= ceiling, f"{name}: more than {ceiling} instructions per weight"
    reads_one_by_one = any(word in case for word in ("coded", "overflow", "dequantize trellis", "sort visits"))
    assert found["wide_loads"] or reads_one_by_one, f"{name}: no 128-bit loads"
    multiplies_matrices = not case.startswith(("dequantize", "look up", "sort", "combine")) and "coded" not in case
    assert found["matrix_instructions"] or not multiplies_matrices, f"{name}: no matrix instructions"


def check_against_table(name: str, found: dict[str, float], recorded: dict[str, float]) -> None:
    """No worse than what was recorded with the same compiler."""
    for measure in ("instructions_per_weight", "shared"):
        if measure in recorded:
            assert found[measure] <= 1.02 * recorded[measure], f"{name}: {measure} has grown from {recorded[measure]}"
    assert found["registers"] <= recorded["registers"] + 8, f"{name}: registers have grown"
    for measure in ("wide_loads", "matrix_instructions"):
        assert found[measure] >= min(1, recorded[measure]), f"{name}: {measure} are gone"
