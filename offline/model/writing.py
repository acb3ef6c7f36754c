"""Writing a checkpoint's folder: tensors, index, config and companions. Its name stands for a complete folder."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from vllm_babai.offline.model.checkpoint import INDEX, REPORT, Checkpoint


def partial_folder(out: Path) -> Path:
    """Where files lie until OUT is complete."""
    return out.with_name(out.name + ".partial")


def publish(partial: Path, out: Path) -> None:
    """Give a complete folder its name, in place of what has it now."""
    if out.exists():
        old = out.with_name(out.name + ".old")
        out.rename(old)
        partial.rename(out)
        shutil.rmtree(old)
    else:
        partial.rename(out)


def save_atomically(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write a safetensors file that is there whole or not at all."""
    unfinished = path.with_suffix(".tmp")
    save_file(tensors, unfinished, metadata={"format": "pt"})
    unfinished.chmod(0o644)  # safetensors makes files that only their owner can read
    os.replace(unfinished, path)


def write_index(folder: Path, files: list[Path]) -> None:
    """model.safetensors.index.json over `files`."""
    weight_map: dict[str, str] = {}
    total = 0
    for path in files:
        total += path.stat().st_size
        with safe_open(path, framework="pt") as file:
            weight_map |= dict.fromkeys(file.keys(), path.name)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def write_config(folder: Path, config: dict[str, Any]) -> None:
    """config.json."""
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def copy_companions(checkpoint: Checkpoint, folder: Path) -> None:
    """Copy tokenizer, chat template, generation config and model code: all small files that are not weights."""
    skipped = {"config.json", INDEX, REPORT, "README.md"}
    for path in checkpoint.folder.iterdir():
        if path.suffix in {".json", ".jinja", ".txt", ".model", ".py", ".tiktoken"} and path.name not in skipped:
            shutil.copyfile(path, folder / path.name)
