"""Table and plot of the reference model beside other tools: `python tests/benchmarks/reference.py`.

Measures nothing: it draws `results/reference.json`, whose figures were measured as tests/benchmarks/README.md says, and
prints them as the table that stands there. The main README shows the plot, `results/reference.png`.
"""

import json
from dataclasses import dataclass

from harness import RESULTS, command_line, markdown, panels, save_plot

OURS = ("SSQR", "HPTQ --rate")  # how the names of our own methods begin
TITLE = "Llama of 5.8M parameters, perplexity 9.221 in bf16"
DATA, PLOT = RESULTS / "reference.json", RESULTS / "reference.png"


@dataclass(frozen=True)
class Point:
    """One method at one size. loss: nats per token more than the original. perplexity: None where it was not noted."""

    method: str
    bits: float
    perplexity: float | None
    loss: float

    @property
    def ours(self) -> bool:
        return self.method.startswith(OURS)


def points() -> list[Point]:
    """All measurements of `results/reference.json`."""
    return [Point(**fields) for fields in json.loads(DATA.read_text())]


def peers() -> dict[str, list[tuple[float, float]]]:
    """Other tools: method → (bits, loss)."""
    found: dict[str, list[tuple[float, float]]] = {}
    for point in points():
        if not point.ours:
            found.setdefault(point.method, []).append((point.bits, point.loss))
    return found


def table_of(found: list[Point]) -> str:
    """By size, then by loss: worst first."""
    rows = []
    for point in sorted(found, key=lambda point: (round(point.bits), -point.loss)):
        name = (
            f"**{point.method.partition(' ')[0]}** `{point.method.partition(' ')[2]}`" if point.ours else point.method
        )
        perplexity = f"{point.perplexity:.3f}" if point.perplexity else ""
        rows.append((name, f"{point.bits:.3f}", perplexity, f"{point.loss:.4f}"))
    return markdown(("", "bits per weight", "perplexity", "loss, nats per token"), rows)


def plot(found: list[Point]) -> None:
    """Loss against size: ours drawn through, others dotted."""
    figure, (axes,) = panels()
    for method in dict.fromkeys(point.method for point in found):
        own = [point for point in found if point.method == method]
        style = {"marker": "o", "linewidth": 2} if own[0].ours else {"marker": "x", "linestyle": ":", "linewidth": 1}
        axes.plot([point.bits for point in own], [point.loss for point in own], label=method, **style)
    axes.set(
        xlabel="bits per weight, everything counted", ylabel="loss over bf16, nats per token", yscale="log", title=TITLE
    )
    axes.legend(fontsize="x-small")
    save_plot(figure, PLOT)


def main() -> None:
    command_line(__doc__).parse_args()
    found = points()
    print(table_of(found), end="")
    plot(found)


if __name__ == "__main__":
    main()
