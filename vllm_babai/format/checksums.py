"""What a checkpoint's files and tensors were when they were written.

Tensors of quantized linears carry checksums of their own. For the others, embeddings, norms, biases and whatever was
left as it was, there is one each in config.json (`checksums`). Both are compared whenever a tensor is read, also in
vLLM. Everything else, config.json and the tokenizer too, stands in the file SHA256SUMS, which
`babai inspect --verify` or `sha256sum --check` compares.
"""

import hashlib
import zlib
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor, uint8

from vllm_babai.compiled import parallel_map
from vllm_babai.errors import FormatError

SUMS = "SHA256SUMS"


def file_sums(folder: Path, files: Iterable[Path]) -> dict[str, str]:
    """Name below `folder` → SHA-256 in hexadecimal digits, sorted by name."""
    files = sorted(files, key=lambda path: path.relative_to(folder).as_posix())
    names = (path.relative_to(folder).as_posix() for path in files)
    return dict(zip(names, parallel_map(_sha256, files), strict=True))


def digest_of(sums: Mapping[str, str]) -> str:
    """One digest for many files: of weight files what `sha256sum *.safetensors | sha256sum` prints."""
    return hashlib.sha256(as_text(sums).encode()).hexdigest()


def as_text(sums: Mapping[str, str]) -> str:
    """As `sha256sum` prints it and `sha256sum --check` reads it."""
    return "".join(f"{sha}  {name}\n" for name, sha in sums.items())


def read_sums(folder: Path) -> dict[str, str]:
    """What SHA256SUMS in a folder says. Raises FormatError where it is not there, or is something else."""
    try:
        lines = (folder / SUMS).read_text(encoding="utf-8").splitlines()
        return {name: sha for sha, name in (line.split("  ", 1) for line in lines)}
    except (OSError, ValueError) as error:
        raise FormatError(
            f"{folder / SUMS} cannot be read ({error}), so nothing tells what the files were: copy it again"
        ) from error


def changed_files(folder: Path, sums: Mapping[str, str]) -> list[str]:
    """Names of the files that are gone or not what `sums` says."""
    inside = [name for name in sums if not Path(name).is_absolute() and ".." not in Path(name).parts]
    present = file_sums(folder, [folder / name for name in inside if (folder / name).is_file()])
    return [name for name, sha in sums.items() if present.get(name) != sha]


def tensor_checksum(tensor: Tensor) -> str:
    """CRC-32 of dtype, shape and bytes, eight hexadecimal digits.

    The bytes are preceded by a line of text such as `bfloat16 4096 128`, and a newline.
    """
    heading = " ".join([str(tensor.dtype).removeprefix("torch."), *map(str, tensor.shape)]) + "\n"
    content = tensor.contiguous().reshape(-1).view(uint8).numpy().data
    return f"{zlib.crc32(content, zlib.crc32(heading.encode())):08x}"


def tensors_kept(names: Iterable[str], parts: Collection[str]) -> set[str]:
    """Those of a checkpoint's tensors that are not of a quantized linear, which is stored as `parts`."""
    names = set(names)
    linears = {name.rpartition(".")[0] for name in names if name.rpartition(".")[2] in parts}
    complete = {linear for linear in linears if all(f"{linear}.{part}" in names for part in parts)}
    return {name for name in names if name.rpartition(".")[0] not in complete or name.rpartition(".")[2] not in parts}


def kept_checksums(files: Iterable[Path], parts: Collection[str]) -> dict[str, str]:
    """Name → checksum of all tensors in weight files that are stored as they were, sorted by name."""
    files = list(files)
    kept = tensors_kept((name for path in files for name in tensor_names(path)), parts)
    by_file = parallel_map(lambda path: _checksums(path, kept), files)
    return dict(sorted((name, checksum) for found in by_file for name, checksum in found.items()))


def check_kept(files: Iterable[Path], checksums: Mapping[str, str]) -> None:
    """Raise FormatError that names a tensor which is not in any of the files, or is another than `checksums` says."""
    found = parallel_map(lambda path: _checksums(path, checksums.keys()), list(files))
    present = {name: checksum for each in found for name, checksum in each.items()}
    for name, checksum in checksums.items():
        compare(name, present.get(name), checksum)


def compare(name: str, found: str | None, wanted: str | None) -> None:
    """Raise FormatError for a tensor that is not there (found), has no checksum (wanted), or another one."""
    if wanted is None:
        raise FormatError(f"{name} is not among the tensors of which config.json has a checksum: copy the model again")
    if found is None:
        raise FormatError(f"the checkpoint has no tensor {name}, of which config.json has a checksum: copy it again")
    if found != wanted:
        raise FormatError(f"{name} is corrupt: its checksum is {found}, in config.json it is {wanted}; copy it again")


def tensor_names(path: Path) -> list[str]:
    """Names of a safetensors file's tensors. Raises FormatError that names it where it is cut or no such file."""
    with _open(path) as file:
        return list(file.keys())


def _checksums(path: Path, names: Collection[str]) -> dict[str, str]:
    with _open(path) as file:
        return {name: tensor_checksum(file.get_tensor(name)) for name in file.keys() if name in names}  # noqa: SIM118


@contextmanager
def _open(path: Path) -> Iterator[Any]:
    """An open safetensors file. Raises FormatError that names it, also for what happens while it is open."""
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError, ValueError) as error:
        raise FormatError(f"{path} is no safetensors file that can be read ({error}): copy it again") from error


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
