"""The way through a model: part by part, and within a part from one group of linears to the next.

The forecast of a plan and the run of the quantizer go it alike. The forecast leaves every weight as it is; the run
quantizes a part before its outputs go on to the next.
"""

import copy
import math
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn

from vllm_babai.errors import QuantizationError
from vllm_babai.offline.model.call import Call
from vllm_babai.offline.model.capture import Moments, Seen, added_linears, advance, moments, seen_by, shared_inputs
from vllm_babai.offline.model.experts import Experts
from vllm_babai.offline.model.routed import Pass, SeenByExpert, expert_moments, expert_owner
from vllm_babai.offline.model.streamed import StreamedModel
from vllm_babai.offline.options import QuantizeOptions
from vllm_babai.offline.ranks import ALONE, Ranks, owners
from vllm_babai.offline.solver.drift import Drift
from vllm_babai.offline.solver.factor import Factor, factorize

TokenWeights = Callable[[list[str]], Tensor | None]


class Part(NamedTuple):
    """What one file of a checkpoint holds: a decoder block, the head, or the embedding. linears: full names of those to
    quantize. packed: tensors of the original that each hold some of these, as experts may be stored. is_lookup: whether
    it is an embedding alone, which multiplies nothing.
    """

    name: str
    linears: tuple[str, ...]
    file: str
    packed: tuple[str, ...] = ()
    is_lookup: bool = False

    @property
    def replaced(self) -> set[str]:
        """Tensors of the original that quantized ones replace; those of experts that are packed have no other name."""
        return {f"{name}.weight" for name in self.linears} | set(self.packed)

    def linears_of(self, model: StreamedModel, module: nn.Module | None = None) -> dict[str, nn.Linear]:
        """Full name → linear to quantize of `module`, which is this part, and by default on the meta device."""
        if self.is_lookup:
            return {}
        wanted = set(self.linears)
        return {name: linear for name, linear in model.linears(self.name, module).items() if name in wanted}

    def weights(self, model: StreamedModel) -> int:
        """How many weights are to be quantized."""
        if self.is_lookup:
            return math.prod(model.checkpoint.shape(f"{self.name}.weight"))
        return sum(linear.weight.numel() for linear in self.linears_of(model).values())


class Inputs(NamedTuple):
    """Calibration inputs. tokens: int64 [sequences, length]. hidden: of the first block, [sequences, length, hidden].
    calls: how each block is called.
    """

    tokens: Tensor
    hidden: Tensor
    calls: list[Call]


@dataclass(frozen=True)
class Stage:
    """A part in memory. linears: those to quantize, by full name. hidden: inputs of `module`, [sequences, length,
    hidden]. call: how it is called. experts: whose linears are to be quantized, too, and among `linears`.
    """

    module: nn.Module
    linears: dict[str, nn.Linear]
    hidden: Tensor
    call: Call
    experts: list[Experts] = field(default_factory=list)


@dataclass(frozen=True)
class Group:
    """Linears that read the same input, by full name; the factor of its Hessian, and its drift where it is known.

    expert: of the linears of one expert, what of the text it has seen; None of all others.
    """

    linears: dict[str, nn.Linear]
    factor: Factor
    drift: Drift | None
    expert: SeenByExpert | None = None


@dataclass(frozen=True)
class Round:
    """Linears that ranks quantize side by side, to exchange them before the next round: those of one group, or a
    layer's experts.

    linears: by full name. owners: full name → rank that quantizes it. groups: those that this rank has linears of, and
    the others of a round of one group.
    """

    linears: dict[str, nn.Linear]
    owners: dict[str, int]
    groups: Iterator[Group]


def parts_of(model: StreamedModel, options: QuantizeOptions) -> list[Part]:
    """The decoder blocks, then head and embedding where they are to be quantized; one more file holds what is in none
    of them.

    Raises QuantizationError when no linear is left to quantize, head or embedding cannot be, or some experts of a layer
    are to be left as they are and others not.
    """
    linears = {name: tuple(model.linears(name)) for name in model.block_names}
    linears = {name: tuple(n for n in every if not options.ignores(n)) for name, every in linears.items()}
    linears |= {name: (name,) for name in bits_outside(model, options)}
    if not any(linears.values()):
        raise QuantizationError("--ignore excludes every linear of the model")
    count = len(linears) + 1
    lookup = None if options.embedding is None or model.is_tied else model.embedding_name
    return [
        Part(name, some, part_file(i, count), _packed(model, name, some), name == lookup)
        for i, (name, some) in enumerate(linears.items(), 1)
    ]


def bits_outside(model: StreamedModel, options: QuantizeOptions) -> dict[str, float]:
    """Head, then embedding, where they are to be quantized: full name → bits asked for. Tied ones are one, under the
    embedding's name.

    Raises QuantizationError where the model has them in a form that is not known, and where they are tied and the
    options ask for different things.
    """
    head, embedding = options.lm_head, options.embedding
    if model.is_tied and head is not None and head != embedding:
        raise QuantizationError(
            f"--lm-head: {model.head_name} is head and embedding of this model: give both by --embedding {head:g}"
        )
    found = {} if head is None or model.is_tied else {model.head_name: head}
    return found if embedding is None else found | {model.embedding_name: embedding}


def _packed(model: StreamedModel, part: str, linears: tuple[str, ...]) -> tuple[str, ...]:
    for experts in model.experts(part):
        names = {name for each in experts.names for name in each.values()}
        if 0 < len(names.intersection(linears)) < len(names):
            raise QuantizationError(
                f"--ignore leaves some linears of {experts.name} as they are and others not; a layer's experts go"
                f" together: ignore all of them (--ignore '{re.escape(experts.name)}') or none"
            )
    return tuple(model.packed(part, linears))


