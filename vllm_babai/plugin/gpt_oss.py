"""vLLM's class of gpt-oss, which also loads what babai stores of each expert.

The class goes over the checkpoint's tensors itself, knows experts in a few formats of vLLM's alone, and passes over all
other names in silence. So they are taken out of its way here; without our experts nothing is.
"""

from collections.abc import Iterable, Iterator

from torch import Tensor
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.models.gpt_oss import GptOssForCausalLM

from vllm_babai.plugin.experts import BabaiExpertsMethod

BIASES = {"gate_up_proj_bias": "w13", "down_proj_bias": "w2"}  # name in the checkpoint, of all experts → stem


class GptOssWithExperts(GptOssForCausalLM):
    """gpt-oss whose experts may be lattice points."""

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Load all tensors, those of our experts by our loaders; returns the names of the parameters that were."""
        layers = {
            name.removesuffix(".routed_experts"): module
            for name, module in self.named_modules()
            if isinstance(module, RoutedExperts) and isinstance(module.quant_method, BabaiExpertsMethod)
        }
        loaded: set[str] = set()

        def others() -> Iterator[tuple[str, Tensor]]:
            for name, tensor in weights:
                block, experts, rest = name.partition(".experts.")
                layer = layers.get(block + experts.removesuffix("."))
                if layer is None:
                    yield name, tensor
                else:
                    loaded.add(f"{block}.experts.routed_experts.{_load(layer, rest, tensor)}")

        return super().load_weights(others()) | loaded


def _load(layer: RoutedExperts, name: str, tensor: Tensor) -> str:
    """Load a tensor by its name behind `experts.`; returns that of the parameter. Gates and ups of biases alternate."""
    if name in BIASES:
        stem = BIASES[name]
        parts = [tensor[:, ::2], tensor[:, 1::2]] if stem == "w13" else [tensor]
        layer.quant_method.load_biases(layer, stem, parts)
        return f"{stem}_bias"
    number, linear, key = name.split(".")
    asked = {layer.ckpt_gate_proj_name: "w1", layer.ckpt_up_proj_name: "w3", layer.ckpt_down_proj_name: "w2"}
    shard = asked[linear]
    parameter = f"{'w2' if shard == 'w2' else 'w13'}_{key}"
    placeholder = getattr(layer, parameter)
    placeholder.weight_loader(placeholder, tensor, parameter, shard_id=shard, expert_id=int(number))
    return parameter
