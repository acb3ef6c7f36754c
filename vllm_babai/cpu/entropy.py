"""CPU backend of `babai::coded_matmul`: decode HPTQ's rANS streams on every core, then multiply."""

import numpy as np
import torch
from torch import Tensor

from vllm_babai.compiled import parallel_map
from vllm_babai.format.entropy.classes import Classes
from vllm_babai.format.entropy.rans import decode_segments
from vllm_babai.format.entropy.segments import SEGMENT
from vllm_babai.ops.coded import CodedTensors, multiply_decoded

SEGMENTS_AT_A_TIME = 8  # per thread and call; a choice that was not measured


def multiply_coded(x: Tensor, coded: CodedTensors) -> Tensor:
    """x [..., in_features] in a floating type → x Wᵀ [..., out_features] in the same."""
    return multiply_decoded(x, coded, decode)


def warm_up_coded(coded: CodedTensors, in_features: int, dtype: torch.dtype) -> None:
    """Compile the decoder. Any number of tokens uses the same."""
    multiply_coded(torch.zeros(1, in_features, dtype=dtype), coded)


def decode(coded: CodedTensors, out: Tensor) -> Tensor:
    """Decode into `out` [rows, columns] and return it: int16 integers, or S ∘ Z in a floating type."""
    integers = _decode_integers(coded, torch.empty(out.shape, dtype=torch.int16))
    if out.dtype == torch.int16:
        return out.copy_(integers)
    groups = coded.scales.shape[1]
    return out.copy_((integers.unflatten(1, (groups, -1)) * coded.scales.unsqueeze(-1)).flatten(1))


def _decode_integers(coded: CodedTensors, out: Tensor) -> Tensor:
    words, states = coded.words.numpy().view(np.uint16), coded.states.numpy().view(np.uint32)
    classes = Classes(coded.row_class.int().numpy(), coded.column_class.int().numpy())
    segments, table = coded.segments.numpy().view(SEGMENT)[:, 0], coded.table.numpy().view(np.uint32)

    def decode_some(first: int) -> None:
        some = slice(first, first + SEGMENTS_AT_A_TIME)
        decode_segments(words, segments[some], states[some], classes, table, out.numpy())

    parallel_map(decode_some, range(0, len(segments), SEGMENTS_AT_A_TIME))
    return out
