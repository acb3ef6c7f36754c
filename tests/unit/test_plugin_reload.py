"""Weights are loaded once, loaded anew and made up, through vLLM's own loaders; nothing stored lives longer."""

import gc
import weakref
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from vllm.config import LoadConfig, ModelConfig, VllmConfig, set_current_vllm_config
from vllm.config.offload import OffloadConfig, PrefetchOffloadConfig, UVAOffloadConfig
from vllm.model_executor import parameter as vllm_parameter
from vllm.model_executor.layers import linear as vllm_linear
from vllm.model_executor.layers.linear import MergedColumnParallelLinear, ReplicatedLinear
from vllm.model_executor.model_loader.dummy_loader import DummyModelLoader
from vllm.model_executor.model_loader.reload import (
    finalize_layerwise_reload,
    initialize_layerwise_reload,
    record_metadata_for_reloading,
)

from vllm_babai.format import HPTQ, SSQR, CheckpointConfig, LatticeWeight, integer_range
from vllm_babai.plugin.config import BabaiConfig

HIDDEN, ROWS = 128, 96
FORMATS = [("ssqr", "packed"), ("hptq", "packed"), ("hptq", "coded")]
MODEL_CONFIG = ModelConfig.__new__(ModelConfig)  # vLLM hands it on to attention layers alone


