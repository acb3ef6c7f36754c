"""The run over a whole model: capture → factor → nearest plane → encode → checkpoint, block by block."""

import copy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.progress import Progress
from torch import Tensor, nn

from vllm_babai.errors import QuantizationError
from vllm_babai.format import FORMATS, CheckpointConfig
from vllm_babai.offline.model.calibration import calibration_tokens, load_tokenizer
from vllm_babai.offline.model.capture import advance, hessians, moments, seen_by, shared_inputs
from vllm_babai.offline.model.checkpoint import open_checkpoint
from vllm_babai.offline.model.streamed import StreamedModel, open_streamed
from vllm_babai.offline.options import QuantizeOptions
from vllm_babai.offline.plan.budget import Budget
from vllm_babai.offline.plan.plan import PlannedLinear, forecast_model, make_plan
from vllm_babai.offline.plan.sensitivity import Sensitivity, measure_sensitivity
from vllm_babai.offline.run_folder import PartialOutput, open_output
from vllm_babai.offline.scales.column_steps import choose_column_steps
from vllm_babai.offline.scales.linear import LayerReport, QuantizedLinear, quantize_hptq, quantize_ssqr
from vllm_babai.offline.solver.drift import Drift, corrected
from vllm_babai.offline.solver.factor import Factor, factorize
from vllm_babai.offline.solver.lattice import Lattice
from vllm_babai.progress import counting_progress


def quantize(
    model: str | Path, out: str | Path, options: QuantizeOptions, *, resume: bool = False, overwrite: bool = False
) -> Path:
    """Quantize a Hugging Face causal LM to a folder that vLLM serves; returns the folder.

    model: folder or hub name. out: folder to make; it appears when it is complete. resume: go on with an interrupted
    run of the same options. overwrite: replace `out`, and an interrupted run, if there is one. Memory: one decoder
    block and its calibration inputs, both twice with drift correction. Raises QuantizationError for anything the user
    can mend.
    """
    checkpoint = open_checkpoint(model)
    device = options.resolve_device()
    streamed = open_streamed(checkpoint, device, options.resolve_dtype(device))
    selected = [name for i in range(len(streamed.blocks)) for name in streamed.linears(i) if not options.ignores(name)]
    head = None if options.lm_head is None else streamed.head_name
    if not selected and head is None:
        raise QuantizationError("--ignore excludes every linear of the model")
    tokenizer = load_tokenizer(checkpoint.folder)
    length = sequence_length(options, checkpoint.config())
    tokens = calibration_tokens(tokenizer, options.calibration, options.samples, length, options.seed)
    hidden, arguments = streamed.first_inputs(tokens)
    output = open_output(Path(out), streamed, options, resume=resume, overwrite=overwrite)
    with counting_progress("linears") as progress:
        sensitivity, plan = _prepare(output, tokens, hidden, arguments, progress) if selected else (None, {})
        budget = Budget(options.rate, {linear.name: linear.rate for linear in plan.values()})
        original = hidden.clone() if options.drift else None
        run = _Run(streamed, options, output, hidden, original, sensitivity, plan, budget, progress)
        task = progress.add_task("", total=len(selected) + (head is not None))
        for index, block_arguments in enumerate(arguments):
            progress.update(task, description=f"block {index + 1} of {len(arguments)}")
            progress.advance(task, run.block(index, block_arguments))
        if head is not None:
            progress.update(task, description=head)
            run.head(tokens)
            progress.advance(task)
    everything = [name for i in range(len(streamed.blocks)) for name in streamed.linears(i)]
    ignored = [name for name in everything if options.ignores(name)]
    return output.finish(_checkpoint_config(options, plan, head, ignored))


def _checkpoint_config(
    options: QuantizeOptions, plan: dict[str, PlannedLinear], head: str | None, ignored: list[str]
) -> CheckpointConfig:
    """A quantized head is always among the overrides, by which the plugin knows it; any other is ignored."""
    if head is None:
        ignored = ["lm_head", *ignored]
    if options.format == "hptq":
        return CheckpointConfig(options.format, ignore=ignored, overrides={} if head is None else {head: {}})
    overrides = {n: {"bits": linear.bits} for n, linear in plan.items() if linear.bits not in (None, options.bits)}
    if head is not None:
        overrides[head] = {"bits": options.of_head().bits}
    return CheckpointConfig(options.format, options.bits, options.group_size, ignored, overrides)


