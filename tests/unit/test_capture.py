"""Capture: linears that share an input share a Hessian, and later linears see what quantized ones put out."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Gemma2Config, LlamaConfig

from vllm_babai.errors import QuantizationError
from vllm_babai.offline.model.call import Call
from vllm_babai.offline.model.capture import BATCH_TOKENS, Moments, advance, batches, moments, seen_by, shared_inputs
from vllm_babai.offline.model.checkpoint import open_checkpoint
from vllm_babai.offline.model.streamed import StreamedModel, open_streamed

TINY = {
    "vocab_size": 4096,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 2,
}


class Block(nn.Module):
    """Two linears on the hidden states, one on what these give; `unused` is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.out = nn.Linear(8, 12), nn.Linear(8, 12), nn.Linear(12, 8)
        self.unused = nn.Linear(8, 8)

    def forward(self, hidden: torch.Tensor, scale: float) -> tuple[torch.Tensor]:
        return (hidden + self.out(self.left(hidden) * self.right(hidden) * scale),)


@pytest.fixture
def block() -> Block:
    torch.manual_seed(0)
    return Block().requires_grad_(False)


@pytest.fixture
def linears(block: Block) -> dict[str, nn.Linear]:
    return {name: module for name, module in block.named_children() if name != "unused"}


def captured_moments(block: Block, linears: dict[str, nn.Linear], hidden: Tensor, scale: float) -> dict[str, Moments]:
    return moments(seen_by(block, linears, hidden, Call(keywords={"scale": scale})), None, dict.fromkeys(linears))


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory, save_random_llama: Any) -> Path:
    return save_random_llama(tmp_path_factory.mktemp("model") / "llama")


@pytest.fixture
def streamed(model_folder: Path) -> StreamedModel:
    return open_streamed(open_checkpoint(model_folder), torch.device("cpu"), torch.float32)


def random_tokens(sequences: int, length: int) -> torch.Tensor:
    return torch.randint(0, 4096, (sequences, length), generator=torch.Generator().manual_seed(0))


def test_groups_of_a_llama_block(streamed: StreamedModel) -> None:
    hidden, calls = streamed.first_inputs(random_tokens(1, 16))
    block = streamed.load_block(0)
    linears = streamed.linears("model.layers.0", block)
    groups = shared_inputs(block, linears, hidden, calls[0])
    short = [[name.rpartition(".")[2] for name in group] for group in groups]
    assert short == [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]]


def test_linears_that_the_block_never_calls_are_named(block: Block) -> None:
    with pytest.raises(QuantizationError, match="unused: not called when the block runs"):
        shared_inputs(block, dict(block.named_children()), torch.randn(1, 4, 8), Call(keywords={"scale": 1.0}))


def test_no_linears_no_groups(block: Block) -> None:
    assert shared_inputs(block, {}, torch.randn(1, 4, 8), Call(keywords={"scale": 1.0})) == []


def test_hessian_is_the_mean_of_outer_products(block: Block, linears: dict[str, nn.Linear]) -> None:
    hidden = torch.randn(300, 100, 8)  # more than one batch
    assert len(list(batches(hidden, torch.device("cpu")))) == -(-300 * 100 // (BATCH_TOKENS // 100 * 100))
    rows = hidden.flatten(0, 1).double()
    inputs = {"left": rows, "out": (block.left(rows.float()) * block.right(rows.float()) * 2.0).double()}
    found = captured_moments(block, {name: linears[name] for name in inputs}, hidden, 2.0)
    for name, x in inputs.items():
        hessian, drift = found[name]
        assert hessian.dtype == torch.float32
        assert drift is None
        torch.testing.assert_close(hessian.double(), x.T @ x / len(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_activations_that_are_not_finite_are_named(value: float, block: Block, linears: dict[str, nn.Linear]) -> None:
    hidden = torch.randn(3, 5, 8)
    hidden[1, 2, 3] = value
    with pytest.raises(QuantizationError, match="left: its input activations have NaN or Inf"):
        captured_moments(block, {"left": linears["left"]}, hidden, 1.0)


def test_advance_replaces_inputs_by_outputs(block: Block) -> None:
    hidden = torch.randn(300, 100, 8)
    expected = block(hidden, scale=0.5)[0]
    advance(block, hidden, Call(keywords={"scale": 0.5}), torch.device("cpu"))
    torch.testing.assert_close(hidden, expected)


FAMILIES = {
    "llama": LlamaConfig(**TINY, tie_word_embeddings=False),
    "gemma2": Gemma2Config(**TINY, head_dim=8, tie_word_embeddings=False),  # its embedding has a buffer, too
    "gemma2-tied": Gemma2Config(**TINY, head_dim=8),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_streamed_parts_compute_what_the_whole_model_does(family: str, tmp_path: Path, save_random_model: Any) -> None:
    tokens, cpu = random_tokens(3, 20), torch.device("cpu")
    folder = save_random_model(FAMILIES[family], tmp_path / family)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        found = model(tokens, output_hidden_states=True)
    streamed = open_streamed(open_checkpoint(folder), cpu, torch.float32)
    hidden, calls = streamed.first_inputs(tokens)
    torch.testing.assert_close(hidden, found.hidden_states[0])
    advance(streamed.load_block(0), hidden, calls[0], cpu)
    torch.testing.assert_close(hidden, found.hidden_states[1])
    advance(streamed.load_block(1), hidden, calls[1], cpu)
    torch.testing.assert_close(streamed.load_head()(tokens, hidden), found.logits)
    if not family.endswith("tied"):
        other = hidden.flip(0)
        streamed.advance_to_head(tokens, hidden, other)
        torch.testing.assert_close(hidden, found.hidden_states[2])
        assert torch.equal(other, hidden.flip(0))


@pytest.mark.parametrize(
    ("tensor", "layer"),
    [("model.layers.1.mlp.up_proj.weight", 1), ("model.layers.0.input_layernorm.weight", 0)],
)
def test_weights_that_are_not_finite_are_named(tensor: str, layer: int, tmp_path: Path, save_random_llama: Any) -> None:
    folder = save_random_llama(tmp_path / "damaged")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.get_parameter(tensor).data.view(-1)[5] = torch.nan
    model.save_pretrained(folder)
    streamed = open_streamed(open_checkpoint(folder), torch.device("cpu"), torch.float32)
    with pytest.raises(QuantizationError, match=f"{tensor} has NaN or Inf in model.safetensors"):
        streamed.load_block(layer)