@pytest.fixture(autouse=True)
def vllm_config(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for module in (vllm_parameter, vllm_linear):
        monkeypatch.setattr(module, "get_tensor_model_parallel_rank", lambda: 0)
        monkeypatch.setattr(module, "get_tensor_model_parallel_world_size", lambda: 1)
    load_format = getattr(request, "param", "auto")
    with set_current_vllm_config(VllmConfig(load_config=LoadConfig(load_format=load_format))):
        yield


class Model(torch.nn.Module):
    """Two fused linears and one on its own."""

    def __init__(self, format_name: str, residency: str) -> None:
        super().__init__()
        bits = 4 if format_name == "ssqr" else None
        config = BabaiConfig(CheckpointConfig(format_name, bits, residency=residency))
        config.packed_modules_mapping = {"gate_up_proj": ["gate_proj", "up_proj"]}
        options = {"bias": False, "params_dtype": torch.float32, "quant_config": config, "disable_tp": True}
        self.gate_up_proj = MergedColumnParallelLinear(HIDDEN, [ROWS, ROWS], prefix="gate_up_proj", **options)
        self.down_proj = ReplicatedLinear(2 * ROWS, HIDDEN, prefix="down_proj", **options)
        record_metadata_for_reloading(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.gate_up_proj(x)[0])[0]

    def process(self) -> None:
        for layer in (self.gate_up_proj, self.down_proj):
            layer.quant_method.process_weights_after_loading(layer)

    def load_weights(self, linears: list[SSQR | HPTQ]) -> None:
        """As vLLM's models do: gate_proj, up_proj, down_proj, tensor by tensor."""
        for linear, (layer, shard) in zip(
            linears, ((self.gate_up_proj, 0), (self.gate_up_proj, 1), (self.down_proj, None)), strict=True
        ):
            for name, tensor in linear.tensors().items():
                parameter = getattr(layer, name)
                parameter.weight_loader(parameter, tensor, *(() if shard is None else (shard,)))


def weights(seed: int, overflow: int, steps: Tensor | None = None) -> list[LatticeWeight]:
    """Of the three linears; each has integers beyond four bits, `overflow` of them."""
    generator = torch.Generator().manual_seed(seed)
    low, high = integer_range(4)
    made = []
    for rows, columns in ((ROWS, HIDDEN), (ROWS, HIDDEN), (HIDDEN, 2 * ROWS)):
        integers = torch.randint(low, high + 1, (rows, columns), dtype=torch.int16, generator=generator)
        integers.view(-1)[:overflow] = 20
        made.append(LatticeWeight(integers, torch.rand(rows, 1, generator=generator).add(0.5).bfloat16(), steps))
    return made


def stored(format_name: str, made: list[LatticeWeight]) -> list[SSQR | HPTQ]:
    return [SSQR.encode(weight, 4) if format_name == "ssqr" else HPTQ.encode(weight) for weight in made]


def expected(x: Tensor, made: list[LatticeWeight]) -> Tensor:
    gate, up, down = (weight.dequantize() for weight in made)
    return x @ torch.cat([gate, up]).t() @ down.t()


def assert_close(y: Tensor, exact: Tensor) -> None:
    assert (y - exact).norm() < 1e-5 * exact.norm()


def reload(model: Model, linears: list[SSQR | HPTQ]) -> None:
    """As `vllm.model_executor.model_loader.reload.inplace.reload_weights` does."""
    initialize_layerwise_reload(model)
    model.load_weights(linears)
    finalize_layerwise_reload(model, MODEL_CONFIG)


@pytest.mark.parametrize(("format_name", "residency"), FORMATS[:2])
@pytest.mark.parametrize("overflow", [10, 4])
def test_reloaded_weights_are_served_from_the_same_memory(format_name: str, residency: str, overflow: int) -> None:
    model, x = Model(format_name, residency), torch.randn(3, HIDDEN)
    first, second = weights(0, overflow=10), weights(1, overflow)
    model.load_weights(stored(format_name, first))
    model.process()
    addresses = {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
    assert_close(model(x), expected(x, first))
    for made in (second, first):
        reload(model, stored(format_name, made))
        assert_close(model(x), expected(x, made))
    assert {name: parameter.data_ptr() for name, parameter in model.named_parameters()} == addresses


def test_the_same_streams_are_reloaded() -> None:
    model, x = Model("hptq", "coded"), torch.randn(3, HIDDEN)
    made = weights(0, 10)
    model.load_weights(stored("hptq", made))
    model.process()
    for parameter in model.parameters():
        parameter.data.zero_()  # as waking from sleep of level 2 leaves them
    reload(model, stored("hptq", made))
    assert_close(model(x), expected(x, made))


def test_reloaded_weights_that_need_more_memory() -> None:
    model = Model("ssqr", "packed")
    model.load_weights(stored("ssqr", weights(0, 10)))
    model.process()
    message = r"gate_up_proj: the reloaded weights do not fit .*overflow_entries: int32 \[20\], now int32 \[24\]"
    with pytest.raises(ValueError, match=message):
        reload(model, stored("ssqr", weights(1, 12)))


def test_reloaded_weights_of_another_width() -> None:
    model = Model("hptq", "packed")
    model.load_weights(stored("hptq", weights(0, 10)))
    model.process()
    wider = [LatticeWeight(weight.integers * 10, weight.scales) for weight in weights(1, 10)]
    with pytest.raises(ValueError, match=r"gate_up_proj: .*constants: \(4, 192\), now \(8, 192\)"):
        reload(model, stored("hptq", wider))


@pytest.mark.parametrize(("format_name", "residency"), FORMATS)
def test_no_stored_tensor_outlives_loading(format_name: str, residency: str) -> None:
    model = Model(format_name, residency)
    linears = stored(format_name, weights(0, 10))
    memory = []
    for i, linear in enumerate(linears):
        arrays = {name: tensor.view(torch.uint8).numpy().copy() for name, tensor in linear.tensors().items()}
        memory += [weakref.ref(array) for array in arrays.values()]
        views = {name: torch.from_numpy(array).view(linear.dtypes[name]) for name, array in arrays.items()}
        linears[i] = type(linear)(**views)
    model.load_weights(linears)
    del linears, linear, arrays, views
    gc.collect()
    assert all(array() is not None for array in memory)
    model.process()
    gc.collect()
    assert all(array() is None for array in memory)


@pytest.mark.parametrize("option", ["uva", "prefetch"])
def test_offloading_to_the_cpu_is_refused(option: str) -> None:
    offload = OffloadConfig(
        uva=UVAOffloadConfig(cpu_offload_gb=option == "uva"),
        prefetch=PrefetchOffloadConfig(offload_group_size=option == "prefetch"),
    )
    with (
        set_current_vllm_config(VllmConfig(offload_config=offload)),
        pytest.raises(NotImplementedError, match="--cpu-offload-gb"),
    ):
        Model("ssqr", "packed")


@pytest.mark.parametrize("vllm_config", ["dummy"], indirect=True)
@pytest.mark.parametrize(("format_name", "residency"), FORMATS)
def test_dummy_weights(format_name: str, residency: str) -> None:
    """`--load-format dummy`: layouts of the right sizes, with overflow, that multiply."""
    torch.manual_seed(0)
    model = Model(format_name, residency)
    DummyModelLoader(LoadConfig(load_format="dummy")).load_weights(model, MODEL_CONFIG)
    model.process()
    y = model(torch.randn(3, HIDDEN))
    assert y.shape == (3, HIDDEN)
    assert y.isfinite().all() and y.abs().min() > 0
    if residency == "packed":
        assert model.gate_up_proj.quant_method.constants == (4, 2 * ROWS)
        assert len(model.gate_up_proj.overflow_entries) == 2 * ROWS * HIDDEN // 100
