"""Every class of linear layer in vLLM, as each rank of 1, 2 and 4, against the sliced dense weight; bad tensors."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor import parameter as vllm_parameter
from vllm.model_executor.layers import linear as vllm_linear
from vllm.model_executor.layers import vocab_parallel_embedding as vllm_vocabulary
from vllm.model_executor.layers.linear import LinearBase

from vllm_babai.format import (
    HPTQ,
    SSQR,
    CheckpointConfig,
    FormatError,
    LatticeWeight,
    Trellis,
    TrellisWeight,
    integer_range,
)
from vllm_babai.plugin.config import BabaiConfig

HIDDEN, HEADS, KV_HEADS, HEAD_SIZE = 128, 8, 2, 16
Q_ROWS, KV_ROWS = HEADS * HEAD_SIZE, KV_HEADS * HEAD_SIZE
QKV = {"q": Q_ROWS, "k": KV_ROWS, "v": KV_ROWS}
Stored = list[
    tuple[object, SSQR | HPTQ | Trellis]
]  # shard id, or None for the whole layer, and what the checkpoint has


@dataclass(frozen=True)
class Case:
    """A layer class, the linears that a checkpoint has for it, and the part of their weights that a rank holds.

    sizes: rows of each stored linear, by shard id. expected(weights by shard id, rank, ranks).
    """

    make: Callable[..., LinearBase]
    sizes: dict[object, int]
    expected: Callable[[dict[object, Tensor], int, int], Tensor]
    fused: dict[str, list[str]] = field(default_factory=dict)


def rows(weight: Tensor, rank: int, ranks: int) -> Tensor:
    return weight.chunk(ranks)[rank]


def qkv(weights: dict[object, Tensor], rank: int, ranks: int) -> Tensor:
    kv_ranks = min(ranks, KV_HEADS)  # then several ranks share a key and value head
    kv = (rows(weights[s], rank * kv_ranks // ranks, kv_ranks) for s in "kv")
    return torch.cat([rows(weights["q"], rank, ranks), *kv])


def fused_qkv(weights: dict[object, Tensor], rank: int, ranks: int) -> Tensor:
    return qkv(dict(zip("qkv", weights[None].split(list(QKV.values())), strict=True)), rank, ranks)


def merged(weights: dict[object, Tensor], rank: int, ranks: int) -> Tensor:
    return torch.cat([rows(weight, rank, ranks) for weight in weights.values()])


def make_qkv(**options: object) -> LinearBase:
    return vllm_linear.QKVParallelLinear(HIDDEN, HEAD_SIZE, HEADS, KV_HEADS, **options)


def make_merged(**options: object) -> LinearBase:
    return vllm_linear.MergedColumnParallelLinear(HIDDEN, [192, 192], **options)


VOCABULARY, PADDED = 330, 384  # as vLLM pads it


def make_head(**options: object) -> vllm_vocabulary.ParallelLMHead:
    return vllm_vocabulary.ParallelLMHead(VOCABULARY, HIDDEN, **options)


def padded_rows(weights: dict[object, Tensor], rank: int, ranks: int) -> Tensor:
    return rows(torch.nn.functional.pad(weights[None], (0, 0, 0, PADDED - VOCABULARY)), rank, ranks)


SPLIT = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
CASES = {
    "qkv_proj": Case(make_qkv, QKV, qkv, SPLIT),
    "gate_up_proj": Case(make_merged, {0: 192, 1: 192}, merged, SPLIT),
    "qkv_proj fused on disk": Case(make_qkv, {None: Q_ROWS + 2 * KV_ROWS}, fused_qkv),
    "gate_up_proj fused on disk": Case(
        make_merged, {None: 384}, lambda w, r, n: torch.cat([rows(half, r, n) for half in w[None].chunk(2)])
    ),
    "column": Case(
        lambda **o: vllm_linear.ColumnParallelLinear(HIDDEN, 192, **o), {None: 192}, lambda w, r, n: rows(w[None], r, n)
    ),
    "row": Case(
        lambda **o: vllm_linear.RowParallelLinear(HIDDEN, 192, **o),
        {None: 192},
        lambda w, r, n: w[None].chunk(n, dim=1)[r],
    ),
    "replicated": Case(
        lambda **o: vllm_linear.ReplicatedLinear(HIDDEN, 192, **o), {None: 192}, lambda w, r, n: w[None]
    ),
    "lm_head": Case(make_head, {None: VOCABULARY}, padded_rows),
}


@pytest.fixture(autouse=True)
def vllm_config() -> Iterator[None]:
    with set_current_vllm_config(VllmConfig()):
        yield


@contextmanager
def as_rank(rank: int, ranks: int) -> Iterator[None]:
    with ExitStack() as stack:
        for module in (vllm_parameter, vllm_linear, vllm_vocabulary):
            for name, value in (("rank", rank), ("world_size", ranks)):
                replacement = mock.Mock(return_value=value)
                stack.enter_context(mock.patch.object(module, f"get_tensor_model_parallel_{name}", replacement))
        yield


def random_weight(out_features: int, bits: int = 4, group_size: int = -1) -> LatticeWeight:
    low, high = integer_range(bits)
    integers = torch.randint(low - 2, high + 3, (out_features, HIDDEN), dtype=torch.int16)
    groups = 1 if group_size == -1 else HIDDEN // group_size
    return LatticeWeight(integers, torch.rand(out_features, groups).add(0.5).bfloat16())


FOUR_BITS = CheckpointConfig("ssqr", 4)


def make_layer(name: str, rank: int = 0, ranks: int = 1, checkpoint: CheckpointConfig = FOUR_BITS) -> LinearBase:
    prefix = f"model.{name.split()[0]}"
    named = replace(checkpoint, overrides={prefix: {}} | checkpoint.overrides)  # without which no head is quantized
    config = BabaiConfig(named)
    config.packed_modules_mapping = CASES[name].fused
    with as_rank(rank, ranks):
        return CASES[name].make(bias=False, params_dtype=torch.float32, quant_config=config, prefix=prefix)


def load(layer: LinearBase, stored: Stored) -> None:
    """As vLLM's models and loader do; vLLM sets no limit on the order."""
    for shard, linear in stored:
        for name, tensor in reversed(linear.tensors().items()):
            parameter = getattr(layer, name)
            parameter.weight_loader(parameter, tensor, *(() if shard is None else (shard,)))
    layer.quant_method.process_weights_after_loading(layer)


