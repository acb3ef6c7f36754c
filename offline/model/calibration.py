"""Calibration text: files or hub datasets → token sequences of one length."""

import json
from collections.abc import Iterator
from itertools import count, islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer

from vllm_babai.errors import QuantizationError
from vllm_babai.offline.model.checkpoint import TRUST_REMOTE_CODE, refuse_pointer

SUFFIXES = (".jsonl", ".txt", ".parquet")


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a model folder. Raises QuantizationError when there is none that can be loaded."""
    for path in (*folder.glob("*.json"), *folder.glob("*.model")):
        refuse_pointer(path)
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=TRUST_REMOTE_CODE)
    except Exception as error:  # transformers and tokenizers raise many kinds for a damaged file
        reason = " ".join(str(error).split())
        raise QuantizationError(
            f"{folder} has no tokenizer that can be loaded: copy the original model's tokenizer files (tokenizer.json,"
            f" tokenizer_config.json or what it has) there. ({reason})"
        ) from error


def calibration_tokens(tokenizer: Any, source: str, samples: int, length: int, seed: int) -> Tensor:
    """`samples` sequences of `length` tokens from `source`, int64 [samples, length]; `seed` fixes the choice.

    source: a .jsonl file with `text` or chat `messages`, a .txt or .parquet file, or the name of a hub dataset.
    Documents are joined and cut, so that every sequence is full. Raises QuantizationError for too little text.
    """
    tokens: list[int] = []
    local = Path(source).exists()
    enough = samples * length * (50 if local else 4)  # a choice to draw from, without reading a whole hub dataset
    for text in read_texts(source, tokenizer):
        tokens += tokenizer(text, add_special_tokens=False)["input_ids"]
        if len(tokens) >= enough:
            break
    whole = len(tokens) // length
    if whole < samples:
        raise QuantizationError(
            f"calibration text {source} has {len(tokens)} tokens; {samples} samples of {length} need"
            f" {samples * length}: give more text, or lower --samples or --sequence-length"
        )
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(whole, generator=generator)[:samples].sort().values
    return torch.tensor(tokens[: whole * length]).view(whole, length)[chosen]


def read_texts(source: str, tokenizer: Any) -> Iterator[str]:
    """The documents of a file or hub dataset. Chat messages go through the tokenizer's chat template."""
    path = Path(source)
    if not _is_file(path):
        if path.suffix in SUFFIXES:
            raise QuantizationError(f"there is no file {source}: give a text that is there, or a dataset on the hub")
        yield from (_record_text(record, source, tokenizer) for record in _hub_records(source))
        return
    if path.suffix not in SUFFIXES:
        raise QuantizationError(f"calibration file {source}: use .jsonl, .txt or .parquet")
    refuse_pointer(path)
    if path.suffix == ".txt":
        yield from _whole_text(path)
    else:
        records = _json_lines(path) if path.suffix == ".jsonl" else _parquet_records(path)
        yield from (_record_text(record, source, tokenizer) for record in records)


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError as error:  # a name that is too long
        raise QuantizationError(f"{path} cannot be opened: {error.strerror}") from error


def _whole_text(path: Path) -> Iterator[str]:
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise _not_utf8(path, error) from error
    if "\0" in text:
        raise QuantizationError(f"{path} is no text: it has zero bytes")
    yield text


def _json_lines(path: Path) -> Iterator[dict]:
    with path.open(encoding="utf-8") as lines:
        for number in count(1):
            try:
                line = next(lines, None)
                if line is None:
                    return
                record = json.loads(line) if line.strip() else None
            except UnicodeDecodeError as error:
                raise _not_utf8(path, error) from error
            except (ValueError, RecursionError) as error:
                raise QuantizationError(f"{path} line {number} is not JSON: {error}") from error
            if isinstance(record, dict):
                yield record
            elif line.strip():
                raise QuantizationError(f"{path} line {number} is no JSON object, but {type(record).__name__}")


def _parquet_records(path: Path) -> Iterator[dict]:
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    try:
        for batch in ParquetFile(path).iter_batches():
            yield from batch.to_pylist()
    except (ArrowException, OSError, ValueError) as error:
        raise QuantizationError(f"{path} cannot be read as parquet ({error}): fetch or make it again") from error


def _not_utf8(path: Path, error: UnicodeDecodeError) -> QuantizationError:
    return QuantizationError(f"{path} is no text in UTF-8 ({error.reason}): convert it, for instance with iconv")


def _record_text(record: dict, source: str, tokenizer: Any) -> str:
    if isinstance(record.get("text"), str):
        return _encodable(record["text"], source)
    if isinstance(record.get("messages"), list):
        if not tokenizer.chat_template:
            raise QuantizationError(f"{source} holds chat messages, but the model's tokenizer has no chat template")
        try:
            return _encodable(tokenizer.apply_chat_template(record["messages"], tokenize=False), source)
        except Exception as error:  # a template may raise anything
            reason = " ".join(str(error).split())
            raise QuantizationError(f"the chat template takes no messages as in {source}: {reason}") from error
    raise QuantizationError(f"records of {source} have neither 'text' nor 'messages', but {sorted(record)}")


def _encodable(text: str, source: str) -> str:
    """The text itself. Raises QuantizationError for half of a surrogate pair, which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise QuantizationError(f"{source} holds a string that is not Unicode: {error.reason}") from error
    return text


def _hub_records(name: str) -> Iterator[dict]:
    from datasets import load_dataset  # from version 4 on, which is required, it runs no code of a dataset's own

    try:
        yield from islice(load_dataset(name, split="train", streaming=True), 1_000_000)
    except Exception as error:  # the library raises many kinds, all of which mean the same to the user
        if isinstance(error, QuantizationError):
            raise
        raise QuantizationError(f"calibration {name} is neither a file nor a dataset on the hub: {error}") from error
