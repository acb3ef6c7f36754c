"""Text to calibrate and to evaluate the bundled model with: modules of the standard library of the Python that runs."""

import importlib.util
import json
from collections.abc import Sequence
from importlib.abc import InspectLoader
from pathlib import Path

# More than 128 sequences of 512 tokens of the bundled model's tokenizer.
CALIBRATION_MODULES = ("argparse", "tarfile", "random", "asyncio.streams", "heapq", "csv", "hmac", "html")
# More than 160 sequences of 512 tokens; all but the last two modules were kept out of the model's training text.
EVALUATION_MODULES = (
    "ipaddress",
    "shutil",
    "xmlrpc.client",
    "operator",
    "multiprocessing.resource_tracker",
    "email.quoprimime",
    "difflib",
    "statistics",
)


def module_source(name: str) -> str:
    """Source text of an installed pure-Python module. Raises FileNotFoundError when Python came without it."""
    spec = importlib.util.find_spec(name)
    source = spec.loader.get_source(name) if spec and isinstance(spec.loader, InspectLoader) else None
    if source is None:
        raise FileNotFoundError(f"this Python has no source text of its module {name}: use one with a full library")
    return source


def write_jsonl(path: Path, modules: Sequence[str]) -> None:
    """Write one line ``{"text": <source>}`` per module."""
    path.write_text("".join(json.dumps({"text": module_source(name)}) + "\n" for name in modules), encoding="utf-8")
