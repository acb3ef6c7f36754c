"""Linear layers in vLLM whose weight is a lattice point: stored tensors → tensors on the device → an op of ours."""

from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import Parameter
from vllm.model_executor.layers.linear import LinearMethodBase, register_weight_loader_v2_supported_method
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

from vllm_babai.format import LayerScheme
from vllm_babai.ops.backends import backend
from vllm_babai.ops.coded import CodedTensors, coded_tensors
from vllm_babai.ops.layout import DeviceLayout
from vllm_babai.plugin.parameter import StoredParameter
from vllm_babai.plugin.progress import LoadProgress
from vllm_babai.plugin.reader import CODED_READERS, READERS, CodedWeight, Reader, read_layer

# LoRA looks for `qweight`.
LAYOUT_NAMES = ("qweight", "scales", "overflow_entries", "overflow_offsets")
CODED_NAMES = ("qweight", "segments", "states", "row_class", "column_class", "table", "scales")
INPUT_SCALES = "input_scales"


@register_weight_loader_v2_supported_method
class BabaiLinearMethod(LinearMethodBase):
    """One linear layer of vLLM, in any of its kinds (replicated, column, row, merged, QKV, lm_head) and on any rank.

    The rank holds its part dense + sparse. Where the columns have steps of their own, these are `input_scales`, float32
    [in_features]: x is multiplied by them in float32 and rounded to its dtype once, no more than a weight in that dtype
    would be. torch.compile makes it part of the norm or activation before.

    format_name: format of the checkpoint. scheme: how the linears fused in this layer are stored.
    prefix: name of the layer in vLLM. names: names of those linears in the checkpoint, in the order of their rows.
    progress: of the model's layers. padding: outputs without a row, which vLLM adds to a vocabulary.
    """

    readers: ClassVar[dict[str, Reader]] = READERS
    activity = "Packing"

    def __init__(
        self, format_name: str, scheme: LayerScheme, prefix: str, names: list[str], progress: LoadProgress
    ) -> None:
        self.reader = self.readers[format_name]
        self.scheme, self.prefix, self.names, self.progress = scheme, prefix, names, progress

    def create_weights(
        self,
        layer: torch.nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        *,
        weight_loader: Callable,
        **_: Any,
    ) -> None:
        """Register a parameter per stored tensor. Raises ValueError when the layer cannot be cut for this rank."""
        multiple = self.reader.column_multiple(self.scheme)
        if input_size_per_partition != input_size and input_size_per_partition % multiple:
            raise ValueError(
                f"{self.prefix}: {input_size} input features do not divide among ranks into multiples of {multiple}, "
                f"which {self.scheme} needs; choose a smaller tensor-parallel size"
            )
        loader = weight_loader if hasattr(layer, "weight_loader_v2") else None
        self.padding = 0
        if isinstance(layer, ParallelLMHead):
            first_row, rows = layer.shard_indices.org_vocab_start_index, layer.num_org_embeddings_per_partition
            if not rows:
                raise ValueError(
                    f"{self.prefix}: a vocabulary of {layer.org_vocab_size} leaves this rank no part of it; "
                    "choose a smaller tensor-parallel size"
                )
            loader = partial(StoredParameter.load_vocabulary, first_row=first_row, vocabulary=layer.org_vocab_size)
            self.padding = sum(output_partition_sizes) - rows
            output_partition_sizes = [rows]
        self.in_features, self.out_features = input_size_per_partition, sum(output_partition_sizes)
        self.params_dtype = params_dtype
        if len(self.names) == len(output_partition_sizes):
            self.sizes = dict(zip(self.names, output_partition_sizes, strict=True))
        else:  # fused on disk
            self.sizes = {self.prefix: self.out_features}
        for name, dtype in self.reader.tensors.items():
            parameter = StoredParameter(
                dtype=dtype, rows=self.out_features, columns=self.in_features, weight_loader=loader
            )
            layer.register_parameter(name, parameter)
        self.progress.expect()

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """Replace the stored tensors by what the op takes. Raises FormatError that names the linear at fault."""
        stored = {name: getattr(layer, name) for name in self.reader.tensors}
        device = next(iter(stored.values())).device
        parts = {name: parameter.parts for name, parameter in stored.items()}
        weight = read_layer(self.reader, parts, self.sizes, self.scheme)
        for name in self.reader.tensors:
            delattr(layer, name)
        placed = self._place(weight, device)
        self.scales_inputs = weight.input_scales is not None
        if self.scales_inputs:
            placed[INPUT_SCALES] = weight.input_scales.to(device, torch.float32)
        for name, tensor in placed.items():
            layer.register_parameter(name, Parameter(tensor, requires_grad=False))
        self._warm_up(layer, device)
        self.progress.advance(self.activity)

    def apply(self, layer: torch.nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [..., in_features] → x Wᵀ + bias, [..., out_features], in the dtype of x."""
        if self.scales_inputs:
            x = (x * getattr(layer, INPUT_SCALES)).to(x.dtype)
        y = self._multiply(layer, x)
        if self.padding:
            y = torch.nn.functional.pad(y, (0, self.padding))
        return y if bias is None else y + bias

    def _place(self, weight: Any, device: torch.device) -> dict[str, Tensor]:
        """What the reader made of the layer's weight → parameters on the device, by name."""
        self.bits = weight.bits
        layout = backend(device.type).device_layout(
            weight.qweight, weight.scales, weight.overflow, self.bits, self.in_features, device
        )
        return dict(zip(LAYOUT_NAMES, layout, strict=True))

    def _multiply(self, layer: torch.nn.Module, x: Tensor) -> Tensor:
        return torch.ops.babai.matmul(x, *_layout(layer), self.bits, self.out_features)

    def _warm_up(self, layer: torch.nn.Module, device: torch.device) -> None:
        """Leave nothing to compile while serving."""
        backend(device.type).warm_up(_layout(layer), self.bits, self.in_features, self.out_features, self.params_dtype)


@register_weight_loader_v2_supported_method
class CodedLinearMethod(BabaiLinearMethod):
    """As its base, but the rank holds its part as the checkpoint's own streams, and every call decodes them."""

    readers = CODED_READERS
    activity = "Indexing"

    def _place(self, weight: CodedWeight, device: torch.device) -> dict[str, Tensor]:
        *tensors, self.across = coded_tensors(weight.segments, weight.scales, device)
        return dict(zip(CODED_NAMES, tensors, strict=True))

    def _multiply(self, layer: torch.nn.Module, x: Tensor) -> Tensor:
        return torch.ops.babai.coded_matmul(x, *(getattr(layer, name) for name in CODED_NAMES), self.across)

    def _warm_up(self, layer: torch.nn.Module, device: torch.device) -> None:
        fields: Any = (*(getattr(layer, name) for name in CODED_NAMES), self.across)
        backend(device.type).warm_up_coded(CodedTensors(*fields), self.in_features, self.params_dtype)


METHODS = {"packed": BabaiLinearMethod, "coded": CodedLinearMethod}


def _layout(layer: torch.nn.Module) -> DeviceLayout:
    return DeviceLayout(*(getattr(layer, name) for name in LAYOUT_NAMES))