def held_weight(layer: LinearBase, in_features: int) -> Tensor:
    return layer.quant_method.apply(layer, torch.eye(in_features)).t()


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize(("bits", "group_size"), [(2, -1), (3, -1), (3, 32), (4, -1), (4, 32), (8, -1)])
@pytest.mark.parametrize("name", CASES)
def test_every_rank_holds_its_part(name: str, bits: int, group_size: int, ranks: int) -> None:
    torch.manual_seed(0)
    case = CASES[name]
    weights = {shard: random_weight(size, bits, group_size) for shard, size in case.sizes.items()}
    stored = [(shard, SSQR.encode(weight, bits)) for shard, weight in weights.items()]
    dense = {shard: weight.dequantize() for shard, weight in weights.items()}
    for rank in range(ranks):
        layer = make_layer(name, rank, ranks, CheckpointConfig("ssqr", bits, group_size))
        load(layer, stored)
        expected = case.expected(dense, rank, ranks)
        assert torch.equal(held_weight(layer, expected.shape[1]), expected)


def gaussian_weight(
    out_features: int, sigma: float, group_size: int = -1, scale_rows: int = 1, steps: Tensor | None = None
) -> LatticeWeight:
    """Integers of every size, as HPTQ stores them; steps: exponents of the columns'."""
    integers = torch.randn(out_features, HIDDEN).mul(sigma).round().short()
    integers[3, 5] = 20_000
    groups = 1 if group_size == -1 else HIDDEN // group_size
    return LatticeWeight(integers, torch.rand(scale_rows, groups).add(0.5).bfloat16(), steps)


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("residency", ["packed", "coded"])
@pytest.mark.parametrize("group_size", [-1, 32])
@pytest.mark.parametrize("name", CASES)
def test_every_rank_decodes_its_part(name: str, group_size: int, residency: str, ranks: int) -> None:
    torch.manual_seed(0)
    case = CASES[name]
    weights = {
        shard: gaussian_weight(size, 1.5 + i, group_size, scale_rows=size if i == 1 else 1)
        for i, (shard, size) in enumerate(case.sizes.items())
    }
    stored: Stored = [(shard, HPTQ.encode(weight)) for shard, weight in weights.items()]
    dense = {shard: weight.dequantize() for shard, weight in weights.items()}
    for rank in range(ranks):
        layer = make_layer(name, rank, ranks, CheckpointConfig("hptq", group_size=group_size, residency=residency))
        load(layer, stored)
        expected = case.expected(dense, rank, ranks)
        assert torch.equal(held_weight(layer, expected.shape[1]), expected)


