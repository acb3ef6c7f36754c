"""vLLM's model classes in the test's own process: built, and loaded as any rank, without an engine around them."""

import gc
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed import (
    destroy_distributed_environment,
    destroy_model_parallel,
    init_distributed_environment,
    initialize_model_parallel,
    parallel_state,
)
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.model_loader import get_model
from vllm.model_executor.models.transformers.base import Base as TransformersBase


@contextmanager
def one_process() -> Iterator[None]:
    """vLLM's process groups, of this process alone.

    vLLM collects garbage after every load, which took 0.8 of its 1 s: the objects of all modules are left out of it.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with set_current_vllm_config(VllmConfig()):
        init_distributed_environment(1, 0, f"tcp://127.0.0.1:{port}", 0, "gloo")
        initialize_model_parallel()
    gc.freeze()
    yield
    gc.unfreeze()
    destroy_model_parallel()
    destroy_distributed_environment()


def config_of(folder: Path, **options: Any) -> VllmConfig:
    """vLLM's configuration for a tiny model. options: of `EngineArgs`."""
    return EngineArgs(
        str(folder),
        dtype="float32",
        enforce_eager=True,
        max_model_len=64,
        max_num_seqs=2,
        enable_prefix_caching=False,
        skip_tokenizer_init=True,
        **options,
    ).create_engine_config()


def load_as_rank(folder: Path, rank: int = 0, ranks: int = 1, *, expert_parallel: bool = False) -> torch.nn.Module:
    """What one of several ranks loads of a checkpoint. The others are not there: nothing is summed over ranks.

    expert_parallel: a rank takes some experts, not some of each.
    """
    config = config_of(folder)
    config.parallel_config.enable_expert_parallel = expert_parallel
    config.parallel_config.tensor_parallel_size = ranks
    as_rank = mock.Mock(wraps=parallel_state.get_tp_group(), rank_in_group=rank, world_size=ranks)
    with mock.patch.object(parallel_state, "_TP", as_rank):
        return load(config)


def load_as_stage(folder: Path, stage: int, stages: int) -> torch.nn.Module:
    """What one of several stages loads of a checkpoint: some of the blocks (pipeline parallel)."""
    config = config_of(folder)
    config.parallel_config.pipeline_parallel_size = stages
    ends = {"is_first_rank": stage == 0, "is_last_rank": stage == stages - 1}
    as_stage = mock.Mock(wraps=parallel_state.get_pp_group(), rank_in_group=stage, world_size=stages, **ends)
    with mock.patch.object(parallel_state, "_PP", as_stage):
        return load(config)


def load(config: VllmConfig) -> torch.nn.Module:
    """The model of a configuration, with its weights.

    vLLM's Transformers backend decorates transformers' own class, which then needs vLLM wherever this process uses it.
    """
    without_device = mock.patch.object(torch.accelerator, "empty_cache")  # vLLM's own workers never call it on a CPU
    undecorated = mock.patch.object(TransformersBase, "_decorate_for_torch_compile")
    with set_current_vllm_config(config), without_device, undecorated:
        return get_model(vllm_config=config)
