"""Reading Hugging Face checkpoints tensor by tensor."""

import json
from dataclasses import dataclass
from pathlib import Path

from safetensors import safe_open
from torch import Tensor

from vllm_babai.errors import QuantizationError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
REPORT = "babai_report.json"  # of a quantized checkpoint: what is known of every linear


@dataclass(frozen=True)
class Checkpoint:
    """A folder of safetensors files; `files` maps a tensor's name to the file that holds it."""

    folder: Path
    files: dict[str, Path]

    def read(self, name: str) -> Tensor:
        """The tensor called `name`, on the CPU. Raises QuantizationError when it is missing."""
        if name not in self.files:
            raise QuantizationError(f"{self.folder} has no tensor {name}")
        with safe_open(self.files[name], framework="pt") as file:
            return file.get_tensor(name)

    def read_kept(self, name: str) -> Tensor:
        """The tensor called `name` as it stays where it is not quantized."""
        return self.read(name)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of the tensor called `name`."""
        with safe_open(self.files[name], framework="pt") as file:
            return tuple(file.get_slice(name).get_shape())

    def read_below(self, prefix: str) -> dict[str, Tensor]:
        """All tensors whose name starts with `prefix`, which is cut off the names."""
        return {name[len(prefix) :]: self.read(name) for name in self.files if name.startswith(prefix)}

    def config(self) -> dict:
        """config.json as a dictionary."""
        return json.loads((self.folder / "config.json").read_text())

    def bytes(self) -> int:
        """Size of all safetensors files on disk."""
        return sum(path.stat().st_size for path in set(self.files.values()))


def open_checkpoint(model: str | Path) -> Checkpoint:
    """Open a model folder, or fetch one from the Hugging Face hub by its name.

    Raises QuantizationError when there is no config.json or no safetensors weights.
    """
    folder = Path(model)
    if not folder.is_dir():
        folder = _from_hub(str(model))
    if not (folder / "config.json").is_file():
        raise QuantizationError(f"{folder} is not a model: it has no config.json")
    if (folder / INDEX).is_file():
        weight_map = json.loads((folder / INDEX).read_text())["weight_map"]
        missing = {file for file in weight_map.values() if not (folder / file).is_file()}
        if missing:
            raise QuantizationError(f"{folder} lacks files that {INDEX} names: {', '.join(sorted(missing))}")
        return Checkpoint(folder, {name: folder / file for name, file in weight_map.items()})
    if (folder / SINGLE).is_file():
        with safe_open(folder / SINGLE, framework="pt") as file:
            return Checkpoint(folder, dict.fromkeys(file.keys(), folder / SINGLE))
    raise QuantizationError(
        f"{folder} has no safetensors weights ({SINGLE} or {INDEX}); save the model with them first"
    )


def _from_hub(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=["*.safetensors", "*.json", "*.jinja", "*.txt", "*.model"]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise QuantizationError(f"{name} is neither a folder nor a model on the hub: {error}") from error
