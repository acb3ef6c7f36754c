"""Calibration text: files or hub datasets → token sequences of one length."""

import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer

from vllm_babai.errors import QuantizationError


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a model folder. Raises QuantizationError when there is none that can be loaded."""
    try:
        return AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
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
    if not path.is_file():
        yield from (_record_text(record, source, tokenizer) for record in _hub_records(source))
    elif path.suffix == ".txt":
        yield path.read_text()
    elif path.suffix == ".jsonl":
        yield from (_record_text(record, source, tokenizer) for record in _json_lines(path))
    elif path.suffix == ".parquet":
        from datasets import Dataset

        records = Dataset.from_parquet(str(path), keep_in_memory=True)
        yield from (_record_text(record, source, tokenizer) for record in records)
    else:
        raise QuantizationError(f"calibration file {source}: use .jsonl, .txt or .parquet")


def _json_lines(path: Path) -> Iterator[dict]:
    with path.open() as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                try:
                    yield json.loads(line)
                except json.JSONDecodeError as error:
                    raise QuantizationError(f"{path} line {number} is not JSON: {error}") from error


def _record_text(record: dict, source: str, tokenizer: Any) -> str:
    if isinstance(record.get("text"), str):
        return record["text"]
    if isinstance(record.get("messages"), list):
        if not tokenizer.chat_template:
            raise QuantizationError(f"{source} holds chat messages, but the model's tokenizer has no chat template")
        return tokenizer.apply_chat_template(record["messages"], tokenize=False)
    raise QuantizationError(f"records of {source} have neither 'text' nor 'messages', but {sorted(record)}")


def _hub_records(name: str) -> Iterator[dict]:
    from datasets import load_dataset

    try:
        yield from islice(load_dataset(name, split="train", streaming=True), 1_000_000)
    except Exception as error:  # the library raises many kinds, all of which mean the same to the user
        if isinstance(error, QuantizationError):
            raise
        raise QuantizationError(f"calibration {name} is neither a file nor a dataset on the hub: {error}") from error
