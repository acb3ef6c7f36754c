"""Routed experts in vLLM on the CPU, as each tensor- and expert-parallel rank holds them, against dense weights."""

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from trellis_cases import random_trellis
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.fused_moe.activation import MoEActivation

from vllm_babai.format import (
    FORMATS,
    HPTQ,
    SSQR,
    FormatError,
    LatticeWeight,
    Overflow,
    Trellis,
    Weight,
    integer_range,
    share_beyond,
    unpack,
)
from vllm_babai.format.config import CheckpointConfig, LayerScheme
from vllm_babai.plugin.expert_residency import widened
from vllm_babai.plugin.experts import BabaiExpertsMethod
from vllm_babai.plugin.kept import KeptTensors
from vllm_babai.plugin.names import LinearNames
from vllm_babai.plugin.progress import LoadProgress
from vllm_babai.plugin.readers import READERS
from vllm_babai.plugin.residency import PackedWeight

EXPERTS, HIDDEN, INNER, TOP, TOKENS = 4, 64, 128, 2, 11
NAMES = {"w1": "model.layers.3.mlp.experts.#.gate_proj", "w3": "model.layers.3.mlp.experts.#.up_proj"} | {
    "w2": "model.layers.3.mlp.experts.#.down_proj"
}
ONE_RANK = {"has_bias": False, "tp_rank": 0, "tp_size": 1, "swiglu_limit": None}  # what the method asks of vLLM
Weights = dict[tuple[int, str], Weight]


@pytest.fixture
def weights() -> Weights:
    return random_weights("ssqr")


def random_weights(form: str) -> Weights:
    generator = torch.Generator().manual_seed(0)
    found: Weights = {}
    for expert in range(EXPERTS):
        for shard in NAMES:
            shape = (HIDDEN, INNER) if shard == "w2" else (INNER, HIDDEN)
            if form == "trellis":
                point = random_trellis(*shape)
                found[expert, shard] = replace(point, words=np.roll(point.words, 100 * len(found)))
                continue
            spread = 2.0 + 3 * expert  # so that HPTQ's experts take different widths
            integers = (torch.randn(shape, generator=generator) * spread).round().short()
            scales = (torch.rand(shape[0], 1, generator=generator) * 0.02 + 0.01).bfloat16()
            found[expert, shard] = LatticeWeight(integers, scales)
    return found


def stored(form: str, weight: Weight, name: str) -> dict[str, Tensor]:
    """Tensors of a linear in the checkpoint."""
    if isinstance(weight, LatticeWeight):
        return (SSQR.encode(weight, 4, name) if form == "ssqr" else HPTQ.encode(weight, linear=name)).tensors()
    return Trellis.encode(weight, linear=name).tensors()


class Layer(nn.Module):
    """What vLLM's layer of routed experts gives to its method. local: numbers of this rank's experts."""

    def __init__(self, local: range, *, on_input: bool = False) -> None:
        super().__init__()
        self.local = local
        self.apply_router_weight_on_input = on_input
        self.activation = MoEActivation.SILU
        whole = len(local) == EXPERTS
        self.expert_map = None if whole else torch.tensor([self.local_number(e) for e in range(EXPERTS)])

    def local_number(self, number: int) -> int:
        return self.local.index(number) if number in self.local else -1

    _map_global_expert_id_to_local_expert_id = local_number


