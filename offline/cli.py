"""The command `babai`."""

import errno
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import MISSING, Field, asdict, fields, replace
from functools import wraps
from inspect import Parameter, Signature, signature
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn, get_type_hints

import torch
import typer
from rich.console import Console
from rich.table import Column, Table

from vllm_babai.errors import FormatError, QuantizationError
from vllm_babai.offline.options import RATES, QuantizeOptions, check_given, torch_dtype
from vllm_babai.offline.ranks import SaidElsewhere, speaks

if TYPE_CHECKING:
    from vllm_babai.offline.tools.evaluate import Evaluation
    from vllm_babai.offline.tools.tasks import Score

app = typer.Typer(help="Lattice quantization of large language models.", no_args_is_help=True, add_completion=False)

Model = Annotated[str, typer.Argument(help="Model folder, or its name on the Hugging Face hub.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
Overwrite = Annotated[bool, typer.Option(help="Replace OUT if it exists.")]

# What of the user's file system can stop a command wherever it writes → what helps.
FILE_SYSTEM = {
    errno.ENOSPC: "free some space, and go on with --resume where the command has it",
    errno.EDQUOT: "free some space, and go on with --resume where the command has it",
    errno.EFBIG: "the limit on the size of files is too low",
    errno.EACCES: "change its permissions, or choose another place",
    errno.EPERM: "change its permissions, or choose another place",
    errno.EROFS: "choose a place that can be written",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.ENOTDIR: "choose a place in a folder",
}


def takes_options(*names: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """On the command line, the command's parameter `options` is fields of QuantizeOptions: `names`, or all of them."""
    hints = get_type_hints(QuantizeOptions, include_extras=True)
    taken = [field for field in fields(QuantizeOptions) if not names or field.name in names]

    def on_command_line(field: Field) -> Parameter:
        default = field.default if field.default_factory is MISSING else field.default_factory()
        return Parameter(field.name, Parameter.KEYWORD_ONLY, default=default, annotation=hints[field.name])

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        parameters: list[Parameter] = []
        for own in signature(command).parameters.values():
            replaced = [on_command_line(field) for field in taken]
            parameters += replaced if own.name == "options" else [own.replace(kind=Parameter.KEYWORD_ONLY)]

        @wraps(command)
        def run(context: typer.Context, **given: Any) -> None:
            options = {field.name: given.pop(field.name) for field in taken}
            if "format" in options:
                check_given([name for name in options if _is_given(context, name)], options["format"])
            command(options=QuantizeOptions(**options), **given)

        parameters.append(Parameter("context", Parameter.KEYWORD_ONLY, annotation=typer.Context))
        run.__signature__ = Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return run

    return decorate


def _is_given(context: typer.Context, name: str) -> bool:
    """Whether the parameter called `name` stands on the command line, and is not a default."""
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def _check_plot(plot: Path | None) -> None:
    """Refuse a plot that could not be written in the end."""
    if plot is not None:
        from vllm_babai.offline.tools.plots import check_plot

        check_plot(plot)


@app.command()
@takes_options()
def quantize(
    model: Model,
    out: Annotated[Path, typer.Argument(help="Folder to make.")],
    options: QuantizeOptions,
    size: Annotated[
        str | None, typer.Option(help="Choose the bits for a checkpoint of this size, such as 5GB.")
    ] = None,
    fit: Annotated[str | None, typer.Option(help="Choose them for a device with this memory, such as 24GiB.")] = None,
    kv_tokens: Annotated[int, typer.Option(help="--fit: tokens of KV cache to leave room for.", min=0)] = 32768,
    resume: Annotated[bool, typer.Option(help="Go on with an interrupted run.")] = False,
    overwrite: Overwrite = False,
) -> None:
    """Quantize MODEL and write a checkpoint that `vllm serve OUT --quantization babai` serves.

    Without --format: SSQR, of 4 bits without --target-bits, --size or --fit. On several GPUs:
    torchrun --nproc-per-node 8 -m vllm_babai.offline.cli quantize MODEL OUT.
    """
    from vllm_babai.offline.card import serve_line
    from vllm_babai.offline.model.checkpoint import REPORT
    from vllm_babai.offline.pipeline import quantize as run

    options = _fitted(model, options, size, fit, kv_tokens)
    bits = options.planned_rate or options.bits
    if speaks():
        typer.echo(f"format {options.format}, {bits} bits per weight")
    with _resumable("`babai quantize` goes on where it stopped with --resume"):
        folder = run(model, out, options, resume=resume, overwrite=overwrite)
    if not speaks():
        return
    report = json.loads((folder / REPORT).read_text())
    size = report["checkpoint_bytes"] / 1e6
    typer.echo(f"{folder}: {report['bits_per_weight']:.3f} bits per quantized weight, {size:.1f} MB in all")
    typer.echo(f"serve it: {serve_line(str(folder))}")


def _fitted(model: str, options: QuantizeOptions, size: str | None, fit: str | None, kv_tokens: int) -> QuantizeOptions:
    """Options with the bits that --size or --fit asks for. Raises QuantizationError where two options set the bits."""
    if size is None and fit is None:
        return options
    if (size is not None and fit is not None) or options.target_bits is not None:
        raise QuantizationError("--size, --fit and --target-bits each choose the bits: give one of them")
    from vllm_babai.offline.fit import fit_device, fit_size, measure

    sizes = measure(model, options)
    return fit_size(options, size, sizes) if size is not None else fit_device(options, fit or "", kv_tokens, sizes)


@app.command()
def inspect(
    folder: Annotated[Path, typer.Argument(help="Quantized folder.")],
    plot: Annotated[Path | None, typer.Option(help="PNG file for the distribution of the integers.")] = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="Compare all files, config and tokenizer too, with what was written.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Show what a quantized folder holds, layer by layer; everything stored is decoded and checked."""
    from vllm_babai.offline.tools.inspect import inspect as look
    from vllm_babai.offline.tools.inspect import integer_counts
    from vllm_babai.offline.tools.inspect import verify as compare

    _check_plot(plot)
    if verify:
        compare(folder)
    found = look(folder)
    if plot is not None:
        from vllm_babai.offline.tools.plots import plot_integers

        plot_integers(integer_counts(folder), plot)
    if as_json:
        typer.echo(json.dumps(asdict(found), indent=2))
        return
    width = max(len(linear.name) for linear in found.linears)
    headings = ("out", "in", "bits", "entropy", "redundancy", "max", "overflow", "error")
    table = Table(Column("linear", min_width=width), *headings)
    for linear in found.linears:
        overflow = "" if linear.overflow_rate is None else f"{linear.overflow_rate:.2%}"
        error = "" if linear.relative_error is None else f"{linear.relative_error:.5f}"
        rates = (linear.bits_per_weight, linear.entropy, linear.redundancy)
        rates_shown = ("" if rate is None else f"{rate:.3f}" for rate in rates)
        largest = "" if linear.largest is None else str(linear.largest)
        numbers = (str(linear.rows), str(linear.columns), *rates_shown, largest)
        table.add_row(linear.name, *numbers, overflow, error)
    console = Console()
    console.print(table)
    for experts in found.experts:
        console.print(experts.summary, soft_wrap=True, highlight=False)
    weights, size = f"{found.quantized_weights:,} quantized weights", f"{found.checkpoint_bytes / 1e6:.1f} MB in all"
    console.print(f"{found.format}: {found.bits_per_weight:.3f} bits per weight over {weights}, {size}")
    if found.digest is not None:
        console.print(
            f"digest {found.digest}{': all files are as they were written' if verify else ''}", soft_wrap=True
        )


@app.command()
@takes_options("calibration", "samples", "sequence_length")
def predict(
    model: Model,
    target_bits: Annotated[float, typer.Option(help="Bits per weight, everything counted.")],
    *,
    format: Annotated[Literal["ssqr", "hptq", "trellis"], typer.Option(help="Checkpoint format.")] = "ssqr",
    options: QuantizeOptions,
    plot: Annotated[Path | None, typer.Option(help="PNG file for the trade-off curve.")] = None,
    as_json: Json = False,
) -> None:
    """Say what MODEL will be like at a size, and where its bits go, without quantizing it."""
    from vllm_babai.offline.tools.predict import predict as run

    _check_plot(plot)
    least, most = RATES["hptq"]
    if format == "hptq" and not least <= target_bits <= most:
        raise QuantizationError(f"--target-bits must be from {least} to {most} with hptq, not {target_bits}")
    goal = (
        replace(options, format="hptq", rate=target_bits)
        if format == "hptq"
        else replace(options, format=format, target_bits=target_bits)
    )
    found = run(model, goal)
    if plot is not None:
        from vllm_babai.offline.tools.plots import plot_tradeoff

        plot_tradeoff(found.curves, (found.rate, found.loss), plot)
    if as_json:
        typer.echo(json.dumps(asdict(found) | {"perplexity_factor": found.perplexity_factor}, indent=2))
        return
    width = max(len(linear.name) for linear in found.plan)
    table = Table(Column("linear", min_width=width), "bits", "loss", "dense", "overflow")
    for linear in found.plan:
        dense = "" if linear.bits is None else str(linear.bits)
        overflow = "" if linear.overflow is None else f"{linear.overflow:.2%}"
        table.add_row(linear.name, f"{linear.rate:.3f}", f"{linear.loss:.6f}", dense, overflow)
    console = Console()
    console.print(table)
    low, high = found.perplexity_factor
    console.print(f"{found.rate:.3f} bits per weight, {found.checkpoint_bytes / 1e6:.1f} MB in all")
    console.print(f"expected KL divergence {found.loss:.5f} nats per token: perplexity × {low:.4f} to {high:.4f}")


@app.command()
def eval(
    model: Model,
    data: Annotated[Path | None, typer.Option(help="Text: a .jsonl, .txt or .parquet file.")] = None,
    window: Annotated[int, typer.Option(help="Tokens per window.")] = 512,
    samples: Annotated[int, typer.Option(help="Windows, spread evenly over the text; 0: all.")] = 0,
    against: Annotated[str | None, typer.Option(help="The original model, to compare with.")] = None,
    tasks: Annotated[str | None, typer.Option(help="Tasks of lm-eval, separated by commas.")] = None,
    task_folder: Annotated[Path | None, typer.Option(help="Where lm-eval finds tasks of your own.")] = None,
    limit: Annotated[int | None, typer.Option(help="Documents per task; without it, all.")] = None,
    card: Annotated[bool, typer.Option(help="Note the result in the model card of MODEL, a quantized folder.")] = False,
    as_json: Json = False,
) -> None:
    """Perplexity of a model on a text, or its scores in tasks; with --against also how far it is from the original."""
    from vllm_babai.offline.card import note_evaluation
    from vllm_babai.offline.model.checkpoint import REPORT
    from vllm_babai.offline.tools.evaluate import evaluate
    from vllm_babai.offline.tools.tasks import run_tasks

    if data is None and tasks is None:
        raise QuantizationError("nothing to measure: give a text by --data, or --tasks")
    if card and (data is None or not (Path(model) / REPORT).is_file()):
        raise QuantizationError(f"--card needs --data, and in {model} the report of `babai quantize` ({REPORT})")
    text = None if data is None else evaluate(model, data, window=window, samples=samples, against=against)
    if card and text is not None and data is not None:
        note_evaluation(Path(model), {"data": data.name, **asdict(text)})
    scores = {}
    if tasks is not None:
        models = {"tasks": model} if against is None else {"tasks": model, "original_tasks": against}
        scores = {
            key: run_tasks(name, tasks.split(","), task_folder=task_folder, limit=limit) for key, name in models.items()
        }
    if as_json:
        found = {key: [asdict(score) for score in found] for key, found in scores.items()}
        typer.echo(json.dumps((asdict(text) if text else {}) | found, indent=2))
        return
    if text is not None:
        _print_evaluation(text)
    if scores:
        _print_scores(*scores.values())


def _print_evaluation(result: "Evaluation") -> None:
    table = Table("measure", "value", "standard error")
    table.add_row("perplexity", f"{result.perplexity:.4f}")
    table.add_row("negative log-likelihood, nats per token", f"{result.nll:.5f}", f"{result.nll_error:.5f}")
    if (c := result.comparison) is not None:
        table.add_row("perplexity of the original", f"{c.original_perplexity:.4f}")
        table.add_row("loss against the original, nats per token", f"{c.loss:.5f}", f"{c.loss_error:.5f}")
        table.add_row("KL divergence, nats", f"{c.divergence:.5f}", f"{c.divergence_error:.5f}")
        table.add_row("same most likely token", f"{c.agreement:.2%}", f"{c.agreement_error:.2%}")
    console = Console()
    console.print(table)
    console.print(f"{result.windows} windows of {result.window} tokens")


@app.command()
def compare(
    models: Annotated[list[str], typer.Argument(help="Model folders, quantized or dense, or names on the hub.")],
    against: Annotated[str, typer.Option(help="The original model.")],
    data: Annotated[Path, typer.Option(help="Text: a .jsonl, .txt or .parquet file.")],
    *,
    window: Annotated[int, typer.Option(help="Tokens per window.")] = 512,
    samples: Annotated[int, typer.Option(help="Windows, spread evenly over the text; 0: all.")] = 0,
    as_json: Json = False,
) -> None:
    """Several models beside each other: bytes of their weight files, and how far they are from the original."""
    from vllm_babai.offline.model.checkpoint import open_checkpoint
    from vllm_babai.offline.tools.evaluate import evaluate

    sizes = [open_checkpoint(model).bytes() for model in models]  # before the first of them takes its time
    found = [evaluate(model, data, window=window, samples=samples, against=against) for model in models]
    if as_json:
        rows = zip(models, sizes, found, strict=True)
        typer.echo(json.dumps([{"model": model, "bytes": size, **asdict(one)} for model, size, one in rows], indent=2))
        return
    table = Table(
        Column("model", overflow="fold"), "MB", "perplexity", "loss, nats per token", "KL, nats", "same top token"
    )
    for model, size, one in zip(models, sizes, found, strict=True):
        c = one.comparison
        assert c is not None
        loss, divergence = f"{c.loss:.4f} ± {c.loss_error:.4f}", f"{c.divergence:.4f} ± {c.divergence_error:.4f}"
        agreement = f"{c.agreement:.1%} ± {c.agreement_error:.1%}"
        table.add_row(model, f"{size / 1e6:.1f}", f"{one.perplexity:.3f}", loss, divergence, agreement)
    Console().print(table)


def _print_scores(scores: "list[Score]", original: "list[Score] | None" = None) -> None:
    table = Table("task", "metric", "value", "standard error", *(("original",) if original else ()))
    for i, score in enumerate(scores):
        error = "" if score.error is None else f"{score.error:.4f}"
        others = (f"{original[i].value:.4f}",) if original else ()
        table.add_row(score.task, score.metric, f"{score.value:.4f}", error, *others)
    Console().print(table)


@app.command()
def convert(
    source: Annotated[Path, typer.Argument(help="Quantized folder.")],
    out: Annotated[Path, typer.Argument(help="Folder to make.")],
    to: Annotated[Literal["dense", "ssqr", "hptq", "compressed-tensors"], typer.Option(help="What to convert to.")],
    dtype: Annotated[str, typer.Option(help="Of the dense weights; float32 is exact.")] = "float32",
    clip: Annotated[bool, typer.Option(help="compressed-tensors: clip overflow, which it has no room for.")] = False,
    overwrite: Overwrite = False,
) -> None:
    """Convert a quantized folder: to the other format, the same lattice points; to an ordinary dense checkpoint; or to
    the layout of compressed-tensors, which vLLM and transformers load without babai.
    """
    from vllm_babai.offline.model.checkpoint import open_checkpoint
    from vllm_babai.offline.tools.convert import convert as run

    if clip and to != "compressed-tensors":
        raise QuantizationError(f"--clip is for --to compressed-tensors; nothing is clipped with --to {to}")
    folder = run(source, out, to, torch_dtype(dtype), clip_overflow=clip, overwrite=overwrite)
    typer.echo(f"{folder}: {to}, {open_checkpoint(folder).bytes() / 1e6:.1f} MB")


@app.command()
def push(
    folder: Annotated[Path, typer.Argument(help="Quantized folder.")],
    repository: Annotated[str, typer.Argument(help="organization/name on the hub; made where it is not there.")],
    private: Annotated[bool, typer.Option(help="Make it private.")] = False,
) -> None:
    """Upload a quantized folder to the Hugging Face hub; log in with `hf auth login` first."""
    from vllm_babai.offline.card import serve_line
    from vllm_babai.offline.tools.push import push as run

    with _resumable("the same command sends what is missing"):
        address = run(folder, repository, private=private)
    typer.echo(f"{address}: {serve_line(repository)}")


@app.command()
def tune(
    device: Annotated[str, typer.Option(help="The GPU to tune for.")] = "cuda",
    out: Annotated[
        Path | None, typer.Option(help="Table to write; without it, the installed one for this GPU.")
    ] = None,
) -> None:
    """Measure which kernel configurations are fastest on this GPU, and write its table; an interrupted run goes on."""
    if not torch.cuda.is_available():
        raise QuantizationError("babai tune measures a GPU, and there is none here")
    from vllm_babai.triton_kernels.configs import FOLDER
    from vllm_babai.triton_kernels.tuning.tune import tune as run

    with _resumable("the same command goes on where it stopped"):
        path = run(device, out)
    typer.echo(f"{path}: written" + ("" if path.parent.samefile(FOLDER) else f"; the kernels look in {FOLDER}"))


@contextmanager
def _resumable(advice: str) -> Iterator[None]:
    """Say on Ctrl-C how to go on."""
    try:
        yield
    except KeyboardInterrupt:
        if speaks():
            typer.echo(f"interrupted: {advice}", err=True)
        raise typer.Exit(130) from None


def main() -> None:
    """Run the command; what the user can fix is shown in one line, without a traceback, and ends with status 2."""
    torch.set_float32_matmul_precision("highest")
    try:
        app()
    except SaidElsewhere:
        raise SystemExit(2) from None
    except (QuantizationError, FormatError) as error:
        _fail(error)
    except OSError as error:
        if error.errno not in FILE_SYSTEM:
            raise
        _fail(f"{error.filename or 'a file'} cannot be written or read: {error.strerror}; {FILE_SYSTEM[error.errno]}")


def _fail(error: object) -> NoReturn:
    message = " ".join(str(error).split())
    Console(stderr=True).print(f"error: {message}", style="red", markup=False, highlight=False, soft_wrap=True)
    raise SystemExit(2)


if __name__ == "__main__":
    main()
