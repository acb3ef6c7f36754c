"""Checkpoints whose tensors are sound, but not those of the model: every command names what is too much or lacks."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from test_damage import INDEX, store

LINEAR = "model.layers.1.mlp.down_proj"


def of_linear(folder: Path) -> tuple[Path, dict[str, Any]]:
    """The file that holds LINEAR, and all its tensors."""
    file = json.loads((folder / INDEX).read_text())["weight_map"][f"{LINEAR}.scales"]
    return folder / file, load_file(folder / file)


def lacking(folder: Path) -> None:
    path, tensors = of_linear(folder)
    store(path, {name: tensor for name, tensor in tensors.items() if not name.startswith(LINEAR)})


def too_much(folder: Path) -> None:
    path, tensors = of_linear(folder)
    mine = {name: tensor for name, tensor in tensors.items() if name.startswith(LINEAR)}
    store(path, tensors | {name.replace("layers.1", "layers.7"): tensor.clone() for name, tensor in mine.items()})


def configured(**fields: Any) -> Callable[[Path], None]:
    """Damage that writes fields of quantization_config anew."""

    def change(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        config["quantization_config"].update(fields)
        (folder / "config.json").write_text(json.dumps(config))

    return change


CHANGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "a linear that is gone": (lacking, LINEAR),
    "a linear too much": (too_much, LINEAR.replace("layers.1", "layers.7")),
    "another format": (configured(format="hptq"), "model.layers.0"),
    "an override of nothing": (configured(overrides={"model.layers.9.mlp.up_proj": {"bits": 5}}), "layers.9"),
}


@pytest.mark.parametrize("name", sorted(CHANGES))
def test_what_is_not_the_models_is_named(
    name: str, ssqr: Path, text: Path, tmp_path: Path, babai: Any, figures: Any
) -> None:
    change, named = CHANGES[name]
    folder, out = shutil.copytree(ssqr, tmp_path / "model"), tmp_path / "out"
    change(folder)
    for command in (("inspect",), ("convert", out, "--to", "dense"), ("eval", "--data", text, "--window", 32)):
        found = babai(command[0], folder, *command[1:])
        ended = "refused by name" if found.refused and named in found.error else "silent"
        figures["not the model's tensors", "traceback" if found.traceback else ended] += 1
        assert found.refused and named in found.error, (command, found)
    assert not out.exists()


@pytest.mark.parametrize("kind", ["folder", "link to nothing"])
def test_companions_that_cannot_be_read_are_named_before_the_run(
    kind: str, source: Path, text: Path, tmp_path: Path, babai: Any
) -> None:
    folder = shutil.copytree(source, tmp_path / "model")
    companion = folder / "added_tokens.json"
    companion.mkdir() if kind == "folder" else companion.symlink_to(tmp_path / "nowhere")
    found = babai("quantize", folder, tmp_path / "out", "--calibration", text)
    assert found.refused and str(companion) in found.error, found
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_companions_are_copied_as_files(ssqr: Path, text: Path, tmp_path: Path, babai: Any) -> None:
    folder, out = shutil.copytree(ssqr, tmp_path / "model"), tmp_path / "out"
    (folder / "linked.txt").symlink_to(text)
    (folder / "folder.txt").mkdir()
    (folder / "dangling.txt").symlink_to(tmp_path / "nowhere")
    assert babai("convert", folder, out, "--to", "dense").status == 0
    assert (out / "linked.txt").read_text() == text.read_text() and not (out / "linked.txt").is_symlink()
    assert not {"folder.txt", "dangling.txt"} & {path.name for path in out.iterdir()}
