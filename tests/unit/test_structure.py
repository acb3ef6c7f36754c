"""The rooms of the project and the direction of imports between them: down only, so that there is no way in circles."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# From the ground up: a room may import the rooms before it. A name with a dot at its end is a folder with all below it;
# one without is a module, or the modules of a folder without those of folders in it.
FLOORS = (
    "vllm_babai",  # errors, files, progress, compiled loops
    "vllm_babai.format",  # what both formats share
    "vllm_babai.format.entropy.",
    "vllm_babai.format.dense_sparse.",
    "vllm_babai.format.trellis.",
    "vllm_babai.format.registry",
    "vllm_babai.format.config",
    "vllm_babai.ops.",
    "vllm_babai.cpu.",
    "vllm_babai.triton_kernels.",
    "vllm_babai.triton_kernels.tuning.",
    "vllm_babai.plugin.",
    "vllm_babai.offline.solver.",
    "vllm_babai.offline.ranks",
    "vllm_babai.offline.options",
    "vllm_babai.offline.scales.",
    "vllm_babai.offline.model.",
    "vllm_babai.transformers",
    "vllm_babai.offline.plan.",
    "vllm_babai.offline",
    "vllm_babai.offline.tools.",
)
FOLDERS = {"offline": "vllm_babai.offline", "triton_kernels": "vllm_babai.triton_kernels", "vllm_babai": "vllm_babai"}
# The doors: what a user or vLLM calls by name, and what opens on first use.
DOORS = {"vllm_babai", "vllm_babai.offline.cli", "vllm_babai.format"}


def modules() -> dict[str, Path]:
    """Module name → file."""
    found = {}
    for folder, package in FOLDERS.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            found[".".join([package, *parts]).removesuffix(".__init__")] = path
    return found


MODULES = modules()


def floor(module: str) -> int:
    """On which floor a module is."""
    if module in FLOORS and MODULES[module].name != "__init__.py":
        return FLOORS.index(module)
    package = module if MODULES[module].name == "__init__.py" else module.rpartition(".")[0]
    fits = [name for name in FLOORS if package == name or (name.endswith(".") and f"{package}.".startswith(name))]
    return FLOORS.index(max(fits, key=len))


def imports(module: str) -> Iterator[str]:
    """Modules of the project that a module imports, anywhere in it."""
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in MODULES)
        elif isinstance(node, ast.ImportFrom) and node.module in MODULES:
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            yield from inner & MODULES.keys() or {node.module}


@pytest.mark.parametrize("module", sorted(MODULES.keys() - DOORS))
def test_imports_go_down(module: str) -> None:
    up = {name for name in imports(module) if floor(name) > floor(module)}
    assert not up, f"{module} imports from a floor above its own: {sorted(up)}"
