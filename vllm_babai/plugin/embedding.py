"""Quantized embeddings in vLLM: rows are looked up in the tensors by which a tied head multiplies."""

from typing import Any

import torch
from torch import Tensor
from vllm.config import get_current_vllm_config_or_none
from vllm.model_executor.custom_op import op_registry_oot
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod, VocabParallelEmbedding

from vllm_babai.format import FormatError
from vllm_babai.plugin.linear import BabaiLinearMethod


class BabaiEmbeddingMethod(BabaiLinearMethod):
    """An embedding on any rank, which holds some rows of the vocabulary: looks up, and makes the logits where tied."""

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """See the base class. Raises FormatError for columns with steps, too: a look-up has no input to scale."""
        super().process_weights_after_loading(layer)
        if self.scales_inputs:
            raise FormatError(f"{self.names[0]}: the columns of an embedding cannot have steps")
        device = getattr(layer, self.residency.names[0]).device
        self.embedding(layer, torch.zeros(1, dtype=torch.int64, device=device))  # compiles

    def embedding(self, layer: torch.nn.Module, input_: Tensor) -> Tensor:
        """Ids of rows that this rank holds, int64 [...] → [..., hidden] in the dtype of the activations."""
        tensors = [getattr(layer, name) for name in self.residency.names]
        return torch.ops.babai.lookup(input_, *tensors, *self.constants, self.sizes.in_features, self.sizes.dtype)


class HeadMethod(UnquantizedEmbeddingMethod):
    """An lm_head that is not quantized of itself, in a model whose embedding is: dense, or the embedding where tied."""

    def tie_weights(self, layer: torch.nn.Module, embed_tokens: VocabParallelEmbedding) -> torch.nn.Module:
        """The embedding, in place of the head."""
        return embed_tokens


def check_drafting(embedding: str) -> None:
    """Raise NotImplementedError where another model drafts tokens, which shares or compares embeddings' weights."""
    current = get_current_vllm_config_or_none()
    if current is not None and current.speculative_config is not None:
        raise NotImplementedError(
            f"{embedding} is quantized, which does not go with --speculative-config: serve without it, or quantize "
            "without --embedding"
        )


def register_embedding(config: type[QuantizationConfig]) -> None:
    """Let every embedding of a model ask its quantization config, if that is a `config`, how it is held. Idempotent.

    Most of vLLM's model classes do not pass it on (Gemma, Qwen3.5, Granite 4).
    """
    kind = VocabParallelEmbedding.__name__
    if kind in op_registry_oot:  # another plugin's, which is left alone
        return

    class AskingEmbedding(VocabParallelEmbedding):
        """While it is built; then it is vLLM's own again, as LoRA looks for the exact class."""

        def __init__(self, *sizes: Any, quant_config: QuantizationConfig | None = None, **options: Any) -> None:
            if quant_config is None:
                current = get_current_vllm_config_or_none()
                if current is not None and isinstance(current.quant_config, config):
                    quant_config = current.quant_config
            super().__init__(*sizes, quant_config=quant_config, **options)
            self.__class__ = VocabParallelEmbedding

    VocabParallelEmbedding.register_oot(AskingEmbedding, name=kind)
