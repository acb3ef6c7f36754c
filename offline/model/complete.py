"""Whether a checkpoint holds what its model needs: every tensor once, in the form that config.json says.

A loader that fills in what it does not find, or passes over what it does not know, makes another model of a damaged
checkpoint. So names and shapes are compared with the model's skeleton before anything is decoded.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor, nn
from transformers import PreTrainedModel

from vllm_babai.errors import QuantizationError
from vllm_babai.format import FORMATS, CheckpointConfig, FormatError
from vllm_babai.format.checksums import compare, tensor_checksum
from vllm_babai.format.config import layer_name
from vllm_babai.offline.model.checkpoint import Checkpoint, open_weights
from vllm_babai.offline.model.experts import PackExperts, find_experts, roles_of, shape_of
from vllm_babai.offline.model.skeleton import empty_model
from vllm_babai.offline.model.view import CheckpointView, Source, view_checkpoint

MTP_LAYERS = ("num_nextn_predict_layers", "num_mtp_layers", "mtp_num_hidden_layers")  # how configurations count them


@dataclass(frozen=True)
class CompleteCheckpoint(Checkpoint):
    """A checkpoint that holds what its model needs.

    source: the same, as it reads its tensors: from FP8, say. scheme: its quantization_config, None where it is dense.
    linears: full name of a quantized linear → [out, in].
    gathered: what the model has as few tensors and the checkpoint expert by expert, each with the names of its weights.
    """

    source: Checkpoint
    scheme: CheckpointConfig | None
    linears: dict[str, tuple[int, int]]
    gathered: list[Source] = field(default_factory=list)

    def read(self, name: str) -> Tensor:
        """The tensor called `name`. Raises QuantizationError also where it is kept, and not as config.json says."""
        tensor = self.source.read(name)
        if self.scheme is not None and self.scheme.checksums is not None and self.is_kept(name):
            try:
                compare(name, tensor_checksum(tensor), self.scheme.checksums.get(name))
            except FormatError as error:
                raise QuantizationError(f"{self.files[name]}: {error}") from error
        return tensor

    def is_kept(self, name: str) -> bool:
        """Whether a tensor is stored as it was: what a quantized linear became has checksums of its own."""
        linear, key = _split(name)
        return self.scheme is None or linear not in self.linears or key not in FORMATS[self.scheme.format].dtypes


def check_complete(checkpoint: Checkpoint) -> CompleteCheckpoint:
    """Compare a checkpoint with its model, names and shapes.

    Raises QuantizationError that names a tensor or linear which is missing, of another shape, unknown to the model, or
    stored in another form than config.json says.
    """
    if isinstance(checkpoint, CompleteCheckpoint):
        return checkpoint
    scheme = read_scheme(checkpoint)
    model = empty_model(checkpoint)
    wanted = model.state_dict(keep_vars=True)
    parts = {} if scheme is None else _parts(checkpoint, wanted)
    of_linears = {f"{linear}.{key}" for linear, keys in parts.items() for key in keys}
    stored = {name: path for name, path in checkpoint.files.items() if name not in of_linears}
    for linear in parts:
        if f"{linear}.weight" in stored:
            raise QuantizationError(f"{linear} is stored twice in {checkpoint.folder}: quantized, and as a weight")
        stored[f"{linear}.weight"] = Path()
    view = view_checkpoint(Checkpoint(checkpoint.folder, stored), model)
    linears = {} if scheme is None else _check_linears(checkpoint, scheme, model, view, parts)
    _check_missing(checkpoint, model, view, wanted)
    for name in find_experts(model):
        view.expert_names(name)  # which counts them
    _check_blocks(checkpoint, model, view, wanted)
    _check_shapes(checkpoint, view, wanted)
    gathered = {id(s): s for s in view.sources.values() if isinstance(s.converter, PackExperts)}
    return CompleteCheckpoint(checkpoint.folder, checkpoint.files, checkpoint, scheme, linears, list(gathered.values()))


def read_scheme(checkpoint: Checkpoint) -> CheckpointConfig | None:
    """How the checkpoint's linears are stored; None where it is not quantized. Raises QuantizationError."""
    raw = checkpoint.config().get("quantization_config")
    if raw is None:
        return None
    try:
        if not isinstance(raw, dict):
            raise FormatError(f"it is {type(raw).__name__}, no object")
        return CheckpointConfig.from_dict(raw)
    except FormatError as error:
        path = checkpoint.folder / "config.json"
        raise QuantizationError(f"{path}: its quantization_config cannot be read: {error}") from error


def _split(name: str) -> tuple[str, str]:
    linear, _, key = name.rpartition(".")
    return linear, key


def _parts(checkpoint: Checkpoint, wanted: Iterable[str]) -> dict[str, set[str]]:
    """Linear → names of its stored tensors, of whatever format; parameters of the model itself are none."""
    known = {key for form in FORMATS.values() for key in form.dtypes}
    parts: dict[str, set[str]] = {}
    for name in checkpoint.files.keys() - set(wanted):
        linear, key = _split(name)
        if key in known:
            parts.setdefault(linear, set()).add(key)
    return parts


def _check_linears(
    checkpoint: Checkpoint,
    scheme: CheckpointConfig,
    model: PreTrainedModel,
    view: CheckpointView,
    parts: dict[str, set[str]],
) -> dict[str, tuple[int, int]]:
    """The quantized linears and their shapes, [out, in]."""
    found: dict[str, tuple[int, int]] = {}
    for linear, shape in _stored_linears(model, view, scheme):
        if linear in parts:
            _check_parts(checkpoint, scheme, linear, parts[linear])
            if not _is_quantized(scheme, linear):
                raise QuantizationError(f"{linear} is stored quantized, but config.json leaves it out (ignore)")
            found[linear] = shape
        elif _is_quantized(scheme, linear):
            raise QuantizationError(
                f"{linear} is stored as an ordinary weight, but config.json says {scheme.format}: copy it again"
            )
    for linear in sorted(parts.keys() - found.keys()):
        raise QuantizationError(f"{linear} is in {checkpoint.folder}, but the model of config.json has no such linear")
    for linear in scheme.overrides.keys() - {layer_name(linear) for linear in found}:
        raise QuantizationError(f"{linear} is among the overrides in config.json, but no linear is stored for it")
    return found


