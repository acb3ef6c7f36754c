"""Reading Hugging Face checkpoints tensor by tensor.

Every file of a checkpoint may be damaged or made to do harm. What is read is data only: safetensors, JSON and text.
Code that a model brings along is never run.
"""

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from vllm_babai.errors import QuantizationError
from vllm_babai.format.checksums import SUMS
from vllm_babai.format.index import INDEX, tensors_by_file

SINGLE = "model.safetensors"
REPORT = "babai_report.json"  # of a quantized checkpoint: what is known of every linear
# For everything that transformers loads. Where it is not said, transformers asks at the terminal.
TRUST_REMOTE_CODE = False
FETCHED = ["*.safetensors", "*.json", "*.jinja", "*.txt", "*.model", "README.md", SUMS]  # of a model on the hub
LFS_POINTER = b"version https://git-lfs"


@dataclass(frozen=True)
class Checkpoint:
    """A folder of safetensors files; `files` maps a tensor's name to the file that holds it."""

    folder: Path
    files: dict[str, Path]

    def read(self, name: str) -> Tensor:
        """The tensor called `name`, on the CPU. Raises QuantizationError when it is missing or cannot be read."""
        if name not in self.files:
            raise QuantizationError(f"{self.folder} has no tensor {name}")
        with open_weights(self.files[name]) as file:
            return file.get_tensor(name)

    def read_kept(self, name: str) -> Tensor:
        """The tensor called `name` as it stays where it is not quantized."""
        return self.read(name)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of the tensor called `name`."""
        with safe_open(self.files[name], framework="pt") as file:
            return tuple(file.get_slice(name).get_shape())

    def size(self, name: str) -> int:
        """Bytes of the tensor called `name` in its file, of which no more than the heading is read."""
        with safe_open(self.files[name], framework="pt") as file:
            stored = file.get_slice(name)
            return math.prod(stored.get_shape()) * stored[:0].element_size()

    def read_below(self, prefix: str) -> dict[str, Tensor]:
        """All tensors whose name starts with `prefix`, which is cut off the names."""
        return {name[len(prefix) :]: self.read(name) for name in self.files if name.startswith(prefix)}

    def config(self) -> dict:
        """config.json as a dictionary. Raises QuantizationError when it cannot be read."""
        return read_json(self.folder / "config.json")

    def bytes(self) -> int:
        """Size of all safetensors files on disk."""
        return sum(path.stat().st_size for path in set(self.files.values()))


def open_checkpoint(model: str | Path) -> Checkpoint:
    """Open a model folder, or fetch one from the Hugging Face hub by its name.

    Raises QuantizationError that names the file at fault: no config.json, no safetensors weights, weights that are
    damaged, incomplete or elsewhere.
    """
    folder = find_folder(model)
    if any(folder.glob("*.gguf")) and not any(folder.glob("*.safetensors")):
        raise QuantizationError(
            f"{folder} holds GGUF files, which are already quantized; start from the original weights, as safetensors"
        )
    if not (folder / "config.json").is_file():
        raise QuantizationError(f"{folder} is not a model: it has no config.json")
    read_json(folder / "config.json")
    if (folder / INDEX).is_file():
        return Checkpoint(folder, _indexed_files(folder))
    if (folder / SINGLE).is_file():
        return Checkpoint(folder, dict.fromkeys(_tensor_names(folder / SINGLE), folder / SINGLE))
    raise QuantizationError(
        f"{folder} has no safetensors weights ({SINGLE} or {INDEX}); save the model with them first"
    )


def without_quantization(config: dict[str, Any]) -> dict[str, Any]:
    """A config.json without the quantization_config of the model, or of the language model in it."""
    inner = {key: without_quantization(value) if isinstance(value, dict) else value for key, value in config.items()}
    return {key: value for key, value in inner.items() if key != "quantization_config"}


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises QuantizationError that names the file."""
    refuse_pointer(path)
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise QuantizationError(f"{path} cannot be read as JSON ({error}): fetch or copy it again") from error
    if not isinstance(found, dict):
        raise QuantizationError(f"{path} holds no JSON object, but {type(found).__name__}: fetch or copy it again")
    return found


@contextmanager
def open_weights(path: Path) -> Iterator[Any]:
    """An open safetensors file. Raises QuantizationError that names it, also for what happens while it is open."""
    refuse_pointer(path)
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError, ValueError, KeyError, AttributeError) as error:  # the last: an unknown dtype
        raise QuantizationError(f"{path} is no safetensors file that can be read ({error}): copy it again") from error


def refuse_pointer(path: Path) -> None:
    """Raise QuantizationError where Git LFS has left a pointer in place of the file, or it cannot be opened."""
    try:
        with path.open("rb") as file:
            start = file.read(len(LFS_POINTER))
    except OSError as error:
        raise QuantizationError(f"{path} cannot be opened: {error.strerror}") from error
    if start == LFS_POINTER:
        raise QuantizationError(f"{path} is a pointer of Git LFS, not the file itself: run `git lfs pull` there")


def find_folder(model: str | Path) -> Path:
    """The folder of a model, fetched from the hub where there is none of that name. Raises QuantizationError."""
    folder = Path(model)
    try:
        if folder.is_dir():
            return folder
        is_file = folder.exists()
    except OSError as error:  # a name that is too long
        raise QuantizationError(f"{model} cannot be opened: {error.strerror}") from error
    if is_file:
        raise QuantizationError(f"{model} is a file: give the model's folder")
    return _from_hub(str(model))


def _indexed_files(folder: Path) -> dict[str, Path]:
    """Tensor → file by the index, all of which are in the folder and hold what the index says.

    A link in the folder is followed: the hub's cache keeps the files themselves in a folder of its own.
    """
    index = read_json(folder / INDEX)
    names = tensors_by_file(index.get("weight_map"))
    if names is None:
        raise QuantizationError(f"{folder / INDEX} has no weight_map from tensors to files: fetch or copy it again")
    for file in names:
        if Path(file).is_absolute() or ".." in Path(file).parts or "\0" in file:
            raise QuantizationError(
                f"{folder / INDEX} names {file!r}, which is not in the folder: do not use this model"
            )
    if missing := {file for file in names if not (folder / file).is_file()}:
        raise QuantizationError(f"{folder} lacks files that {INDEX} names: {', '.join(sorted(missing))}")
    for file, expected in names.items():
        if lacking := expected - set(_tensor_names(folder / file)):
            raise QuantizationError(f"{folder / file} lacks {min(lacking)}, which {INDEX} says it holds: copy it again")
    return {name: folder / file for name, file in index["weight_map"].items()}


def _tensor_names(path: Path) -> list[str]:
    with open_weights(path) as file:
        return list(file.keys())


def _from_hub(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=FETCHED))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError, ValueError) as error:
        raise QuantizationError(f"{name} is neither a folder nor a model on the hub: {error}") from error