def random_trellis(out_features: int) -> TrellisWeight:
    """Tiles of any bits, rows in any order, random words."""
    generator = np.random.default_rng(out_features)
    blocks = -(-out_features // 16)
    rates = generator.integers(2, 11, (blocks, HIDDEN // 64)).astype(np.uint8)
    spans = np.split(np.arange(16 * blocks), range(256, 16 * blocks, 256))
    order = np.concatenate([generator.permutation(span) for span in spans])
    words = generator.integers(0, 1 << 32, 16 * int(rates.sum()), dtype=np.uint32)
    exponents = generator.integers(0, 100, 16 * blocks).astype(np.uint8)
    return TrellisWeight((out_features, HIDDEN), rates, order, 4000.0, exponents, words)


TILED = CheckpointConfig("trellis", residency="tiled")


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("name", CASES)
def test_every_rank_takes_its_tiles(name: str, ranks: int) -> None:
    if name == "row" and ranks == 4:
        with pytest.raises(ValueError, match="do not divide among ranks into multiples of 64"):
            make_layer(name, 0, ranks, TILED)
        return
    case = CASES[name]
    weights = {shard: random_trellis(size) for shard, size in case.sizes.items()}
    dense = {shard: weight.dequantize() for shard, weight in weights.items()}
    for rank in range(ranks):
        layer = make_layer(name, rank, ranks, TILED)
        load(layer, [(shard, Trellis.encode(weight)) for shard, weight in weights.items()])
        expected = case.expected(dense, rank, ranks)
        assert torch.equal(held_weight(layer, expected.shape[1]), expected)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda t: t[:-1], "too short|words"),
        (lambda t: flipped(t), "corrupt"),
        (lambda t: with_version(9)(t), "format version 9"),
        (lambda t: Trellis.encode(random_trellis(160)).trellis, "192 × 128, but trellis is of 160 × 128"),
        (lambda t: t.char(), "trellis has dtype torch.int8"),
    ],
)
def test_damaged_trellis(damage: Callable[[Tensor], Tensor], message: str) -> None:
    linears = [Trellis.encode(random_trellis(192)) for _ in range(2)]
    stored: Stored = [(0, linears[0]), (1, Trellis(damage(linears[1].trellis.clone())))]
    with pytest.raises(FormatError, match=f"model.up_proj: .*({message})"):
        load(make_layer("gate_up_proj", checkpoint=TILED), stored)


