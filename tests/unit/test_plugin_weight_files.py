"""The plugin looks at weight files before vLLM reads them: damage is said with the name of the file."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from vllm_babai.errors import FormatError
from vllm_babai.format.index import INDEX
from vllm_babai.plugin.weight_files import check_weight_files

FILES = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two files with a tensor each, and their index."""
    for number, name in enumerate(FILES):
        save_file({f"layers.{number}.weight": torch.ones(8)}, tmp_path / name)
    index = {"weight_map": {f"layers.{number}.weight": name for number, name in enumerate(FILES)}}
    (tmp_path / INDEX).write_text(json.dumps(index))
    return tmp_path


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def swap(index: Path) -> None:
    index.write_text(json.dumps({"weight_map": {"layers.0.weight": FILES[1]}}))


@pytest.mark.parametrize(
    ("file", "damage", "message"),
    [
        (FILES[1], cut, f"{FILES[1]} is no safetensors file"),
        (FILES[0], Path.unlink, f"lacks {FILES[0]}"),
        (INDEX, swap, f"{FILES[1]} lacks layers.0.weight"),
        (INDEX, cut, f"{INDEX} cannot be read"),
        (INDEX, lambda index: index.write_text("[]"), f"{INDEX} cannot be read"),
        (INDEX, lambda index: index.write_text('{"weight_map": {"a": 3}}'), f"{INDEX} has no weight_map"),
    ],
)
def test_damage_is_named(file: str, damage: Callable[[Path], object], message: str, folder: Path) -> None:
    check_weight_files(folder, None)
    damage(folder / file)
    with pytest.raises(FormatError, match=message):
        check_weight_files(folder, None)


def test_without_an_index_all_files_are_looked_at(folder: Path) -> None:
    (folder / INDEX).unlink()
    check_weight_files(folder, None)
    cut(folder / FILES[0])
    with pytest.raises(FormatError, match=FILES[0]):
        check_weight_files(folder, None)


def test_a_tensor_of_an_unknown_name_is_named(folder: Path) -> None:
    check_weight_files(folder, {"layers.0.weight", "layers.1.weight"})
    save_file({"layers.1.codes": torch.ones(8), "layers.1.weight": torch.ones(8)}, folder / FILES[1])
    check_weight_files(folder, {"layers.0.weight", "layers.1.weight"})
    save_file({"layers.1.codesx": torch.ones(8), "layers.1.weight": torch.ones(8)}, folder / FILES[1])
    with pytest.raises(FormatError, match=f"{FILES[1]} has layers.1.codesx"):
        check_weight_files(folder, {"layers.0.weight", "layers.1.weight"})
