"""Compile gate: what the compilers make of the kernels, for GPUs that are not there.

`python tests/kernels/gate.py ARCHITECTURE…` compiles the kernels with shipped configurations, needs no GPU and prints
the measures as JSON; `--update` writes them to gate.json, which has a table for every version of Triton.
`test_compile_gate.py` compares the two. `--shipped` compiles every kernel that a shipped table can choose instead: all
widths, buckets and group sizes, a line each as it is done, of which nothing is recorded.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from vllm_babai.triton_kernels.arguments import Layer, Sizes
from vllm_babai.triton_kernels.coded import MAX_TOKENS, Shape, multiply_kernel
from vllm_babai.triton_kernels.configs import Config, Target, table_for
from vllm_babai.triton_kernels.dequantize import dense_kernel, dequantize_form, overflow_kernel
from vllm_babai.triton_kernels.entropy import WARP, Streams, decode_kernel
from vllm_babai.triton_kernels.experts import combine, grouped, route
from vllm_babai.triton_kernels.experts import fused as experts_fused
from vllm_babai.triton_kernels.experts import trellis as experts_trellis
from vllm_babai.triton_kernels.fused import Operands, Tiling, fused_kernel, fused_tiling
from vllm_babai.triton_kernels.layout import Geometry
from vllm_babai.triton_kernels.lookup import dense_rows_kernel, overflow_rows_kernel
from vllm_babai.triton_kernels.trellis import arguments as trellis_arguments
from vllm_babai.triton_kernels.trellis import dequantize as trellis_dequantize
from vllm_babai.triton_kernels.trellis import fused as trellis_fused

ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942")
TABLE = Path(__file__).with_name("gate.json")
TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
COLUMNS = 4096  # input features of the layer that is compiled for
GROUP_SIZES = (COLUMNS, 32, 64, 128)

# Types of the kernels' arguments. "i32:16": a multiple of 16 in every layer that matters, as Triton finds out for
# itself; every pointer is one.
LAYER = Layer("*i32", "*bf16", "*i16", "*i32", "*i32", "*i32")
SIZES = Sizes(n="i32:16", k="i32:16", padded_rows="i32:16", group_size="i32")
STREAMS = Streams("*i16", "*i32", "*i32", "*i16", "*u8", "*i32", "*fp32")
FUSED = {"layer": LAYER, "sizes": SIZES, **dict.fromkeys(("m", "splits", "panels"), "i32")}
DEQUANTIZE = {"layer": LAYER, "weight_ptr": "*bf16", "first_tile": "i32", "sizes": SIZES}
LOOK_UP = {"layer": LAYER, "ids_ptr": "*i64", "out_ptr": "*bf16", "tokens": "i32", "sizes": SIZES}
DECODE = {"streams": STREAMS, "out_ptr": "*bf16", "columns": "i32:16", "groups": "i32"}
MULTIPLY_CODED = {
    "streams": STREAMS,
    **dict.fromkeys(("x_ptr", "partial_ptr"), "*fp32"),
    "shape": Shape("i32:16", "i32:16"),
    "groups": "i32",
}

EXPERTS = {
    "layer": LAYER,
    "operands": experts_fused.Operands("*bf16", "*bf16", "*fp32", "*bf16", "*i32", "*i32", "*i32", "*bf16"),
    "sizes": experts_fused.Sizes(n="i32:16", k="i32:16", padded_rows="i32:16", group_size="i32", own_rows="i32:16"),
    **dict.fromkeys(("blocks", "splits", "panels", "per_row"), "i32"),
}
EXPERTS_PRODUCT = {
    "operands": grouped.Operands("*bf16", "*bf16", "*bf16", "*i32", "*i32", "*bf16"),
    "sizes": grouped.Sizes(n="i32:16", k="i32:16", own_rows="i32:16"),
    **dict.fromkeys(("first_row", "last_row", "per_row"), "i32"),
}
EXPERTS_SORT = {
    **dict.fromkeys(("ids_ptr", "owners_ptr", "visits_ptr"), "*i32"),
    **dict.fromkeys(("visits", "experts", "blocks"), "i32"),
}
EXPERTS_COMBINE = {"found_ptr": "*bf16", "weights_ptr": "*fp32", "ids_ptr": "*i32", "y_ptr": "*bf16", "k": "i32"}
EXPERTS_COMBINE["hidden"] = "i32:16"
TRELLIS = {
    "layer": trellis_arguments.Layer("*i32", "*i32", "*i32", "*i32", "*fp32"),
    "sizes": trellis_arguments.Sizes(n="i32:16", k="i32:16", blocks="i32:16", columns="i32:16"),
}
TRELLIS_FUSED = {
    **TRELLIS,
    "operands": trellis_fused.Operands("*fp16", "*fp32", "*fp32", "*i32", "*bf16"),
    **dict.fromkeys(("m", "shares"), "i32"),
}
TRELLIS_EXPERTS = {
    "layer": TRELLIS["layer"],
    "operands": experts_trellis.Operands("*fp16", "*fp32", "*fp32", "*i32", "*bf16", "*i32", "*i32", "*bf16"),
    "sizes": experts_trellis.Sizes(n="i32:16", blocks="i32:16", rows="i32:16", columns="i32:16"),
    **dict.fromkeys(("blocks", "shares", "per_row"), "i32"),
}
TRELLIS_DECODE = {**TRELLIS, "weight_ptr": "*bf16", **dict.fromkeys(("first_row", "last_row"), "i32")}


def fused_types(dtype: str = "bf16") -> dict[str, Any]:
    """Types of the fused kernel's arguments, with activations of `dtype`."""
    return FUSED | {"operands": Operands(f"*{dtype}", f"*{dtype}", "*fp32", f"*{dtype}")}


