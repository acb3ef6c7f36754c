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

from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

from vllm_babai.errors import QuantizationError
from vllm_babai.offline.model.checkpoint import Checkpoint


@dataclass(frozen=True)
class Source:
    """Where tensors of the model come from. stored: names in the checkpoint by the pattern that found them.
    converter: what makes `targets`, tensors of the model, of them; None where it is one tensor and a copy of it.
    """

    targets: tuple[str, ...]
    converter: WeightConverter | None = None
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
            (stored,) = source.stored.values()
            return self.checkpoint.read(stored[0])
        converter = copy.deepcopy(source.converter)  # it collects what it is given
        for pattern, names in source.stored.items():
            for stored_name in names:
                converter.add_tensor(source.targets[0], stored_name, pattern, self.checkpoint.read(stored_name))
        found = converter.convert(source.targets[0], model=self.model, config=self.model.config)[name]
        return found[0] if isinstance(found, list) else found

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

    def files(self, name: str) -> set[str]:
        """Names of the files that hold what the model's tensor called `name` is made of."""
        stored = (stored for names in self.sources[name].stored.values() for stored in names)
        return {self.checkpoint.files[one].name for one in stored}


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


def _targets(first: str, converter: WeightConverter, wanted: Iterable[str]) -> tuple[str, ...]:
    """All tensors that a converter makes, given the first: its target patterns stand in the names word by word."""
    head, *others = (re.sub(r"\\(.)", r"\1", pattern).strip("^$") for pattern in converter.target_patterns)
    names = [first, *(first.replace(head, other) for other in others)]
    return tuple(name for name in names if name in wanted)
