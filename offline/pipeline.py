"""The run over a whole model: capture → factor → nearest plane → encode → checkpoint, block by block."""

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from vllm_babai.format import FORMATS, CheckpointConfig, Weight
from vllm_babai.format.config import kind_of, layer_name
from vllm_babai.offline.model.expert_report import check_stored, report_experts
from vllm_babai.offline.model.place import check_place
from vllm_babai.offline.model.routed import SeenByExpert
from vllm_babai.offline.model.streamed import StreamedModel
from vllm_babai.offline.model.walk import Group, Part, Round, Stage, bits_outside, rounds, walk
from vllm_babai.offline.options import QuantizeOptions
from vllm_babai.offline.plan.budget import Budget, Target, targets
from vllm_babai.offline.plan.plan import PlannedLinear, forecast_model, make_plan
from vllm_babai.offline.plan.sensitivity import Sensitivity, measure_sensitivity, sensitivity_passes
from vllm_babai.offline.prepare import Prepared, prepare
from vllm_babai.offline.ranks import Ranks, joined_ranks
from vllm_babai.offline.run_folder import RunFolder, open_run
from vllm_babai.offline.scales.column_steps import choose_column_steps
from vllm_babai.offline.scales.linear import (
    LayerReport,
    QuantizedLinear,
    quantize_hptq,
    quantize_ssqr,
    quantize_trellis,
)
from vllm_babai.offline.solver.drift import corrected
from vllm_babai.offline.solver.factor import factorize
from vllm_babai.offline.solver.lattice import Lattice
from vllm_babai.progress import CountingProgress, Phase, counting_progress


def quantize(
    model: str | Path, out: str | Path, options: QuantizeOptions, *, resume: bool = False, overwrite: bool = False
) -> Path:
    """Quantize a Hugging Face causal LM to a folder that vLLM serves; returns the folder.

    model: folder or hub name. out: folder to make; it appears when it is complete. resume: go on with an interrupted
    run of the same options. overwrite: replace `out`, and an interrupted run, if there is one. Memory: one decoder
    block and its calibration inputs, both twice with drift correction. Where torchrun has started several processes
    they do it together, see `offline.ranks`. Raises QuantizationError for anything the user can fix.
    """
    with joined_ranks(options.resolve_device()) as ranks:
        with ranks.together():
            check_place(Path(out), model, resume=resume, overwrite=overwrite)
            prepared = prepare(model, options, ranks)
        with open_run(Path(out), prepared, options, resume=resume, overwrite=overwrite) as folder:
            config = None if ranks.once(lambda: folder.is_complete) else _quantize_parts(prepared, folder, options)

            def publish() -> Path:
                if config is not None:
                    folder.finish(config)
                return folder.publish()

            return ranks.once(publish)


def _quantize_parts(prepared: Prepared, folder: RunFolder, options: QuantizeOptions) -> CheckpointConfig:
    """Quantize every part that the folder lacks; returns how the linears are stored."""
    linears = [name for part in prepared.blocks for name in part.linears]
    with counting_progress(quiet=not prepared.ranks.is_first) as progress:
        sensitivity, plan = _sensitivity_and_plan(prepared, folder, options, progress) if linears else (None, [])
        outside = bits_outside(prepared.model, options)
        wanted = targets(linears, outside, plan, options)
        done = prepared.ranks.once(lambda: {part.name for part in prepared.parts if folder.has(part)})
        if len(done) < len(prepared.parts):
            budget = Budget(wanted, set(outside))
            with progress.phase("quantizing", len(wanted), "linears") as phase:
                for note in prepared.model.notes():
                    phase.note(note)
                embedding = _embedding(prepared, options)
                run = _Run(prepared, options, folder, done, sensitivity, wanted, budget, phase, embedding)
                walk(prepared.model, prepared.walked, prepared.inputs, _streams(prepared, run), run.visit)
    return _checkpoint_config(prepared, options, wanted)


