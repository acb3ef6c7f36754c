"""Hours to quantize large mixtures of experts: `python tests/benchmarks/expert_hours.py [--device cuda]`.

No model is needed: `--rows` rows of one expert's linears, of a model's shapes and with random weights and inputs, are
quantized as `babai quantize` does by default (SSQR of 4 bits, 16 paths, row covariance for the down projection). Rows
are solved in bands that know nothing of each other, so the seconds of a whole linear follow by the number of its rows;
its factor is measured whole. Attention, shared experts and the first dense blocks count as experts of as many
weights. What runs the model meanwhile, block by block, is computed from the number of its operations and the rate of a
product of matrices.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from harness import Median, alternate, command_line, report, table
from torch import Tensor

from vllm_babai.offline.options import QuantizeOptions
from vllm_babai.offline.scales.linear import quantize_ssqr
from vllm_babai.offline.solver.factor import Factor, factorize
from vllm_babai.offline.solver.lattice import Lattice
from vllm_babai.offline.solver.row_geometry import RowGeometry, independent_rows, row_geometry

BITS, OVERFLOW = 4, 0.01
# How often a token's way through all weights is computed: forwards to the sensitivity, in its backward pass and of both
# streams, the gradient, and what the groups of a block are captured by, of both streams. Counted, not measured.
RUNS = 9
BATCH = 4096  # tokens of the product that gives the rate


@dataclass(frozen=True)
class Mixture:
    """A model. blocks: that have experts. chosen: experts of a token. others: weights of all other linears."""

    blocks: int
    experts: int
    chosen: int
    hidden: int
    inner: int
    others: float

    @property
    def weights_of_expert(self) -> int:
        """Of gate, up and down."""
        return 3 * self.hidden * self.inner

    @property
    def weights_of_token(self) -> float:
        """Weights that a token is multiplied with."""
        return self.blocks * self.chosen * self.weights_of_expert + self.others


MODELS = {
    "Qwen3-30B-A3B": Mixture(blocks=48, experts=128, chosen=8, hidden=2048, inner=768, others=0.906e9),
    "DeepSeek-V3": Mixture(blocks=58, experts=256, chosen=8, hidden=7168, inner=2048, others=15.1e9),
}


def seconds_of(run: Callable[[], object], device: torch.device) -> float:
    """Seconds that a call takes: of a CPU's cores, which other processes disturb least; of a GPU until it is done."""
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    started = clock()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return clock() - started


def random_inputs(columns: int, device: torch.device) -> Tensor:
    """Correlated inputs of different sizes, [tokens, columns], more tokens than columns."""
    generator = torch.Generator().manual_seed(columns)
    spread = 10 ** torch.rand(columns, generator=generator)
    mix = torch.randn(64, columns, generator=generator) / 8
    found = torch.randn(2 * columns, columns, generator=generator)
    return ((found + torch.randn(2 * columns, 64, generator=generator) @ mix) * spread).to(device)


def geometry(rows: int, coupled: bool, device: torch.device) -> RowGeometry:
    """G of some rows: coupled as those of a down projection, or its diagonal."""
    generator = torch.Generator().manual_seed(rows)
    if not coupled:
        return independent_rows(torch.rand(rows, generator=generator, dtype=torch.float64) + 0.5)
    gradients = torch.randn(4 * rows, rows, generator=generator)
    return row_geometry((gradients.T @ gradients / len(gradients)).to(device))


def seconds_of_linear(rows: int, columns: int, some: int, coupled: bool, device: torch.device) -> float:
    """Seconds of an expert's linear [rows, columns] with a Hessian of its own, `some` of whose rows are solved."""
    options = QuantizeOptions()
    inputs = random_inputs(columns, device)
    found: list[Factor] = []

    def factor() -> None:
        found.append(factorize(inputs.T @ inputs / len(inputs), options.column_order, options.damping))

    once = seconds_of(factor, device)
    weight = torch.randn(some, columns, generator=torch.Generator().manual_seed(0)).to(device) / columns**0.5
    lattice = Lattice(found[0], geometry(some, coupled, device), options.row_paths)
    solved = seconds_of(lambda: quantize_ssqr("linear", weight, lattice, BITS, -1, OVERFLOW, 0), device)
    return once + solved * rows / some


def operations_per_second(hidden: int, device: torch.device) -> float:
    """Of a product of matrices in float32, a multiplication and an addition counted as two."""
    x, weight = torch.randn(BATCH, hidden, device=device), torch.randn(hidden, hidden, device=device)
    seconds_of(lambda: x[:64] @ weight, device)
    return 2 * BATCH * hidden**2 / seconds_of(lambda: x @ weight, device)


def hours(model: Mixture, some: int, tokens: int, device: torch.device) -> dict[str, float]:
    """Hours to solve all linears, and to run the model."""
    gate = seconds_of_linear(model.inner, model.hidden, min(some, model.inner), False, device)
    down = seconds_of_linear(model.hidden, model.inner, min(some, model.hidden), True, device)
    experts = model.blocks * model.experts + model.others / model.weights_of_expert
    runs = 2 * RUNS * tokens * model.weights_of_token / operations_per_second(model.hidden, device)
    return {"solving": experts * (2 * gate + down) / 3600, "running the model": runs / 3600}


def main() -> None:
    """Read the command line."""
    parser = command_line(__doc__, rounds=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rows", type=int, default=256, help="of each linear to solve; G knows 256 together")
    parser.add_argument("--tokens", type=int, default=128 * 2048, help="of calibration text; the command's default")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    options = parser.parse_args()
    device = torch.device(options.device)
    tiny = min(options.rows, 64)
    for coupled in (False, True):  # compiles the solver's loops
        seconds_of_linear(tiny, tiny, tiny, coupled, device)
    candidates = {n: partial(hours, MODELS[n], options.rows, options.tokens, device) for n in options.models}
    rounds = alternate(candidates, options.rounds)
    found = {n: {part: Median.of([one[part] for one in each]) for part in each[0]} for n, each in rounds.items()}
    title = "hours on one core" if device.type == "cpu" else f"hours on one {device.type}"
    drawn = table(title, ("model", *next(iter(found.values()))))
    for name, parts in found.items():
        drawn.add_row(name, *(value.text() for value in parts.values()))
    report(found, [drawn], options.json)


if __name__ == "__main__":
    main()
