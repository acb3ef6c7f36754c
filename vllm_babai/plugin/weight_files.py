"""The weight files of a folder, looked at before vLLM reads them: what it says of damage names no file."""

import json
from pathlib import Path

from vllm_babai.errors import FormatError
from vllm_babai.format.checksums import tensor_names
from vllm_babai.format.index import INDEX, tensors_by_file


def check_weight_files(folder: Path) -> None:
    """Hold the heading of every weight file against its length and the index, if there is one.

    Raises FormatError that names the file which is cut, is not there or lacks a tensor that the index says it holds, or
    the index. Of the files no more than headings is read.
    """
    if not (folder / INDEX).is_file():
        for path in sorted(folder.glob("*.safetensors")):
            tensor_names(path)
        return
    for file, expected in _indexed(folder / INDEX).items():
        if not (folder / file).is_file():
            raise FormatError(f"{folder} lacks {file}, which {INDEX} names: copy it again")
        if lacking := expected - set(tensor_names(folder / file)):
            raise FormatError(f"{folder / file} lacks {min(lacking)}, which {INDEX} says it holds: copy both again")


def _indexed(index: Path) -> dict[str, set[str]]:
    """File → names of its tensors, as the index has them."""
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    except (OSError, ValueError, RecursionError, LookupError, TypeError) as error:
        raise FormatError(f"{index} cannot be read as an index ({error!r}): copy it again") from error
    found = tensors_by_file(weight_map)
    if found is None:
        raise FormatError(f"{index} has no weight_map from tensors to files: copy it again")
    return found
