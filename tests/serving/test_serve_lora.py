"""`vllm serve --enable-lora` of a quantized model, against transformers with the dense twin and the adapter merged."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from adapters import save_adapter
from safetensors.torch import load_file
from twins import answer_in_transformers, check_as_twin, save_with


@pytest.mark.long
def test_an_adapter_is_served_beside_the_model(
    checkpoints: Any, start_servers: Callable[..., Any], tmp_path: Path
) -> None:
    dense = load_file(checkpoints.dense / "model.safetensors")
    added = save_adapter(tmp_path / "adapter", {n: w for n, w in dense.items() if n.endswith("_proj.weight")})
    merged = save_with(tmp_path / "merged", {n: w.float() + added.get(n, 0.0) for n, w in dense.items()}, {})
    alone, together = (answer_in_transformers(folder) for folder in (checkpoints.dense, merged))
    assert alone.text != together.text
    options = ("--dtype", "float32", "--enable-lora", "--lora-modules", f"adapter={tmp_path / 'adapter'}")
    with start_servers((checkpoints.quantized, *options)) as (server,):
        check_as_twin(server.client, alone)
        check_as_twin(server.client, together, model="adapter")
        assert server.terminate() == 0
