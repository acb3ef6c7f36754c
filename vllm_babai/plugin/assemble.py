"""From the parts that a layer's placeholders collected to the weight that the rank holds."""

from collections.abc import Mapping
from itertools import accumulate
from typing import TypeVar

from vllm_babai.format import FormatError
from vllm_babai.plugin.parameter import Part
from vllm_babai.plugin.readers.reader import Reader, StoredLinear, check_dtypes

Piece = TypeVar("Piece")
Weight = TypeVar("Weight")


def assemble(reader: Reader[Piece, Weight], parts: Mapping[str, list[Part]], rows: Mapping[str, int]) -> Weight:
    """What the reader makes of all that a layer needs on one rank.

    parts: by tensor name. rows: on this rank, of each linear fused in the layer, by name, in order.
    Raises FormatError that names the linear for tensors that are missing, stored twice, truncated or corrupt, and for
    linears that do not go together.
    """
    for tensor_name, found in parts.items():
        _check_complete(tensor_name, found, rows)
    by_tensor = [_group_by_tensor(found) for found in parts.values()]
    if len({len(groups) for groups in by_tensor}) > 1:
        raise FormatError(f"{', '.join(rows)}: some of {', '.join(parts)} are fused in the checkpoint and some are not")
    pieces: list[Piece] = []
    for groups in zip(*by_tensor, strict=True):
        tensors = {name: group[0].tensor.cpu() for name, group in zip(parts, groups, strict=True)}
        same_linear = groups[0]
        shape = (sum(part.shape[0] for part in same_linear), same_linear[0].shape[1])
        names = {_linear_at(part.destination, rows) for part in same_linear}
        name = names.pop() if len(names) == 1 else ""
        linear = StoredLinear(tensors, shape, [part.window for part in same_linear], name)
        try:
            check_dtypes(tensors, reader.form.dtypes)
            pieces += reader.read(linear)
        except FormatError as error:
            raise FormatError(f"{_linear_at(same_linear[0].destination, rows)}: {error}") from error
    try:
        return reader.stack(pieces)
    except FormatError as error:
        raise FormatError(f"{', '.join(rows)}: {error}") from error


def _check_complete(tensor_name: str, parts: list[Part], rows: Mapping[str, int]) -> None:
    filled = 0
    for part in sorted(parts, key=lambda part: part.destination):
        if part.destination < filled:
            raise FormatError(f"{_linear_at(part.destination, rows)}: the checkpoint has {tensor_name} twice")
        if part.destination > filled:
            break
        filled += part.rows
    if filled < sum(rows.values()):
        raise FormatError(f"{_linear_at(filled, rows)}: the checkpoint lacks {tensor_name}")


def _group_by_tensor(parts: list[Part]) -> list[list[Part]]:
    """Parts in the order of their rows; those cut from one stored tensor (linears fused on disk) together."""
    groups: dict[int, list[Part]] = {}
    for part in sorted(parts, key=lambda part: part.destination):
        groups.setdefault(id(part.tensor), []).append(part)
    return list(groups.values())


def _linear_at(row: int, rows: Mapping[str, int]) -> str:
    """Name of the fused linear that holds this row of the layer."""
    last_rows = accumulate(rows.values())
    return next(name for name, last in zip(rows, last_rows, strict=True) if row < last)
