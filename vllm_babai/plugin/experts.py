"""Experts in vLLM whose weights are lattice points: stored tensors → one layout for all experts → an op of ours."""

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module, Parameter
from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.fused_moe import FusedMoEMethodBase
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.utils import set_weight_attrs

from vllm_babai.format import FormatError
from vllm_babai.ops.backends import backend
from vllm_babai.plugin.assemble import assemble
from vllm_babai.plugin.expert_residency import EXPERT_RESIDENCIES, HeldExperts
from vllm_babai.plugin.kept import KeptTensors
from vllm_babai.plugin.linear import check_offloading
from vllm_babai.plugin.parameter import Part
from vllm_babai.plugin.progress import LoadProgress
from vllm_babai.plugin.readers import Reader
from vllm_babai.plugin.readers.reader import Window
from vllm_babai.plugin.residency import Placed

SHARDS = {"w13": ("w1", "w3"), "w2": ("w2",)}  # stem of the parameters → vLLM's names of an expert's linears in it
ACTIVATIONS = {  # which need nothing but their input
    MoEActivation.SILU,
    MoEActivation.GELU,
    MoEActivation.GELU_TANH,
    MoEActivation.SILU_NO_MUL,
    MoEActivation.GELU_NO_MUL,
    MoEActivation.GELU_TANH_NO_MUL,
    MoEActivation.RELU2_NO_MUL,
    MoEActivation.SWIGLUOAI,  # with gpt-oss's constants, see `plugin.moe`
}


