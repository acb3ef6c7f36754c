"""Experts on the CPU: tokens sorted by expert, so that each expert multiplies all of its tokens in one go."""

import torch
from torch import Tensor

from vllm_babai.cpu.backend import matmul, warm_up
from vllm_babai.ops.experts import Activate, ExpertTensors
from vllm_babai.ops.layout import DeviceLayout


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


def multiply_experts(x: Tensor, weights: Tensor, ids: Tensor, experts: ExpertTensors, activate: Activate) -> Tensor:
    """x [tokens, hidden] → for every token the sum of what its experts make of it, weighted, in the dtype of x.

    weights: float32 [tokens, k]. ids: int [tokens, k], which expert of `experts`; −1: none of them.
    """
    flat = ids.flatten()
    order = flat.argsort(stable=True)
    order = order[int((flat < 0).sum()) :]
    token = order // ids.shape[1]
    counts = torch.bincount(flat[order], minlength=len(experts.gate_up.dense)).tolist()
    outputs = _multiply_sorted(x[token], counts, experts.gate_up, experts.gate_up_bits, experts.gate_up_rows)
    if experts.biases:
        outputs += experts.biases[0][flat[order]]
    found = _multiply_sorted(activate(outputs), counts, experts.down, experts.down_bits, x.shape[1])
    if experts.biases:
        found += experts.biases[1][flat[order]]
    weighted = found.float() * weights.flatten()[order, None]
    return torch.zeros(x.shape, dtype=torch.float32).index_add_(0, token, weighted).to(x.dtype)


def warm_up_experts(experts: ExpertTensors, hidden: int, dtype: torch.dtype) -> None:
    """Compile every way to multiply with activations of `dtype`."""
    warm_up(_of_expert(experts.gate_up, 0), experts.gate_up_bits, hidden, experts.gate_up_rows, dtype)
    warm_up(_of_expert(experts.down, 0), experts.down_bits, experts.inner, hidden, dtype)


def _multiply_sorted(x: Tensor, counts: list[int], layout: DeviceLayout, bits: int, out_features: int) -> Tensor:
    """x [rows, in], sorted by expert → [rows, out]. counts: how many rows belong to each expert."""
    y = x.new_empty(len(x), out_features)
    first = 0
    for number, count in enumerate(counts):
        if count:
            rows = slice(first, first + count)
            y[rows] = matmul(x[rows], *_of_expert(layout, number), bits, out_features)
        first += count
    return y


def _of_expert(layout: DeviceLayout, number: int) -> DeviceLayout:
    """The layout of one expert's linear."""
    return DeviceLayout(layout.dense[number], layout.scales[number], layout.entries, layout.offsets[number])