@pytest.mark.parametrize("tokens", [1, 2, 3, 5, 15, 16, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_trellis_multiplies_any_number_of_tokens(dtype: torch.dtype, tokens: int) -> None:
    weight, layer = random_trellis(192), make_layer("replicated", checkpoint=TILED)
    load(layer, [(None, Trellis.encode(weight))])
    x = torch.randn(tokens, HIDDEN).to(dtype)
    y = layer.quant_method.apply(layer, x)
    assert y.dtype == dtype
    expected = x.double() @ weight.dequantize().double().T
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 0.02, torch.float16: 0.003}[dtype]
    assert torch.allclose(y.double(), expected, atol=tolerance * float(expected.abs().max()))


def test_activations_of_another_layer_are_refused() -> None:
    layer = make_layer("replicated", checkpoint=TILED)
    load(layer, [(None, Trellis.encode(random_trellis(192)))])
    with pytest.raises(ValueError, match=f"its tiles have {HIDDEN} columns"):
        layer.quant_method.apply(layer, torch.randn(1, HIDDEN + 2))


def test_dummy_trellis() -> None:
    held = make_layer("column", checkpoint=TILED).quant_method.reader.dummy(192, HIDDEN).window
    assert held.rates.shape == (12, 2)
    assert len(held.words) == 16 * int(held.rates.sum())


@pytest.mark.parametrize(("sigma", "bits"), [(0.3, 2), (1.5, 3), (3, 4), (6, 5), (20, 8), (1000, 8)])
def test_smallest_width_with_little_overflow(sigma: float, bits: int) -> None:
    torch.manual_seed(0)
    layer = make_layer("gate_up_proj", checkpoint=CheckpointConfig("hptq"))
    load(layer, [(0, HPTQ.encode(gaussian_weight(192, 0.3))), (1, HPTQ.encode(gaussian_weight(192, sigma)))])
    assert layer.quant_method.constants[0] == bits


@pytest.mark.parametrize(("residency", "activity"), [("packed", "Packing"), ("coded", "Indexing")])
def test_progress_counts_the_layers(residency: str, activity: str, capsys: pytest.CaptureFixture[str]) -> None:
    config = BabaiConfig(CheckpointConfig("hptq", residency=residency))
    with as_rank(0, 1):
        layers = [
            vllm_linear.ReplicatedLinear(HIDDEN, 64, bias=False, quant_config=config, prefix=f"model.{i}")
            for i in range(3)
        ]
    for layer in layers:
        load(layer, [(None, HPTQ.encode(gaussian_weight(64, 1.5)))])
    shown = capsys.readouterr().err
    assert f"{activity} linear layers: 100%" in shown
    assert "3/3" in shown


def test_order_of_the_tensors_does_not_matter() -> None:
    weights = {shard: random_weight(size) for shard, size in QKV.items()}
    layer = make_layer("qkv_proj")
    load(layer, [(shard, SSQR.encode(weights[shard], 4)) for shard in "vqk"])
    expected = torch.cat([weights[shard].dequantize() for shard in "qkv"])
    assert torch.equal(held_weight(layer, HIDDEN), expected)


def test_bias_is_added() -> None:
    layer = make_layer("column")
    load(layer, [(None, SSQR.encode(random_weight(192), 4))])
    x, bias = torch.randn(3, HIDDEN), torch.randn(192)
    assert torch.equal(layer.quant_method.apply(layer, x, bias), layer.quant_method.apply(layer, x) + bias)


def test_base_weight_is_found_where_lora_looks_for_it() -> None:
    layer = make_layer("column")
    load(layer, [(None, SSQR.encode(random_weight(192), 4))])
    assert set(dict(layer.named_parameters())) == {"qweight", "scales", "overflow_entries", "overflow_offsets"}


def damaged(stored: SSQR | HPTQ, name: str, damage: Callable[[Tensor], Tensor]) -> SSQR | HPTQ:
    return type(stored)(**{**stored.tensors(), name: damage(stored.tensors()[name].clone())})


def flipped(tensor: Tensor) -> Tensor:
    tensor.view(torch.uint8).view(-1)[tensor.nbytes // 2] ^= 1
    return tensor


def with_version(number: int) -> Callable[[Tensor], Tensor]:
    def change(blob: Tensor) -> Tensor:
        blob[4] = number
        return blob

    return change


@pytest.mark.parametrize("name", ["qweight", "scales", "overflow"])
def test_missing_tensor(name: str) -> None:
    layer = make_layer("qkv_proj")
    stored = [(shard, SSQR.encode(random_weight(size), 4)) for shard, size in QKV.items()]
    for shard, linear in stored:
        for tensor_name, tensor in linear.tensors().items():
            if (shard, tensor_name) != ("k", name):
                parameter = getattr(layer, tensor_name)
                parameter.weight_loader(parameter, tensor, shard)
    with pytest.raises(FormatError, match=f"model.k_proj: the checkpoint lacks {name}"):
        layer.quant_method.process_weights_after_loading(layer)


@pytest.mark.parametrize(("name", "linear"), [("row", "model.row"), ("qkv_proj fused on disk", "model.qkv_proj")])
def test_nothing_loaded(name: str, linear: str) -> None:
    with pytest.raises(FormatError, match=f"{linear}: the checkpoint lacks qweight"):
        load(make_layer(name), [])


def test_duplicate_tensor() -> None:
    stored: Stored = [(shard, SSQR.encode(random_weight(192), 4)) for shard in (0, 1, 1)]
    with pytest.raises(FormatError, match=r"model.up_proj: the checkpoint has qweight twice"):
        load(make_layer("gate_up_proj"), stored)


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("overflow", lambda t: t[:-1], "truncated"),
        ("overflow", lambda t: t[:3], "truncated"),
        ("overflow", flipped, "corrupt"),
        ("overflow", with_version(9), "format version 9"),
        ("qweight", lambda t: t[:-1], "qweight has shape"),
        ("qweight", lambda t: t[:, :-1], "qweight has shape"),
        ("qweight", lambda t: t.char(), "qweight has dtype torch.int8"),
        ("scales", lambda t: t[1:], "scales has shape"),
        ("scales", lambda t: t.expand(-1, 2), "scales has shape"),
        ("scales", lambda t: t.float(), "scales has dtype torch.float32"),
    ],
)
def test_damaged_tensor(name: str, damage: Callable[[Tensor], Tensor], message: str, ranks: int) -> None:
    linears = [SSQR.encode(random_weight(192), 4) for _ in range(2)]
    stored: Stored = [(0, linears[0]), (1, damaged(linears[1], name, damage))]
    with pytest.raises(FormatError, match=f"model.up_proj: .*{message}"):
        load(make_layer("gate_up_proj", ranks=ranks), stored)


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("residency", ["packed", "coded"])
@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("codes", lambda t: t[:-1], "truncated"),
        ("codes", flipped, "corrupt"),
        ("codes", with_version(9), "format version 9"),
        ("codes", lambda t: HPTQ.encode(gaussian_weight(160, 1.5)).codes, "192 × 128, but codes is of 160 × 128"),
        ("codes", lambda t: t.char(), "codes has dtype torch.int8"),
        ("scales", flipped, "scales are corrupt"),
        ("scales", lambda t: t.expand(2, 1), "scales has shape"),
        ("scales", lambda t: t.expand(1, 2), "scales has shape"),
        ("scales", lambda t: t.float(), "scales has dtype torch.float32"),
    ],
)
def test_damaged_code(name: str, damage: Callable[[Tensor], Tensor], message: str, residency: str, ranks: int) -> None:
    linears = [HPTQ.encode(gaussian_weight(192, 1.5)) for _ in range(2)]
    stored: Stored = [(0, linears[0]), (1, damaged(linears[1], name, damage))]
    layer = make_layer("gate_up_proj", ranks=ranks, checkpoint=CheckpointConfig("hptq", residency=residency))
    with pytest.raises(FormatError, match=f"model.up_proj: .*{message}"):
        load(layer, stored)


