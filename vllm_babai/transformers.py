"""Loading a quantized checkpoint in transformers: `import vllm_babai.transformers`, then `from_pretrained` as usual.

The quantized linears become modules that hold their weights as vLLM does and multiply by the same ops; experts, which
transformers keeps in one tensor for all, become dense, and so does an embedding with the head that is tied to it. The
import makes format and quantizer known to transformers, which finds no plugins by itself. Without it transformers would
only warn, and start from random weights: so `attn_implementation` in config.json has a value that it refuses, see
`format.config`.
"""

import re
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from vllm_babai.format import FORMATS, CheckpointConfig, FormatError
from vllm_babai.format.checksums import check_kept
from vllm_babai.format.config import OWN_ATTENTION, QUANT_METHOD, REFUSAL, without_refusal
from vllm_babai.offline.model.checkpoint import Checkpoint, open_checkpoint
from vllm_babai.offline.model.complete import check_complete
from vllm_babai.offline.model.dense import dense_tensors
from vllm_babai.offline.model.view import view_checkpoint
from vllm_babai.plugin.readers import READERS
from vllm_babai.plugin.readers.reader import StoredLinear, Window, check_dtypes
from vllm_babai.plugin.residency import RESIDENCIES


class BabaiLinear(nn.Module):
    """A linear whose weight is stored quantized: x [..., in] → x Wᵀ + bias, [..., out]. It cannot be trained.

    stored: its name in the checkpoint.
    """

    def __init__(self, linear: nn.Linear, stored: str) -> None:
        super().__init__()
        self.in_features, self.out_features, self.stored = linear.in_features, linear.out_features, stored
        self.bias = linear.bias
        self.input_scales: Tensor | None = None

    def fill(self, tensors: dict[str, Tensor], config: CheckpointConfig, device: torch.device) -> None:
        """Take the weight as the checkpoint stores it. Raises FormatError where that is damaged."""
        reader = READERS[config.format, config.residency](config.scheme(self.stored))
        shape = (self.out_features, self.in_features)
        check_dtypes(tensors, reader.form.dtypes)
        whole = Window(slice(0, shape[0]), slice(0, shape[1]))
        weight = reader.stack(reader.read(StoredLinear(tensors, shape, [whole], self.stored)))
        self.residency = RESIDENCIES[reader.residency]
        placed = self.residency.place(weight, self.in_features, device)
        self.constants = placed.constants
        for name, tensor in placed.tensors.items():
            self.register_buffer(name, tensor, persistent=False)
        if weight.input_scales is not None:
            self.input_scales = weight.input_scales.to(device, torch.float32)

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        if self.input_scales is not None:
            x = (x * self.input_scales).to(x.dtype)
        y = self.residency.multiply(x, [getattr(self, name) for name in self.residency.names], self.constants)
        return y if self.bias is None else y + self.bias


@register_quantization_config(QUANT_METHOD)
class BabaiQuantizationConfig(QuantizationConfigMixin):
    """The quantization_config of a checkpoint. Raises FormatError that names a field at fault."""

    def __init__(self, **fields: Any) -> None:
        fields = {"quant_method": QUANT_METHOD, **fields}
        self.quant_method, self.fields = QUANT_METHOD, fields
        self.checkpoint = CheckpointConfig.from_dict(fields)

    def to_dict(self) -> dict[str, Any]:
        """As it stands in config.json."""
        return dict(self.fields)


