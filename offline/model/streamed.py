"""A causal language model whose decoder blocks are read when their turn comes.

The model is built on the meta device. Its outer part (embedding, rotary tables) is loaded once, to make the inputs of
the first block; a block's weights exist only between `load_block` and the end of its use.
"""

import copy
from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from vllm_babai.errors import QuantizationError
from vllm_babai.offline.model.call import Call, Injector, Recorder, Recording, StandIn
from vllm_babai.offline.model.capture import batches
from vllm_babai.offline.model.checkpoint import Checkpoint
from vllm_babai.offline.model.embedding import embedding_module, is_tied
from vllm_babai.offline.model.experts import Experts, check_experts, find_experts, refuse_unknown_experts
from vllm_babai.offline.model.served import fused_with, stays_dense
from vllm_babai.offline.model.skeleton import architecture, load_config
from vllm_babai.offline.model.source import open_source
from vllm_babai.offline.model.trial import Tried, try_blocks, without
from vllm_babai.offline.model.view import CheckpointView, view_checkpoint


@dataclass
class StreamedModel:
    """See the module. Parts and linears go by their names in the checkpoint; those of transformers' modules, which may
    be others, stay in here and in `view`.

    skeleton: the model on the meta device. decoder_name: of the text decoder in it. list_name: of the list of blocks in
    the decoder. tried: what a first run of each block on the meta device has shown.
    """

    view: CheckpointView
    skeleton: PreTrainedModel
    decoder_name: str
    list_name: str
    tried: list[Tried]
    device: torch.device
    dtype: torch.dtype
    _expert_names: dict[str, list[dict[str, str]]] = field(default_factory=dict, init=False, repr=False)

    @property
    def checkpoint(self) -> Checkpoint:
        """The checkpoint, in floating point."""
        return self.view.checkpoint

    @property
    def positions(self) -> int:
        """The longest sequence that the model was made for, 2048 where it does not say."""
        config = self.skeleton.config.get_text_config(decoder=True)
        return getattr(config, "max_position_embeddings", None) or 2048

    @property
    def blocks(self) -> nn.ModuleList:
        """The decoder blocks, on the meta device."""
        blocks = self.skeleton.get_submodule(self._list)
        assert isinstance(blocks, nn.ModuleList)
        return blocks

    @cached_property
    def block_names(self) -> list[str]:
        """Full names of the decoder blocks, e.g. 'model.layers.0'."""
        return [self.view.stored_module(f"{self._list}.{index}") for index in range(len(self.blocks))]

    @property
    def blocks_name(self) -> str:
        """What the names of all decoder blocks begin with, e.g. 'model.layers'."""
        return self.block_names[0].rpartition(".")[0]

    @property
    def head_name(self) -> str:
        """Full name of the linear that makes logits, usually 'lm_head'; of a tied one, that of the embedding.

        Raises QuantizationError when there is none, or its weight is not stored as one tensor.
        """
        head = self.skeleton.get_output_embeddings()
        if not isinstance(head, nn.Linear):
            raise QuantizationError(f"--lm-head: {type(self.skeleton).__name__} has no linear that makes logits")
        stored = self._stored_linear(self._head)
        if stored is None:
            raise QuantizationError(f"--lm-head: {self.checkpoint.folder} does not hold {self._head} as one tensor")
        return stored

    @property
    def is_tied(self) -> bool:
        """Whether the matrix that makes logits is the embedding."""
        return is_tied(self.skeleton)

    @property
    def embedding_name(self) -> str:
        """Full name of the embedding of tokens, e.g. 'model.embed_tokens'. Raises QuantizationError for one of an
        unknown kind.
        """
        name = embedding_module(self.skeleton)
        stored = self.view.stored_name(f"{name}.weight")
        if stored is None:
            raise QuantizationError(f"--embedding: {self.checkpoint.folder} does not hold {name} as one tensor")
        return stored.removesuffix(".weight")

    def linears(self, part: str, module: nn.Module | None = None) -> dict[str, nn.Linear]:
        """Full name → linear of `module`, which is the part of that name, and by default the one on the meta device.

        A part is a decoder block or the head. Linears that cannot be quantized are left out, see `left_alone`; those of
        experts are views of what the module holds.
        """
        name = self._module(part)
        modules = self.skeleton.get_submodule(name) if module is None else module
        spared = self.left_alone[part] if part in self.block_names else {}
        linears = {n: m for n, m in modules.named_modules(prefix=name) if isinstance(m, nn.Linear) and n not in spared}
        found = {self._stored_linear(n) or n: m for n, m in linears.items()}
        for experts in self.experts(part, modules):
            found |= experts.linears
        return found

    def experts(self, part: str, module: nn.Module | None = None) -> list[Experts]:
        """The modules of experts in `module`, which is the part of that name, and by default on the meta device."""
        name = self._module(part)
        modules = self.skeleton.get_submodule(name) if module is None else module
        found = []
        for full, inner in find_experts(modules, name).items():
            if full not in self._expert_names:
                self._expert_names[full] = self.view.expert_names(full)
            names = self._expert_names[full]
            found.append(Experts(next(iter(names[0].values())).rsplit(".", 2)[0], full, inner, names))
        return found

    def packed(self, part: str, linears: Collection[str]) -> list[str]:
        """Tensors of the checkpoint that hold a part's experts, where `linears`, to be quantized, are of these; and the
        copy of a tied head that some checkpoints have.
        """
        if part not in self.block_names:
            copy = self.view.stored_name(f"{self._head}.weight")
            return [copy] if self.is_tied and copy not in (None, f"{part}.weight") else []
        found = []
        for experts in self.experts(part):
            if any(name in linears for names in experts.names for name in names.values()):
                weights = [key for key, tensor in experts.module.named_parameters() if tensor.dim() == 3]
                found += [stored for key in weights for stored in self.view.stored(f"{experts.module_name}.{key}")]
        return found

    @cached_property
    def left_alone(self) -> dict[str, dict[str, str]]:
        """Block → linears in it that have to stay as they are, by transformers' full name, and why."""
        architecture = type(self.skeleton).__name__
        found: dict[str, dict[str, str]] = {}
        stored: dict[str, dict[str, str]] = {}  # block → its other linears: name in the checkpoint → transformers'
        for part, block, tried in zip(self.block_names, self.blocks, self.tried, strict=True):
            found[part], stored[part] = {}, {}
            for linear in (name for name, module in block.named_modules() if isinstance(module, nn.Linear)):
                full = f"{self._module(part)}.{linear}"
                name = self._stored_linear(full)
                if linear not in tried.called:
                    found[part][full] = "its block never calls it"
                elif name is None:
                    found[part][full] = "the checkpoint does not hold its weight as one tensor"
                elif stays_dense(name, architecture):
                    found[part][full] = "vLLM has no quantized form of it"
                else:
                    stored[part][name.removeprefix(part)] = full
        everywhere = {name for names in stored.values() for name in names}
        for part, names in stored.items():
            for name, full in names.items():
                others = [other for other in fused_with(name) if other in everywhere and other not in names]
                if others:  # as blocks that use the keys and values of others, or have no values of their own
                    found[part][full] = f"vLLM fuses it with {', '.join(others)[1:]}, which is not quantized there"
        return found

    def notes(self) -> list[str]:
        """What is left alone, a line for each kind of linear."""
        counts: Counter[tuple[str, str]] = Counter()
        for part, linears in self.left_alone.items():
            counts.update((name.removeprefix(f"{self._module(part)}."), reason) for name, reason in linears.items())
        return [f"{name} of {n} decoder blocks stays as it is: {why}" for (name, why), n in counts.items()]

    def load_block(self, index: int) -> nn.Module:
        """A copy of block `index` with its weights. Raises QuantizationError for missing tensors or NaN."""
        return self.load(self.block_names[index])

    def load(self, part: str) -> nn.Module:
        """A copy of a decoder block or the head with its weights. Raises QuantizationError like `load_block`."""
        name, state = self._module(part), {}
        sources = {key: key for key in self.view.below(f"{name}.")}
        sources |= {key: source for key, source in self._tied_to.items() if key.startswith(f"{name}.")}
        for key, source in sources.items():
            tensor = state[key.removeprefix(f"{name}.")] = self.view.read(source)
            if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                stored = self.view.stored_name(source) or source
                raise QuantizationError(f"{stored} has NaN or Inf in {', '.join(sorted(self.view.files(source)))}")
        module = copy.deepcopy(self.skeleton.get_submodule(name))
        self._fill(module, state, name)
        module.eval().requires_grad_(False)
        for full, inner in find_experts(module, name).items():
            check_experts(inner, full)
        return module

    def first_inputs(self, tokens: Tensor, embedding: Tensor | None = None) -> tuple[Tensor, list[Call]]:
        """Hidden states before the first block, [sequences, length, hidden], and how each block is called.

        tokens: int64 [sequences, length]. embedding: instead of the checkpoint's, [vocabulary, hidden].
        """
        decoder = copy.deepcopy(self.skeleton.get_submodule(self.decoder_name))
        recorders = [Recorder(block, tried.outputs) for block, tried in zip(self.blocks, self.tried, strict=True)]
        decoder.set_submodule(self.list_name, nn.ModuleList(recorders))
        prefix = f"{self.decoder_name}." if self.decoder_name else ""
        wanted = {key for key, _ in decoder.named_parameters()} | {key for key, _ in decoder.named_buffers()}
        state = {key: self.view.read(prefix + key) for key in wanted if prefix + key in self.view}
        if embedding is not None:
            state[f"{embedding_module(self.skeleton)}.weight".removeprefix(prefix)] = embedding
        self._fill(decoder, state, self.decoder_name)
        decoder.eval()
        recordings = [Recording(name) for name in self.block_names]
        hidden: list[Tensor] = []
        with torch.no_grad():
            decoder(tokens[:1].repeat(2, 1).to(self.device), use_cache=False)
            for recorder, recording in zip(recorders, recordings, strict=True):
                recording.note_doubled(recorder.args, recorder.kwargs)
            for sequence in tokens:
                decoder(sequence[None].to(self.device), use_cache=False)
                noted = [r.note(each.args, each.kwargs) for each, r in zip(recorders, recordings, strict=True)]
                hidden.append(noted[0])
        stacked: dict[tuple[int, ...], Tensor] = {}
        return torch.cat(hidden), [recording.call(stacked) for recording in recordings]

    def load_head(self) -> Callable[[Tensor, Tensor], Tensor]:
        """What follows the blocks: a function of tokens [1, length] and hidden states [1, length, hidden] → logits."""
        model, injected = self._without_blocks()
        self._fill_outer(model)

        def head(tokens: Tensor, hidden: Tensor) -> Tensor:
            injected.hidden = hidden
            return model(tokens, use_cache=False).logits

        return head

    @torch.no_grad()
    def advance_to_head(self, tokens: Tensor, *streams: Tensor) -> None:
        """Replace the last block's outputs by what the head reads, batch by batch and in place; no logits are made.

        tokens: int64 [sequences, length]. streams: hidden states [sequences, length, hidden] of these tokens.
        """
        model, injected = self._without_blocks()
        recorder = Recorder(model.get_submodule(self._head))
        model.set_submodule(self._head, recorder)
        self._fill_outer(model)
        for hidden in streams:
            for window, injected.hidden in batches(hidden, self.device):
                model(tokens[window].to(self.device), use_cache=False)
                hidden[window] = recorder.args[0].to(hidden.device)

    @property
    def _list(self) -> str:
        return join(self.decoder_name, self.list_name)

    @property
    def _head(self) -> str:
        head = self.skeleton.get_output_embeddings()
        return next(name for name, module in self.skeleton.named_modules() if module is head)

    def _stored_linear(self, name: str) -> str | None:
        """What the checkpoint calls a linear; None where its weight is not stored as one tensor."""
        key = f"{name}.weight"
        stored = self.view.stored_name(self._tied_to.get(key, key))
        return None if stored is None else stored.removesuffix(".weight")

    @property
    def _tied_to(self) -> dict[str, str]:
        """Tensor of the model → the one that it is."""
        return getattr(self.skeleton, "all_tied_weights_keys", None) or {}

    def _module(self, part: str) -> str:
        """What transformers calls a decoder block or the head."""
        return f"{self._list}.{self.block_names.index(part)}" if part in self.block_names else self._head

    def _without_blocks(self) -> tuple[nn.Module, Injector]:
        """The model on the meta device with stand-ins for its blocks, the last of which gives whatever it is told."""
        model, last = copy.deepcopy(self.skeleton), self.tried[-1]
        injected = Injector(self.blocks[-1], last.outputs, last.batch)
        before = [StandIn(block, tried.outputs) for block, tried in zip(self.blocks[:-1], self.tried[:-1], strict=True)]
        model.set_submodule(self._list, nn.ModuleList([*before, injected]))
        return model, injected

    def _fill_outer(self, model: nn.Module) -> None:
        """Give a model without blocks its weights. What it does not run on text (a vision tower) may lack some."""
        state = {key: self.view.read(key) for key in model.state_dict() if key in self.view}
        state |= {key: state[source] for key, source in self._tied_to.items() if key not in state and source in state}
        inside = tuple(f"{name}." if name else "" for name in (self.decoder_name, self._head))
        self._fill(model, state, "", spare={key for key in model.state_dict() if not key.startswith(inside)})
        model.eval().requires_grad_(False)

    def _fill(self, module: nn.Module, state: dict[str, Tensor], name: str, spare: Collection[str] = ()) -> None:
        """Give a copy of the module called `name` its tensors; buffers that no checkpoint stores are computed anew.

        spare: tensors that may be missing, and stay on the meta device.
        """
        state = {key: t.to(self.device, self.dtype if t.is_floating_point() else None) for key, t in state.items()}
        stored = module.state_dict().keys()
        if missing := stored - state.keys() - set(spare):
            shown = name or type(module).__name__
            raise QuantizationError(f"{shown} lacks tensors in the checkpoint: {', '.join(sorted(missing))}")
        for part_name, part in module.named_modules():
            buffers = dict(part.named_buffers(part_name, recurse=False))
            if buffers.keys() - stored:
                part.to_empty(device=self.device, recurse=False)
                _spoil(buffers.keys() - stored, module)
                self._owner(join(name, part_name))._init_weights(part)  # its weights, too, which are read after it
        if name.startswith(f"{self._list}.") and _spoiled(module, stored):
            decoder = without(self.skeleton.get_submodule(self.decoder_name), self.list_name)
            decoder.set_submodule(self.list_name, nn.ModuleList([module]))
            self._owner(self.decoder_name)._init_weights(decoder)  # as Falcon-H1, whose decoder does it for its blocks
        if spoiled := _spoiled(module, stored):
            raise QuantizationError(
                f"{name}: neither the checkpoint nor {type(self.skeleton).__name__} has values for its buffers"
                f" {', '.join(spoiled)}"
            )
        module.load_state_dict(state, strict=False, assign=True)

    def _owner(self, name: str) -> PreTrainedModel:
        """The innermost of transformers' models that the module called `name` is part of: it knows its buffers."""
        owner = self.skeleton
        module: nn.Module = self.skeleton
        for part in filter(None, name.split(".")):
            module = getattr(module, part)
            owner = module if isinstance(module, PreTrainedModel) else owner
        return owner