def part_file(number: int, count: int) -> str:
    """File name of part `number`, from 1 to `count`."""
    return f"model-{number:05}-of-{count:05}.safetensors"


def walk(
    model: StreamedModel, parts: Sequence[Part], inputs: Inputs, streams: list[Tensor], visit: Callable[..., None]
) -> None:
    """Take hidden states from part to part, in place; one part is in memory at a time.

    parts: those from the first block on. streams: hidden states like `inputs.hidden`, of one model or of two.
    visit(part, *stages): called with a stage for each stream before its hidden states go on; it may change the weights.
    """
    left: list[dict] = [{} for _ in streams]  # by blocks for later ones
    for number, (part, call) in enumerate(zip(parts, [*inputs.calls, Call()], strict=False), 1):
        stages = _stages(model, part, inputs.tokens, streams, [call.of(each) for each in left])
        visit(part, *stages)
        if number < len(parts):
            _advance(stages, model.device)
        del stages  # before the next part is loaded


def _stages(model: StreamedModel, part: Part, tokens: Tensor, streams: list[Tensor], calls: list[Call]) -> list[Stage]:
    """A stage for each stream. To the head every token is a sequence of its own, so that no more than one token's
    logits are computed when it is called to see what it reads.
    """
    first = model.load(part.name)
    modules = [first, *(copy.deepcopy(first) for _ in streams[1:])]
    if isinstance(first, nn.Linear):
        model.advance_to_head(tokens, *streams)
        streams = [hidden.flatten(0, 1)[:, None] for hidden in streams]
    linears = [part.linears_of(model, each) for each in modules]
    experts = [_experts(model, part, each) for each in modules]
    return [Stage(*each) for each in zip(modules, linears, streams, calls, experts, strict=True)]


def _experts(model: StreamedModel, part: Part, module: nn.Module) -> list[Experts]:
    if part.name not in model.block_names:
        return []
    return [each for each in model.experts(part.name, module) if next(iter(each.names[0].values())) in part.linears]


def _advance(stages: list[Stage], device: torch.device) -> None:
    for stage in stages:
        advance(stage.module, stage.hidden, stage.call, device)


def rounds(
    stage: Stage,
    original: Stage | None,
    token_weights: TokenWeights,
    options: QuantizeOptions,
    ranks: Ranks = ALONE,
    *,
    at_once: bool = False,
) -> Iterator[Round]:
    """The groups of a stage's linears in the order in which they are called; those of experts come last.

    original: the same part of the original model, to learn the drift from; None: it is not captured. token_weights:
    how much each token of all ranks counts for linears of one input. at_once: capture all groups in one pass; else each
    is captured when the caller is done with the round before, whose linears it may have quantized. Raises
    QuantizationError that names the linears when activations are not finite or their Hessian cannot be factored.
    """
    of_experts = {name for experts in stage.experts for names in experts.names for name in names.values()}
    ordinary = {name: linear for name, linear in stage.linears.items() if name not in of_experts}
    groups = shared_inputs(stage.module, ordinary, stage.hidden[:1].to(_device(stage)), stage.call)
    for some in [groups] if at_once and groups else [[group] for group in groups]:
        found = _capture(stage, original, {group[0]: token_weights(group) for group in some}, ranks)
        for group in some:
            linears = {name: stage.linears[name] for name in group}
            by_rank = owners({name: linear.weight.numel() for name, linear in linears.items()}, ranks.count)
            yield Round(linears, by_rank, iter([_factored(linears, found.pop(group[0]), options)]))
    for index, experts in enumerate(stage.experts):
        passes = [Pass(each.module, each.experts[index], each.hidden, each.call) for each in (stage, original) if each]
        of_experts_here = (
            _factored(linears, own, options, seen_by_expert)
            for linears, own, seen_by_expert in expert_moments(*passes, token_weights=token_weights, ranks=ranks)
        )
        numbered = enumerate(experts.names)
        by_rank = {name: expert_owner(number, ranks.count) for number, names in numbered for name in names.values()}
        yield Round({name: stage.linears[name] for name in by_rank}, by_rank, of_experts_here)


def _factored(
    linears: dict[str, nn.Linear], own: Moments, options: QuantizeOptions, expert: SeenByExpert | None = None
) -> Group:
    try:
        factor = factorize(own.hessian, options.column_order, options.damping)
    except QuantizationError as error:
        raise QuantizationError(f"{', '.join(linears)}: {error}") from error
    return Group(linears, factor, own.drift, expert)


def _capture(
    stage: Stage, original: Stage | None, token_weights: dict[str, Tensor | None], ranks: Ranks
) -> dict[str, Moments]:
    """Moments of the linears that `token_weights` names, of each group one."""
    token_weights = {name: w if w is None else w[ranks.share(len(w))] for name, w in token_weights.items()}

    def seen(of: Stage, added: Collection[str] = ()) -> Iterator[dict[str, Seen]]:
        linears = {name: of.linears[name] for name in token_weights}
        return seen_by(of.module, linears, of.hidden, of.call, added)

    if original is None:
        return moments(seen(stage), None, token_weights, ranks)
    linears = {name: stage.linears[name] for name in token_weights}
    added = added_linears(stage.module, linears, stage.hidden, stage.call)
    return moments(seen(stage, added), seen(original, added), token_weights, ranks)


def _device(stage: Stage) -> torch.device:
    return next(stage.module.parameters()).device