def compile_kernel(kernel, types: dict[str, Any], constants: dict[str, Any], architecture: str, warps: int):
    """Compile a kernel for an architecture. constants: values of its compile-time arguments, by name.

    types: of the other arguments, by name; of a named tuple that of each member. "1": an integer that is 1, which
    Triton compiles in.
    """
    signature: dict[str, Any] = {}
    compiled_in, attributes = {}, {}
    for i, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name], compiled_in[i,] = "constexpr", constants[name]
            continue
        is_group = isinstance(types[name], tuple)
        members = types[name] if is_group else (types[name],)
        paths = [(i, j) if is_group else (i,) for j in range(len(members))]
        attributes |= {
            path: [["tt.divisibility", 16]]
            for path, kind in zip(paths, members, strict=True)
            if kind.startswith("*") or kind.endswith(":16")
        }
        compiled_in |= {path: 1 for path, kind in zip(paths, members, strict=True) if kind == "1"}
        plain = ["constexpr" if kind == "1" else kind.removesuffix(":16") for kind in members]
        signature[name] = type(members)(*plain) if is_group else plain[0]
    source = ASTSource(kernel, signature, compiled_in, attributes)
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

    Loops that convert integers do not count (but for the reciprocal in a division): those are of the overflow part. Nor
    does what holds an exit: that is a branch back from code behind the kernel's end, where it waits.
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
        return 0 if _count(r"\bI2F(?!\S*RP)|\bEXIT\b", loop) else _count(r"\b(HMMA|HGMMA|UTC\w*MMA)\b", loop)

    # what needs more tensor memory than there is compiles to a trap, without a loop
    return max(loops, key=lambda loop: (products(loop), -len(loop)), default=[])


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


def shipped(architecture: str) -> dict[str, tuple[Geometry, Config, Tiling]]:
    """Name → fused kernel, of all that the architecture's table can choose; equal ones once."""
    target = target_of(architecture)
    chosen: dict[tuple[Tiling, int], tuple[str, Config]] = {}
    for entry in table_for(target).entries:
        for group_size in GROUP_SIZES:
            groups = COLUMNS // group_size
            config = entry.choice(groups)
            tiling = fused_tiling(Geometry(entry.bits, COLUMNS, 4096), config, groups, entry.tokens, target)
            name = f"{entry.bits} bits, {entry.tokens} tokens, groups of {group_size}"
            chosen.setdefault((tiling, config.warps), (name, config))
    return {
        name: (Geometry(tiling.bits, COLUMNS, 4096), config, tiling) for (tiling, _), (name, config) in chosen.items()
    }