def join(*names: str) -> str:
    """Names of modules in each other as one: the model itself has none."""
    return ".".join(filter(None, names))


def open_streamed(checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> StreamedModel:
    """Build the model on the meta device, find its decoder blocks and see them run.

    Raises QuantizationError for a model that is quantized already (other than in FP8 or MXFP4), is not a causal LM of a
    known type, has no list of decoder blocks, holds experts of an unknown kind, or whose blocks do not run one by one.
    """
    source = open_source(checkpoint)
    try:
        config = load_config(source)
        kind: Any = architecture(config, source)
        with torch.device("meta"):
            skeleton = kind._from_config(config, dtype=dtype)
    except (ValueError, KeyError) as error:
        reason = " ".join(str(error).split())
        raise QuantizationError(f"{source.folder} is not a causal language model: {reason}") from error
    skeleton.eval().requires_grad_(False)
    if config.is_encoder_decoder or skeleton.get_output_embeddings() is None:
        raise QuantizationError(
            f"{source.folder} is not a causal language model: {type(skeleton).__name__} makes no logits of the next"
            " token after decoder blocks alone"
        )
    decoder = skeleton.get_decoder()
    decoder_name = next(name for name, module in skeleton.named_modules() if module is decoder)
    list_name = _find_blocks(decoder, config)
    blocks_name = join(decoder_name, list_name)
    refuse_unknown_experts(skeleton.get_submodule(blocks_name), blocks_name)
    tried = try_blocks(decoder, list_name, blocks_name)
    view = view_checkpoint(source, skeleton)
    _refuse_missing(view, decoder_name)
    model = StreamedModel(view, skeleton, decoder_name, list_name, tried, device, dtype)
    if not any(model.linears(name) for name in model.block_names):
        raise QuantizationError(
            f"{blocks_name} ({type(model.blocks[0]).__name__}) hold no nn.Linear, which is all that can be quantized"
        )
    return model


def _find_blocks(decoder: nn.Module, config: Any) -> str:
    layers = config.get_text_config(decoder=True).num_hidden_layers
    lists = [n for n, m in decoder.named_modules() if isinstance(m, nn.ModuleList) and len(m) == layers]
    if not lists:
        raise QuantizationError(f"{type(decoder).__name__} has no list of {layers} decoder blocks")
    return min(lists, key=len)


def _refuse_missing(view: CheckpointView, decoder_name: str) -> None:
    tied = getattr(view.model, "all_tied_weights_keys", None) or {}
    wanted = [name for name in view.model.state_dict() if name.startswith(decoder_name) and name not in tied]
    if missing := [name for name in wanted if name not in view]:
        more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
        raise QuantizationError(
            f"{view.checkpoint.folder} lacks tensors in the checkpoint: {', '.join(missing[:5])}{more}"
        )


def _spoil(buffers: Collection[str], module: nn.Module) -> None:
    """Make it visible in these buffers when nothing computes them."""
    for name in buffers:
        buffer = module.get_buffer(name)
        if buffer.is_floating_point():
            buffer.fill_(torch.nan)


def _spoiled(module: nn.Module, stored: Collection[str]) -> list[str]:
    """Names of the buffers that are not stored and nothing has computed."""
    buffers = ((name, buffer) for name, buffer in module.named_buffers() if name not in stored and not buffer.is_meta)
    return [name for name, buffer in buffers if buffer.is_floating_point() and buffer.isnan().any()]
