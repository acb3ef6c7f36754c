"""The Tritons that kernels are compiled with: those that vLLM installs on a GPU, as `deploy/setup.sh` puts them aside.

Beside a CPU build of vLLM another Triton is installed, or one of these. A folder `triton-<version>` of the environment
holds a version; on PYTHONPATH it comes before the installed one, in a process of its own.
"""

import os
import sys
from collections.abc import Mapping
from pathlib import Path

import triton

# Version → folder, None for the installed one. The first is compiled with in full, the others in part.
PINNED: dict[str, Path | None] = {
    path.name.removeprefix("triton-"): path for path in sorted(Path(sys.prefix).glob("triton-[0-9]*"))
}
TRITONS: dict[str, Path | None] = PINNED | {triton.__version__: None}
FIRST = next(iter(TRITONS))


def environment(version: str, **more: str) -> Mapping[str, str]:
    """Environment of a process that is to compile with this version; more: of other variables."""
    folders = [str(TRITONS[version] or ""), os.environ.get("PYTHONPATH", "")]
    path = os.pathsep.join(folder for folder in folders if folder)
    return {**os.environ, "TRITON_INTERPRET": "0", **({"PYTHONPATH": path} if path else {}), **more}
