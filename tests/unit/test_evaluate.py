"""Evaluation: perplexity by its definition, and comparisons of which the answer is known."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from vllm_babai.offline import QuantizationError, QuantizeOptions, quantize
from vllm_babai.offline.tools.evaluate import evaluate, evaluation_windows

WINDOW = 64


@pytest.fixture(scope="module")
def text(short_text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("evaluation") / "text.txt"
    path.write_text(short_text.read_text()[:6000])
    return path


@pytest.fixture(scope="module")
def quantized(bundled_model: Path, short_text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled model, of which only the last block's last linear is quantized, at 2 bits."""
    ignore = [r"layers\.[0-4]", "self_attn", "gate_proj|up_proj"]
    options = QuantizeOptions(bits=2, calibration=str(short_text), samples=8, sequence_length=64, ignore=ignore)
    return quantize(bundled_model, tmp_path_factory.mktemp("evaluation") / "out", options)


def direct_losses(folder: Path, tokenizer: Any, text: Path) -> torch.Tensor:
    """Negative log-likelihood of every predicted token, float64 [windows, WINDOW − 1], token by token."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokens = tokenizer(text.read_text(), add_special_tokens=False)["input_ids"]
    rows = []
    for start in range(0, len(tokens) - WINDOW + 1, WINDOW):
        window = tokens[start : start + WINDOW]
        with torch.no_grad():
            probability = torch.softmax(model(torch.tensor([window])).logits[0].double(), -1)
        rows.append([-math.log(probability[i, window[i + 1]]) for i in range(WINDOW - 1)])
    return torch.tensor(rows, dtype=torch.float64)


def test_perplexity_is_that_of_a_direct_computation(bundled_model: Path, tokenizer: Any, text: Path) -> None:
    expected = direct_losses(bundled_model, tokenizer, text)
    result = evaluate(bundled_model, text, window=WINDOW)
    assert result.nll == pytest.approx(float(expected.mean()), rel=1e-4)
    assert result.perplexity == pytest.approx(math.exp(float(expected.mean())), rel=1e-3)
    by_window = expected.mean(1)
    assert result.nll_error == pytest.approx(float(by_window.std() / len(by_window) ** 0.5), rel=1e-3)
    assert (result.windows, result.window, result.tokens) == (len(expected), WINDOW, expected.numel())
    assert len(result.position_nll) == 8
    assert result.position_nll[0] == pytest.approx(float(expected[:, :8].mean()), rel=1e-3)
    assert result.comparison is None


def test_a_model_against_itself(bundled_model: Path, text: Path) -> None:
    comparison = evaluate(bundled_model, text, window=WINDOW, against=bundled_model).comparison
    assert comparison is not None
    assert (comparison.loss, comparison.loss_error, comparison.agreement) == (0, 0, 1)
    assert comparison.divergence == pytest.approx(0, abs=1e-7)


def test_a_quantized_model_against_the_original(bundled_model: Path, quantized: Path, text: Path) -> None:
    original = evaluate(bundled_model, text, window=WINDOW)
    result = evaluate(quantized, text, window=WINDOW, against=bundled_model)
    comparison = result.comparison
    assert comparison is not None
    assert comparison.original_perplexity == pytest.approx(original.perplexity)
    assert comparison.loss == pytest.approx(result.nll - original.nll)
    assert comparison.divergence > 5 * comparison.divergence_error > 0
    assert 0.5 < comparison.agreement < 1
    assert 0 < comparison.agreement_error < 0.1


def test_windows_are_cuts_of_the_joined_documents(bundled_model: Path, tokenizer: Any, tmp_path: Path) -> None:
    documents = [f"def number_{i}():\n    return {i}\n" for i in range(40)]
    path = tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps({"text": document}) + "\n" for document in documents))
    tokens = tokenizer("".join(documents), add_special_tokens=False)["input_ids"]
    windows = evaluation_windows(bundled_model, path, 16, 0)
    assert windows.flatten().tolist() == tokens[: len(tokens) // 16 * 16]
    few = evaluation_windows(bundled_model, path, 16, 3)
    assert torch.equal(few, windows[:: len(windows) // 3][:3])


def test_too_little_text_is_an_error(bundled_model: Path, tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("import os")
    with pytest.raises(QuantizationError, match=r"has \d tokens, less than one window of 64"):
        evaluate(bundled_model, path, window=WINDOW)