def _prepare(
    output: PartialOutput, tokens: Tensor, hidden: Tensor, arguments: list[dict[str, Any]], progress: Progress
) -> tuple[Sensitivity | None, dict[str, PlannedLinear]]:
    """Sensitivity to errors, and the plan of every linear by name; those of an interrupted run where there is one."""
    model, options = output.model, output.options
    if not options.sensitivity:
        return None, {}
    plan = output.read_plan()
    if plan is None:
        task = progress.add_task("measuring sensitivity", total=None)
        output.sensitivity_folder.mkdir(exist_ok=True)
        sensitivity = measure_sensitivity(model, tokens, hidden, arguments, options.seed, output.sensitivity_folder)
        plan = []
        if options.planned_rate is not None:
            progress.update(task, description="planning")
            plan = make_plan(forecast_model(model, hidden, arguments, sensitivity, options), options)
        output.write_plan(plan)
        progress.remove_task(task)
    sensitivity = Sensitivity(output.sensitivity_folder, model.blocks_name)
    return sensitivity, {linear.name: linear for linear in plan}


@dataclass(frozen=True)
class _Stream:
    """A block, those of its linears that are quantized by full name, and the calibration inputs that go through it."""

    block: nn.Module
    linears: dict[str, nn.Linear]
    hidden: Tensor
    arguments: dict[str, Any]


