"""Bits per weight for a size: of the whole checkpoint (--size), or of the device that will serve it (--fit)."""

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from vllm_babai.errors import QuantizationError
from vllm_babai.offline.model.checkpoint import open_checkpoint
from vllm_babai.offline.model.skeleton import load_config
from vllm_babai.offline.model.streamed import open_streamed
from vllm_babai.offline.model.walk import bits_outside, parts_of
from vllm_babai.offline.options import RATES, QuantizeOptions
from vllm_babai.offline.plan.budget import bytes_beside

UNITS = {"": 1, "k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}
USABLE = 0.92  # of a device's memory: vLLM's default --gpu-memory-utilization
ACTIVATIONS = 2**30  # bytes for activations and graphs: a choice; vLLM prints what it really took
MARGIN = 0.995  # of the rate: plans are met within half a percent
LEAST_SSQR = 2.05  # bits: what two take with their scales and hardly any overflow
BYTES_PER_CACHED = 2  # bfloat16, vLLM's default for the KV cache of a bfloat16 model


@dataclass(frozen=True)
class Sizes:
    """kept: bytes of tensors that stay as they are, and of head and embedding with the bits asked for. weights: how
    many get the bits that are left. cached: bytes of KV cache that a token takes.
    """

    kept: int
    weights: int
    cached: int


def measure(model: str | Path, options: QuantizeOptions) -> Sizes:
    """What of a model's size quantization can change, and what it cannot. Raises QuantizationError like `prepare`."""
    checkpoint = open_checkpoint(model)
    streamed = open_streamed(checkpoint, torch.device("cpu"), torch.float32)
    parts, outside = parts_of(streamed, options), bits_outside(streamed, options)
    weights = sum(part.weights(streamed) for part in parts if part.name not in outside)
    if not weights:
        raise QuantizationError("--size and --fit share bits out among linears of decoder blocks, and none is left")
    return Sizes(bytes_beside(streamed, parts, options), weights, cache_bytes(load_config(checkpoint)))


def cache_bytes(config: Any) -> int:
    """Bytes of KV cache per token: at most, where some layers keep a window of them alone.

    Layers of linear attention keep none; latent attention keeps one vector for keys and values.
    """
    text = config.get_text_config(decoder=True)
    kinds = getattr(text, "layer_types", None) or ["full_attention"] * text.num_hidden_layers
    layers = sum("attention" in kind and "linear" not in kind for kind in kinds)
    if (rank := getattr(text, "kv_lora_rank", None)) is not None:
        return layers * (rank + text.qk_rope_head_dim) * BYTES_PER_CACHED
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return layers * 2 * heads * width * BYTES_PER_CACHED


def fit_size(options: QuantizeOptions, size: str, sizes: Sizes) -> QuantizeOptions:
    """Options with the bits at which all weight files take no more than `size`, such as 5GB."""
    return _with_rate(options, f"--size {size}", read_bytes("--size", size), sizes)


def fit_device(options: QuantizeOptions, memory: str, tokens: int, sizes: Sizes) -> QuantizeOptions:
    """Options with the bits at which weights and a KV cache of `tokens` fit a device of `memory`, such as 24GiB.

    Raises QuantizationError where they do not, and for HPTQ, which is larger on a device than on disk.
    """
    if options.format == "hptq":
        raise QuantizationError("--fit is for forms that a device multiplies as they are: --format ssqr or trellis")
    room = USABLE * read_bytes("--fit", memory) - ACTIVATIONS - tokens * sizes.cached
    what = f"--fit {memory}, less {tokens * sizes.cached / 1e9:.2f} GB for {tokens} tokens of KV cache,"
    return _with_rate(options, what, room, sizes)


def read_bytes(option: str, text: str) -> float:
    """5GB, 800 MB, 24GiB → bytes. Raises QuantizationError that names the option."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(|[kmgt]i?)b?", text.strip().lower())
    if found is None:
        raise QuantizationError(f"{option} must be a size such as 5GB or 24GiB, not {text}")
    return float(found[1]) * UNITS[found[2]]


def _with_rate(options: QuantizeOptions, what: str, room: float, sizes: Sizes) -> QuantizeOptions:
    rate = MARGIN * 8 * (room - sizes.kept) / sizes.weights
    least, most = RATES[options.format]
    if options.format == "ssqr":
        least = LEAST_SSQR
    if rate < least:
        needed = (sizes.kept + least / MARGIN / 8 * sizes.weights) / 1e9
        raise QuantizationError(
            f"{what} leaves {max(room, 0) / 1e9:.2f} GB for weights: with {least} bits, the fewest that "
            f"--format {options.format} has, they need {needed:.2f} GB"
        )
    rate = min(round(rate - 0.0005, 3), most)
    return replace(options, rate=rate) if options.format == "hptq" else replace(options, target_bits=rate)
