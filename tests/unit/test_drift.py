"""Drift correction: the ridge regression on what the original model put out, and what a linear's output is added to."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GemmaConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
)

from vllm_babai.errors import QuantizationError
from vllm_babai.offline import QuantizeOptions, pipeline, quantize
from vllm_babai.offline.model import capture, walk
from vllm_babai.offline.model.call import Call
from vllm_babai.offline.model.capture import Seen, added_linears, moments, seen_by
from vllm_babai.offline.model.checkpoint import open_checkpoint
from vllm_babai.offline.model.dense import load_dense
from vllm_babai.offline.model.streamed import open_streamed
from vllm_babai.offline.solver import drift as drift_correction
from vllm_babai.offline.solver.drift import Drift, corrected, reliability
from vllm_babai.offline.solver.factor import factorize

SEQUENCES, LENGTH, INPUTS, OUTPUTS, DAMPING = 6, 20, 12, 7, 0.02


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def in_batches(inputs: Tensor, stream: Tensor | None) -> list[dict[str, Seen]]:
    """What q_proj sees: tensors [sequences, length, features] as batches of four sequences and of two."""
    streams = {} if stream is None else {w: stream[4 * w : 4 * w + 4].flatten(0, 1) for w in (0, 1)}
    windows = [slice(0, 4), slice(4, 8)]
    return [{"q_proj": Seen(w, inputs[w].flatten(0, 1), streams.get(i))} for i, w in enumerate(windows)]


def test_of_mixed_tokens_the_correction_errs_least(generator: torch.Generator) -> None:
    """Some tokens have drifted, and others, whose Hessian is mixed with theirs, have not."""
    weight, share = torch.randn(OUTPUTS, INPUTS, generator=generator), 0.3
    x, others = torch.randn(40, INPUTS, generator=generator), torch.randn(50, INPUTS, generator=generator)
    x_hat = x + 0.3 * torch.randn(40, INPUTS, generator=generator)
    hessian = share * x_hat.T @ x_hat / len(x) + (1 - share) * others.T @ others / len(others)
    cross = (x - x_hat).T @ x_hat / len(x)
    drift = Drift(torch.stack([cross, cross]), None).of_share(share)
    found = corrected(weight, factorize(hessian, "natural", 1e-9), drift).requires_grad_()
    drifted = (x @ weight.T - x_hat @ found.T).square().sum() / len(x)
    not_drifted = (others @ (weight - found).T).square().sum() / len(others)
    (gradient,) = torch.autograd.grad(share * drifted + (1 - share) * not_drifted, found)
    torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-5)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("has_stream", [False, True])
def test_the_whole_correction_is_the_ridge_regression(
    has_stream: bool, weighted: bool, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    def random(features: int) -> Tensor:
        """Both halves of each batch are the same, so that nothing counts as noise."""
        return torch.randn(3, LENGTH, features, generator=generator)[[0, 1, 0, 1, 2, 2]]

    weight = torch.randn(OUTPUTS, INPUTS, generator=generator)
    x, h = random(INPUTS), random(OUTPUTS) if has_stream else None
    x_hat, h_hat = x + 0.3 * random(INPUTS), None if h is None else h + 0.5 * random(OUTPUTS)
    tokens = random(1)[..., 0].square() if weighted else None
    tokens = None if tokens is None else tokens / tokens.mean()
    hessian, drift = moments(in_batches(x_hat, h_hat), in_batches(x, h), {"q_proj": tokens})["q_proj"]
    assert drift is not None
    factor = factorize(hessian, "activation", DAMPING)

    # The same as least squares: a row √w (x̂, Wx + h − ĥ) for every token, and √λ (I, W) for the damping.
    wanted = x @ weight.T + (0 if h is None or h_hat is None else h - h_hat)
    root = torch.ones(SEQUENCES * LENGTH, 1) if tokens is None else tokens.reshape(-1, 1).sqrt()
    damping = (DAMPING * hessian.diagonal().mean() * SEQUENCES * LENGTH).sqrt()
    rows = torch.cat((root * x_hat.flatten(0, 1), damping * torch.eye(INPUTS)))
    answers = torch.cat((root * wanted.flatten(0, 1), damping * weight.T))
    expected = torch.linalg.lstsq(rows.double(), answers.double()).solution.T.float()
    for rows in (4096, 3):
        monkeypatch.setattr(drift_correction, "ROWS", rows)
        torch.testing.assert_close(corrected(weight, factor, drift), expected, rtol=1e-4, atol=1e-5)


def test_what_two_halves_do_not_agree_on_is_left_out(generator: torch.Generator) -> None:
    weight, hessian = torch.randn(OUTPUTS, INPUTS, generator=generator), torch.eye(INPUTS)
    factor = factorize(hessian, "natural", 0.0)
    first, second = torch.randn(2, OUTPUTS, INPUTS, generator=generator)
    second -= first * (first * second).sum() / first.square().sum()
    second *= first.norm() / second.norm()
    for stream, share in (
        ((first, -first), 0),
        ((first, second), 0),
        ((first + second, first), 0.8),
        ((first,) * 2, 1),
    ):
        drift = Drift(torch.zeros(2, INPUTS, INPUTS), torch.stack(stream))
        expected = weight + share * (stream[0] + stream[1]) / 2
        torch.testing.assert_close(corrected(weight, factor, drift), expected, rtol=1e-4, atol=1e-4)


def test_reliability_is_the_share_that_brings_an_estimate_closest(generator: torch.Generator) -> None:
    truth = torch.randn(200, 200, generator=generator)
    halves = truth + 1.5 * torch.randn(2, 200, 200, generator=generator)
    mean = halves.mean(0)
    common, own = float((halves[0] * halves[1]).sum()), float(halves.square().sum()) / 2
    assert reliability(common, own) == pytest.approx(float((mean * truth).sum() / mean.square().sum()), abs=0.02)


def test_without_drift_the_weight_stays_as_it_is(generator: torch.Generator) -> None:
    weight = torch.randn(OUTPUTS, INPUTS, generator=generator)
    inputs, stream = (torch.randn(SEQUENCES, LENGTH, n, generator=generator) for n in (INPUTS, OUTPUTS))
    seen = in_batches(inputs, stream)
    hessian, drift = moments(seen, seen, {"q_proj": None})["q_proj"]
    assert drift is not None
    assert torch.equal(corrected(weight, factorize(hessian, "natural", DAMPING), drift), weight)


def test_activations_that_are_not_finite_are_refused() -> None:
    inputs = torch.ones(SEQUENCES, LENGTH, INPUTS)
    inputs[2, 3, 4] = torch.nan
    for pair in ((inputs, torch.ones_like(inputs)), (torch.ones_like(inputs), inputs)):
        with pytest.raises(
            QuantizationError, match="q_proj: its input activations have NaN or Inf on the calibration text"
        ):
            moments(*(in_batches(side, None) for side in pair), {"q_proj": None})


class Block(nn.Module):
    """`down` is added to the hidden states, `out` only when it has been scaled."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.out = nn.Linear(8, 12), nn.Linear(12, 8), nn.Linear(8, 8)

    def forward(self, hidden: Tensor) -> Tensor:
        hidden = hidden + 0.1 * self.out(hidden)
        hidden += self.down(torch.relu(self.up(hidden)))
        return hidden


