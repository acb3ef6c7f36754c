"""Several processes quantize one model together, as torchrun starts them; on a CPU they talk by gloo."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from architectures import TEXT
from safetensors.torch import load_file, save_file

from vllm_babai.offline import QuantizeOptions, quantize
from vllm_babai.offline.model.checkpoint import open_checkpoint
from vllm_babai.offline.model.dense import stored_linears
from vllm_babai.offline.ranks import Ranks, owners

# Two ranks of 64 × 32 tokens, `BATCH_TOKENS` each: the halves of drift are then those of one rank, and a sum of two is
# the same in any order.
OPTIONS = {"samples": 128, "sequence_length": 32, "paths": 2}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory, save_random_llama: Any) -> Path:
    """A Llama of one block."""
    return save_random_llama(tmp_path_factory.mktemp("model") / "source", num_hidden_layers=1)


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory, save_random_model: Any) -> Path:
    """A mixture of experts of two blocks."""
    config = transformers.MixtralConfig(**TEXT | {"num_local_experts": 3, "num_experts_per_tok": 2})
    return save_random_model(config, tmp_path_factory.mktemp("model") / "mixture")


@pytest.fixture
def torchrun(source: Path, short_text: Path) -> Any:
    """Function that runs `babai quantize` as several ranks."""

    def run(ranks: int, out: Path, *more: str, model: Path = source) -> subprocess.CompletedProcess[str]:
        options = [f"--{key.replace('_', '-')}={value}" for key, value in OPTIONS.items()]
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        command += ["-m", "vllm_babai.offline.cli", "quantize", str(model), str(out), f"--calibration={short_text}"]
        return subprocess.run([*command, *options, *more], capture_output=True, text=True, timeout=300)

    return run


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: weight.dequantize() for name, weight, _, _ in stored_linears(open_checkpoint(folder))}


def report(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "babai_report.json").read_text())


@pytest.mark.parametrize("form", ["ssqr", pytest.param("hptq", marks=pytest.mark.long)])
def test_two_ranks_find_what_one_finds(
    form: str, source: Path, short_text: Path, torchrun: Any, tmp_path: Path
) -> None:
    options = QuantizeOptions(format=form, calibration=str(short_text), **OPTIONS)  # type: ignore[arg-type]
    one = quantize(source, tmp_path / "one", options)
    ended = torchrun(2, tmp_path / "two", f"--format={form}")
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("serve it:") == 1
    assert ended.stderr.count("quantizing: 0 of") == 1, "the first rank alone tells of progress"
    expected, found = weights(one), weights(tmp_path / "two")
    assert expected.keys() == found.keys()
    if form == "ssqr":  # of HPTQ each rank has its part of what is left over, and so other rates
        assert all(torch.equal(weight, found[name]) for name, weight in expected.items())
    of_one, of_two = report(one), report(tmp_path / "two")
    assert of_two["bits_per_weight"] == pytest.approx(of_one["bits_per_weight"], rel=0.01)
    assert [layer["name"] for layer in of_two["layers"]] == [layer["name"] for layer in of_one["layers"]]
    for layer, other in zip(of_one["layers"], of_two["layers"], strict=True):
        assert other["relative_error"] == pytest.approx(layer["relative_error"], rel=0.05)


@pytest.mark.long
def test_experts_have_owners(mixture: Path, short_text: Path, torchrun: Any, tmp_path: Path) -> None:
    options = QuantizeOptions(calibration=str(short_text), **OPTIONS)  # type: ignore[arg-type]
    one = report(quantize(mixture, tmp_path / "one", options))
    ended = torchrun(2, tmp_path / "two", "--format=ssqr", model=mixture)
    assert ended.returncode == 0, ended.stderr
    two = report(tmp_path / "two")
    for expert, other in zip(one["experts"], two["experts"], strict=True):
        assert sum(expert["tokens"]) == sum(other["tokens"])
    for layer, other in zip(one["layers"], two["layers"], strict=True):
        assert other["name"] == layer["name"]
        assert other["relative_error"] == pytest.approx(layer["relative_error"], rel=0.05)


@pytest.mark.long
def test_a_failure_is_said_once_and_resumed_by_another_number(
    mixture: Path, short_text: Path, torchrun: Any, tmp_path: Path
) -> None:
    model = shutil.copytree(mixture, tmp_path / "model")
    whole = load_file(model / "model.safetensors")
    name = "model.layers.1.self_attn.o_proj.weight"
    damaged = {key: tensor.clone() for key, tensor in whole.items()}
    damaged[name][3, 4] = torch.nan
    save_file(damaged, model / "model.safetensors", metadata={"format": "pt"})
    more = ["--format=ssqr", "--no-sensitivity"]
    ended = torchrun(2, tmp_path / "out", *more, model=model)
    assert ended.returncode != 0
    assert sum(line.startswith("error: ") for line in ended.stderr.splitlines()) == 1, ended.stderr
    assert f"error: {name} has NaN or Inf" in ended.stderr

    save_file(whole, model / "model.safetensors", metadata={"format": "pt"})
    first = tmp_path / "out.partial" / "model-00001-of-00003.safetensors"
    written = first.read_bytes()
    options = QuantizeOptions(sensitivity=False, calibration=str(short_text), **OPTIONS)  # type: ignore[arg-type]
    out = quantize(model, tmp_path / "out", options, resume=True)
    assert (out / first.name).read_bytes() == written
    assert len(report(out)["layers"]) == len(weights(out))


def test_shares_and_owners() -> None:
    shares = [Ranks(number, 3).share(8) for number in range(3)]
    assert [index for share in shares for index in range(8)[share]] == list(range(8))
    assert owners({"q": 4, "k": 1, "v": 1}, 2) == {"q": 0, "k": 1, "v": 1}
    assert owners({"gate": 3, "up": 3}, 1) == {"gate": 0, "up": 0}