def shipped_gate(architecture: str) -> dict[str, dict[str, float]]:
    """Case → measures of every kernel of `shipped`, printed as they come: that takes minutes."""
    results = {}
    for name, (geometry, config, tiling) in shipped(architecture).items():
        compiled = compile_kernel(fused_kernel, fused_types(), {"TILING": tiling}, architecture, config.warps)
        results[name] = measure(compiled, config.rows * geometry.block_columns)
        print(architecture, name, config, results[name], file=sys.stderr, flush=True)
    return results


def target_of(architecture: str) -> Target:
    """A GPU of this architecture whose name no table has."""
    return Target("cuda" if architecture.startswith("sm_") else "hip", architecture, architecture, 1)


def gate(architecture: str) -> dict[str, dict[str, float]]:
    """Case → measures for one architecture."""
    target = target_of(architecture)
    backend, table = target.backend, table_for(target)
    results = {}
    for name, (bits, tokens, groups, dtype) in cases(architecture).items():
        geometry = Geometry(bits, 4096, 4096)
        config = table.lookup(bits, tokens, 4096, 4096, groups)
        constants = {"TILING": fused_tiling(geometry, config, groups, tokens, target)}
        compiled = compile_kernel(fused_kernel, fused_types(dtype), constants, architecture, config.warps)
        results[name] = measure(compiled, config.rows * geometry.block_columns)
    for bits in (3, 4):
        constants = {"FORM": dequantize_form(Geometry(bits, 4096, 4096), 1, backend)}
        compiled = compile_kernel(dense_kernel, DEQUANTIZE, constants, architecture, 4)
        results[f"dequantize {bits} bits"] = measure(compiled, 0)
    compiled = compile_kernel(overflow_kernel, DEQUANTIZE, constants, architecture, 2)
    results["dequantize overflow"] = measure(compiled, 0)
    results |= experts_gate(architecture, target)
    for name, kernel in {"look up": dense_rows_kernel, "look up overflow": overflow_rows_kernel}.items():
        results[name] = measure(compile_kernel(kernel, LOOK_UP, constants, architecture, 1), 0)
    return results | coded_gate(architecture, backend) | trellis_gate(architecture, target)


def experts_gate(architecture: str, target: Target) -> dict[str, dict[str, float]]:
    """Case → measures of the kernels for experts of 1536 × 2048; bits and rows of a block."""
    results = {}
    for bits, tokens in [(3, 1), (4, 1), (4, 16), (4, 64)] if architecture == "sm_90" else [(4, 16)]:
        geometry = Geometry(bits, 2048, 1536)
        config = table_for(target).lookup(bits, tokens, 1536, 2048)
        tiling = fused_tiling(geometry, config, 1, tokens, target)._replace(one_tile=False, dependent=False)
        compiled = compile_kernel(experts_fused.experts_kernel, EXPERTS, {"TILING": tiling}, architecture, config.warps)
        name = f"experts {bits} bits, {tokens} row{'s' if tokens > 1 else ''}"
        results[name] = measure(compiled, config.rows * geometry.block_columns)
    constants = {"PRODUCT": grouped.product(2048, torch.bfloat16, target, biased=False)}
    compiled = compile_kernel(grouped.product_kernel, EXPERTS_PRODUCT, constants, architecture, grouped.WARPS)
    results["experts, dequantized"] = measure(compiled, 0)
    constants = {"ROWS": 16, "EXPERTS": 128}
    results["sort visits"] = measure(
        compile_kernel(route.sort_kernel, EXPERTS_SORT, constants, architecture, route.WARPS), 0
    )
    constants = {"COLUMNS": combine.COLUMNS, "BACKEND": target.backend}
    compiled = compile_kernel(combine.combine_kernel, EXPERTS_COMBINE, constants, architecture, combine.WARPS)
    return results | {"combine visits": measure(compiled, 0)}


