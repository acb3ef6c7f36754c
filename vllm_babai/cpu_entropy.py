"""CPU backend of `babai::coded_matmul`: decode HPTQ's rANS streams on every core, then multiply."""

import numpy as np
import torch
from torch import Tensor

from vllm_babai.coded import CodedTensors, multiply_decoded
from vllm_babai.format.hptq import Shape
from vllm_babai.format.parallel import parallel_map
from vllm_babai.format.rans import decode_tile


def multiply_coded(x: Tensor, coded: CodedTensors) -> Tensor:
    """x [..., in_features] in a floating type → x Wᵀ [..., out_features] in the same."""
    return multiply_decoded(x, coded, decode)


def decode(coded: CodedTensors, out: Tensor) -> Tensor:
    """Decode into `out` [rows, columns] and return it: int16 integers, or S ∘ Z in a floating type."""
    integers = _decode_integers(coded)
    if out.dtype == torch.int16:
        return out.copy_(integers)
    groups = coded.scales.shape[1]
    return out.copy_((integers.unflatten(1, (groups, -1)) * coded.scales.unsqueeze(-1)).flatten(1))


def _decode_integers(coded: CodedTensors) -> Tensor:
    shape = Shape(len(coded.row_class), len(coded.column_class), coded.tile_rows, coded.tile_columns, coded.lanes)
    out = torch.empty(shape.rows, shape.columns, dtype=torch.int16)
    words, ends = coded.words.numpy().view(np.uint16), coded.ends.numpy()
    classes = coded.row_class.int().numpy(), coded.column_class.int().numpy()
    common = (*classes, coded.table.numpy().view(np.uint32), coded.offset, coded.shift, coded.lanes, out.numpy())

    def decode_one(index: int) -> None:
        decode_tile(words, ends[index - 1] if index else 0, ends[index], shape.tile(index), *common)

    parallel_map(decode_one, range(shape.count))
    return out
