"""The model card: README.md of a quantized checkpoint, as the Hugging Face hub shows it.

It is rendered from the checkpoint's report and config alone, so that it can be rendered again when `babai eval` has
measured something.
"""

import json
from collections.abc import Iterable
from dataclasses import asdict, fields
from pathlib import Path
from shlex import quote
from typing import Any

import yaml
from huggingface_hub import ModelCard

from vllm_babai.errors import QuantizationError
from vllm_babai.files import write_atomically
from vllm_babai.offline.model.checkpoint import REPORT, Checkpoint, read_json
from vllm_babai.offline.options import FORMATS_OF, QuantizeOptions

CARD = "README.md"
# What the card of the original says of the model, and is as true of the quantized one.
INHERITED = ("license", "license_name", "license_link", "language", "pipeline_tag")
FORM_NAMES = {"ssqr": "SSQR, dense + sparse", "hptq": "HPTQ, entropy coded", "trellis": "trellis, fixed rate"}


def describe_base(checkpoint: Checkpoint) -> dict[str, Any]:
    """What the card tells of the original: its name, its bytes, and what its own card says in INHERITED.

    A model from the hub's cache has its name there; that of any other is its folder's, and not a link.
    """
    name = _hub_name(checkpoint.folder)
    inherited = {key: value for key, value in _front_matter(checkpoint.folder / CARD).items() if key in INHERITED}
    return {
        "name": name or checkpoint.folder.resolve().name,
        "on_hub": name is not None,
        "bytes": checkpoint.bytes(),
        "card": inherited,
    }


def write_card(folder: Path, report: dict[str, Any]) -> None:
    """Write README.md of a quantized checkpoint. report: see `RunFolder.finish`.

    Raises QuantizationError where the report is not one of this version.
    """
    quantization = read_json(folder / "config.json")["quantization_config"]
    try:
        text = render_card(report, quantization)
    except (KeyError, TypeError) as error:
        raise QuantizationError(f"{folder / REPORT} lacks {error}, as of another version: quantize again") from error
    write_atomically(folder / CARD, text)


def note_evaluation(folder: Path, evaluation: dict[str, Any]) -> None:
    """Add what `babai eval` measured to card and report; an earlier evaluation on the same text is replaced.

    evaluation: plain data of an `Evaluation`, and the name of its text as `data`. Raises QuantizationError where the
    folder has no report of this version.
    """
    report = read_json(folder / REPORT)
    others = [each for each in report.get("evaluations", []) if each["data"] != evaluation["data"]]
    report["evaluations"] = [*others, evaluation]
    write_card(folder, report)
    write_atomically(folder / REPORT, json.dumps(report, indent=2) + "\n")


def render_card(report: dict[str, Any], quantization: dict[str, Any]) -> str:
    """The whole text of the card. report: see `RunFolder.finish`. quantization: the `quantization_config`."""
    base, options = report["base"], report["options"]
    form = FORM_NAMES[quantization["format"]]
    front = base["card"] | {"library_name": "vllm", "tags": ["babai", "quantized", quantization["format"]]}
    if base["on_hub"]:
        front |= {"base_model": base["name"], "base_model_relation": "quantized"}
    original = f"[{base['name']}](https://huggingface.co/{base['name']})" if base["on_hub"] else base["name"]
    length = options["sequence_length"] or "up to 2048"
    size, before = _megabytes(report["checkpoint_bytes"]), _megabytes(base["bytes"])
    facts = {
        "original": original,
        "format": form,
        "bits per quantized weight, everything counted": f"{report['bits_per_weight']:.3f}",
        "quantized weights": f"{report['quantized_weights']:,}",
        "size of the weight files": f"{size}; the original's {before}",
        "calibration": f"{options['samples']} sequences of {length} tokens of {Path(options['calibration']).name}",
    }
    sections = [
        f"---\n{yaml.safe_dump(front, sort_keys=True, allow_unicode=True)}---",
        f"# {base['name'].split('/')[-1]}, {form}, {report['bits_per_weight']:.2f} bits",
        _table(("", ""), facts.items()),
        "## Quality",
        _quality(report.get("evaluations", [])),
        "## Serve",
        f"With vllm-babai installed beside vLLM:\n\n```\n{serve_line('FOLDER_OR_REPOSITORY')}\n```",
        "## Made by",
        f"```\n{command_line(base['name'], options)}\n```",
    ]
    return "\n\n".join(sections) + "\n"


def serve_line(model: str) -> str:
    """The command that serves a checkpoint, with as much context as the device has memory for."""
    return f"vllm serve {quote(model)} --quantization babai --max-model-len auto"


def command_line(model: str, options: dict[str, Any]) -> str:
    """The `babai quantize` that these options came from: what is not a default, files without their folders."""
    words = ["babai", "quantize", quote(model), "OUT"]
    defaults = asdict(QuantizeOptions())
    for field in fields(QuantizeOptions):
        value, flag = options.get(field.name, defaults[field.name]), f"--{field.name.replace('_', '-')}"
        if field.name == "format":
            words += [flag, value]
        elif value == defaults[field.name] or options["format"] not in FORMATS_OF.get(field.name, (options["format"],)):
            continue
        elif isinstance(value, bool):
            words.append(flag if value else f"--no-{field.name.replace('_', '-')}")
        elif isinstance(value, list):
            words += [word for each in value for word in (flag, quote(each))]
        else:
            words += [flag, quote(Path(value).name if _is_file(value) else str(value))]
    return " ".join(words)


def _is_file(value: Any) -> bool:
    return isinstance(value, str) and Path(value).suffix in (".jsonl", ".txt", ".parquet")


def _quality(evaluations: list[dict[str, Any]]) -> str:
    if not evaluations:
        return "Not measured yet: `babai eval FOLDER --data TEXT --against ORIGINAL --card`."
    heads = ("text", "perplexity", "of the original", "loss, nats per token", "KL divergence, nats", "same top token")
    rows = []
    for each in evaluations:
        row = [f"{each['data']}, {each['windows']} windows of {each['window']} tokens", f"{each['perplexity']:.4f}"]
        if (compared := each["comparison"]) is None:
            row += [""] * 4
        else:
            row += [
                f"{compared['original_perplexity']:.4f}",
                f"{compared['loss']:.5f} ± {compared['loss_error']:.5f}",
                f"{compared['divergence']:.5f} ± {compared['divergence_error']:.5f}",
                f"{compared['agreement']:.2%}",
            ]
        rows.append(row)
    return _table(heads, rows) + "\n\nStandard errors are over windows."


def _table(heads: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    heads = list(heads)
    lines = [heads, ["---"] * len(heads), *(list(row) for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _megabytes(size: int) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


def _front_matter(path: Path) -> dict[str, Any]:
    """What a model card says of itself to machines; nothing where there is none that can be read."""
    try:
        return ModelCard.load(path).data.to_dict()
    except (OSError, ValueError, TypeError, yaml.YAMLError):  # a card is no part of the model
        return {}


def _hub_name(folder: Path) -> str | None:
    """organization/name of a folder in the hub's cache, where it is `models--organization--name/snapshots/…`."""
    if folder.parent.name != "snapshots" or not folder.parents[1].name.startswith("models--"):
        return None
    return "/".join(folder.parents[1].name.removeprefix("models--").split("--"))
