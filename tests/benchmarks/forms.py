"""The three forms at the same sizes: `python tests/benchmarks/forms.py [--out FOLDER] [options]`.

Quantizes a model to each form with all defaults and evaluates it against the original. The figures go to the folder, as
JSON and as a table; what is there already is not measured again. Without other options: the demonstration's model and
texts.
"""

from harness import command_line, markdown
from quality import Case, Row, measure_missing, take_material

SIZES = (1.75, 2.125, 2.6, 3.125, 4.125)
FORMS = {"trellis": SIZES, "ssqr": SIZES[1:], "hptq": SIZES}  # two bits are the fewest of SSQR
HEADINGS = ("bits", "form", "perplexity", "loss, nats", "predicted", "KL, nats", "CPU seconds")


def table_of(rows: list[Row]) -> str:
    """By size, then by loss: worst first."""
    cells = []
    for row in sorted(rows, key=lambda row: (row.asked, -row.loss)):
        loss = f"{row.loss:.4f} ± {row.loss_error:.4f}"
        predicted = "" if row.predicted is None else f"{row.predicted:.4f}"
        divergence = f"{row.divergence:.4f} ± {row.divergence_error:.4f}"
        seconds = "" if row.cpu_seconds is None else f"{row.cpu_seconds:.0f}"
        cells.append((f"{row.bits:.3f}", row.format, f"{row.perplexity:.3f}", loss, predicted, divergence, seconds))
    return markdown(HEADINGS, cells)


def main() -> None:
    """Read the command line."""
    parser = command_line(__doc__)
    take_material(parser, samples=128, windows=160)
    parser.add_argument("--forms", nargs="+", choices=list(FORMS), default=list(FORMS))
    parser.add_argument("--sizes", type=float, nargs="+", default=list(SIZES), help="bits per weight to measure")
    options = parser.parse_args()
    wanted = ((Case(form, "all"), size) for form in options.forms for size in options.sizes if size in FORMS[form])
    rows = measure_missing(wanted, options, options.out / "forms.json")
    (options.out / "forms.md").write_text(table_of(rows))


if __name__ == "__main__":
    main()
