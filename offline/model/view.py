"""A checkpoint under the names of transformers' modules.

A checkpoint names its tensors as their authors did; transformers renames, merges, splits and transposes them into its
own modules when it loads them (`transformers.conversion_mapping`). A view applies the same rules, one tensor at a time,
so that the quantizer can read any module, and remembers under which name each tensor is stored, so that the result is
written as it was published. What the model has no place for (MTP layers, say) is known by name only.
"""

import copy
import re
from collections.abc import Iterable
from dataclasses import dataclass, field

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

from vllm_babai.errors import QuantizationError
from vllm_babai.offline.model.checkpoint import Checkpoint
from vllm_babai.offline.model.experts import (
    NAMES,
    NUMBERED,
    ROLE_OF,
    ROLES,
    PackExperts,
    count_experts,
    layout_of,
    names_by_number,
    roles_of,
)


@dataclass(frozen=True)
class Source:
    """Where tensors of the model come from. stored: names in the checkpoint by the pattern that found them.
    converter: what makes `targets`, tensors of the model, of them; None where it is one tensor and a copy of it.
    """

    targets: tuple[str, ...]
    converter: WeightConverter | PackExperts | None = None
    stored: dict[str, list[str]] = field(default_factory=dict)


@dataclass(frozen=True)
class CheckpointView:
    """See the module. sources: tensor of the model → where it comes from; what the checkpoint lacks is not in it."""

    checkpoint: Checkpoint
    model: PreTrainedModel
    sources: dict[str, Source]

    def __contains__(self, name: str) -> bool:
        return name in self.sources

    def read(self, name: str) -> Tensor:
        """The model's tensor called `name`, on the CPU. Raises QuantizationError when it is missing."""
        if name not in self.sources:
            raise QuantizationError(f"{self.checkpoint.folder} has no tensor for {name}")
        source = self.sources[name]
        if source.converter is None:
            return self.checkpoint.read(stored_names(source)[0])
        return gather(source, {one: self.checkpoint.read(one) for one in stored_names(source)}, self.model)[name]

    def below(self, prefix: str) -> list[str]:
        """The model's tensors whose names start with `prefix`, in the order of the checkpoint."""
        return [name for name in self.sources if name.startswith(prefix)]

    def stored_name(self, name: str) -> str | None:
        """What the model's tensor called `name` is called in the checkpoint; None where it is not stored as it is."""
        source = self.sources.get(name)
        if source is None or source.converter is not None:
            return None
        (stored,) = source.stored.values()
        return stored[0]

    def stored_module(self, name: str) -> str:
        """What the module called `name` is called in the checkpoint.

        Raises QuantizationError when its tensors have no such name in common.
        """
        inside = {stored for n in self.below(f"{name}.") for part in self.sources[n].stored.values() for stored in part}
        for tensor in self.below(f"{name}."):
            stored, rest = self.stored_name(tensor), tensor.removeprefix(name)
            if stored is not None and stored.endswith(rest):
                prefix = stored.removesuffix(rest)
                if all(other.startswith(f"{prefix}.") for other in inside):
                    return prefix
        raise QuantizationError(f"{name}: the checkpoint keeps its tensors under names without a common beginning")

    def stored(self, name: str) -> list[str]:
        """Names in the checkpoint of all that the model's tensor called `name` is made of."""
        return stored_names(self.sources[name])

    def expert_names(self, name: str) -> list[dict[str, str]]:
        """For each expert of the module called `name`: role → full name of its linear in a checkpoint.

        Where all experts are one tensor, these are the names that they get one by one. Raises QuantizationError for
        experts that are missing.
        """
        module = self.model.get_submodule(name)
        stored = [one.removesuffix(".weight") for one in self._stored_experts(name, module)]
        roles, count = roles_of(module), count_experts(module)
        numbered = [found for one in stored if (found := NUMBERED.fullmatch(one))]
        if not numbered:
            stem, own = stored[0].rpartition(".")[0], dict(zip(ROLES, NAMES[0], strict=True))
            stem = stem if stem.endswith("experts") else f"{stem}.experts"
            return [{role: f"{stem}.{number}.{own[role]}" for role in roles} for number in range(count)]
        by_role = {}
        for role in roles:
            of_role = [found.group() for found in numbered if ROLE_OF[found.group(3)] == role]
            by_role[role] = names_by_number(of_role, count, f"{name}, {role}")
        return [{role: by_role[role][number] for role in roles} for number in range(count)]

    def _stored_experts(self, name: str, module: nn.Module) -> list[str]:
        parameters = [f"{name}.{key}" for key, tensor in module.named_parameters() if tensor.dim() == 3]
        if missing := [key for key in parameters if key not in self]:
            raise QuantizationError(f"{self.checkpoint.folder} has no tensor for {missing[0]}")
        return list(dict.fromkeys(one for key in parameters for one in self.stored(key)))

    def files(self, name: str) -> set[str]:
        """Names of the files that hold what the model's tensor called `name` is made of."""
        return {self.checkpoint.files[one].name for one in self.stored(name)}


