"""Linear layers in vLLM whose weight is a lattice point: stored tensors → tensors on the device → an op of ours."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from vllm.config import VllmConfig, get_current_vllm_config
from vllm.model_executor.layers.linear import LinearMethodBase, register_weight_loader_v2_supported_method
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

from vllm_babai.plugin.assemble import assemble
from vllm_babai.plugin.kept import KeptTensors
from vllm_babai.plugin.lora import show_weight
from vllm_babai.plugin.parameter import StoredParameter, VocabularyParameter
from vllm_babai.plugin.progress import LoadProgress
from vllm_babai.plugin.readers import Reader
from vllm_babai.plugin.residency import RESIDENCIES, Placed

INPUT_SCALES = "input_scales"


@dataclass(frozen=True)
class LayerSizes:
    """What this rank holds of a layer.

    rows: of each linear fused in the layer, by name, in order. in_features: columns. padding: outputs without a row,
    which vLLM adds to a vocabulary. dtype: of the activations.
    """

    rows: dict[str, int]
    in_features: int
    padding: int
    dtype: torch.dtype

    @property
    def out_features(self) -> int:
        """Rows in all, without padding."""
        return sum(self.rows.values())


@register_weight_loader_v2_supported_method
class BabaiLinearMethod(LinearMethodBase):
    """One linear layer of vLLM, in any of its kinds (replicated, column, row, merged, QKV, lm_head) and on any rank.

    The reader's residency says how the rank holds its part of the weight. Where the columns have steps of their own,
    these are `input_scales`, float32 [in_features]: x is multiplied by them in float32 and rounded to its dtype once,
    no more than a weight in that dtype would be. torch.compile makes it part of the norm or activation before.

    prefix: name of the layer in vLLM. names: names of the linears fused in it, as the checkpoint has them, in the order
    of their rows. progress, kept: of the model, whose layers share them.
    """

    sizes: LayerSizes  # from create_weights on, like the next
    vllm_config: VllmConfig
    constants: tuple[int, ...]  # of the op, from process_weights_after_loading on, like the next
    scales_inputs: bool

    def __init__(
        self, reader: Reader[Any, Any], prefix: str, names: list[str], progress: LoadProgress, kept: KeptTensors
    ) -> None:
        self.reader, self.residency = reader, RESIDENCIES[reader.residency]
        self.prefix, self.names, self.progress, self.kept = prefix, names, progress, kept
        self.loaded: Placed | None = None  # names, shapes and dtypes of the first load, on the meta device

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
        """Register a placeholder per stored tensor.

        Raises ValueError when the layer cannot be cut for this rank, NotImplementedError for offloading to the CPU,
        FormatError for a weight file that is cut or missing.
        """
        self._check_columns(input_size_per_partition, input_size)
        padding = 0
        if isinstance(layer, VocabParallelEmbedding):
            rows = self._rows_of_vocabulary(layer)
            padding = sum(output_partition_sizes) - rows
            output_partition_sizes = [rows]
        if len(self.names) == len(output_partition_sizes):
            by_name = dict(zip(self.names, output_partition_sizes, strict=True))
        else:  # fused on disk
            by_name = {self.names[0] if len(self.names) == 1 else self.prefix: sum(output_partition_sizes)}
        self.sizes = LayerSizes(by_name, input_size_per_partition, padding, params_dtype)
        for name, dtype in self.reader.form.dtypes.items():
            layer.register_parameter(name, self._placeholder(layer, dtype, weight_loader))
        self.vllm_config = get_current_vllm_config()
        check_offloading(self.vllm_config)
        self.kept.check_files(self.vllm_config.model_config, self.vllm_config.load_config)
        self.progress.expect()

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """Replace the stored tensors by what the op takes.

        Raises FormatError that names the linear or tensor at fault, ValueError where new weights do not fit in the
        place of old.
        """
        self.kept.check(self.vllm_config.model_config, self.vllm_config.load_config)
        weight = self._take_weight(layer)
        device = getattr(layer, next(iter(self.reader.form.dtypes))).device
        for name in self.reader.form.dtypes:
            delattr(layer, name)
        placed = self.residency.place(weight, self.sizes.in_features, device)
        self.residency.warm_up(placed, self.sizes.in_features, self.sizes.dtype)
        self.constants, self.scales_inputs = placed.constants, weight.input_scales is not None
        if weight.input_scales is not None:
            placed.tensors[INPUT_SCALES] = weight.input_scales.to(device, torch.float32)
        for name, tensor in self._as_loaded_first(placed).items():
            layer.register_parameter(name, Parameter(tensor, requires_grad=False))
        if isinstance(layer, VocabParallelEmbedding):
            show_weight(layer, self.vllm_config, self.sizes.dtype, device)
        self.progress.advance(self.residency.activity)

    def apply(self, layer: torch.nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [..., in_features] → x Wᵀ + bias, [..., out_features], in the dtype of x."""
        if self.scales_inputs:
            x = (x * getattr(layer, INPUT_SCALES)).to(x.dtype)
        y = self.residency.multiply(x, [getattr(layer, name) for name in self.residency.names], self.constants)
        if self.sizes.padding:
            y = torch.nn.functional.pad(y, (0, self.sizes.padding))
        return y if bias is None else y + bias

    def _check_columns(self, columns: int, all_columns: int) -> None:
        multiple = self.reader.column_multiple
        if columns != all_columns and columns % multiple:
            raise ValueError(
                f"{self.prefix}: {all_columns} input features do not divide among ranks into multiples of {multiple}, "
                f"which {self.reader.scheme} needs; choose a smaller tensor-parallel size"
            )

    def _rows_of_vocabulary(self, layer: VocabParallelEmbedding) -> int:
        if not layer.num_org_embeddings_per_partition:
            raise ValueError(
                f"{self.prefix}: a vocabulary of {layer.org_vocab_size} leaves this rank no part of it; "
                "choose a smaller tensor-parallel size"
            )
        return layer.num_org_embeddings_per_partition

    def _placeholder(self, layer: torch.nn.Module, dtype: torch.dtype, weight_loader: Callable) -> StoredParameter:
        size: dict[str, Any] = {"dtype": dtype, "rows": self.sizes.out_features, "columns": self.sizes.in_features}
        if isinstance(layer, VocabParallelEmbedding):
            first_row, vocabulary = layer.shard_indices.org_vocab_start_index, layer.org_vocab_size
            return VocabularyParameter(first_row=first_row, vocabulary=vocabulary, **size)
        loader = weight_loader if hasattr(layer, "weight_loader_v2") else None
        return StoredParameter(layer_loader=loader, **size)

    def _take_weight(self, layer: torch.nn.Module) -> Any:
        """The weight of the layer. Then the placeholders, which vLLM keeps for reloading, drop the stored tensors."""
        if self.vllm_config.load_config.load_format == "dummy":
            return self.reader.dummy(self.sizes.out_features, self.sizes.in_features)
        parts = {name: getattr(layer, name).parts for name in self.reader.form.dtypes}
        try:
            return assemble(self.reader, parts, self.sizes.rows)
        finally:
            for found in parts.values():
                found.clear()

    def _as_loaded_first(self, placed: Placed) -> dict[str, Tensor]:
        """The tensors, as large as when the layer was loaded first: vLLM copies reloaded weights to the same memory.

        Captured CUDA graphs and compiled code hold on to it, and to the constants. Fewer overflow entries are padded.
        Raises ValueError for what does not fit.
        """
        if self.loaded is None:
            shapes = {name: tensor.to("meta") for name, tensor in placed.tensors.items()}
            self.loaded = Placed(shapes, placed.constants)
            return placed.tensors
        before, tensors = self.loaded, dict(placed.tensors)
        for name in self.residency.may_shrink & tensors.keys():
            missing = before.tensors[name].shape[0] - tensors[name].shape[0]
            if missing > 0:
                padding = (0, 0) * (tensors[name].dim() - 1) + (0, missing)
                tensors[name] = torch.nn.functional.pad(tensors[name], padding)
        different = [
            f"{name}: {_describe(before.tensors.get(name))}, now {_describe(tensors.get(name))}"
            for name in before.tensors | tensors
            if _describe(before.tensors.get(name)) != _describe(tensors.get(name))
        ]
        if before.constants != placed.constants:
            different.append(f"constants: {before.constants}, now {placed.constants}")
        if different:
            raise ValueError(
                f"{self.prefix}: the reloaded weights do not fit in the memory of the ones before "
                f"({'; '.join(different)}); start the server again to serve them"
            )
        return tensors


def check_offloading(vllm_config: VllmConfig) -> None:
    """Raise NotImplementedError for vLLM's offloading of weights, which reckons with sizes before loading.

    Placeholders have none then: any budget would move all quantized layers.
    """
    offload = getattr(vllm_config, "offload_config", None)  # the versions before it keep the option elsewhere
    if offload is not None and (offload.uva.cpu_offload_gb or offload.prefetch.offload_group_size):
        raise NotImplementedError(
            "quantized layers cannot be offloaded to the CPU (--cpu-offload-gb, --offload-group-size): their sizes are "
            "unknown before they are loaded. Quantize to fewer bits, or split the model with --tensor-parallel-size"
        )


def _describe(tensor: Tensor | None) -> str:
    return "none" if tensor is None else f"{tensor.dtype} {list(tensor.shape)}".removeprefix("torch.")
