"""What the compilers make of the kernels for every GPU, against limits of the chips and the table `gate.json`.

Each architecture is compiled by `gate.py` in a process of its own, without a GPU and without the interpreter, by the
Triton that is installed and by those in folders `triton-*` of the environment: vLLM 0.32 installs 3.7.1 on a GPU, vLLM
0.33 installs 3.8. After a change that is meant to change the code: `python tests/kernels/gate.py --update`.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import triton

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
    "decode coded": 80,
    "multiply coded, 1 token": 80,
}
TENSOR_MEMORY = 512  # columns; more compiles to a trap


# Version → folder that holds it, None for the one that is installed.
TRITONS: dict[str, Path | None] = {triton.__version__: None}
TRITONS |= {path.name.removeprefix("triton-"): path for path in sorted(Path(sys.prefix).glob("triton-*"))}


@pytest.mark.parametrize("version", TRITONS)
@pytest.mark.parametrize("architecture", SHARED_MEMORY)
def test_compiled_kernels(architecture: str, version: str, tmp_path: Path) -> None:
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path), "TRITON_INTERPRET": "0"}
    if folder := TRITONS[version]:
        environment["PYTHONPATH"] = os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, str(HERE / "gate.py"), architecture]
    child = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert child.returncode == 0, child.stderr[-4000:]
    measured = json.loads(child.stdout)[architecture]
    recorded = RECORDED.get(version, {}).get(architecture)
    for case, found in measured.items():
        check_limits(architecture, case, found)
        if recorded:
            check_against_table(f"Triton {version}, {architecture}, {case}", found, recorded[case])
    if recorded:
        assert measured.keys() == recorded.keys()


def check_limits(architecture: str, case: str, found: dict[str, float]) -> None:
    name = f"{architecture}, {case}"
    assert found["spills"] == 0, f"{name}: registers are spilled"
    assert found["shared"] <= SHARED_MEMORY[architecture], f"{name}: {found['shared']} bytes of shared memory"
    assert found["tensor_memory"] <= TENSOR_MEMORY, f"{name}: {found['tensor_memory']} columns of tensor memory"
    ceiling = INSTRUCTIONS_PER_WEIGHT.get(case, float("inf"))
    assert found.get("instructions_per_weight", 0) <= ceiling, f"{name}: more than {ceiling} instructions per weight"
    reads_one_by_one = "coded" in case or "overflow" in case
    assert found["wide_loads"] or reads_one_by_one, f"{name}: no 128-bit loads"
    multiplies_matrices = not case.startswith("dequantize") and "coded" not in case
    assert found["matrix_instructions"] or not multiplies_matrices, f"{name}: no matrix instructions"


def check_against_table(name: str, found: dict[str, float], recorded: dict[str, float]) -> None:
    """No worse than what was recorded with the same compiler."""
    for measure in ("instructions_per_weight", "shared"):
        if measure in recorded:
            assert found[measure] <= 1.02 * recorded[measure], f"{name}: {measure} has grown from {recorded[measure]}"
    assert found["registers"] <= recorded["registers"] + 8, f"{name}: registers have grown"
    for measure in ("wide_loads", "matrix_instructions"):
        assert found[measure] >= min(1, recorded[measure]), f"{name}: {measure} are gone"
