"""Names of linears: the checkpoint's, and those by which vLLM asks how a layer is stored.

vLLM renames what a checkpoint holds (`hf_to_vllm_mapper`), and many of its classes leave out a part of the name when
they ask: the q_proj of Falcon-H1 is `layers.0.q_proj` to them, the mamba.in_proj of Granite 4 `layers.0.mixer.in_proj`.
So a name that the checkpoint does not have is looked up by its block and its last part.
"""

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any, NamedTuple

from vllm_babai.format import CheckpointConfig
from vllm_babai.format.config import layer_name

Renaming = Callable[[dict[str, Any]], dict[str, Any]]  # keys are names: `WeightsMapper.apply_dict`


class Found(NamedTuple):
    """Names of a linear. renamed: as the model's configuration has it. stored: in the checkpoint."""

    renamed: str
    stored: str


class LinearNames:
    """The linears that a checkpoint stores quantized; none where its configuration does not list them, as older ones.

    renaming: what the model makes of the checkpoint's names.
    """

    def __init__(self, checkpoint: CheckpointConfig, renaming: Renaming = dict) -> None:
        self.checkpoint = checkpoint
        self.by_name: dict[str, Found] = {}
        self.by_last_part: dict[tuple[str, str], list[Found]] = {}  # key: block, last part of the name
        self.of_experts: dict[tuple[str, str], str] = {}  # the same key → stored name, with # for the expert's number
        for block in checkpoint.scope or ():
            for kind in (kind for kind in checkpoint.linears or () if ".#." in kind):
                if layer_name(f"{block}.{kind}".replace("#", "0")) not in checkpoint.ignore:
                    for key in renaming({block: None}):
                        self.of_experts[key, kind.rpartition(".")[2]] = f"{block}.{kind}"
            stored = [f"{block}.{kind}" for kind in checkpoint.linears or () if "#" not in kind]
            for renamed, name in renaming({name: name for name in stored}).items():
                found = self.by_name[renamed] = Found(renamed, name)
                for key in renaming({block: None}):
                    self.by_last_part.setdefault((key, renamed.rpartition(".")[2]), []).append(found)
        self.blocks = {block for block, _ in self.by_last_part}

    def __contains__(self, name: str) -> bool:
        return self._found(name) is not None

    def find(self, name: str) -> Found:
        """The names of the linear that vLLM calls `name`; both are `name` where nothing is known of it."""
        return self._found(name) or Found(name, name)

    def experts(self, prefix: str, last_parts: Iterable[str]) -> list[str]:
        """Stored names of the linears of the experts in the layer that vLLM calls `prefix`, by the last parts of their
        names, with # for the expert's number; none where they are not quantized.

        Raises ValueError where the checkpoint has another number of them, or calls them otherwise.
        """
        wanted = list(last_parts)
        block = next((block for block, _ in self.of_experts if prefix.startswith(f"{block}.")), "")
        there = [name for name, _ in self.of_experts if name == block]
        found = [self.of_experts[block, last] for last in wanted if (block, last) in self.of_experts]
        if len(there) != len(found) or 0 < len(found) < len(wanted):
            stored = ", ".join(sorted(name for (at, _), name in self.of_experts.items() if at == block))
            raise ValueError(
                f"{prefix}: vLLM's class asks for {', '.join(wanted)} of every expert, and the checkpoint has {stored};"
                " `babai convert OUT NEW --to dense` makes it servable"
            )
        return found

    def _found(self, name: str) -> Found | None:
        if name in self.by_name:
            return self.by_name[name]
        block = next((block for block in self.blocks if name.startswith(f"{block}.")), "")
        candidates = self.by_last_part.get((block, name.rpartition(".")[2]), [])
        return candidates[0] if len(candidates) == 1 else None


def renamed(checkpoint: CheckpointConfig, renaming: Renaming) -> CheckpointConfig:
    """The configuration with all names as the model has them."""

    def apply(names: Iterable[str]) -> list[str]:
        return list(renaming(dict.fromkeys(names)))

    if checkpoint.embedding is not None:
        checkpoint = replace(checkpoint, embedding=next(iter(apply([checkpoint.embedding])), checkpoint.embedding))
    if checkpoint.scope is None:
        return replace(checkpoint, ignore=apply(checkpoint.ignore), overrides=renaming(checkpoint.overrides))
    blocks = {block: new for block in checkpoint.scope for new in apply([block])}
    kinds = checkpoint.linears
    if kinds is not None:
        pairs = ((new, name) for block, new in blocks.items() for name in apply(f"{block}.{kind}" for kind in kinds))
        kinds = sorted({name.removeprefix(f"{block}.") for block, name in pairs})
    return replace(
        checkpoint,
        ignore=apply(checkpoint.ignore),
        overrides=renaming(checkpoint.overrides),
        scope=list(blocks.values()),
        linears=kinds,
    )