def _stored_linears(
    model: PreTrainedModel, view: CheckpointView, scheme: CheckpointConfig
) -> Iterator[tuple[str, tuple[int, int]]]:
    """Name in the checkpoint and shape of the model's linears that have a weight there, those of experts one by one;
    and of the embedding, where that is quantized.
    """
    embedding = model.get_input_embeddings() if scheme.embedding is not None else None
    for name, module in model.named_modules():
        looks_up = isinstance(module, nn.Embedding) and module is embedding
        if not (looks_up or isinstance(module, nn.Linear)):
            continue
        stored = view.stored_name(f"{name}.weight")
        if stored is not None:
            rows, columns = module.get_parameter("weight").shape
            yield stored.removesuffix(".weight"), (rows, columns)
    for name, experts in find_experts(model).items():
        shapes = {role: shape_of(experts, role) for role in roles_of(experts)}
        for names in view.expert_names(name):
            yield from ((linear, shapes[role]) for role, linear in names.items())


def _is_quantized(scheme: CheckpointConfig, linear: str) -> bool:
    """Whether config.json says so of the linear. Older checkpoints have no scope: all blocks, which are numbered."""
    inside = scheme.scope is not None or linear in scheme.overrides or re.search(r"\.\d+\.", linear) is not None
    return inside and scheme.is_quantized(linear)


def _check_parts(checkpoint: Checkpoint, scheme: CheckpointConfig, linear: str, keys: set[str]) -> None:
    needed = FORMATS[scheme.format].dtypes.keys()
    if keys == needed:
        return
    other = next((form.name for form in FORMATS.values() if keys == form.dtypes.keys()), None)
    if other is not None:
        raise QuantizationError(f"{linear} is stored as {other}, but config.json says {scheme.format}")
    if lacking := sorted(needed - keys):
        raise QuantizationError(f"{linear}: {checkpoint.folder} has no tensor {linear}.{lacking[0]}")
    raise QuantizationError(f"{linear}: {linear}.{min(keys - needed)} is no tensor of {scheme.format}")


def _check_missing(
    checkpoint: Checkpoint, model: PreTrainedModel, view: CheckpointView, wanted: dict[str, Tensor]
) -> None:
    stored = {id(tensor) for name, tensor in wanted.items() if name in view}  # a tied one is stored once
    optional = [re.compile(pattern) for pattern in getattr(model, "_keys_to_ignore_on_load_missing", None) or []]
    for name, tensor in wanted.items():
        if id(tensor) not in stored and not any(pattern.search(name) for pattern in optional):
            raise QuantizationError(f"{checkpoint.folder} has no tensor for {name}: copy it again")


def _check_blocks(
    checkpoint: Checkpoint, model: PreTrainedModel, view: CheckpointView, wanted: dict[str, Tensor]
) -> None:
    """Refuse tensors that are named as those of one block more than the model has.

    Others that the model does not know are common: rotary tables, or layers that predict further tokens (MTP), which
    DeepSeek and GLM number as the next blocks.
    """
    mtp = _mtp_blocks(model)
    used = {one for name in view.sources for names in view.sources[name].stored.values() for one in names}
    kinds = {re.sub(r"\d+", "#", name) for name in wanted if re.search(r"\.\d+\.", name)}
    optional = [re.compile(pattern) for pattern in getattr(model, "_keys_to_ignore_on_load_unexpected", None) or []]
    for name in sorted(view.checkpoint.files.keys() - used):
        if (number := re.search(r"(?<=\.)\d+(?=\.)", name)) and number[0] in mtp:
            continue
        if re.sub(r"\d+", "#", name) in kinds and not any(pattern.search(name) for pattern in optional):
            raise QuantizationError(f"{name} is in {checkpoint.folder}, but the model of config.json has no such block")


def _check_shapes(checkpoint: Checkpoint, view: CheckpointView, wanted: dict[str, Tensor]) -> None:
    """Compare the tensors that are stored as the model has them."""
    by_file: dict[Path, dict[str, Tensor]] = {}
    for name in view.sources:
        stored = view.stored_name(name)
        if stored is not None and stored in checkpoint.files:
            by_file.setdefault(checkpoint.files[stored], {})[stored] = wanted[name]
    for path, tensors in by_file.items():
        with open_weights(path) as file:
            headers = {name: file.get_slice(name) for name in tensors}
            found = {name: (tuple(each.get_shape()), each.get_dtype()) for name, each in headers.items()}
        for name, (shape, dtype) in found.items():
            needed = tuple(tensors[name].shape)
            if shape != needed:
                raise QuantizationError(f"{name} in {path} has shape {shape}, but config.json needs {needed}")
            if tensors[name].is_floating_point() and "F" not in dtype:
                raise QuantizationError(f"{name} in {path} has dtype {dtype}, which is no floating point type")


def _mtp_blocks(model: PreTrainedModel) -> set[str]:
    """Numbers of the MTP layers, as blocks after the last."""
    text = model.config.get_text_config()
    count = max(getattr(text, field, None) or 0 for field in MTP_LAYERS)
    return {str(text.num_hidden_layers + i) for i in range(count)}
