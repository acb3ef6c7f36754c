"""What to do about experts that few tokens reach: `python tests/benchmarks/expert_rules.py MODEL [options]`.

MODEL: of `python tests/benchmarks/second_model.py MODEL --experts 8`. Quantizes it to HPTQ at the same rates with each
rule, from little calibration text and from more, and evaluates it against the original. `--constants` does the same
with values of the constants of our rule. The figures go to a folder, as JSON and as a table; what is there already is
not measured again.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from harness import RESULTS, command_line, markdown
from quality import WIDTHS, Case, Row, measure_missing, take_material
from torch import Tensor

ROUTED, SENSITIVITY = "vllm_babai.offline.model.routed", "vllm_babai.offline.plan.expert_sensitivity"
SIZES = WIDTHS
SAMPLES = (2, 16)  # sequences of 256 tokens: 64 and 512 a column of gate and up for all eight experts
HEADINGS = ("bits", "tokens", "rule", "loss, nats", "KL, nats", "predicted")
Rule = Callable[[Tensor, int, float, Tensor], tuple[Tensor, float]]  # as `solver.shrink.shrunk`


def own(hessian: Tensor, tokens: int, fourth: float, other: Tensor) -> tuple[Tensor, float]:
    """The expert's own tokens alone."""
    return hessian, 0.0


def fixed(hessian: Tensor, tokens: int, fourth: float, other: Tensor) -> tuple[Tensor, float]:
    """The layer's Hessian counts as one token for each column."""
    share = len(hessian) / (len(hessian) + tokens)
    return hessian.lerp(other, share), share


def rounded(hessian: Tensor, tokens: int, fourth: float, other: Tensor) -> tuple[Tensor, float]:
    """Below one token for each column, the weights are rounded to the nearest: that is what the identity does. So large
    a one leaves nothing of the drift's correction.
    """
    if tokens >= len(hessian):
        return hessian, 0.0
    return torch.eye(len(hessian), device=hessian.device) * hessian.trace(), 1.0


def everything(hessian: Tensor, tokens: int, fourth: float, other: Tensor) -> tuple[Tensor, float]:
    """All tokens of the layer go through all experts."""
    return other, 1.0


def with_rule(name: str, rule: Rule) -> Case:
    """A rule in the place of ours, for experts of however many tokens."""
    changed: dict[str, Any] = {f"{ROUTED}.shrunk": rule, f"{ROUTED}.ENOUGH": math.inf}
    return Case("ssqr", name, constants=changed, sizes=WIDTHS)


def with_constant(module: str, name: str, value: float) -> Case:
    """Ours, with another value of a constant."""
    return Case("ssqr", f"{name} = {value:g}", constants={f"{module}.{name}": value}, sizes=WIDTHS)


OURS = Case("ssqr", "mixed by its spread (ours)", sizes=WIDTHS)
RULES = [
    with_rule("own tokens alone", own),
    with_rule("fixed mixture", fixed),
    with_rule("rounded to nearest if starved", rounded),
    with_rule("all tokens through all experts", everything),
    OURS,
]
CONSTANTS = [
    *(with_constant(ROUTED, "ENOUGH", value) for value in (2, 32, math.inf)),
    *(with_constant(ROUTED, "SAMPLE", value) for value in (256, 8192)),
    *(with_constant(SENSITIVITY, "LEAST_SHARE", value) for value in (0.01, 0.5)),
    OURS,
]


def cells(row: Row, tokens: int) -> tuple[str, ...]:
    """A line of the table."""
    loss = f"{row.loss:.4f} ± {row.loss_error:.4f}"
    divergence = f"{row.divergence:.4f} ± {row.divergence_error:.4f}"
    return f"{row.bits:.3f}", str(tokens), row.name, loss, divergence, f"{row.predicted or 0:.4f}"


def main() -> None:
    """Read the command line."""
    parser = command_line(__doc__)
    take_material(parser, samples=0, windows=60)
    parser.set_defaults(length=256, out=RESULTS / "experts")
    parser.add_argument("--constants", action="store_true", help="values of the constants instead of rules")
    parser.add_argument("--sizes", type=float, nargs="+", default=list(SIZES), help="bits per weight to measure")
    parser.add_argument("--texts", type=int, nargs="+", default=list(SAMPLES), help="sequences of calibration text")
    options = parser.parse_args()
    cases = CONSTANTS if options.constants else RULES
    lines = []
    for samples in options.texts:
        options.samples = samples
        wanted = ((case, size) for size in options.sizes for case in cases)
        rows = measure_missing(wanted, options, options.out / f"rules-{samples}.json")
        found = {(row.name, row.asked): row for row in rows}
        lines += [cells(found[case.name, size], samples * options.length) for size in options.sizes for case in cases]
    name = "constants.md" if options.constants else "rules.md"
    (options.out / name).write_text(markdown(HEADINGS, sorted(lines, key=lambda line: (float(line[0]) // 1, line[1]))))


if __name__ == "__main__":
    main()
