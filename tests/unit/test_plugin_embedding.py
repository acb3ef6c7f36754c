"""Quantized embeddings in vLLM's own model classes, tied and not, as any rank: what is looked up is what is stored."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from architectures import TEXT
from torch import Tensor, nn
from transformers import Gemma2Config, LlamaConfig, PreTrainedConfig
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod, VocabParallelEmbedding
from vllm_models import load_as_rank, one_process

from vllm_babai.format import CheckpointConfig
from vllm_babai.offline import QuantizeOptions, quantize
from vllm_babai.offline.model.dense import load_dense
from vllm_babai.plugin.config import BabaiConfig, register_config

SIZES = TEXT | {"hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
CASES: dict[str, tuple[PreTrainedConfig, dict[str, Any]]] = {
    "llama, tied": (LlamaConfig(**SIZES | {"tie_word_embeddings": True}), {"embedding": 4}),
    "gemma2, tied": (Gemma2Config(**SIZES | {"tie_word_embeddings": True, "head_dim": 32}), {"embedding": 3}),
    "llama, hptq": (
        LlamaConfig(**SIZES | {"tie_word_embeddings": False}),
        {"format": "hptq", "rate": 3, "embedding": 4.5},
    ),
}


@pytest.fixture(scope="module", autouse=True)
def groups() -> Iterator[None]:
    register_config()
    with one_process():
        yield


@pytest.fixture(scope="module", params=CASES)
def quantized(
    request: pytest.FixtureRequest, short_text: Path, tmp_path_factory: pytest.TempPathFactory, save_random_model: Any
) -> Path:
    config, options = CASES[request.param]
    folder = tmp_path_factory.mktemp("embedding")
    source = save_random_model(config, folder / "source")
    common = {"calibration": str(short_text), "samples": 2, "sequence_length": 32, "paths": 1, "sensitivity": False}
    return quantize(source, folder / "out", QuantizeOptions(**{**common, **options}))


def embedding_of(model: nn.Module) -> VocabParallelEmbedding:
    (found,) = (m for m in model.modules() if type(m) is VocabParallelEmbedding)
    return found


def look_up(embedding: VocabParallelEmbedding, ids: Tensor) -> Tensor:
    """As the class does on its rank, but for the sum over ranks."""
    embedding.reduce_results = False
    return embedding(ids)


@pytest.mark.parametrize("ranks", [pytest.param(1, marks=pytest.mark.long), 2])
def test_ranks_look_up_and_multiply_what_is_stored(quantized: Path, ranks: int) -> None:
    twin = load_dense(quantized, torch.device("cpu"))
    weight = twin.get_input_embeddings().weight
    tied = twin.get_output_embeddings().weight is weight
    ids = torch.tensor([0, 5, len(weight) // 2, len(weight) - 1, 5])
    x = torch.randn(3, weight.shape[1])
    rows, logits = torch.zeros(len(ids), weight.shape[1]), []
    with torch.inference_mode():
        for rank in range(ranks):
            model = load_as_rank(quantized, rank, ranks)
            embedding = embedding_of(model)
            rows += look_up(embedding, ids)
            head = model.lm_head if hasattr(model, "lm_head") else embedding
            assert (head is embedding) == tied
            if not tied:
                assert isinstance(head.quant_method, UnquantizedEmbeddingMethod)
            logits.append(head.quant_method.apply(head, x))
        assert torch.equal(rows, weight[ids])
        expected = x @ twin.get_output_embeddings().weight.T
        torch.testing.assert_close(torch.cat(logits, 1)[:, : len(weight)], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("prefix", "drafts", "message"),
    [
        ("model.mtp.embed_tokens", False, "model.mtp.embed_tokens: vLLM's class looks tokens up there, too"),
        ("model.embed_tokens", True, "model.embed_tokens is quantized, which does not go with --speculative-config"),
    ],
)
def test_other_look_ups_are_refused(prefix: str, drafts: bool, message: str) -> None:
    stored = CheckpointConfig("ssqr", 4, overrides={"model.embed_tokens": {}}, embedding="model.embed_tokens")
    config = VllmConfig()
    config.speculative_config = mock.Mock() if drafts else None
    with set_current_vllm_config(config), pytest.raises(NotImplementedError, match=message):
        VocabParallelEmbedding(64, 32, quant_config=BabaiConfig(stored), prefix=prefix)