def loaded(
    form: str,
    weights: Weights,
    layer: Layer,
    *,
    rank: int = 0,
    ranks: int = 1,
    has_bias: bool = False,
    change: Callable[[int, str, Tensor], list[Tensor]] = lambda expert, shard, tensor: [tensor],
) -> BabaiExpertsMethod:
    """The method after loading, as rank `rank` of `ranks` that divide each expert.

    change: what the checkpoint has of an expert's tensor in its place.
    """
    reader = READERS[form, FORMATS[form].residencies[0]]
    readers = {stem: reader(LayerScheme(4 if form == "ssqr" else None)) for stem in ("w13", "w2")}
    moe: Any = SimpleNamespace(**ONE_RANK | {"tp_rank": rank, "tp_size": ranks, "has_bias": has_bias})
    method = BabaiExpertsMethod(moe, "experts", NAMES, readers, LoadProgress(), KeptTensors(None))
    with set_current_vllm_config(VllmConfig()):
        method.create_weights(layer, len(layer.local), HIDDEN, INNER // ranks, torch.float32, EXPERTS)
    for (expert, shard), weight in weights.items():
        name = NAMES[shard].replace("#", str(expert))
        stem = "w2" if shard == "w2" else "w13"
        for key, original in stored(form, weight, name).items():
            for tensor in change(expert, shard, original):
                loader = getattr(layer, f"{stem}_{key}").weight_loader
                arguments = {"weight_name": key, "shard_id": shard, "expert_id": expert, "return_success": True}
                here = loader(getattr(layer, f"{stem}_{key}"), tensor, **arguments)
                assert here == (expert in layer.local)
    method.process_weights_after_loading(layer)
    return method


def routing() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(TOKENS, HIDDEN, generator=generator)
    ids = torch.stack(
        [torch.randperm(EXPERTS - 1, generator=generator)[:TOP] for _ in range(TOKENS)]
    )  # none to the last
    return x, torch.rand(TOKENS, TOP, generator=generator), ids


def expected(weights: Weights, x: Tensor, router: Tensor, ids: Tensor, *, on_input: bool = False) -> Tensor:
    result = torch.zeros_like(x)
    for token in range(len(x)):
        for weight, expert in zip(router[token], ids[token].tolist(), strict=True):
            gate, up, down = (weights[expert, shard].dequantize() for shard in ("w1", "w3", "w2"))
            row = x[token] * weight if on_input else x[token]
            y = down @ (torch.nn.functional.silu(gate @ row) * (up @ row))
            result[token] += y if on_input else y * weight
    return result


def run(method: BabaiExpertsMethod, layer: Layer, x: Tensor, router: Tensor, ids: Tensor) -> Tensor:
    return method.apply(layer, x, router, ids, None, None)


@pytest.mark.parametrize("form", ["ssqr", "hptq", "trellis"])
@pytest.mark.parametrize("parallel", ["none", "tensor", "experts"])
def test_ranks_add_up_to_the_dense_experts(form: str, parallel: str) -> None:
    weights = random_weights(form)
    x, router, ids = routing()
    whole = range(EXPERTS)
    layers = {
        "none": [(Layer(whole), 0, 1)],
        "tensor": [(Layer(whole), rank, 2) for rank in range(2)],
        "experts": [(Layer(range(2)), 0, 1), (Layer(range(2, 4)), 0, 1)],
    }[parallel]
    found = torch.zeros_like(x)
    for layer, rank, ranks in layers:
        method = loaded(form, weights, layer, rank=rank, ranks=ranks)
        found += run(method, layer, x, router, ids)
        assert not hasattr(layer, "w2_scale")
    torch.testing.assert_close(found, expected(weights, x, router, ids), rtol=1e-3, atol=1e-3)


def test_router_weights_on_the_input(weights: Weights) -> None:
    x, router, ids = routing()
    router, ids = router[:, :1], ids[:, :1]
    layer = Layer(range(EXPERTS), on_input=True)
    found = run(loaded("ssqr", weights, layer), layer, x, router, ids)
    torch.testing.assert_close(found, expected(weights, x, router, ids, on_input=True), rtol=1e-3, atol=1e-3)


def test_the_op_is_traceable(weights: Weights) -> None:
    x, router, ids = routing()
    layer = Layer(range(EXPERTS))
    method = loaded("ssqr", weights, layer)
    compiled: Callable[..., Tensor] = torch.compile(
        lambda x, router, ids: run(method, layer, x, router, ids), backend="eager", fullgraph=True
    )
    torch.testing.assert_close(compiled(x, router, ids), run(method, layer, x, router, ids))


def changed(expert: int, shard: str, change: Callable[[Tensor], list[Tensor]]) -> Callable[..., list[Tensor]]:
    """Apply `change` to the tensors of one linear of one expert."""
    return lambda e, s, tensor: change(tensor) if (e, s) == (expert, shard) else [tensor]


def damaged(tensor: Tensor) -> list[Tensor]:
    """One bit in the middle is another."""
    if tensor.dtype != torch.uint8:
        return [tensor]
    tensor = tensor.clone()
    tensor.view(-1)[tensor.numel() // 2] ^= 1
    return [tensor]


@pytest.mark.parametrize("form", ["ssqr", "hptq", "trellis"])
@pytest.mark.parametrize("local", [range(EXPERTS), range(2, EXPERTS)])
def test_what_is_wrong_with_an_expert_is_named(form: str, local: range) -> None:
    weights = random_weights(form)
    for change, message in (
        (lambda tensor: [], r"experts\.2\.up_proj: the checkpoint lacks"),
        (lambda tensor: [tensor, tensor], r"experts\.2\.up_proj: the checkpoint has .* twice"),
        (damaged, r"experts\.2\.up_proj: .*(checksum|CRC|damaged|corrupt)"),
    ):
        with pytest.raises(FormatError, match=message):
            loaded(form, weights, Layer(local), change=changed(2, "w3", change))
    swapped = weights | {(3, "w2"): weights[3, "w1"]}
    with pytest.raises(FormatError, match=r"experts\.3\.down_proj"):
        loaded(form, swapped, Layer(local))


def test_an_expert_that_is_not_there_at_all_is_named(weights: Weights) -> None:
    rest = {key: weight for key, weight in weights.items() if key[0] != 3}
    with pytest.raises(FormatError, match=r"experts\.3\.gate_proj: the checkpoint lacks qweight"):
        loaded("ssqr", rest, Layer(range(2, EXPERTS)))


@pytest.mark.parametrize(
    ("device", "changes", "message"),
    [
        ("meta", {}, "not for meta"),
        ("cpu", {"swiglu_limit": 7.0}, "experts: .*swiglu_limit"),
        ("cpu", {"tp_size": 128}, "experts: .*do not divide among ranks"),
    ],
)
def test_what_cannot_be_served_is_refused(device: str, changes: dict[str, Any], message: str) -> None:
    readers = {stem: READERS["ssqr", "packed"](LayerScheme(4)) for stem in ("w13", "w2")}
    moe: Any = SimpleNamespace(**ONE_RANK | changes)
    method = BabaiExpertsMethod(moe, "experts", NAMES, readers, LoadProgress(), KeptTensors(None))
    layer, inner = Layer(range(EXPERTS)), INNER // moe.tp_size
    with torch.device(device), pytest.raises((NotImplementedError, ValueError), match=message):
        method.create_weights(layer, EXPERTS, HIDDEN, inner, torch.float32, EXPERTS)


def test_biases_that_the_checkpoint_lacks_are_named(weights: Weights) -> None:
    with pytest.raises(FormatError, match="experts: its experts have biases"):
        loaded("ssqr", weights, Layer(range(EXPERTS)), has_bias=True)


def test_a_wider_dense_part_is_the_same_weight(weights: Weights) -> None:
    integers = weights[3, "w1"].integers
    narrow = SSQR.encode(weights[3, "w1"], 3, "linear")
    dense = integers.clamp(*integer_range(3))
    rows, columns = torch.where(integers != dense)
    excess = (integers - dense)[rows, columns].int()
    weight = PackedWeight(3, narrow.qweight, narrow.scales, Overflow(rows.int(), columns.int(), excess))
    wide = widened(weight, 5, HIDDEN)
    restored = unpack(wide.qweight, 5, HIDDEN)
    restored[wide.overflow.rows.long(), wide.overflow.columns.long()] += wide.overflow.excess.short()
    assert torch.equal(restored, integers)
    assert len(wide.overflow.excess) / integers.numel() == pytest.approx(share_beyond(integers, integer_range(5)))


def test_names_of_experts() -> None:
    kinds = ["mlp.experts.#.down_proj", "mlp.experts.#.gate_proj", "mlp.experts.#.up_proj", "self_attn.q_proj"]
    ignore = [f"model.layers.1.mlp.experts.{name}" for name in ("down_proj", "gate_proj", "up_proj")]
    config = CheckpointConfig("ssqr", 4, scope=["model.layers.0", "model.layers.1"], linears=kinds, ignore=ignore)
    names = LinearNames(config)
    asked = ["gate_proj", "up_proj", "down_proj"]
    found = names.experts("model.layers.0.feed_forward.experts", asked)
    assert found == [f"model.layers.0.mlp.experts.#.{name}" for name in asked]
    assert names.experts("model.layers.1.mlp.experts", asked) == []
    with pytest.raises(ValueError, match=r"experts: vLLM's class asks for w1, w3, w2 .* has .*experts\.#\.gate_proj"):
        names.experts("model.layers.0.mlp.experts", ["w1", "w3", "w2"])
