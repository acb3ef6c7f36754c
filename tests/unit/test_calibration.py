"""Calibration text from every kind of source, packed into sequences that the seed chooses."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from vllm_babai.errors import QuantizationError
from vllm_babai.offline.model.calibration import calibration_tokens, read_texts

TEXTS = ["def first():\n    return 1\n" * 30, "class Second:\n    pass\n" * 30]
CHAT = [{"role": "user", "content": "What is a lattice?"}, {"role": "assistant", "content": "A grid of points."}]


def write_lines(path: Path, records: list[dict]) -> str:
    path.write_text("\n".join(map(json.dumps, records)) + "\n\n")  # an empty line at the end is no record
    return str(path)


@pytest.fixture(params=["txt", "jsonl", "parquet"])
def source(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    path = tmp_path / f"text.{request.param}"
    if request.param == "txt":
        path.write_text("".join(TEXTS))
    elif request.param == "jsonl":
        write_lines(path, [{"text": text, "other": 1} for text in TEXTS])
    else:
        from datasets import Dataset

        Dataset.from_dict({"text": TEXTS}).to_parquet(str(path))
    return str(path)


def test_files_of_text(source: str, tokenizer: Any) -> None:
    assert "".join(read_texts(source, tokenizer)) == "".join(TEXTS)


def test_sequences_are_cuts_of_the_joined_text(source: str, tokenizer: Any) -> None:
    tokens = calibration_tokens(tokenizer, source, samples=5, length=32, seed=0)
    assert tokens.shape == (5, 32)
    assert tokens.dtype == torch.int64
    documents = ["".join(TEXTS)] if source.endswith(".txt") else TEXTS
    joined = [token for text in documents for token in tokenizer(text)["input_ids"]]
    cuts = {tuple(joined[i : i + 32]) for i in range(0, len(joined) - 31, 32)}
    assert {tuple(row) for row in tokens.tolist()} <= cuts


def test_chat_messages_go_through_the_chat_template(tmp_path: Path, tokenizer: Any) -> None:
    source = write_lines(tmp_path / "chat.jsonl", [{"messages": CHAT}, {"messages": CHAT[:1]}])
    expected = [tokenizer.apply_chat_template(chat, tokenize=False) for chat in (CHAT, CHAT[:1])]
    assert list(read_texts(source, tokenizer)) == expected
    assert "lattice" in expected[0]
    assert expected[0] != CHAT[0]["content"]


def test_chat_messages_without_a_template_are_an_error(tmp_path: Path, tokenizer: Any, monkeypatch: Any) -> None:
    source = write_lines(tmp_path / "chat.jsonl", [{"messages": CHAT}])
    monkeypatch.setattr(tokenizer, "chat_template", None)
    with pytest.raises(QuantizationError, match="tokenizer has no chat template"):
        list(read_texts(source, tokenizer))


def test_the_seed_fixes_the_choice(short_text: Path, tokenizer: Any) -> None:
    first, again, other = (calibration_tokens(tokenizer, str(short_text), 8, 64, seed) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert len({tuple(row) for row in first.tolist()}) == 8


def test_all_of_the_text_can_be_used(tmp_path: Path, tokenizer: Any) -> None:
    text = TEXTS[0]
    (tmp_path / "text.txt").write_text(text)
    tokens = tokenizer(text)["input_ids"]
    whole = len(tokens) // 16
    packed = calibration_tokens(tokenizer, str(tmp_path / "text.txt"), whole, 16, seed=3)
    assert packed.flatten().tolist() == tokens[: whole * 16]


def test_too_little_text_is_an_error_with_both_numbers(tmp_path: Path, tokenizer: Any) -> None:
    path = tmp_path / "text.txt"
    path.write_text(TEXTS[0])
    there = len(tokenizer(TEXTS[0])["input_ids"])
    with pytest.raises(QuantizationError, match=rf"has {there} tokens; 100 samples of 64 need 6400"):
        calibration_tokens(tokenizer, str(path), samples=100, length=64, seed=0)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "text\n", r"use .jsonl, .txt or .parquet"),
        ("a.jsonl", '{"text": "x"}\n{"text": \n', "a.jsonl line 2 is not JSON"),
        ("a.jsonl", '{"body": "x"}\n', r"neither 'text' nor 'messages', but \['body'\]"),
        ("a.jsonl", '{"text": 3}\n', "neither 'text' nor 'messages'"),
    ],
)
def test_files_that_cannot_be_read_are_errors(
    name: str, content: str, message: str, tmp_path: Path, tokenizer: Any
) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(QuantizationError, match=message):
        calibration_tokens(tokenizer, str(tmp_path / name), 1, 8, seed=0)


def test_a_dataset_that_cannot_be_had_is_an_error(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(*_: Any, **__: Any) -> None:
        raise ConnectionError("no network")

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    with pytest.raises(QuantizationError, match="someone/words is neither a file nor a dataset on the hub: no network"):
        calibration_tokens(tokenizer, "someone/words", 1, 8, seed=0)


def test_a_hub_dataset_is_read_no_further_than_needed(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    read = []

    def load_dataset(name: str, **_: Any) -> Any:
        for number in range(1000):
            read.append(number)
            yield {"text": f"# {name} {number}\n" * 20}

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    assert calibration_tokens(tokenizer, "someone/words", 4, 16, seed=0).shape == (4, 16)
    assert len(read) < 10
