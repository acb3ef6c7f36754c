"""A causal language model whose decoder blocks are read when their turn comes.

The model is built on the meta device. Its outer part (embedding, rotary tables) is loaded once, to make the inputs of
the first block; a block's weights exist only between `load_block` and the end of its use.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from vllm_babai.errors import QuantizationError
from vllm_babai.offline.model.capture import batches
from vllm_babai.offline.model.checkpoint import Checkpoint


class _Recorder(nn.Module):
    """Stands in for a decoder block: passes the hidden states on, and notes them and the other arguments."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.hidden = torch.empty(0)
        self.arguments: dict[str, Any] = {}
        for name in ("attention_type", "layer_type", "is_sliding", "layer_idx"):  # what models read off their blocks
            if hasattr(block, name):
                setattr(self, name, getattr(block, name))

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if args:
            raise QuantizationError(f"decoder blocks called with positional arguments {args} are not supported")
        self.hidden, self.arguments = hidden, kwargs
        return hidden


class _Injector(nn.Module):
    """Stands in for the first decoder block: whatever it is given, it passes on `hidden`."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = torch.empty(0)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.hidden


@dataclass
class StreamedModel:
    """See the module. `blocks_name` is the name of the list of decoder blocks, e.g. 'model.layers'."""

    checkpoint: Checkpoint
    skeleton: PreTrainedModel
    blocks_name: str
    device: torch.device
    dtype: torch.dtype

    @property
    def blocks(self) -> nn.ModuleList:
        """The decoder blocks, on the meta device."""
        blocks = self.skeleton.get_submodule(self.blocks_name)
        assert isinstance(blocks, nn.ModuleList)
        return blocks

    def block_name(self, index: int) -> str:
        """Full name of a decoder block."""
        return f"{self.blocks_name}.{index}"

    @property
    def head_name(self) -> str:
        """Full name of the linear that makes logits, usually 'lm_head'.

        Raises QuantizationError when there is none, or none with a weight of its own.
        """
        head = self.skeleton.get_output_embeddings()
        if not isinstance(head, nn.Linear):
            raise QuantizationError(f"--lm-head: {type(self.skeleton).__name__} has no linear that makes logits")
        name = next(name for name, module in self.skeleton.named_modules() if module is head)
        if head.weight is self.skeleton.get_input_embeddings().weight:
            raise QuantizationError(
                f"--lm-head: {name} is tied to the embedding, which stays as it is; quantize without --lm-head"
            )
        return name

    def linears(self, index: int) -> dict[str, nn.Linear]:
        """Full name → linear of a decoder block, on the meta device."""
        return named_linears(self.block_name(index), self.blocks[index])

    def load_block(self, index: int) -> nn.Module:
        """A copy of block `index` with its weights. Raises QuantizationError for missing tensors or NaN."""
        return self.load(self.block_name(index))

    def load(self, name: str) -> nn.Module:
        """A copy of the module called `name` with its weights. Raises QuantizationError like `load_block`."""
        state = self.checkpoint.read_below(f"{name}.")
        for key, tensor in state.items():
            if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                raise QuantizationError(f"{name}.{key} has NaN or Inf in {self.checkpoint.files[f'{name}.{key}'].name}")
        module = copy.deepcopy(self.skeleton.get_submodule(name))
        _fill(module, state, name, self.device, self.dtype)
        return module.eval().requires_grad_(False)

    def first_inputs(self, tokens: Tensor) -> tuple[Tensor, list[dict[str, Any]]]:
        """Hidden states before the first block, and the keyword arguments of every block.

        tokens: int64 [sequences, length]. Returns [sequences, length, hidden] and one dictionary per block, made for a
        batch of one sequence, which serves any batch as positions and mask are the same.
        """
        backbone, _, list_name = self.blocks_name.rpartition(".")
        model = copy.deepcopy(self.skeleton.get_submodule(backbone))
        recorders = [_Recorder(block) for block in self.blocks]
        setattr(model, list_name, nn.ModuleList(recorders))
        prefix = f"{backbone}." if backbone else ""
        wanted = {key for key, _ in model.named_parameters()} | {key for key, _ in model.named_buffers()}
        state = {key: self.checkpoint.read(prefix + key) for key in wanted if prefix + key in self.checkpoint.files}
        _fill(model, state, backbone, self.device, self.dtype)
        hidden: list[Tensor] = []
        with torch.no_grad():
            for sequence in tokens:
                model(sequence[None].to(self.device), use_cache=False)
                hidden.append(recorders[0].hidden)
        return torch.cat(hidden), [recorder.arguments for recorder in recorders]

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
        recorder = _Recorder(model.get_submodule(self.head_name))
        model.set_submodule(self.head_name, recorder)
        self._fill_outer(model)
        for hidden in streams:
            for window, injected.hidden in batches(hidden, self.device):
                model(tokens[window].to(self.device), use_cache=False)
                hidden[window] = recorder.hidden.to(hidden.device)

    def _without_blocks(self) -> tuple[nn.Module, _Injector]:
        """The model on the meta device with stand-ins for its blocks, the first of which gives whatever it is told."""
        model, injected = copy.deepcopy(self.skeleton), _Injector()
        backbone, _, list_name = self.blocks_name.rpartition(".")
        stand_ins = [_Recorder(block) for block in self.blocks[1:]]
        setattr(model.get_submodule(backbone), list_name, nn.ModuleList([injected, *stand_ins]))
        return model, injected

    def _fill_outer(self, model: nn.Module) -> None:
        """Give a model without blocks its weights."""
        state = {key: self.checkpoint.read(key) for key in model.state_dict() if key in self.checkpoint.files}
        tied = getattr(model, "_tied_weights_keys", None) or {}
        state |= {key: state[source] for key, source in dict(tied).items() if key not in state and source in state}
        _fill(model, state, type(model).__name__, self.device, self.dtype)
        model.eval().requires_grad_(False)


def named_linears(name: str, module: nn.Module) -> dict[str, nn.Linear]:
    """Full name → linear of the module called `name`, which may be a linear itself."""
    return {n: m for n, m in module.named_modules(prefix=name) if isinstance(m, nn.Linear)}


def open_streamed(checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> StreamedModel:
    """Build the model on the meta device and find its decoder blocks.

    Raises QuantizationError for a model that is already quantized, is not a causal LM of a known type, has no list of
    decoder blocks, or holds a mixture of experts.
    """
    if "quantization_config" in checkpoint.config():
        raise QuantizationError(f"{checkpoint.folder} is already quantized; start from the original weights")
    try:
        config = AutoConfig.from_pretrained(checkpoint.folder)
        with torch.device("meta"):
            skeleton = AutoModelForCausalLM.from_config(config, dtype=dtype)
    except (ValueError, KeyError) as error:
        raise QuantizationError(f"{checkpoint.folder} is not a causal language model: {error}") from error
    model = StreamedModel(checkpoint, skeleton, _find_blocks(skeleton, config), device, dtype)
    for name, module in model.blocks.named_modules(prefix=model.blocks_name):
        if "expert" in name.rpartition(".")[2].lower() or "Experts" in type(module).__name__:
            raise QuantizationError(f"{name} ({type(module).__name__}) is a mixture of experts: not supported yet")
    if not model.linears(0):
        raise QuantizationError(f"{model.block_name(0)} holds no nn.Linear")
    return model


def _find_blocks(skeleton: nn.Module, config: Any) -> str:
    layers = config.get_text_config().num_hidden_layers
    lists = [n for n, m in skeleton.named_modules() if isinstance(m, nn.ModuleList) and len(m) == layers]
    if not lists:
        raise QuantizationError(f"{type(skeleton).__name__} has no list of {layers} decoder blocks")
    return min(lists, key=len)


def _fill(module: nn.Module, state: dict[str, Tensor], name: str, device: torch.device, dtype: torch.dtype) -> None:
    """Give a module on the meta device its tensors; buffers that no checkpoint stores are computed anew."""
    state = {key: t.to(device, dtype if t.is_floating_point() else None) for key, t in state.items()}
    stored = module.state_dict().keys()
    if missing := stored - state.keys():
        raise QuantizationError(f"{name} lacks tensors in the checkpoint: {', '.join(sorted(missing))}")
    for part_name, part in module.named_modules():
        buffers = {key for key, _ in part.named_buffers(part_name, recurse=False)}
        if buffers - stored:
            part.to_empty(device=device, recurse=False)
            _initializer(module)(part)  # its weights, too, which are read after it
    module.load_state_dict(state, strict=False, assign=True)


def _initializer(module: nn.Module) -> Any:
    """transformers computes rotary tables and embedding scales in the model's `_init_weights`."""
    initializer = getattr(module, "_init_weights", None)
    if initializer is None:
        raise QuantizationError(f"{type(module).__name__} has buffers that its checkpoint does not store")
    return initializer