def _embedding(prepared: Prepared, options: QuantizeOptions) -> str | None:
    return None if options.embedding is None else prepared.model.embedding_name


def _streams(prepared: Prepared, run: "_Run") -> list[Tensor]:
    """Hidden states before the first block: of the quantized model, and with drift correction those of the original."""
    hidden = prepared.inputs.hidden
    if prepared.embedding is None:
        return [hidden, hidden.clone()] if run.options.drift else [hidden]
    looked_up, _ = prepared.model.first_inputs(prepared.inputs.tokens, run.look_up(prepared.embedding))
    return [looked_up, hidden] if run.options.drift else [looked_up]


def _checkpoint_config(prepared: Prepared, options: QuantizeOptions, wanted: dict[str, Target]) -> CheckpointConfig:
    """Quantized head and embedding are always among the overrides, by which the plugin knows them; any other head is
    ignored.
    """
    model, outside = prepared.model, bits_outside(prepared.model, options)
    embedding = _embedding(prepared, options)
    has_head = len(prepared.walked) > len(prepared.blocks)
    ignored = [*([] if has_head else ["lm_head"]), *weights_left_alone(model, wanted)]
    scope = model.block_names
    kinds = sorted({kind_of(name, part.name) for part in prepared.blocks for name in part.linears})
    if options.format != "ssqr":
        overrides: dict[str, dict[str, int]] = {name: {} for name in outside}
        residency = FORMATS[options.format].residencies[0]
        return CheckpointConfig(
            options.format,
            ignore=ignored,
            overrides=overrides,
            residency=residency,
            scope=scope,
            linears=kinds,
            embedding=embedding,
        )
    overrides = {
        layer_name(n): {"bits": target.bits}
        for n, target in wanted.items()
        if target.bits != options.bits or n in outside
    }
    return CheckpointConfig(
        options.format,
        options.bits,
        options.group_size,
        ignored,
        overrides,
        scope=scope,
        linears=kinds,
        embedding=embedding,
    )


def weights_left_alone(model: StreamedModel, quantized: Collection[str]) -> list[str]:
    """Modules of the decoder blocks with a matrix of their own that stays as it is: convolutions, routers, linears that
    were ignored. In vLLM any of them may be a linear. A layer's experts are one name for each of their linears.
    """
    blocks = tuple(f"{name}." for name in model.block_names)
    packed = {name for block in model.block_names for name in model.packed(block, quantized)}
    weights = [name for name in model.checkpoint.files if name.startswith(blocks) and name.endswith(".weight")]
    matrices = [n.removesuffix(".weight") for n in weights if n not in packed and len(model.checkpoint.shape(n)) > 1]
    experts = [name for block in model.block_names for each in model.experts(block) for name in each.names[0].values()]
    return list(dict.fromkeys(layer_name(name) for name in [*matrices, *experts] if name not in quantized))


def _sensitivity_and_plan(
    prepared: Prepared, folder: RunFolder, options: QuantizeOptions, progress: CountingProgress
) -> tuple[Sensitivity | None, list[PlannedLinear]]:
    """Sensitivity to errors, and the plan where one is asked for; those of an interrupted run where there is one."""
    if not options.sensitivity:
        return None, []
    model, inputs, ranks = prepared.model, prepared.inputs, prepared.ranks
    plan = ranks.once(folder.read_plan)
    if plan is None:
        ranks.once(lambda: folder.sensitivity.mkdir(exist_ok=True))
        with progress.phase("measuring sensitivity", sensitivity_passes(model), "passes") as phase:
            sensitivity = measure_sensitivity(
                model, inputs, options.seed, folder.sensitivity, phase.advance, phase.note, ranks
            )
        forecasts = []
        if options.planned_rate is not None:
            blocks = prepared.blocks
            with progress.phase("planning", sum(len(part.linears) for part in blocks), "linears") as phase:
                ranks.once(lambda: None)  # what the first has written is there
                forecasts = forecast_model(model, blocks, inputs, sensitivity, options, phase.advance, ranks)

        def write() -> list[PlannedLinear]:
            made = make_plan(forecasts, options) if forecasts else []
            folder.write_plan(made)
            return made

        plan = ranks.once(write)
    return Sensitivity(folder.sensitivity, model.blocks_name), plan