def stored_names(source: Source) -> list[str]:
    """Names in the checkpoint of all that a source reads."""
    return [name for names in source.stored.values() for name in names]


def gather(source: Source, tensors: dict[str, Tensor], model: PreTrainedModel | None = None) -> dict[str, Tensor]:
    """Name in the model → tensor, of a source with a converter. tensors: by name in the checkpoint."""
    assert source.converter is not None
    converter = copy.deepcopy(source.converter)  # it collects what it is given
    for pattern, names in source.stored.items():
        for name in names:
            converter.add_tensor(source.targets[0], name, pattern, tensors[name])
    found = converter.convert(source.targets[0], model=model, config=getattr(model, "config", None))
    return {name: value[0] if isinstance(value, list) else value for name, value in found.items()}


def view_checkpoint(checkpoint: Checkpoint, model: PreTrainedModel) -> CheckpointView:
    """A view of `checkpoint` for `model`, which may be on the meta device."""
    wanted = model.state_dict()
    transforms = get_model_conversion_mapping(model)
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    sources: dict[str, Source] = {}
    # In transformers' order: experts by number, and the first key of a group of renamings first.
    for stored in sorted(checkpoint.files, key=dot_natural_key):
        name, pattern = rename_source_key(stored, renamings, converters, model.base_model_prefix, wanted)
        if name not in wanted and stored in wanted:
            name, pattern = stored, None
        if name not in wanted:
            _note_expert(sources, model, name, stored)
            continue
        if pattern is None:
            sources.setdefault(name, Source((name,), None, {stored: [stored]}))
            continue
        converter = by_pattern[pattern]
        if name not in sources:
            source = Source(_targets(name, converter, wanted), converter)
            sources |= dict.fromkeys(source.targets, source)
        sources[name].stored.setdefault(pattern, []).append(stored)
    return CheckpointView(checkpoint, model, sources)


def _note_expert(sources: dict[str, Source], model: PreTrainedModel, name: str, stored: str) -> None:
    """Note a linear of one expert, where transformers knows these experts by one tensor for all of them."""
    found = NUMBERED.fullmatch(name.removesuffix(".weight"))
    if found is None:
        return
    prefix, role = found.group(1), ROLE_OF[found.group(3)]
    try:
        module = model.get_submodule(prefix)
    except AttributeError:
        return
    if layout_of(module) is None:
        return
    targets = tuple(f"{prefix}.{key}" for key, tensor in module.named_parameters() if tensor.dim() == 3)
    if targets[0] not in sources:
        sources |= dict.fromkeys(targets, Source(targets, PackExperts(module, prefix)))
    sources[targets[0]].stored.setdefault(role, []).append(stored)


def _targets(first: str, converter: WeightConverter, wanted: Iterable[str]) -> tuple[str, ...]:
    """All tensors that a converter makes, given the first: its target patterns stand in the names word by word."""
    head, *others = (re.sub(r"\\(.)", r"\1", pattern).strip("^$") for pattern in converter.target_patterns)
    names = [first, *(first.replace(head, other) for other in others)]
    return tuple(name for name in names if name in wanted)
