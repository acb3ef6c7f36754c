"""Experts on the CPU: tokens sorted by expert, so that each expert multiplies all of its tokens in one go."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from vllm_babai.cpu.backend import matmul, warm_up
from vllm_babai.cpu.trellis import multiply_trellis, trellis_layout, warm_up_trellis
from vllm_babai.format.trellis.window import TrellisWindow, join_blocks, with_as_many_blocks
from vllm_babai.ops.experts import Activate, ExpertTensors, TrellisExperts
from vllm_babai.ops.layout import DeviceLayout
from vllm_babai.ops.trellis import TrellisTensors


def experts_layout(layouts: list[DeviceLayout]) -> DeviceLayout:
    """The layouts of linears of one size and width, as one with a dimension more.

    dense: [experts, …]. scales: [experts, …]. entries: of all. offsets: [experts, …], into these.
    """
    counts = torch.tensor([0, *(len(layout.entries) for layout in layouts)]).cumsum(0)
    return DeviceLayout(
        torch.stack([layout.dense for layout in layouts]),
        torch.stack([layout.scales for layout in layouts]),
        torch.cat([layout.entries for layout in layouts]),
        torch.stack([layout.offsets + int(first) for layout, first in zip(layouts, counts, strict=False)]),
    )


def trellis_experts_layout(windows: list[TrellisWindow], device: torch.device) -> TrellisTensors:
    """The blocks of one expert after those of the other, filled up to as many; places are those of an expert's rows."""
    return trellis_layout(join_blocks(with_as_many_blocks(windows), windows[0].rows), device)


def multiply_experts(x: Tensor, weights: Tensor, ids: Tensor, experts: ExpertTensors, activate: Activate) -> Tensor:
    """x [tokens, hidden] → for every token the sum of what its experts make of it, weighted, in the dtype of x.

    weights: float32 [tokens, k]. ids: int [tokens, k], which expert of `experts`; −1: none of them.
    """

    def gate_up(rows: Tensor, number: int) -> Tensor:
        return matmul(rows, *_of_expert(experts.gate_up, number), experts.gate_up_bits, experts.gate_up_rows)

    def down(rows: Tensor, number: int) -> Tensor:
        return matmul(rows, *_of_expert(experts.down, number), experts.down_bits, x.shape[1])

    linears = Linears(len(experts.gate_up.dense), gate_up, down, experts.biases)
    return _through_experts(x, weights, ids, linears, activate)


def multiply_trellis_experts(
    x: Tensor, weights: Tensor, ids: Tensor, experts: TrellisExperts, activate: Activate
) -> Tensor:
    """See `multiply_experts`."""

    def gate_up(rows: Tensor, number: int) -> Tensor:
        return multiply_trellis(rows, _trellis_of(experts.gate_up, number, experts.number))

    def down(rows: Tensor, number: int) -> Tensor:
        return multiply_trellis(rows, _trellis_of(experts.down, number, experts.number))

    linears = Linears(experts.number, gate_up, down, experts.biases)
    return _through_experts(x, weights, ids, linears, activate)


def warm_up_experts(experts: ExpertTensors, hidden: int, dtype: torch.dtype) -> None:
    """Compile every way to multiply with activations of `dtype`."""
    warm_up(_of_expert(experts.gate_up, 0), experts.gate_up_bits, hidden, experts.gate_up_rows, dtype)
    warm_up(_of_expert(experts.down, 0), experts.down_bits, experts.inner, hidden, dtype)


def warm_up_trellis_experts(experts: TrellisExperts, hidden: int, dtype: torch.dtype) -> None:
    """Compile the kernels of the rates that these experts have."""
    for trellis, columns in ((experts.gate_up, hidden), (experts.down, experts.inner)):
        warm_up_trellis(trellis, columns, dtype)


Multiply = Callable[[Tensor, int], Tensor]  # rows that go to an expert, its number → outputs of one of its linears


class Linears(NamedTuple):
    """Those of a layer's experts. number: of experts. biases: [experts, rows] of both, or none."""

    number: int
    gate_up: Multiply
    down: Multiply
    biases: tuple[Tensor, ...]


def _through_experts(x: Tensor, weights: Tensor, ids: Tensor, linears: Linears, activate: Activate) -> Tensor:
    """Visits, tokens at their experts, sorted by expert; what they find, weighted and added up for every token."""
    flat = ids.flatten()
    order = flat.argsort(stable=True)
    order = order[int((flat < 0).sum()) :]
    if not len(order):
        return torch.zeros_like(x)
    token, owner = order // ids.shape[1], flat[order]
    counts = torch.bincount(owner, minlength=linears.number).tolist()
    outputs = _multiply(x[token], counts, linears.gate_up)
    if linears.biases:
        outputs += linears.biases[0][owner]
    found = _multiply(activate(outputs), counts, linears.down)
    if linears.biases:
        found += linears.biases[1][owner]
    weighted = found.float() * weights.flatten()[order, None]
    return torch.zeros(x.shape, dtype=torch.float32).index_add_(0, token, weighted).to(x.dtype)


def _multiply(x: Tensor, counts: list[int], multiply: Multiply) -> Tensor:
    """What `multiply` makes of the rows of each expert; one that nobody visits is not asked. counts: of rows."""
    return torch.cat([multiply(rows, expert) for expert, rows in enumerate(x.split(counts)) if len(rows)])


def _of_expert(layout: DeviceLayout, number: int) -> DeviceLayout:
    """The layout of one expert's linear."""
    return DeviceLayout(layout.dense[number], layout.scales[number], layout.entries, layout.offsets[number])


def _trellis_of(trellis: TrellisTensors, number: int, experts: int) -> TrellisTensors:
    """The blocks of one expert."""
    count = len(trellis.starts) // experts
    own = slice(number * count, (number + 1) * count)
    starts, tiles, places, scales = (tensor[own] for tensor in trellis.tensors[1:])
    return TrellisTensors(trellis.words, starts, tiles, places, scales, trellis.out_features, trellis.columns)