@pytest.mark.parametrize("name", ["codes", "scales"])
def test_missing_code(name: str) -> None:
    layer = make_layer("column", checkpoint=CheckpointConfig("hptq"))
    (other,) = {"codes", "scales"} - {name}
    parameter = getattr(layer, other)
    parameter.weight_loader(parameter, HPTQ.encode(gaussian_weight(192, 1.5)).tensors()[other])
    with pytest.raises(FormatError, match=f"model.column: the checkpoint lacks {name}"):
        layer.quant_method.process_weights_after_loading(layer)


def column_steps(seed: int = 0) -> Tensor:
    return torch.randint(0, 40, (HIDDEN,), dtype=torch.int16, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("residency", ["packed", "coded"])
@pytest.mark.parametrize("name", CASES)
def test_every_rank_scales_its_inputs(name: str, residency: str, ranks: int) -> None:
    torch.manual_seed(0)
    case = CASES[name]
    weights = {
        shard: gaussian_weight(size, 1.5 + i, scale_rows=size if i == 1 else 1, steps=column_steps())
        for i, (shard, size) in enumerate(case.sizes.items())
    }
    for weight in weights.values():
        weight.integers[3, 5] = 200  # larger ones round in float32
    stored: Stored = [(shard, HPTQ.encode(weight)) for shard, weight in weights.items()]
    dense = {shard: weight.dequantize() for shard, weight in weights.items()}
    for rank in range(ranks):
        layer = make_layer(name, rank, ranks, CheckpointConfig("hptq", residency=residency))
        load(layer, stored)
        expected = case.expected(dense, rank, ranks)
        assert layer.input_scales.shape == (expected.shape[1],)
        assert torch.equal(held_weight(layer, expected.shape[1]), expected)


@pytest.mark.parametrize("residency", ["packed", "coded"])
def test_scaled_inputs_are_rounded_once(residency: str) -> None:
    torch.manual_seed(0)
    weight = gaussian_weight(192, 3.0, steps=column_steps())
    weight.integers[3, 5] = 0
    config = BabaiConfig(CheckpointConfig("hptq", residency=residency))
    with as_rank(0, 1):
        layer = vllm_linear.ReplicatedLinear(
            HIDDEN, 192, bias=False, params_dtype=torch.bfloat16, quant_config=config, prefix="model.layer"
        )
    load(layer, [(None, HPTQ.encode(weight))])
    x = (torch.randn(64, HIDDEN) * torch.exp2(column_steps() / 16)).bfloat16()
    exact = x.double() @ weight.dequantize().double().T
    served = layer.quant_method.apply(layer, x)
    dense = torch.nn.functional.linear(x, weight.dequantize(torch.bfloat16))
    assert served.dtype == torch.bfloat16
    assert (served - exact).square().mean() < 1.6 * (dense - exact).square().mean()


@pytest.mark.parametrize("residency", ["packed", "coded"])
@pytest.mark.parametrize("other", [None, column_steps(1)])
def test_fused_linears_share_the_steps_of_columns(other: Tensor | None, residency: str) -> None:
    stored: Stored = [
        (shard, HPTQ.encode(gaussian_weight(192, 1.5, steps=steps)))
        for shard, steps in enumerate((column_steps(), other))
    ]
    layer = make_layer("gate_up_proj", checkpoint=CheckpointConfig("hptq", residency=residency))
    with pytest.raises(FormatError, match=r"model.gate_proj, model.up_proj: .* columns have different steps"):
        load(layer, stored)


@pytest.mark.parametrize("case", ["gate_up_proj fused on disk", "row"])
@pytest.mark.parametrize("name", ["qweight", "scales"])
def test_corrupt_dense_part(name: str, case: str) -> None:
    (size,) = CASES[case].sizes.values()
    with pytest.raises(FormatError, match=f"model.{case.split()[0]}: qweight or scales are corrupt"):
        load(make_layer(case), [(None, damaged(SSQR.encode(random_weight(size), 4), name, flipped))])


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("case", ["column", "row", "replicated", "qkv_proj fused on disk"])
def test_sizes_that_do_not_match(case: str, ranks: int) -> None:
    (size,) = CASES[case].sizes.values()
    with pytest.raises(
        FormatError, match=f"the layer is {size} × {HIDDEN} with 4 bits, but overflow is of {size - 32}"
    ):
        load(make_layer(case, ranks=ranks), [(None, SSQR.encode(random_weight(size - 32), 4))])


def test_bits_that_do_not_match() -> None:
    with pytest.raises(FormatError, match=r"model.column: .*4 bits, but overflow is of 192 × 128 with 3 bits"):
        load(make_layer("column"), [(None, SSQR.encode(random_weight(192, bits=3), 3))])


def test_tensors_fused_in_part() -> None:
    layer = make_layer("gate_up_proj fused on disk")
    whole = SSQR.encode(random_weight(384), 4)
    for name, tensor in whole.tensors().items():
        parameter = getattr(layer, name)
        for shard in (0, 1) if name == "scales" else (None,):
            parameter.weight_loader(parameter, tensor if shard is None else tensor[:192].clone(), shard)
    with pytest.raises(FormatError, match="some of qweight, scales, overflow are fused"):
        layer.quant_method.process_weights_after_loading(layer)


@pytest.mark.parametrize(("bits", "group_size", "multiple"), [(3, -1, 8), (4, 128, 128)])
def test_columns_that_do_not_divide(bits: int, group_size: int, multiple: int) -> None:
    with pytest.raises(ValueError, match=f"model.row: .* multiples of {multiple}"):
        config = BabaiConfig(CheckpointConfig("ssqr", bits, group_size))
        with as_rank(0, 2):
            vllm_linear.RowParallelLinear(256 + 8, 64, bias=False, quant_config=config, prefix="model.row")


def test_a_head_may_have_bits_of_its_own() -> None:
    torch.manual_seed(0)
    weight = random_weight(VOCABULARY, bits=5)
    head = make_layer("lm_head", checkpoint=CheckpointConfig("ssqr", 4, overrides={"model.lm_head": {"bits": 5}}))
    load(head, [(None, SSQR.encode(weight, 5))])
    assert torch.equal(held_weight(head, HIDDEN), padded_rows({None: weight.dequantize()}, 0, 1))


def test_a_head_that_the_checkpoint_does_not_name_stays_as_it_is() -> None:
    config = BabaiConfig(CheckpointConfig("ssqr", 4, ignore=["lm_head"]))
    with as_rank(0, 1):
        head = make_head(quant_config=config, prefix="lm_head")
    assert isinstance(head.quant_method, vllm_vocabulary.UnquantizedEmbeddingMethod)


def test_a_rank_without_a_part_of_the_vocabulary() -> None:
    with pytest.raises(ValueError, match="lm_head: a vocabulary of 330 leaves this rank no part of it"):
        make_layer("lm_head", 7, 8)


@pytest.mark.parametrize("form", [SSQR, HPTQ])
@pytest.mark.parametrize("ranks", [1, 2])
def test_tensors_of_another_linear(form: type[SSQR] | type[HPTQ], ranks: int) -> None:
    weight = random_weight(192) if form is SSQR else gaussian_weight(192, 1.5)
    with pytest.raises(FormatError, match=r"model\.column: (overflow|codes) belongs to another linear"):
        layer = make_layer("column", ranks=ranks, checkpoint=CheckpointConfig(form.name, 4))
        load(layer, [(None, form.encode(weight, 4, "model.row"))])
