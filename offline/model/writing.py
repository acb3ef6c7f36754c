"""Writing what lies in a checkpoint's folder: tensors, index, config and companions, each there whole or not at all."""

import json
import os
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from vllm_babai.errors import QuantizationError
from vllm_babai.files import write_atomically
from vllm_babai.format import FORMATS
from vllm_babai.format.checksums import SUMS, as_text, digest_of, file_sums, kept_checksums
from vllm_babai.format.config import refusing
from vllm_babai.format.index import INDEX
from vllm_babai.offline.model.checkpoint import REPORT, Checkpoint
from vllm_babai.offline.model.place import MADE, RUN


def save_atomically(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write a safetensors file that is there whole or not at all; folders above it are made.

    Raises QuantizationError where it cannot be written, for want of room say.
    """
    unfinished = path.with_suffix(".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, unfinished, metadata={"format": "pt"})
        unfinished.chmod(0o644)  # safetensors makes files that only their owner can read
        os.replace(unfinished, path)
    except (OSError, SafetensorError) as error:
        with suppress(OSError):
            unfinished.unlink()
        raise QuantizationError(f"{path} cannot be written: {error}") from error


def write_index(folder: Path, files: list[Path]) -> None:
    """model.safetensors.index.json over `files`, which lie in `folder` or below it."""
    weight_map: dict[str, str] = {}
    total = 0
    for path in files:
        total += path.stat().st_size
        with safe_open(path, framework="pt") as file:
            weight_map |= dict.fromkeys(file.keys(), path.relative_to(folder).as_posix())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    write_atomically(folder / INDEX, json.dumps(index, indent=2) + "\n")


def write_config(folder: Path, config: dict[str, Any]) -> None:
    """config.json."""
    write_atomically(folder / "config.json", json.dumps(config, indent=2) + "\n")


def seal(folder: Path, config: dict[str, Any], files: list[Path], companions: list[str]) -> str:
    """config.json of a quantized checkpoint and SHA256SUMS, the last of its files; returns the digest of all.

    config: its quantization_config gets the digest of the weight files and a checksum of each tensor that was left as
    it was, and `attn_implementation` what keeps transformers from loading it without knowing our format. files: of
    weights. companions: names of what else belongs to the checkpoint.
    """
    sums = file_sums(folder, files)
    quantization = config["quantization_config"]
    parts = FORMATS[quantization["format"]].dtypes
    checked = {"digest": digest_of(sums), "checksums": kept_checksums(files, parts)}
    write_config(folder, refusing(config | {"quantization_config": quantization | checked}))
    sums |= file_sums(folder, [folder / name for name in ("config.json", INDEX, *companions)])
    write_atomically(folder / SUMS, as_text(sums))
    return digest_of(sums)


def copy_companions(checkpoint: Checkpoint, folder: Path) -> list[str]:
    """Copy tokenizer, chat template, generation config and model code: all small regular files that are not weights.

    Returns their names.

    Links are followed, as a hub cache consists of links; folders, and links to nothing, are left out.
    """
    skipped = {"config.json", INDEX, REPORT, RUN, MADE}
    copied = []
    for path in checkpoint.folder.iterdir():
        if (
            path.is_file()
            and path.suffix in {".json", ".jinja", ".txt", ".model", ".py", ".tiktoken"}
            and path.name not in skipped
        ):
            shutil.copyfile(path, folder / path.name)
            copied.append(path.name)
    return copied
