"""The backward pass, block by block, against one autograd pass over the whole model."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from vllm_babai.errors import QuantizationError
from vllm_babai.offline.model.checkpoint import open_checkpoint
from vllm_babai.offline.model.streamed import open_streamed
from vllm_babai.offline.model.walk import Inputs
from vllm_babai.offline.plan import waiting
from vllm_babai.offline.plan.sensitivity import ROW_BLOCK, measure_sensitivity
from vllm_babai.offline.plan.waiting import WaitingInputs
from vllm_babai.offline.solver.row_geometry import ROW_DAMPING


@pytest.fixture(scope="module")
def folder(save_random_llama: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_random_llama(
        tmp_path_factory.mktemp("model"), hidden_size=32, intermediate_size=300, num_hidden_layers=3
    )


def test_gradients_are_those_of_the_whole_model(folder: Path, tmp_path: Path) -> None:
    tokens = torch.randint(4096, (3, 16), generator=torch.Generator().manual_seed(1))
    streamed = open_streamed(open_checkpoint(folder), torch.device("cpu"), torch.float32)
    hidden, calls = streamed.first_inputs(tokens)
    before = hidden.clone()
    sensitivity = measure_sensitivity(streamed, Inputs(tokens, hidden, calls), 7, tmp_path)
    assert torch.equal(hidden, before)

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    gradients: dict[str, list[torch.Tensor]] = {}
    linears = [n for name in streamed.block_names for n in streamed.linears(name)]
    for name in linears:
        model.get_submodule(name).register_full_backward_hook(
            lambda _, __, by_output, name=name: gradients.setdefault(name, []).append(by_output[0][0])
        )
    generator = torch.Generator().manual_seed(7)
    for sequence in tokens:
        log_p = torch.log_softmax(model(sequence[None]).logits[0], -1)
        labels = torch.multinomial(log_p.detach().exp(), 1, generator=generator)
        (-log_p.gather(1, labels).sum()).backward()

    for name in linears:
        expected = torch.stack(gradients[name])
        weights = expected.square().sum(-1)
        torch.testing.assert_close(sensitivity.shared_weights([name]), weights / weights.mean(), rtol=1e-3, atol=1e-5)
        rows = expected.flatten(0, 1)
        covariance = rows.T @ rows / len(rows)
        measured = sensitivity.row_covariance(name)
        for first in range(0, len(covariance), ROW_BLOCK):
            block = covariance[first : first + ROW_BLOCK, first : first + ROW_BLOCK]
            torch.testing.assert_close(
                measured[first : first + ROW_BLOCK, : len(block)],
                block,
                rtol=1e-3,
                atol=float(block.abs().max()) * 1e-5,
            )

    p = torch.cat([model(sequence[None]).logits[0].detach().softmax(-1) for sequence in tokens])
    variances = (p - p.square()).mean(0).double()
    head = sensitivity.row_geometry("lm_head")
    assert head.is_diagonal
    torch.testing.assert_close(head.pivots, variances + ROW_DAMPING * variances.mean(), rtol=1e-3, atol=1e-9)
    assert sensitivity.shared_weights(["lm_head"]) is None


def test_linears_of_one_input_share_weights_of_mean_one(folder: Path, tmp_path: Path) -> None:
    tokens = torch.randint(4096, (2, 8), generator=torch.Generator().manual_seed(2))
    streamed = open_streamed(open_checkpoint(folder), torch.device("cpu"), torch.float32)
    sensitivity = measure_sensitivity(streamed, Inputs(tokens, *streamed.first_inputs(tokens)), 0, tmp_path)
    shared = sensitivity.shared_weights([f"model.layers.0.self_attn.{n}_proj" for n in "qkv"])
    assert shared.shape == (2, 8)
    assert float(shared.mean()) == pytest.approx(1.0, rel=1e-5)
    assert not list(tmp_path.glob("tmp*")), "what waited on disk is gone"


@pytest.mark.parametrize("memory", [1e9, 0])
def test_inputs_wait_in_memory_or_on_disk(
    memory: float, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = torch.randint(4096, (2, 8), generator=torch.Generator().manual_seed(2))
    streamed = open_streamed(open_checkpoint(folder), torch.device("cpu"), torch.float32)
    inputs = Inputs(tokens, *streamed.first_inputs(tokens))
    said: list[str] = []
    found = []
    for name, available in (("expected", 1e9), ("found", memory)):
        (tmp_path / name).mkdir()
        monkeypatch.setattr(waiting, "available_memory", lambda available=available: available)
        measure_sensitivity(streamed, inputs, 0, tmp_path / name, note=said.append)
        found.append({file.name: load_file(file) for file in (tmp_path / name).glob("*.safetensors")})
        assert all(path.is_file() for path in (tmp_path / name).iterdir()), "what waited on disk is gone"
    assert found[0].keys() == found[1].keys()
    for file, tensors in found[0].items():
        assert all(torch.equal(tensor, found[1][file][key]) for key, tensor in tensors.items())
    assert ("in memory" if memory else f"on disk in {tmp_path / 'found'}") in said[1]


def test_size_is_known_before_anything_is_computed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hidden = torch.empty(128, 2048, 4096, dtype=torch.bfloat16, device="meta")
    monkeypatch.setattr(waiting, "available_memory", lambda: 100e9)
    monkeypatch.setattr(waiting.shutil, "disk_usage", lambda _: SimpleNamespace(free=80e9))
    kept = WaitingInputs.plan(hidden, 32, tmp_path)
    assert str(kept) == f"inputs of blocks wait on disk in {tmp_path} for the backward pass: 68.72 GB"
    assert WaitingInputs.plan(hidden, 8, tmp_path).folder is None
    with pytest.raises(QuantizationError, match=r"needs 171\.80 GB for the inputs of 80 blocks.*80\.00 GB.*--samples"):
        WaitingInputs.plan(hidden, 80, tmp_path)


@pytest.mark.parametrize(("limit", "free"), [("max", 7 * 1024), ("5000", 2000)])
def test_a_container_may_have_less_memory_than_its_machine(
    limit: str, free: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "meminfo").write_text("MemTotal:       64 kB\nMemAvailable:    7 kB\n")
    (tmp_path / "memory.max").write_text(f"{limit}\n")
    (tmp_path / "memory.current").write_text("3000\n")
    monkeypatch.setattr(waiting, "MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(waiting, "CGROUP", tmp_path)
    assert waiting.available_memory() == free
