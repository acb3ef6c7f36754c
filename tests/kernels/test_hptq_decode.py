"""The GPU decoder of HPTQ, alone and fused with a product: exact in the interpreter, and compiled for GPUs."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from vllm_babai.coded import coded_tensors
from vllm_babai.format import HPTQ, LatticeWeight, hptq
from vllm_babai.triton_kernels.coded import MAX_TOKENS, multiply_coded, multiply_kernel
from vllm_babai.triton_kernels.entropy import decode, decode_kernel

TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
TYPES = {
    "words_ptr": "*i16",
    "ends_ptr": "*i64",
    "row_class_ptr": "*u8",
    "column_class_ptr": "*u8",
    "table_ptr": "*i32",
    "scales_ptr": "*fp32",
    **dict.fromkeys(("rows", "columns", "tile_rows", "tile_columns", "scale_stride", "group_size", "offset"), "i32"),
}


def test_interpreted_decoder_is_exact() -> None:
    """In a process of its own: the interpreter cannot be switched on after Triton's kernels were defined."""
    script = [sys.executable, __file__]
    child = subprocess.run(script, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert child.returncode == 0, child.stdout + child.stderr


@pytest.mark.parametrize("architecture", [80, 90, 100, 120])
@pytest.mark.parametrize("out", ["i16", "bf16"])
def test_decoder_compiles(architecture: int, out: str, tmp_path: Path) -> None:
    types = {**TYPES, "out_ptr": f"*{out}"}
    constants = {"SHIFT": 0, "LANES": 32, "DEQUANTIZE": out == "bf16", "GROUPED": False, "BACKEND": "cuda"}
    assembly = assembly_of(decode_kernel, types, constants, architecture, tmp_path)
    assert "VOTE" in assembly and "SHFL" not in assembly  # lanes are counted by votes, not by a scan


@pytest.mark.parametrize("architecture", [80, 90, 100, 120])
@pytest.mark.parametrize("tokens", [1, MAX_TOKENS])
def test_fused_kernel_compiles(architecture: int, tokens: int, tmp_path: Path) -> None:
    types = {**TYPES, "x_ptr": "*fp32", "partial_ptr": "*fp32"}
    constants = {"SHIFT": 0, "LANES": 32, "TOKENS": tokens, "GROUPED": False, "BACKEND": "cuda"}
    assembly = assembly_of(multiply_kernel, types, constants, architecture, tmp_path)
    step = assembly[assembly.index("VOTE") : assembly.rindex("VOTE")]
    assert "SHFL" not in step and "LDS" not in step  # lanes are added up, and layouts converted, at the end of a row


def assembly_of(kernel: Any, types: dict[str, str], constants: dict, architecture: int, tmp_path: Path) -> str:
    """Compiled without a stack or local memory."""
    names = kernel.arg_names
    pointers = {(names.index(name),): [["tt.divisibility", 16]] for name in names if name.endswith("_ptr")}
    source = ASTSource(
        kernel,
        {name: types.get(name, "constexpr") for name in names},
        {(names.index(name),): value for name, value in constants.items()},
        pointers,
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options={"num_warps": 1})
    cubin = tmp_path / "decode.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    usage = subprocess.check_output([TOOLS / "cuobjdump", "--dump-resource-usage", cubin], text=True)
    assert re.search(r"STACK:0 .*LOCAL:0", usage)
    return subprocess.check_output([TOOLS / "nvdisasm", "-c", cubin], text=True)


def check_decoder(rows: int, columns: int, sigma: float, uneven: float, scales: torch.Tensor) -> None:
    spread = sigma * torch.exp2(uneven * torch.randn(rows, 1)) * torch.exp2(uneven * torch.randn(columns))
    integers = torch.round(torch.randn(rows, columns) * spread).short()
    integers[2, 3:5] = torch.tensor([20000, -20000], dtype=torch.int16)
    weight = LatticeWeight(integers, scales)
    coded = hptq.read_blob(HPTQ.encode(weight).codes)
    tensors = coded_tensors(coded, scales, torch.device("cpu"))
    assert torch.equal(decode(tensors, torch.empty(rows, columns, dtype=torch.int16)), integers)
    workspace = decode(tensors, torch.empty(rows, columns, dtype=torch.bfloat16))
    assert torch.equal(workspace, weight.dequantize(torch.bfloat16))
    for tokens in (1, 3, 5):
        x = torch.randn(tokens, columns)
        expected = x @ weight.dequantize().t()
        assert torch.allclose(multiply_coded(x, tensors), expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))
    print(coded.shape, "contexts", len(coded.model.codes), "shift", coded.model.shift)


if __name__ == "__main__":
    torch.manual_seed(0)
    hptq.LANE_WEIGHTS, hptq.TILE_WEIGHTS = 64, 1024  # all lanes in matrices that an interpreter gets through
    check_decoder(40, 100, 1.5, 0.7, torch.rand(1, 1).bfloat16())
    check_decoder(9, 900, 40.0, 0.0, torch.rand(9, 3).bfloat16())
    check_decoder(10, 45, 1.0, 0.0, torch.rand(1, 45).bfloat16())