def coded_gate(architecture: str, backend: str) -> dict[str, dict[str, float]]:
    """Case → measures of the kernels that decode; a turn of their innermost loop takes an integer in every lane."""
    chosen = {
        "decode coded": (decode_kernel, DECODE, {"DEQUANTIZE": True, "GROUPED": False}),
        "decode coded, groups": (decode_kernel, DECODE, {"DEQUANTIZE": True, "GROUPED": True}),
        "multiply coded, groups": (multiply_kernel, MULTIPLY_CODED, {"TOKENS": 1, "GROUPED": True}),
    }
    for tokens in (1, MAX_TOKENS):
        name = f"multiply coded, {tokens} token{'s' if tokens > 1 else ''}"
        chosen[name] = (multiply_kernel, MULTIPLY_CODED, {"TOKENS": tokens, "GROUPED": False})
    return {
        name: measure(compile_kernel(kernel, types, {"BACKEND": backend} | constants, architecture, 1), WARP.value)
        for name, (kernel, types, constants) in chosen.items()
    }


def trellis_gate(architecture: str, target: Target) -> dict[str, dict[str, float]]:
    """Case → measures of the kernels of the trellis form. Each is compiled with the loop for one number of bits alone.

    A turn of it takes STEP tiles. With the loops for all bits they take a minute each, and the loops are the same.
    """
    chosen = [(4, 1), (6, 1)]
    if architecture == "sm_90":
        chosen += [(5, 1), (8, 1), (10, 1), (4, 16), (6, 16), (4, 64), (6, 64)]
    turn = trellis_arguments.STEP * trellis_arguments.TILE_ROWS * trellis_arguments.TILE_COLUMNS
    results = {}
    for bits, tokens in chosen:
        tiling = trellis_fused.fused_tiling(tokens, target)._replace(low=bits, high=bits)
        compiled = compile_kernel(trellis_fused.fused_kernel, TRELLIS_FUSED, {"TILING": tiling}, architecture, 1)
        name = f"trellis {bits / 2:g} bits, {tokens} token{'s' if tokens > 1 else ''}"
        results[name] = measure(compiled, turn)
    for bits, tokens in [(4, 1), (4, 16)] if architecture == "sm_90" else []:
        tiling = trellis_fused.fused_tiling(tokens, target)._replace(low=bits, high=bits)
        constants = {"TILING": tiling}
        compiled = compile_kernel(experts_trellis.experts_kernel, TRELLIS_EXPERTS, constants, architecture, 1)
        name = f"experts, trellis {bits / 2:g} bits, {tokens} row{'s' if tokens > 1 else ''}"
        results[name] = measure(compiled, turn)
    constants = {"BITS": (4, 4), "SHARE": trellis_dequantize.ENTRIES, "BACKEND": target.backend}
    compiled = compile_kernel(trellis_dequantize.decode_kernel, TRELLIS_DECODE, constants, architecture, 1)
    return results | {"dequantize trellis": measure(compiled, 0)}


def _record(architecture: str, measures: dict[str, dict[str, float]]) -> None:
    tables = json.loads(TABLE.read_text()) if TABLE.exists() else {}
    tables.setdefault(triton.__version__, {})[architecture] = measures
    TABLE.write_text(json.dumps(tables, indent=1) + "\n")


def main(arguments: list[str]) -> None:
    """Command line: architectures (all by default), --shipped or --update."""
    chosen = [name for name in arguments if not name.startswith("-")] or list(ARCHITECTURES)
    compile_all = shipped_gate if "--shipped" in arguments else gate
    results = {}
    for architecture in chosen:
        results[architecture] = compile_all(architecture)
        if compile_all is gate and "--update" in arguments:
            _record(architecture, results[architecture])
    print(json.dumps(results))


if __name__ == "__main__":
    main(sys.argv[1:])
