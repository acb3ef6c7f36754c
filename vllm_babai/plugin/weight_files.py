"""The weight files of a folder, looked at before vLLM reads them: what it says of damage names no file."""

import json
from collections.abc import Collection
from pathlib import Path

from vllm_babai.errors import FormatError
from vllm_babai.format import FORMATS
from vllm_babai.format.checksums import tensor_names
from vllm_babai.format.index import INDEX, tensors_by_file

KEYS = {key for form in FORMATS.values() for key in form.dtypes}  # last parts of the names of a linear's tensors


def check_weight_files(folder: Path, kept: Collection[str] | None) -> None:
    """Hold the heading of every weight file against its length, the index, if there is one, and the names it may have.

    kept: names of the tensors that are stored as they were; None or none where that is not known. Raises FormatError
    that names the file which is cut, is not there, lacks a tensor that the index says it holds or has one of an unknown
    name, or the index. Of the files no more than headings is read.
    """
    if (folder / INDEX).is_file():
        expected = _indexed(folder / INDEX)
    else:
        expected = {path.name: set() for path in sorted(folder.glob("*.safetensors"))}
    for file, indexed in expected.items():
        if not (folder / file).is_file():
            raise FormatError(f"{folder} lacks {file}, which {INDEX} names: copy it again")
        names = set(tensor_names(folder / file))
        if lacking := indexed - names:
            raise FormatError(f"{folder / file} lacks {min(lacking)}, which {INDEX} says it holds: copy both again")
        if kept and (unknown := {name for name in names.difference(kept) if name.rpartition(".")[2] not in KEYS}):
            raise FormatError(f"{folder / file} has {min(unknown)}, which is not of this checkpoint: copy it again")


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
