"""The experts of a mixture-of-experts block, one by one: three linears each, whatever the layout of their weights.

transformers keeps all experts of a block in 3-D parameters, in four layouts (`use_experts_implementation` says which of
them), and calls the module that holds them with the tokens, the experts chosen for each and their weights. Here an
expert's linears are views of those parameters: what is written to a linear is in the block at once.
"""

import inspect
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vllm_babai.errors import QuantizationError

# Names that checkpoints give to the linears of an expert: gate, up, down.
NAMES = (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"))
ROLES = ("gate", "up", "down")
ROLE_OF = {name: role for names in NAMES for name, role in zip(names, ROLES, strict=True)}
NUMBERED = re.compile(rf"(.*experts)\.(\d+)\.({'|'.join(ROLE_OF)})")


class Layout(NamedTuple):
    """How a module's parameters hold its experts.

    transposed: [in, out] instead of [out, in]. gated: rows of gate and up are one parameter. concatenated: gate's rows
    come first; else they alternate. biased: the linears have biases.
    """

    transposed: bool
    gated: bool
    concatenated: bool
    biased: bool


class Routed(NamedTuple):
    """What experts are called with. inputs: [tokens, hidden]. chosen, weights: [tokens, k], the experts that a token
    goes to and what their outputs count.
    """

    inputs: Tensor
    chosen: Tensor
    weights: Tensor


def layout_of(module: nn.Module) -> Layout | None:
    """The layout of a module of experts; None for any other module."""
    down = getattr(module, "down_proj", None)
    if not isinstance(down, nn.Parameter) or down.dim() != 3:
        return None
    said: list[Any] = [
        getattr(module, key, None) for key in ("is_transposed", "has_gate", "is_concatenated", "has_bias")
    ]
    return Layout(*said) if all(isinstance(one, bool) for one in said) else None


def find_experts(module: nn.Module, prefix: str = "") -> dict[str, nn.Module]:
    """Full name → module of experts."""
    return {name: m for name, m in module.named_modules(prefix=prefix) if layout_of(m) is not None}


def refuse_unknown_experts(module: nn.Module, prefix: str) -> None:
    """Raise QuantizationError that names a module of experts whose layout or call is not known here."""
    for name, inner in module.named_modules(prefix=prefix):
        by_name = name.rpartition(".")[2] == "experts" or "Experts" in type(inner).__name__
        if by_name and layout_of(inner) is None:
            raise QuantizationError(f"{_described(name, inner)}: its experts are held in a way that is not supported")


class Expert:
    """One expert of a module: `linears` by role (gate, up, down), views of the module's parameters."""

    def __init__(self, experts: nn.Module, number: int) -> None:
        layout = layout_of(experts)
        assert layout is not None
        self.experts: Any = experts
        self.layout = layout
        self.linears = {**self._first(number), "down": self._linear("down_proj", number)}

    def inner(self, x: Tensor) -> Tensor:
        """x [tokens, hidden] → what the down projection reads, [tokens, intermediate]."""
        return self.activate(*(self.linears[role](x) for role in ROLES[:2] if role in self.linears))

    def activate(self, *outputs: Tensor) -> Tensor:
        """The outputs of gate and up, or of up alone → what the down projection reads."""
        if not self.layout.gated:
            return self.experts.act_fn(*outputs)
        joined = torch.cat(outputs, -1) if self.layout.concatenated else torch.stack(outputs, -1).flatten(-2)
        return self.experts._apply_gate(joined)

    def __call__(self, x: Tensor) -> Tensor:
        """x [tokens, hidden] → [tokens, hidden], not yet weighted."""
        return self.linears["down"](self.inner(x))

    def _first(self, number: int) -> dict[str, nn.Linear]:
        if not self.layout.gated:
            return {"up": self._linear("up_proj", number)}
        halves: list[Callable[[Tensor], Tensor]] = [lambda t: t.chunk(2)[0], lambda t: t.chunk(2)[1]]
        if not self.layout.concatenated:
            halves = [lambda t: t[::2], lambda t: t[1::2]]
        return {role: self._linear("gate_up_proj", number, cut) for role, cut in zip(ROLES, halves, strict=False)}

    def _linear(self, parameter: str, number: int, cut: Callable[[Tensor], Tensor] = lambda t: t) -> nn.Linear:
        packed = getattr(self.experts, parameter).data[number]
        weight = cut(packed.T if self.layout.transposed else packed)
        linear = nn.Linear(1, 1, bias=self.layout.biased, device="meta")  # whose own parameters go at once
        linear.out_features, linear.in_features = weight.shape
        linear.weight = nn.Parameter(weight, requires_grad=False)
        if self.layout.biased:
            linear.bias = nn.Parameter(
                cut(getattr(self.experts, f"{parameter}_bias").data[number]), requires_grad=False
            )
        return linear


@dataclass(frozen=True)
class Experts:
    """A block's experts. name: in the checkpoint, what the names of all its linears begin with. module: that holds
    them. module_name: of that in transformers' model. names: of each expert's linears in the checkpoint, by role.
    """

    name: str
    module_name: str
    module: nn.Module
    names: list[dict[str, str]]

    def __len__(self) -> int:
        return len(self.names)

    def expert(self, number: int) -> Expert:
        """The expert of that number."""
        return Expert(self.module, number)

    @property
    def linears(self) -> dict[str, nn.Linear]:
        """Full name → linear of all experts."""
        return {
            names[role]: linear
            for number, names in enumerate(self.names)
            for role, linear in self.expert(number).linears.items()
        }


def count_experts(module: nn.Module) -> int:
    """How many experts a module holds."""
    return len(module.down_proj)  # type: ignore[arg-type]


def roles_of(module: nn.Module) -> tuple[str, ...]:
    """Roles of an expert's linears: gate, up and down, or the last two."""
    layout = layout_of(module)
    assert layout is not None
    return ROLES if layout.gated else ROLES[1:]


def shape_of(module: nn.Module, role: str) -> tuple[int, int]:
    """[out, in] of the linears of that role."""
    linear = Expert(module, 0).linears[role]
    return linear.out_features, linear.in_features


def routed(module: nn.Module, name: str, args: tuple, kwargs: dict[str, Any]) -> Routed:
    """What a module of experts is called with. Raises QuantizationError that names it for another way to call it."""
    given = (*args, *kwargs.values())
    if len(given) == 3 and all(isinstance(one, Tensor) and one.dim() == 2 for one in given):
        call = Routed(*given)
        floating = [one.is_floating_point() for one in call]
        if call.chosen.shape == call.weights.shape == (len(call.inputs), call.chosen.shape[1]) and floating == [
            True,
            False,
            True,
        ]:
            return call
    shapes = ", ".join(str(list(one.shape)) if isinstance(one, Tensor) else type(one).__name__ for one in given)
    raise QuantizationError(f"{_described(name, module)}: it is called in a way that is not supported ({shapes})")


def run_each(module: nn.Module, counts: float = 1.0) -> tuple[Tensor, Tensor]:
    """Random tokens [experts, hidden], one for each expert of a module, and what the module makes of them.

    counts: the router's weight of every token.
    """
    weight: Any = module.down_proj
    count, (_, hidden) = len(weight), shape_of(module, roles_of(module)[0])
    tokens = torch.randn(count, hidden, generator=torch.Generator().manual_seed(0)).to(weight.device, weight.dtype)
    index = torch.arange(count, device=weight.device)[:, None]
    return tokens, module(tokens, index, torch.full_like(tokens[:, :1], counts))


def differ(found: Tensor, expected: Tensor) -> bool:
    """Whether outputs are not those expected, or not finite; bfloat16 rounds to 0.004."""
    return not (found.float() - expected.float()).norm() <= 0.02 * expected.float().norm() + 1e-12


@torch.no_grad()
def check_experts(module: nn.Module, name: str) -> None:
    """Run every expert of a module on a token of its own, as the module does it and one by one.

    Raises QuantizationError that names the module where they differ: then its experts are not what they seem.
    """
    tokens, together = run_each(module, counts=0.5)
    alone = torch.cat([Expert(module, e)(tokens[e : e + 1]) for e in range(len(tokens))]).float() * 0.5
    if differ(alone, together):
        raise QuantizationError(f"{_described(name, module)}: its experts compute something else than is known here")


@dataclass
class PackExperts:
    """Makes the parameters of a module of experts of its linears, as one of transformers' converters would.

    module: on the meta device. name: of it in the model. found: role → weights by number.
    """

    module: nn.Module
    name: str
    found: dict[str, list[Tensor]] = field(default_factory=dict)

    def add_tensor(self, _: str, __: str, role: str, tensor: Tensor) -> None:
        """Take the weight of the next expert's linear of that role."""
        self.found.setdefault(role, []).append(tensor)

    def convert(self, *_: Any, **__: Any) -> dict[str, Tensor]:
        """Full name → parameter."""
        layout = layout_of(self.module)
        assert layout is not None
        stacked = {role: torch.stack(weights) for role, weights in self.found.items()}
        packed = {f"{self.name}.down_proj": stacked["down"]}
        if not layout.gated:
            packed[f"{self.name}.up_proj"] = stacked["up"]
        elif layout.concatenated:
            packed[f"{self.name}.gate_up_proj"] = torch.cat([stacked["gate"], stacked["up"]], 1)
        else:
            packed[f"{self.name}.gate_up_proj"] = torch.stack([stacked["gate"], stacked["up"]], 2).flatten(1, 2)
        return {key: tensor.mT.contiguous() if layout.transposed else tensor for key, tensor in packed.items()}


def names_by_number(stored: Sequence[str], count: int, what: str) -> list[str]:
    """Names of linears of one role in the order of their experts. Raises QuantizationError where one is missing."""
    numbers = {int(found.group(2)): name for name in stored if (found := NUMBERED.fullmatch(name))}
    for number in range(count):
        if number not in numbers:
            raise QuantizationError(f"{what}: the checkpoint has no tensor of expert {number} of {count}")
    if len(stored) != count or len(numbers) != count:
        raise QuantizationError(f"{what}: the checkpoint has {len(stored)} tensors of {count} experts")
    return [numbers[number] for number in range(count)]


def _described(name: str, module: nn.Module) -> str:
    return f"{name} ({type(module).__name__} in {inspect.getsourcefile(type(module))})"
