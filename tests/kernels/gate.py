"""Compile gate: what the compilers make of the kernels, for GPUs that are not there.

`python tests/kernels/gate.py ARCHITECTURE…` compiles the kernels with the shipped configurations, needs no GPU and
prints the measures as JSON; `--update` writes them to gate.json. `test_compile_gate.py` compares the two.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from vllm_babai.triton_kernels.coded import MAX_TOKENS, multiply_kernel
from vllm_babai.triton_kernels.configs import Target, table_for
from vllm_babai.triton_kernels.dequantize import dense_kernel, overflow_kernel
from vllm_babai.triton_kernels.entropy import WARP, decode_kernel
from vllm_babai.triton_kernels.fused import fused_constants, fused_kernel
from vllm_babai.triton_kernels.layout import Geometry

ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942")
TABLE = Path(__file__).with_name("gate.json")
TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"

# Argument name → type; what stands in MULTIPLES is a multiple of 16 in every layer that matters, as Triton finds out.
DENSE_TYPES = {
    "dense_ptr": "*i32",
    "scales_ptr": "*bf16",
    "entries_ptr": "*i16",
    "diagonal_ptr": "*i32",
    "starts_ptr": "*i32",
    "counters_ptr": "*i32",
    "partials_ptr": "*fp32",
    **dict.fromkeys(
        ("first_tile", "m", "n", "k", "padded_rows", "column_blocks", "group_size", "splits", "segments"), "i32"
    ),
}
CODED_TYPES = {
    "words_ptr": "*i16",
    "row_class_ptr": "*i16",
    "column_class_ptr": "*u8",
    **dict.fromkeys(("segments_ptr", "states_ptr", "table_ptr"), "*i32"),
    **dict.fromkeys(("scales_ptr", "x_ptr", "partial_ptr"), "*fp32"),
    "out_ptr": "*bf16",
    **dict.fromkeys(("all_rows", "columns", "groups", "group_size"), "i32"),
}
MULTIPLES = {"n", "k", "padded_rows", "all_rows", "columns"}  # and every pointer


def dense_types(dtype: str = "bf16") -> dict[str, str]:
    """Types for the kernels of dense + sparse, with activations and dequantized weights of `dtype`."""
    return DENSE_TYPES | dict.fromkeys(("x_ptr", "xt_ptr", "y_ptr", "weight_ptr"), f"*{dtype}")


def compile_kernel(kernel, types: dict[str, str], constants: dict, architecture: str, warps: int, multiples=MULTIPLES):
    """Compile a kernel for an architecture. types: of its arguments, by name; constants: of the others.

    multiples: integer arguments that are a multiple of 16; pointers always are.
    """
    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else types[name] for name in names}
    multiples = [name for name in names if name in multiples or name.endswith("_ptr")]
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in multiples}
    source = ASTSource(
        kernel, signature, {(names.index(name),): value for name, value in constants.items()}, attributes
    )
    if architecture.startswith("sm_"):
        target = GPUTarget("cuda", int(architecture[3:]), 32)
    else:
        target = GPUTarget("hip", architecture, 64)
    return triton.compile(source, target=target, options={"num_warps": warps, "enable_fp_fusion": True})


def measure(compiled, weights_per_iteration: int) -> dict[str, float]:
    """Registers, shared memory, spills and instructions of a compiled kernel.

    weights_per_iteration: weights that a program takes in one turn of its main loop; 0 when there is no such loop.
    """
    if "amdgcn" in compiled.asm:
        return _measure_amd(compiled)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = _tool("cuobjdump", "--dump-resource-usage", file.name)
        lines = _tool("nvdisasm", "-c", file.name).splitlines()
    registers, stack, local = re.search(r"REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)", usage).groups()
    code = [line for line in lines if re.match(r"\s*/\*[0-9a-f]{4,}\*/|\.L", line)]
    measures = {
        "registers": int(registers),
        "shared": compiled.metadata.shared,
        "spills": int(stack) + int(local) + _count(r"\b(STL|LDL)\b", code),
        "wide_loads": _count(r"\b(LDG|LDGSTS)\.\S*\b128", code),
        "matrix_instructions": _count(r"\b(HMMA|HGMMA|UTC\w*MMA)\b", code),
        "conversions": _count(r"\bI2F", code),
        "tensor_memory": getattr(compiled.metadata, "tmem_size", 0) or 0,
    }
    if weights_per_iteration:
        lanes = 32 * compiled.metadata.num_warps
        measures["instructions_per_weight"] = round(len(_main_loop(code)) * lanes / weights_per_iteration, 3)
    return measures


def _measure_amd(compiled) -> dict[str, float]:
    code = compiled.asm["amdgcn"].splitlines()
    fields = {name: int(value) for name, value in re.findall(r"\.(\w+):\s+(\d+)", compiled.asm["amdgcn"])}
    return {
        "registers": fields["vgpr_count"],
        "shared": compiled.metadata.shared,
        "spills": fields["vgpr_spill_count"] + fields["sgpr_spill_count"] + fields["private_segment_fixed_size"],
        "wide_loads": _count(r"(global|buffer)_load_dwordx4", code),
        "matrix_instructions": _count(r"v_mfma", code),
        "conversions": 0,
        "tensor_memory": 0,
    }


def _tool(name: str, *arguments: str) -> str:
    return subprocess.run([TOOLS / name, *arguments], capture_output=True, text=True, check=True).stdout


def _count(pattern: str, code: list[str]) -> int:
    return sum(bool(re.search(pattern, line)) for line in code)


def _main_loop(code: list[str]) -> list[str]:
    """The instructions of the loop (code up to a backward branch) with most matrix products; of those the innermost.

    Loops that convert integers do not count (but for the reciprocal in a division): those are of the overflow part.
    """
    labels, instructions, loops = {}, [], []
    for line in code:
        if line.startswith(".L"):
            labels[line.split(":")[0]] = len(instructions)
            continue
        instructions.append(line)
        target = re.search(r"\bBRA\b.*`\((\.L\w+)\)", line)
        if target and target[1] in labels:
            loop = instructions[labels[target[1]] :]
            if len(loop) > 1:  # every kernel ends with a branch to itself
                loops.append(loop)

    def products(loop: list[str]) -> int:
        return 0 if _count(r"\bI2F(?!\S*RP)", loop) else _count(r"\b(HMMA|HGMMA|UTC\w*MMA)\b", loop)

    return max(loops, key=lambda loop: (products(loop), -len(loop)))


def cases(architecture: str) -> dict[str, tuple[int, int, int, str]]:
    """Name → (bits, tokens, groups, dtype) of what is compiled of the fused kernel, for a 4096 × 4096 layer."""
    chosen = {f"{bits} bits, 1 token": (bits, 1, 1, "bf16") for bits in (2, 3, 4, 5, 8)}
    chosen |= {f"{bits} bits, 64 tokens": (bits, 64, 1, "bf16") for bits in (3, 4, 5)}
    if architecture == "sm_90":
        chosen |= {f"{bits} bits, {tokens} tokens": (bits, tokens, 1, "bf16") for bits in (3, 4) for tokens in (16, 32)}
        chosen |= {f"{bits} bits, 64 tokens": (bits, 64, 1, "bf16") for bits in (2, 8)}
        chosen |= {f"{bits} bits, 1 token, groups of 128": (bits, 1, 32, "bf16") for bits in (3, 4)}
        chosen |= {f"{bits} bits, 1 token, fp16": (bits, 1, 1, "fp16") for bits in (3, 4, 8)}
    return chosen


def gate(architecture: str) -> dict[str, dict[str, float]]:
    """Case → measures for one architecture."""
    backend = "cuda" if architecture.startswith("sm_") else "hip"
    target = Target(backend, architecture, architecture, 1)
    table = table_for(target)
    results = {}
    for name, (bits, tokens, groups, dtype) in cases(architecture).items():
        geometry = Geometry(bits, 4096, 4096)
        config = table.lookup(bits, tokens, 4096, 4096).for_groups(groups)
        constants = fused_constants(geometry, config, groups, tokens, target)
        compiled = compile_kernel(fused_kernel, dense_types(dtype), constants, architecture, config.warps)
        results[name] = measure(compiled, config.rows * geometry.block_columns)
    for bits in (3, 4):
        columns = Geometry(bits, 4096, 4096).block_columns
        constants = {"BITS": bits, "BLOCK_COLUMNS": columns, "GROUPED": False, "BACKEND": backend}
        compiled = compile_kernel(dense_kernel, dense_types(), constants, architecture, 4)
        results[f"dequantize {bits} bits"] = measure(compiled, 0)
    constants = {"LOW": -8, "HIGH": 7, "GROUPED": False, "BACKEND": backend}
    compiled = compile_kernel(overflow_kernel, dense_types(), constants, architecture, 2)
    results["dequantize overflow"] = measure(compiled, 0)
    return results | coded_gate(architecture, backend)


def coded_gate(architecture: str, backend: str) -> dict[str, dict[str, float]]:
    """Case → measures of the kernels that decode; a turn of their innermost loop takes an integer in every lane."""
    chosen = {
        "decode coded": (decode_kernel, {"DEQUANTIZE": True, "GROUPED": False}),
        "decode coded, groups": (decode_kernel, {"DEQUANTIZE": True, "GROUPED": True}),
        "multiply coded, groups": (multiply_kernel, {"TOKENS": 1, "GROUPED": True}),
    }
    for tokens in (1, MAX_TOKENS):
        name = f"multiply coded, {tokens} token{'s' if tokens > 1 else ''}"
        chosen[name] = (multiply_kernel, {"TOKENS": tokens, "GROUPED": False})
    return {
        name: measure(
            compile_kernel(kernel, CODED_TYPES, {"BACKEND": backend} | constants, architecture, 1), WARP.value
        )
        for name, (kernel, constants) in chosen.items()
    }


def main(arguments: list[str]) -> None:
    """Command line: architectures (all by default) and --update."""
    chosen = [name for name in arguments if not name.startswith("-")] or list(ARCHITECTURES)
    results = {architecture: gate(architecture) for architecture in chosen}
    if "--update" in arguments:
        known = json.loads(TABLE.read_text())["architectures"] if TABLE.exists() else {}
        table = {"triton": triton.__version__, "architectures": known | results}
        TABLE.write_text(json.dumps(table, indent=1) + "\n")
    print(json.dumps(results))


if __name__ == "__main__":
    main(sys.argv[1:])
