"""Whether a checkpoint holds what its model needs, and nothing that is another model's."""

from pathlib import Path

import pytest
from architectures import configuration, save_random
from safetensors.torch import load_file, save_file

from vllm_babai.errors import QuantizationError
from vllm_babai.offline.model.checkpoint import open_checkpoint
from vllm_babai.offline.model.complete import check_complete


def test_a_block_too_many_is_named_unless_it_is_an_mtp_layer(tmp_path: Path) -> None:
    config = configuration("deepseek-v3")
    assert (config.num_hidden_layers, config.num_mtp_layers) == (2, 1)
    file = save_random(config, tmp_path / "model") / "model.safetensors"
    for number in (2, 3):
        tensors = load_file(file)
        last = {name: tensor for name, tensor in tensors.items() if name.startswith("model.layers.1.")}
        more = {name.replace("layers.1.", f"layers.{number}."): tensor.clone() for name, tensor in last.items()}
        save_file(tensors | more, file, {"format": "pt"})
        if number == 2:
            check_complete(open_checkpoint(file.parent))
    with pytest.raises(QuantizationError, match=r"^model\.layers\.3\.\S+ is in .*, but .* no such block"):
        check_complete(open_checkpoint(file.parent))