class BabaiExpertsMethod(FusedMoEMethodBase):
    """A layer's routed experts, of which this rank holds some (expert parallel) or a part of each (tensor parallel).

    names: of the linears in the checkpoint by vLLM's w1, w2 and w3, with # for the number of the expert. readers: of
    w13, gate above up, and of w2. progress: of the model's layers. kept: see `plugin.kept`.
    """

    hidden: int  # from create_weights on, like the next
    inner: int  # columns of w2 on this rank
    experts: int  # on this rank
    numbers: dict[int, int]  # of this rank's experts → in the checkpoint
    constants: dict[str, tuple[int, ...]]  # of the op, by stem; from process_weights_after_loading on

    def __init__(
        self,
        moe: Any,
        prefix: str,
        names: dict[str, str],
        readers: dict[str, Reader],
        progress: LoadProgress,
        kept: KeptTensors,
    ) -> None:
        super().__init__(moe)
        self.prefix, self.names, self.readers = prefix, names, readers
        self.progress, self.kept = progress, kept
        self.residency = EXPERT_RESIDENCIES[readers["w2"].residency]
        self.parts: dict[tuple[int, str], dict[str, list[Part]]] = {}  # local expert and stem → by tensor

    def get_fused_moe_quant_config(self, layer: Module) -> None:
        """None: vLLM's own kernels have no part in this."""

    def create_weights(
        self,
        layer: Any,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        global_num_experts: int,
        **_: Any,
    ) -> None:
        """Register a placeholder per kind of stored tensor, which takes no memory.

        Raises ValueError when the experts cannot be cut for this rank, NotImplementedError for what is not there yet,
        FormatError for a weight file that is cut or missing.
        """
        if self.moe.swiglu_limit is not None or layer.activation not in ACTIVATIONS:
            limit = "" if self.moe.swiglu_limit is None else f" with swiglu_limit {self.moe.swiglu_limit}"
            raise NotImplementedError(
                f"{self.prefix}: experts with the activation {layer.activation.value}{limit} are not served yet:"
                " convert --to dense"
            )
        backend(torch.get_default_device().type)  # refuses a device without kernels
        multiple = self.readers["w2"].column_multiple
        if self.moe.tp_size > 1 and intermediate_size_per_partition % multiple:
            raise ValueError(
                f"{self.prefix}: {intermediate_size_per_partition * self.moe.tp_size} features of its experts do not"
                f" divide among ranks into multiples of {multiple}; choose a smaller tensor-parallel size, or"
                " --enable-expert-parallel"
            )
        self.experts, self.hidden, self.dtype = num_experts, hidden_size, params_dtype
        self.inner = intermediate_size_per_partition
        local = layer._map_global_expert_id_to_local_expert_id
        self.numbers = {local(number): number for number in range(global_num_experts) if local(number) >= 0}
        self.vllm_config = get_current_vllm_config()
        check_offloading(self.vllm_config)
        self.kept.check_files(self.vllm_config.model_config, self.vllm_config.load_config)
        for stem, reader in self.readers.items():
            for key, dtype in reader.form.dtypes.items():
                self._expect(stem, key)
                placeholder = Parameter(torch.empty(0, dtype=dtype), requires_grad=False)
                set_weight_attrs(placeholder, {"weight_loader": partial(self._load, layer, stem, key)})
                layer.register_parameter(f"{stem}_{key}", placeholder)
            if self.moe.has_bias:
                unknown = torch.full((num_experts, self._rows(stem)), torch.nan, dtype=params_dtype)
                layer.register_parameter(f"{stem}_bias", Parameter(unknown, requires_grad=False))
        self.progress.expect()

    def process_weights_after_loading(self, layer: Any) -> None:
        """Replace the stored tensors by the layouts of all experts. Raises FormatError that names what is at fault."""
        self.kept.check(self.vllm_config.model_config, self.vllm_config.load_config)
        self.constants = {}
        for stem, reader in self.readers.items():
            device = getattr(layer, f"{stem}_{next(iter(reader.form.dtypes))}").device
            weights = [self._weight(reader, number, stem) for number in range(self.experts)]
            placed = self.residency.place(weights, self.hidden if stem == "w13" else self.inner, device)
            for key in reader.form.dtypes:
                delattr(layer, f"{stem}_{key}")
            for name, tensor in placed.tensors.items():
                layer.register_parameter(f"{stem}_{name}", Parameter(tensor, requires_grad=False))
            self.constants[stem] = placed.constants
        for bias in self._biases(layer):
            if bias.isnan().any():
                raise FormatError(f"{self.prefix}: its experts have biases, and the checkpoint has not those of all")
        self.residency.warm_up(self._held(layer), self.hidden, self.dtype)
        self.parts.clear()
        self.progress.advance("Packing")

    def apply(
        self,
        layer: Any,
        x: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        shared_experts: Any,
        shared_experts_input: Any,
    ) -> Tensor:
        """x [tokens, hidden] → the sum of what the experts of this rank make of it, weighted, in the dtype of x."""
        on_input = layer.apply_router_weight_on_input
        if on_input:
            x = x * topk_weights.to(x.dtype)
        ids = topk_ids if layer.expert_map is None else layer.expert_map[topk_ids.long()]
        weights = torch.ones_like(topk_weights) if on_input else topk_weights
        return self.residency.multiply(x, weights.float(), ids, self._held(layer), layer.activation.value)

    def _held(self, layer: Module) -> Any:
        """The experts as the backend takes them."""
        gate_up, down = (
            Placed({name: getattr(layer, f"{stem}_{name}") for name in self.residency.names}, self.constants[stem])
            for stem in SHARDS
        )
        held = HeldExperts(gate_up, down, self.experts, self._rows("w13"), self.inner, self._biases(layer))
        return self.residency.experts(held)

    def _biases(self, layer: Module) -> tuple[Tensor, ...]:
        return tuple(getattr(layer, f"{stem}_bias") for stem in SHARDS if self.moe.has_bias)

    def load_biases(self, layer: Module, stem: str, parts: list[Tensor]) -> None:
        """Take this rank's share. parts: [experts, rows] of each linear of a stem, of all experts.

        What is added to the output of w2 is summed over ranks, so the first alone adds it.
        """
        rank = self.moe.tp_rank
        own = slice(rank * self.inner, (rank + 1) * self.inner) if stem == "w13" else slice(None)
        taken = torch.cat([part[:, own] for part in parts], 1)
        bias = getattr(layer, f"{stem}_bias").data
        for local, number in self.numbers.items():
            bias[local] = taken[number]
        if stem == "w2" and rank:
            bias.zero_()

    def _rows(self, stem: str) -> int:
        return self.hidden if stem == "w2" else self.inner * len(self._shards(stem))

    def _shards(self, stem: str) -> list[str]:
        return [shard for shard in SHARDS[stem] if shard in self.names]

    def _expect(self, stem: str, key: str) -> None:
        for number in range(self.experts):
            self.parts.setdefault((number, stem), {})[key] = []

    def _load(
        self,
        layer: Any,
        stem: str,
        key: str,
        param: Parameter,
        loaded_weight: Tensor,
        weight_name: str,
        shard_id: str,
        expert_id: int,
        return_success: bool = False,
    ) -> bool | None:
        """The weight loader of a placeholder, as vLLM calls it: notes what this rank takes of one stored tensor."""
        number = layer._map_global_expert_id_to_local_expert_id(expert_id)
        if number == -1:
            return False if return_success else None
        rank, ranks = self.moe.tp_rank, self.moe.tp_size
        own, all_inner = slice(rank * self.inner, (rank + 1) * self.inner), self.inner * ranks
        whole = slice(0, self.hidden)
        if shard_id == "w2":
            part = Part(loaded_weight, Window(whole, own), (self.hidden, all_inner), 0)
        else:
            first = self.inner * self._shards(stem).index(shard_id)
            part = Part(loaded_weight, Window(own, whole), (all_inner, self.hidden), first)
        self.parts[number, stem][key].append(part)
        return True if return_success else None

    def _weight(self, reader: Reader, number: int, stem: str) -> Any:
        """What this rank holds of an expert."""
        columns = self.hidden if stem == "w13" else self.inner
        if self.vllm_config.load_config.load_format == "dummy":
            return reader.dummy(self._rows(stem), columns)
        rows = self._rows(stem) // len(self._shards(stem))
        stored = {self.names[shard].replace("#", str(self.numbers[number])): rows for shard in self._shards(stem)}
        weight = assemble(reader, self.parts[number, stem], stored)
        if weight.input_scales is not None:
            raise NotImplementedError(
                f"{next(iter(stored))}: experts whose columns have steps of their own are not served"
            )
        return weight
