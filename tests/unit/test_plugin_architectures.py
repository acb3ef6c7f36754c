"""vLLM's own model classes, on the meta device: they ask for a method for each linear that was quantized, no other.

This is how the tables in `offline/model/served.py` are known to be right: a class of vLLM that fuses other linears, or
builds one without a method, fails here.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from architectures import configuration, save_random
from vllm.config import set_current_vllm_config
from vllm.model_executor.model_loader.utils import initialize_model
from vllm_models import config_of, one_process

from vllm_babai.format import CheckpointConfig
from vllm_babai.format.config import kind_of
from vllm_babai.offline.model.checkpoint import open_checkpoint
from vllm_babai.offline.model.served import FUSED, fused_with
from vllm_babai.offline.model.streamed import open_streamed
from vllm_babai.offline.pipeline import weights_left_alone
from vllm_babai.plugin.config import BabaiConfig
from vllm_babai.plugin.linear import BabaiLinearMethod

CASES = ("llama", "stablelm", "deepseek-v3", "minicpm3", "jamba", "falcon-h1", "gptj")


@pytest.fixture(scope="module")
def groups() -> Iterator[None]:
    with one_process():
        yield


def kinds(names: list[str], blocks: list[str]) -> set[tuple[int, str]]:
    """Number of the block and last part of the name of linears: classes of vLLM leave out what is between."""
    prefixes = {f"{name.rpartition('.')[0]}.": name for name in blocks}
    (start,) = prefixes
    return {(int(n.removeprefix(start).split(".")[0]), n.rpartition(".")[2]) for n in names}


@pytest.mark.parametrize("name", CASES)
def test_every_quantized_linear_has_a_method(name: str, tmp_path: Path, groups: None) -> None:
    source = save_random(configuration(name), tmp_path)
    streamed = open_streamed(open_checkpoint(source), torch.device("cpu"), torch.float32)
    quantized = [linear for block in streamed.block_names for linear in streamed.linears(block)]
    ignored = weights_left_alone(streamed, quantized)
    config = config_of(source)
    listed = sorted({kind_of(linear, block) for block in streamed.block_names for linear in streamed.linears(block)})
    stored = CheckpointConfig("ssqr", 4, ignore=ignored, scope=streamed.block_names, linears=listed)
    config.quant_config = BabaiConfig(stored)
    with set_current_vllm_config(config), torch.device("meta"):
        model = initialize_model(config)

    methods = [getattr(module, "quant_method", None) for module in model.modules()]
    served = [method.names for method in methods if isinstance(method, BabaiLinearMethod)]
    assert served
    blocks = streamed.block_names
    assert kinds([n for names in served for n in names], blocks) == kinds(quantized, blocks)
    for names in served:
        own = {n.rpartition(".")[2] for n in names}
        assert len(own) == 1 or {n.rpartition(".")[2] for n in fused_with(names[0])} == own
    mapping = config.quant_config.packed_modules_mapping
    fused = [set(parts) for parts in mapping.values() if len(parts) > 1]
    assert all(any(parts <= set(known) for known in FUSED) for parts in fused)