class Twice(nn.Module):
    """The outputs of both linears are added to the hidden states, in place."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.again = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, hidden: Tensor) -> Tensor:
        hidden = 1.0 * hidden
        hidden += self.down(torch.relu(hidden))
        hidden += self.again(torch.relu(hidden))
        return hidden


@pytest.mark.parametrize("name", ["up", "down", "out"])
def test_what_a_linear_sees(name: str, generator: torch.Generator) -> None:
    torch.manual_seed(0)
    block = Block().requires_grad_(False)
    hidden = torch.randn(50, 100, 8, generator=generator)  # more than one batch
    after = hidden + 0.1 * block.out(hidden)
    inputs = {"out": hidden, "up": after, "down": torch.relu(block.up(after))}[name]
    before = hidden.clone()
    linears = {name: block.get_submodule(name)}
    added = added_linears(block, linears, hidden, Call())
    found = list(seen_by(block, linears, hidden, Call(), added))
    batches = [seen[name] for seen in found]
    assert len(batches) > 1
    assert [i for seen in batches for i in range(50)[seen.window]] == list(range(50))
    torch.testing.assert_close(torch.cat([seen.inputs for seen in batches]), inputs.flatten(0, 1))
    streams = [seen.stream for seen in batches]
    if name == "down":
        torch.testing.assert_close(torch.cat(streams), after.flatten(0, 1))
    else:
        assert streams == [None] * len(batches)
    torch.testing.assert_close(hidden, before, rtol=0, atol=0)
    expected = moments(seen_by(block, linears, hidden, Call()), None, {name: None})[name]
    assert expected.drift is None
    torch.testing.assert_close(moments(found, found, {name: None})[name].hessian, expected.hessian)


def test_several_linears_seen_in_one_pass_are_those_seen_alone() -> None:
    """The first sum is in place: what `down` is added to must not be what it becomes."""
    torch.manual_seed(0)
    block, hidden = Twice().requires_grad_(False), torch.randn(3, 10, 8)
    linears = {name: block.get_submodule(name) for name in ("down", "again")}
    assert added_linears(block, linears, hidden, Call()) == linears.keys()
    (together,) = seen_by(block, linears, hidden, Call(), linears.keys())
    for name, linear in linears.items():
        (alone,) = seen_by(block, {name: linear}, hidden, Call(), {name})
        torch.testing.assert_close(together[name].inputs, alone[name].inputs, rtol=0, atol=0)
        torch.testing.assert_close(together[name].stream, alone[name].stream, rtol=0, atol=0)


SIZES = {
    "vocab_size": 4096,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 2,
}
PRE_NORM = {"o_proj", "down_proj"}
FAMILIES = {
    "llama": (LlamaConfig(**SIZES), PRE_NORM),
    "mistral": (MistralConfig(**SIZES), PRE_NORM),
    "qwen2": (Qwen2Config(**SIZES), PRE_NORM),
    "qwen3": (Qwen3Config(**SIZES, head_dim=16), PRE_NORM),
    "gemma": (GemmaConfig(**SIZES, head_dim=16), PRE_NORM),
    "gemma2": (Gemma2Config(**SIZES, head_dim=16), set()),  # its norms come before the sum
    "phi3": (Phi3Config(**SIZES), PRE_NORM),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_linears_that_are_added_to_the_residual_stream(family: str, tmp_path: Path, save_random_model: Any) -> None:
    config, expected = FAMILIES[family]
    streamed = open_streamed(open_checkpoint(save_random_model(config, tmp_path)), torch.device("cpu"), torch.float32)
    hidden, calls = streamed.first_inputs(torch.arange(40).view(2, 20))
    block = streamed.load_block(0)
    found = {}
    for name in streamed.linears("model.layers.0"):
        linear = block.get_submodule(name.removeprefix("model.layers.0."))
        added = added_linears(block, {name: linear}, hidden, calls[0])
        (seen,) = seen_by(block, {name: linear}, hidden, calls[0], added)
        found[name.rpartition(".")[2]] = seen[name].stream
    assert {name for name, stream in found.items() if stream is not None} == expected
    if expected:
        torch.testing.assert_close(found["o_proj"], hidden.flatten(0, 1))
        assert found["down_proj"].shape == found["o_proj"].shape
        assert not torch.equal(found["down_proj"], found["o_proj"])


def test_correction_brings_the_model_closer_to_the_original(
    tmp_path: Path, short_text: Path, save_random_llama: Any
) -> None:
    source = save_random_llama(tmp_path / "source", num_hidden_layers=4)
    tokens = torch.randint(0, 4096, (8, 40), generator=torch.Generator().manual_seed(0))
    original = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    distances = []
    for drift in (False, True):
        chosen = QuantizeOptions(
            bits=2, calibration=str(short_text), samples=32, sequence_length=32, drift=drift, sensitivity=False
        )
        out = quantize(source, tmp_path / f"drift-{drift}", chosen)
        with torch.no_grad():
            logits = load_dense(out, torch.device("cpu"))(tokens).logits
            distances.append(float((logits - original(tokens).logits).square().mean()))
    assert distances[1] < 0.95 * distances[0]


def test_without_correction_nothing_is_captured_of_the_original_model(
    tmp_path: Path, short_text: Path, save_random_llama: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("called")

    for module, name in ((walk, "added_linears"), (capture, "Drift"), (pipeline, "corrected")):
        monkeypatch.setattr(module, name, refuse)
    options = QuantizeOptions(calibration=str(short_text), samples=8, sequence_length=32)
    source = save_random_llama(tmp_path / "source")
    quantize(source, tmp_path / "out", replace(options, drift=False))
    with pytest.raises(AssertionError, match="called"):
        quantize(source, tmp_path / "corrected", options)