@dataclass(frozen=True)
class _Made:
    """A linear that this rank has quantized. seen: of an expert's."""

    tensors: dict[str, Tensor]
    report: LayerReport
    seen: SeenByExpert | None


@dataclass
class _Run:
    """What is done with each part: quantize it, or restore what an interrupted run made of it. done: names of the parts
    that it has made.
    """

    prepared: Prepared
    options: QuantizeOptions
    folder: RunFolder
    done: set[str]
    sensitivity: Sensitivity | None
    targets: dict[str, Target]
    budget: Budget
    phase: Phase
    embedding: str | None  # where it is to be quantized

    @property
    def ranks(self) -> Ranks:
        """Those that quantize."""
        return self.prepared.ranks

    def visit(self, part: Part, stage: Stage, original: Stage | None = None) -> None:
        """Give a stage its quantized weights. original: the same part of the original model, to correct drift by."""
        self.phase.at(part.name)
        if part.name in self.done:
            self._restore(part, stage.linears)
            self.phase.advance(len(part.linears))
        else:
            self._quantize(part, stage, original)

    def look_up(self, part: Part) -> Tensor:
        """Quantize an embedding, or restore it; what it gives for every token, [vocabulary, hidden].

        Its Hessian is the identity: the rows of a look-up are not summed, so that all features count alike, and so do
        all rows, of which each token reads one. Nearest plane is then plain rounding, which every rank does on its own.
        """
        name, model = part.name, self.prepared.model
        self.phase.at(name)
        self.phase.advance()
        if name in self.done:
            return self._stored_weight(name, self.folder.read(part)).dequantize()
        weight = model.checkpoint.read(f"{name}.weight").to(model.device)
        factor = factorize(torch.eye(weight.shape[1], device=weight.device), self.options.column_order, 0.0)
        quantized = self._encode(name, weight, Lattice(factor), self.budget)
        if self.ranks.is_first:
            tensors = {f"{name}.{key}": tensor for key, tensor in quantized.tensors.items()}
            self.folder.write(part, tensors, [quantized.report])
        return quantized.weight.dequantize()

    def _quantize(self, part: Part, stage: Stage, original: Stage | None) -> None:
        """Quantize linears in the order in which they run, each group on the outputs of the groups before it."""
        own: dict[str, _Made] = {}
        order: list[str] = []
        for each in rounds(stage, original, self._token_weights, self.options, self.ranks):
            order.extend(each.linears)
            self._quantize_round(each, own)
        made = {name: linear for of_rank in self.ranks.collect(own) for name, linear in of_rank.items()}
        if self.ranks.is_first:
            self._write(part, stage, {name: made[name] for name in order})

    def _quantize_round(self, each: Round, made: dict[str, _Made]) -> None:
        """Quantize this rank's linears of a round, then exchange weights. What is left over is shared by its ranks."""
        quantizing = set(each.owners.values())
        budget, before = self.budget.share(len(quantizing)), len(made)
        for group in each.groups:
            if group.factor.damping > self.options.damping:
                names = ", ".join(group.linears)
                self.phase.note(f"{names}: damping raised to {group.factor.damping:g}")
            exponents = self._column_steps(group, budget)
            for name, linear in group.linears.items():
                if each.owners[name] == self.ranks.number:
                    quantized = self._quantize_linear(name, group, budget, exponents)
                    linear.weight.copy_(quantized.weight.dequantize())
                    budget.spend(quantized.report)
                    made[name] = _Made(quantized.tensors, quantized.report, group.expert)
                    self.phase.advance()
        for name, linear in each.linears.items():
            self.ranks.take(linear.weight, each.owners[name])
        left = self.ranks.exchange(budget.left_over)
        self.budget.left_over = sum(left[rank] for rank in sorted(quantizing))
        self.phase.advance(len(each.linears) - (len(made) - before))

    def _write(self, part: Part, stage: Stage, made: dict[str, _Made]) -> None:
        """Write a part's file and report; experts are compared with what is stored of them."""
        tensors = {f"{n}.{key}": tensor for n, linear in made.items() for key, tensor in linear.tensors.items()}
        reports = [linear.report for linear in made.values()]
        seen = {name: linear.seen for name, linear in made.items() if linear.seen is not None}
        experts = [report_experts(each, seen) for each in stage.experts]
        for report in experts:
            if report.starved:
                self.phase.note(f"{report.summary} (--samples shows them more text)")
        self.folder.write(part, tensors, reports, experts)
        if stage.experts:
            stored = self.folder.read(part)
            for each in stage.experts:
                check_stored(each, stored, FORMATS[self.options.format])

    def _token_weights(self, group: list[str]) -> Tensor | None:
        return self.sensitivity.shared_weights(group) if self.sensitivity else None

    def _column_steps(self, group: Group, budget: Budget) -> Tensor | None:
        """Exponents of the columns' steps of linears that share an input, or None."""
        if self.options.format != "hptq" or not self.options.column_steps or group.expert is not None:
            return None  # experts share one kernel, which has no steps for the columns of each
        if self.embedding in group.linears:
            return None  # what is looked up has no input that could be scaled
        weights = {name: linear.weight for name, linear in group.linears.items()}
        rates = [budget.next_rate(name, weight.numel()) for name, weight in weights.items()]

        def choose() -> Tensor | None:
            chosen = choose_column_steps(list(weights.values()), group.factor, rates, self.options.seed)
            return None if chosen is None else chosen.exponents.cpu()

        return self.ranks.once(choose)

    def _quantize_linear(
        self, name: str, group: Group, budget: Budget, column_exponents: Tensor | None
    ) -> QuantizedLinear:
        rows = self.sensitivity.row_geometry(name) if self.sensitivity else None
        lattice = Lattice(group.factor, rows, self.options.row_paths)
        if group.expert is None:
            model = self.prepared.model
            weight = model.checkpoint.read(f"{name}.weight").to(model.device)
        else:  # which the checkpoint may keep with others in one tensor
            weight = group.linears[name].weight.clone()
        if group.drift is not None:
            weight = corrected(weight, group.factor, group.drift)
        return self._encode(name, weight, lattice, budget, column_exponents)

    def _encode(
        self, name: str, weight: Tensor, lattice: Lattice, budget: Budget, column_exponents: Tensor | None = None
    ) -> QuantizedLinear:
        options, target = self.options, self.targets[name]
        if options.format == "hptq":
            rate = budget.next_rate(name, weight.numel())
            return quantize_hptq(name, weight, lattice, rate, options.seed, column_exponents)
        if options.format == "trellis":
            rate = budget.next_rate(name, weight.numel())
            return quantize_trellis(name, weight, lattice, rate, options.seed)
        return quantize_ssqr(name, weight, lattice, target.bits, options.group_size, target.overflow, options.seed)

    def _restore(self, part: Part, linears: dict[str, nn.Linear]) -> None:
        """Give a part the weights that an interrupted run has already quantized."""
        stored = self.folder.read(part)
        for name, linear in linears.items():
            linear.weight.copy_(self._stored_weight(name, stored).dequantize())
        for report in self.folder.read_reports(part):
            self.budget.spend(report)

    def _stored_weight(self, name: str, stored: dict[str, Tensor]) -> Weight:
        form = FORMATS[self.options.format]
        return form.from_tensors({key: stored[f"{name}.{key}"] for key in form.dtypes}).decode()
