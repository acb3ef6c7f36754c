"""The parts of the kernel benchmark that need no GPU, on made-up timings."""

import importlib
import importlib.util
import inspect
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from rich.console import Console
from torch._subclasses.fake_tensor import FakeTensorMode

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "kernels.py"


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    specification = importlib.util.spec_from_file_location("kernel_benchmark", SCRIPT)
    module = importlib.util.module_from_spec(specification)
    sys.modules[specification.name] = module
    specification.loader.exec_module(module)
    return module


@pytest.fixture
def report(benchmark: ModuleType):
    timings = [
        benchmark.Timing(layer, kernel, *shape, tokens, bytes_each * shape[0] * shape[1] / 1e12, 10**6)
        for layer, shape in (("small", (1000, 1000)), ("large", (4000, 1000)))
        for kernel, bytes_each in ((benchmark.BASELINE, 2.0), ("babai 4 bits", 0.5))
        for tokens in (1, 64)
    ]
    return benchmark.Report("Made-up GPU", 4e12, timings)


def test_speedup_and_bandwidth(benchmark: ModuleType, report) -> None:
    babai = next(timing for timing in report.timings if timing.kernel == "babai 4 bits")
    assert report.speedup(babai) == pytest.approx(4.0)
    assert report.bandwidth(babai) == pytest.approx(0.5)


def test_table_shows_every_layer_and_kernel(benchmark: ModuleType, report) -> None:
    console = Console(width=160, record=True)
    console.print(benchmark.table(report))
    text = console.export_text()
    assert text.count("babai 4 bits") == 2
    assert "4.00 50%" in text and "M=64" in text and "Made-up GPU" in text


def test_plot_is_written(benchmark: ModuleType, report, tmp_path: Path) -> None:
    benchmark.plot(report, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes()[:4] == b"\x89PNG"


def test_a_peer_that_fails_is_left_out(benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    console = Console(record=True)
    monkeypatch.setitem(benchmark.PEERS, "broken", lambda weight: 1 / 0)
    assert not list(benchmark.time_peer("layer", "broken", (8, 8), torch.device("cpu"), (1,), console))
    assert "broken left out" in console.export_text()


def test_marlin_is_called_as_the_installed_vllm_has_it(benchmark: ModuleType) -> None:
    with FakeTensorMode():
        multiply, bytes_each = benchmark.marlin(torch.empty(256, 512, dtype=torch.bfloat16))
        y = multiply(torch.empty(3, 512, dtype=torch.bfloat16))
    assert y.shape == (3, 256)
    assert bytes_each == 256 * 512 // 2 + 2 * 256 * 4


def test_humming_is_called_as_the_installed_vllm_has_it(benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its package needs a GPU; vLLM's functions around it are replaced by ones of the same parameters."""
    from vllm.model_executor.layers.quantization.utils import humming
    from vllm.utils import humming as package

    def same_parameters(function: Any, result: Any) -> Any:
        signature = inspect.signature(function)
        return lambda *arguments, **options: signature.bind(*arguments, **options) and result

    y = torch.zeros(3, 256)
    for module, name, result in (
        (humming, "prepare_humming_linear_layer_config", "config"),
        (humming, "get_humming_linear_compute_config", "{}"),
        (humming, "apply_humming_linear", y),
        (package, "create_humming_locks", torch.zeros(1)),
    ):
        monkeypatch.setattr(module, name, same_parameters(getattr(module, name), result))
    multiply, bytes_each = benchmark.humming(torch.empty(256, 512, dtype=torch.bfloat16))
    assert multiply(torch.empty(3, 512, dtype=torch.bfloat16)) is y
    assert bytes_each == 256 * 512 // 2 + 2 * 256 * 4


@pytest.mark.parametrize(
    ("peer", "module", "function"),
    [("vLLM bf16", "fused_moe", "fused_experts"), ("Marlin int4", "experts.marlin_moe", "fused_marlin_moe")],
)
def test_experts_are_called_as_the_installed_vllm_has_them(
    peer: str, module: str, function: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM's kernels need a GPU; functions of the same parameters stand in for them."""
    import expert_kernels

    owner = importlib.import_module(f"vllm.model_executor.layers.fused_moe.{module}")
    signature = inspect.signature(getattr(owner, function))
    monkeypatch.setattr(owner, function, lambda *arguments, **options: signature.bind(*arguments, **options).arguments)
    sizes = expert_kernels.Mixture(2, 256, 128, 2)
    multiply, size = expert_kernels.PEERS[peer](sizes, torch.device("cpu"))
    bound = multiply(torch.zeros(3, 256), *expert_kernels.random_routing(sizes, 3, torch.device("cpu")))
    assert bound["topk_ids"].shape == bound["topk_weights"].shape == (3, 2)
    weights = 2 * 3 * 128 * 256
    assert size == (2 * weights if peer == "vLLM bf16" else weights // 2 + 2 * weights // 128)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("script", ["kernels.py", "expert_kernels.py"])
def test_without_a_gpu_it_says_so(script: str) -> None:
    child = subprocess.run([sys.executable, str(SCRIPT.with_name(script))], capture_output=True, text=True)
    assert child.returncode == 1
    assert "needs a GPU" in child.stderr