@register_quantizer(QUANT_METHOD)
class BabaiQuantizer(HfQuantizer):
    """Puts `BabaiLinear`s in the place of quantized linears, and fills them once the other weights are loaded.

    dense: quantized experts, of which the model has no module of their own, and the embedding.
    """

    requires_calibration = True
    quantization_config: BabaiQuantizationConfig
    checkpoint: Checkpoint
    dense: list[str]

    def is_serializable(self) -> bool:
        """No: the modules hold what their device takes, not what a checkpoint stores."""
        return False

    @property
    def is_trainable(self) -> bool:
        """No."""
        return False

    def update_attn_implementation(self, config: PreTrainedConfig) -> PreTrainedConfig:
        """Take what the model's authors chose, else let transformers, where config.json has what refuses others."""
        refused = config._attn_implementation == REFUSAL
        without_refusal(config)
        if refused:
            config._attn_implementation = getattr(config, OWN_ATTENTION, None)
        return config

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **options: Any
    ) -> None:
        if not checkpoint_files:
            raise FormatError("babai checkpoints are loaded from a folder or the hub, not from a state_dict")
        self.checkpoint = open_checkpoint(Path(checkpoint_files[0]).parent)
        keys = tuple(FORMATS[self.quantization_config.checkpoint.format].dtypes)
        first = keys[0]
        linears = [name.removesuffix(f".{first}") for name in self.checkpoint.files if name.endswith(f".{first}")]
        weights = {f"{name}.weight": Path() for name in linears}
        view = view_checkpoint(Checkpoint(self.checkpoint.folder, weights), model)
        names = {view.stored_name(name): name.removesuffix(".weight") for name in view.sources}
        alone = {stored: names[f"{stored}.weight"] for stored in linears if f"{stored}.weight" in names}
        embedding = alone.pop(self.quantization_config.checkpoint.embedding or "", None)
        for stored, name in alone.items():
            model.set_submodule(name, BabaiLinear(model.get_submodule(name), stored))
        self.dense = [stored for stored in linears if stored not in alone]
        if self.dense:  # which are filled afterwards
            late = {r"\.experts\.", *([] if embedding is None else [rf"^{re.escape(embedding)}\.weight$"])}
            model._keys_to_ignore_on_load_missing = {*(model._keys_to_ignore_on_load_missing or ()), *late}
        unexpected = set(model._keys_to_ignore_on_load_unexpected or ())
        model._keys_to_ignore_on_load_unexpected = unexpected | {rf"\.({'|'.join(keys)})$"}

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **_: Any) -> PreTrainedModel:
        config = self.quantization_config.checkpoint
        checkpoint = check_complete(self.checkpoint)
        check_kept(sorted(set(self.checkpoint.files.values())), config.checksums or {})
        for name, module in model.named_modules():
            if isinstance(module, BabaiLinear):
                keys = FORMATS[config.format].dtypes
                tensors = {key: self.checkpoint.read(f"{module.stored}.{key}") for key in keys}
                try:
                    module.fill(tensors, config, _device(model, name))
                except FormatError as error:
                    raise FormatError(f"{module.stored}: {error}") from error
        for _, stored in groupby(self.dense, lambda name: name.partition(".experts.")[0]):
            _fill_dense(model, checkpoint, list(stored))
        model.tie_weights()
        return model


@dataclass(frozen=True)
class InMemory(Checkpoint):
    """Tensors that are read from memory, under their names in a checkpoint."""

    tensors: dict[str, Tensor]

    def read(self, name: str) -> Tensor:
        """The tensor called `name`."""
        return self.tensors[name]


def _fill_dense(model: PreTrainedModel, checkpoint: Checkpoint, linears: list[str]) -> None:
    """Give the experts of a block, or the embedding, their weights, dense.

    Raises FormatError where the model has no place for them.
    """
    keys = {name for linear in linears for name in checkpoint.files if name.rpartition(".")[0] == linear}
    tensors = dict(dense_tensors(checkpoint, sorted(keys)))
    view = view_checkpoint(InMemory(checkpoint.folder, dict.fromkeys(tensors, Path()), tensors), model)
    if lost := tensors.keys() - {stored for name in view.sources for stored in view.stored(name)}:
        raise FormatError(f"{min(lost)}: {type(model).__name__} of this version of transformers has no place for it")
    for name in view.sources:
        parent, _, own = name.rpartition(".")
        like = model.get_parameter(name)
        value = view.read(name).to(_device(model, parent), like.dtype)
        setattr(model.get_submodule(parent), own, nn.Parameter(value, requires_grad=False))


def _device(model: PreTrainedModel, name: str) -> torch.device:
    """Where the module called `name` belongs: by the device map, or where the model is."""
    placed = getattr(model, "hf_device_map", None) or {}
    fits = [prefix for prefix in placed if not prefix or f"{name}.".startswith(f"{prefix}.")]
    return torch.device(placed[max(fits, key=len)]) if fits else model.device
