"""What a block is called with, noted sequence by sequence, is right for batches of the sequences."""

from collections import UserDict
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from vllm_babai.offline import QuantizationError
from vllm_babai.offline.model.call import Call, Recorder, Recording, run_block

HEADS, LENGTH, SIZE = 3, 5, 8


class Block(nn.Module):
    """Reads everything that it is called with, by position and by keyword."""

    kind = "all of it"

    def __init__(self, batch: int) -> None:
        super().__init__()
        self.batch = batch

    def forward(self, hidden: Tensor, own: Tensor, *, mask: Tensor, alibi: Tensor, left: Any, scale: float) -> tuple:
        assert own.shape == (hidden.shape[self.batch], LENGTH, SIZE)
        left["own"] = (own + 1, own - 1)
        bias = alibi.view(hidden.shape[self.batch], HEADS, LENGTH).sum(1)[..., None]
        return scale * hidden + own * mask + bias, "something else"


def arguments(own: Tensor, left: Any) -> tuple[tuple, dict[str, Any]]:
    alibi = torch.arange(HEADS * LENGTH).view(HEADS, 1, LENGTH).repeat(len(own), 1, 1)
    return (own,), {"mask": torch.ones(1, LENGTH, SIZE), "alibi": alibi, "left": left, "scale": 2.0}


def recorded(block: Block, sequences: Tensor) -> tuple[Tensor, Call]:
    """Hidden states, and the call, as `StreamedModel.first_inputs` notes them."""
    own = sequences * 10

    def call(x: Tensor, per_layer: Tensor) -> tuple[tuple, dict[str, Any]]:
        hidden = x if block.batch == 0 else torch.stack([x, x + 1])
        rest, keywords = arguments(per_layer, UserDict())
        recorder = Recorder(block, outputs=2)
        assert recorder.kind == "all of it"
        outputs = recorder(hidden, *rest, **keywords)
        assert outputs[0] is hidden
        assert len(outputs) == 2
        return recorder.args, recorder.kwargs

    recording = Recording("model.layers.0")
    recording.note_doubled(*call(sequences[:1].repeat(2, 1, 1), own[:1].repeat(2, 1, 1)))
    hidden = [recording.note(*call(sequences[i : i + 1], own[i : i + 1])) for i in range(len(sequences))]
    return torch.cat(hidden), recording.call({})


@pytest.mark.parametrize("batch", [0, 1])
def test_any_batch_of_the_sequences(batch: int) -> None:
    block, sequences = Block(batch), torch.randn(4, LENGTH, SIZE)
    hidden, call = recorded(block, sequences)
    assert hidden.shape[:2] == (4, LENGTH)
    for window in (slice(0, 1), slice(1, 4), slice(0, 4)):
        here = call.at(window)
        found = run_block(block, hidden[window], here)
        x, own = sequences[window], sequences[window] * 10
        direct = x if batch == 0 else torch.stack([x, x + 1])
        rest, keywords = arguments(own, {})
        expected = block(direct, *rest, **keywords)[0]
        torch.testing.assert_close(found, expected if batch == 0 else expected.movedim((1, 2), (0, 1)))
        torch.testing.assert_close(here.left["own"], (own + 1, own - 1))
        assert not call.left


def test_what_earlier_blocks_left_is_cut_like_the_batch() -> None:
    class Reader(nn.Module):
        def forward(self, hidden: Tensor, left: dict[str, tuple[Tensor, Tensor]]) -> Tensor:
            return hidden + left["kv"][0] - left["kv"][1]

    recording = Recording("model.layers.1")
    one = torch.zeros(1, LENGTH, SIZE)
    recording.note_doubled((one.repeat(2, 1, 1),), {"left": UserDict()})
    recording.note((one,), {"left": UserDict()})
    kv = torch.randn(2, 4, LENGTH, SIZE)
    call = recording.call({}).of({"kv": (kv[0], kv[1])}).at(slice(1, 3))
    torch.testing.assert_close(run_block(Reader(), torch.zeros(2, LENGTH, SIZE), call), (kv[0] - kv[1])[1:3])


def test_equal_arguments_are_kept_once() -> None:
    recording = Recording("model.layers.0")
    hidden, mask = torch.zeros(1, LENGTH, SIZE), torch.zeros(1, 1, LENGTH, LENGTH)
    recording.note_doubled((hidden.repeat(2, 1, 1),), {"mask": mask.repeat(2, 1, 1, 1)})
    for _ in range(3):
        recording.note((hidden,), {"mask": mask.clone()})
    assert recording.call({}).keywords["mask"].shape == mask.shape


def test_parts_that_several_blocks_share_are_stacked_once() -> None:
    sequences, stacked = torch.randn(3, 1, LENGTH, SIZE), {}
    calls = []
    for index in range(2):
        recording = Recording(f"model.layers.{index}")
        recording.note_doubled((sequences[0].repeat(2, 1, 1), sequences[0].repeat(2, 1, 1)), {})
        for x in sequences.unbind():
            recording.note((x, x), {})
        calls.append(recording.call(stacked))
    assert len(stacked) == 2  # the tensors that `unbind` makes are others each time
    assert calls[0].positional[1].parts.shape == (3, 1, LENGTH, SIZE)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ((1, 2), "argument step differs from sequence to sequence and is no tensor"),
        ((torch.ones(3), torch.zeros(3)), "argument step differs .* has no dimension for a batch"),
    ],
    ids=["number", "tensor"],
)
def test_arguments_that_no_batch_can_have(values: tuple, message: str) -> None:
    recording, hidden = Recording("model.layers.7"), torch.zeros(1, LENGTH, SIZE)
    recording.note_doubled((hidden.repeat(2, 1, 1),), {"step": values[0]})
    with pytest.raises(QuantizationError, match=f"model.layers.7: its {message}"):
        for value in values:
            recording.note((hidden,), {"step": value})
        recording.call({})
