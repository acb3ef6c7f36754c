"""A trellis checkpoint on one rank and on two, against transformers with its dense twin."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from twins import Answer, answer_of_twin, check_as_twin, store_linears

from vllm_babai.format import CheckpointConfig, Trellis
from vllm_babai.offline.scales.trellis import search_trellis
from vllm_babai.offline.solver.factor import factorize
from vllm_babai.offline.solver.lattice import Lattice

SERVERS = {"one rank": [], "two ranks": ["--tensor-parallel-size", "2"]}


@pytest.fixture(scope="module")
def trellis(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled model at 4 bits per weight, every linear as if its inputs were white noise."""

    def encode(_: str, weight: Tensor) -> dict[str, Tensor]:
        lattice = Lattice(factorize(torch.eye(weight.shape[1]), "reverse", 0.0), None, 4)
        solution = search_trellis(weight.float().T.flip(0).contiguous(), lattice, 4.0, 0)
        return Trellis.encode(solution.weight).tensors()

    config = CheckpointConfig("trellis", ignore=["lm_head"], residency="tiled")
    return store_linears(tmp_path_factory.mktemp("trellis") / "quantized", config, encode)


@pytest.fixture(scope="module")
def expected(trellis: Path) -> Answer:
    return answer_of_twin(trellis)


@pytest.fixture(scope="module")
def servers(trellis: Path, start_servers: Callable[..., Any]) -> Iterator[dict[str, Any]]:
    with start_servers(*((trellis, "--dtype", "float32", *options) for options in SERVERS.values())) as running:
        yield dict(zip(SERVERS, running, strict=True))


@pytest.mark.parametrize("name", SERVERS)
def test_equals_the_dense_twin(name: str, servers: dict[str, Any], expected: Answer) -> None:
    check_as_twin(servers[name].client, expected)
    assert "Placing linear layers: 100%" in servers[name].log.read_text()
