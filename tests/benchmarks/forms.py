"""The three forms at the same sizes: `python tests/benchmarks/forms.py [--out FOLDER] [options]`.

Quantizes a model to each form with all defaults and evaluates it against the original. The figures go to the folder, as
JSON and as a table; what is there already is not measured again. Without other options: the demonstration's model and
texts.
"""

import json
import tempfile
from dataclasses import asdict
from pathlib import Path

from harness import DEMO, RESULTS, command_line, markdown
from quality import Case, Material, Row, demonstration_texts, measure

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
    parser.add_argument("--model", type=Path, default=DEMO / "stdlib-6m")
    parser.add_argument("--calibration", type=Path)
    parser.add_argument("--evaluation", type=Path)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--windows", type=int, default=160)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--forms", nargs="+", choices=list(FORMS), default=list(FORMS))
    parser.add_argument("--sizes", type=float, nargs="+", default=list(SIZES), help="bits per weight to measure")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    results = options.out / "forms.json"
    rows = [Row(**row) for row in json.loads(results.read_text())] if results.exists() else []
    done = {(row.format, row.asked) for row in rows}
    with tempfile.TemporaryDirectory() as folder:
        calibration, evaluation = demonstration_texts(Path(folder))
        material = Material(
            options.model,
            options.calibration or calibration,
            options.evaluation or evaluation,
            options.samples,
            options.windows,
            options.length,
        )
        for form in options.forms:
            for size in options.sizes:
                if size in FORMS[form] and (form, size) not in done:
                    rows.append(measure(Case(form, "all"), size, material))
                    print(rows[-1], flush=True)
                    results.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    (options.out / "forms.md").write_text(table_of(rows))


if __name__ == "__main__":
    main()