@dataclass
class _Run:
    """What goes from block to block. hidden: the calibration inputs of the next block. original: what they are in the
    original model; None without drift correction.
    """

    model: StreamedModel
    options: QuantizeOptions
    output: PartialOutput
    hidden: Tensor
    original: Tensor | None
    sensitivity: Sensitivity | None
    plan: dict[str, PlannedLinear]
    budget: Budget
    progress: Progress

    def block(self, index: int, arguments: dict[str, Any]) -> int:
        """Quantize a block, or restore what an interrupted run made of it; advance its inputs; count its linears."""
        block = self.model.load_block(index)
        stream, original = self._stream(index, block, self.hidden, arguments), None
        if self.original is not None:
            original = self._stream(index, copy.deepcopy(block), self.original, arguments)
        if self.output.has_block(index):
            self._restore(index, stream.linears)
        else:
            self._quantize(index, stream, original)
        if index + 1 < len(self.output.parts):
            for each in filter(None, (stream, original)):
                advance(each.block, each.hidden, arguments, self.model.device)
        return len(stream.linears)

    def head(self, tokens: Tensor) -> None:
        """Quantize the head after the last block, unless an interrupted run did: a block that is one linear.

        Every token is a sequence of its own to it, so that no more than one token's logits are computed. tokens: int64
        [sequences, length].
        """
        index, name = len(self.model.blocks), self.model.head_name
        if self.output.has_block(index):
            return
        inputs = [self.hidden] if self.original is None else [self.hidden, self.original]
        self.model.advance_to_head(tokens, *inputs)
        linear = self.model.load(name)
        assert isinstance(linear, nn.Linear)
        stream, *original = (_Stream(linear, {name: linear}, each.flatten(0, 1)[:, None], {}) for each in inputs)
        options = self.options.of_head()
        alone = replace(self, options=options, plan={}, budget=Budget(options.rate, {}))
        alone._quantize(index, stream, original[0] if original else None)

    def _stream(self, index: int, block: nn.Module, hidden: Tensor, arguments: dict[str, Any]) -> _Stream:
        name = self.model.block_name(index)
        linears = {f"{name}.{n}": m for n, m in block.named_modules() if isinstance(m, nn.Linear)}
        linears = {n: m for n, m in linears.items() if not self.options.ignores(n)}
        return _Stream(block, linears, hidden, arguments)

    def _quantize(self, index: int, stream: _Stream, original: _Stream | None) -> None:
        """Quantize linears in the order in which they run, each group on the outputs of the groups before it."""
        tensors: dict[str, Tensor] = {}
        reports: list[LayerReport] = []
        first = stream.hidden[:1].to(self.model.device)
        for group in shared_inputs(stream.block, stream.linears, first, stream.arguments):
            covariance, drift = self._capture(group, stream, original)
            factor = self._factorize(covariance, group)
            exponents = self._column_steps({name: stream.linears[name].weight for name in group}, factor)
            for name in group:
                quantized = self._quantize_linear(name, factor, drift, exponents)
                _replace(stream.linears[name], quantized.weight.dequantize())
                if self.options.format == "hptq":
                    self.budget.spend(quantized.report)
                tensors |= {f"{name}.{key}": tensor for key, tensor in quantized.tensors.items()}
                reports.append(quantized.report)
        self.output.write_block(index, tensors, reports)

    def _capture(self, group: list[str], stream: _Stream, original: _Stream | None) -> tuple[Tensor, Drift | None]:
        """Hessian of a group's inputs, and how far they are from the original model's."""
        lead = group[0]
        weights = self.sensitivity.shared_weights(group) if self.sensitivity else None
        if original is not None:
            seen, wanted = (seen_by(s.block, s.linears[lead], s.hidden, s.arguments) for s in (stream, original))
            return moments(lead, seen, wanted, weights)
        covariances = hessians(
            stream.block, {lead: stream.linears[lead]}, stream.hidden, stream.arguments, {lead: weights}
        )
        return covariances[lead], None

    def _factorize(self, covariance: Tensor, group: list[str]) -> Factor:
        options = self.options
        try:
            factor = factorize(covariance, options.order, options.damping)
        except QuantizationError as error:
            raise QuantizationError(f"{', '.join(group)}: {error}") from error
        if factor.damping > options.damping:
            self.progress.console.print(f"{', '.join(group)}: damping raised to {factor.damping:g}")
        return factor

    def _column_steps(self, weights: dict[str, Tensor], factor: Factor) -> Tensor | None:
        """Exponents of the columns' steps of linears that share an input, or None."""
        if self.options.format != "hptq" or not self.options.column_steps:
            return None
        rates = [self.budget.next_rate(name, weight.numel()) for name, weight in weights.items()]
        chosen = choose_column_steps(list(weights.values()), factor, rates, self.options.seed)
        return None if chosen is None else chosen.exponents

    def _quantize_linear(
        self, name: str, factor: Factor, drift: Drift | None, column_exponents: Tensor | None
    ) -> QuantizedLinear:
        options = self.options
        rows = self.sensitivity.row_geometry(name) if self.sensitivity else None
        lattice = Lattice(factor, rows, options.paths)
        weight = self.model.checkpoint.read(f"{name}.weight").to(self.model.device)
        if drift is not None:
            weight = corrected(weight, factor, drift)
        if options.format == "hptq":
            rate = self.budget.next_rate(name, weight.numel())
            return quantize_hptq(name, weight, lattice, rate, options.seed, column_exponents)
        bits, overflow = options.bits, options.overflow
        if name in self.plan:
            bits, overflow = self.plan[name].bits or bits, self.plan[name].overflow or overflow
        return quantize_ssqr(name, weight, lattice, bits, options.group_size, overflow, options.seed)

    def _restore(self, index: int, linears: dict[str, nn.Linear]) -> None:
        """Give a block the weights that an interrupted run has already quantized."""
        stored, form = self.output.read_block(index), FORMATS[self.options.format]
        for name, linear in linears.items():
            parts = {key: stored[f"{name}.{key}"] for key in form.dtypes}
            _replace(linear, form.from_tensors(parts).decode().dequantize())
        if self.options.format == "hptq":
            for report in self.output.read_reports(index):
                self.budget.spend(report)


def _replace(linear: nn.Linear, weight: Tensor) -> None:
    linear.weight.copy_(weight)


def sequence_length(options: QuantizeOptions, config: dict[str, Any]) -> int:
    """Tokens per calibration sequence. Raises QuantizationError when the model has fewer positions."""
    positions = config.get("max_position_embeddings") or 2048
    if options.sequence_length > positions:
        raise QuantizationError(
            f"--sequence-length {options.sequence_length} exceeds the model's {positions} positions"
        )
    return options.sequence_length or min(2048, positions)
