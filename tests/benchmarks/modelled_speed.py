"""Size, load time and speed by format and GPU: `python tests/benchmarks/modelled_speed.py [--model NAME]`.

**Speeds and load times are a model: no GPU has run the kernels.** A matmul takes as long as the slower of two things:
moving bytes, at BANDWIDTH of the data sheet's (the weight, and the partial sums of the fused kernel, written and read
as if no cache held them), and issuing its instructions (`gate.json`), at ISSUE of what the schedulers can at boost
clock; LAUNCH seconds for every launch come on top. The coded kernels wait, too: a warp decodes its part in steps of
STEP_CYCLES. These are upper limits: attention, KV cache and sampling are left out, and not every card holds its boost
clock. A second table has what a product launches and moves, by the number of tokens.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from math import ceil
from pathlib import Path

from harness import command_line, markdown

from vllm_babai.format.entropy.hptq import MAX_LANES
from vllm_babai.format.entropy.segments import SEGMENT_WEIGHTS
from vllm_babai.triton_kernels.coded import MAX_TOKENS
from vllm_babai.triton_kernels.configs import Target, bucket, config_for
from vllm_babai.triton_kernels.fused import Launch, plan_launch
from vllm_babai.triton_kernels.layout import Geometry

GATE = json.loads((Path(__file__).parents[1] / "kernels" / "gate.json").read_text())["3.7.1"]  # the Triton of vLLM 0.32
BANDWIDTH, ISSUE = 0.85, 0.7  # assumed; integer instructions, most of ours, are issued at half the rate of others
OVERFLOW_INSTRUCTIONS = {1: 35, 16: 90}  # per entry, from the fused kernel's machine code; a third of the lanes idle
LAUNCH = 1.5e-6  # seconds, assumed: from one kernel of a CUDA graph to the next
STEP_CYCLES = 300  # assumed; from one integer of a lane to its next are two loads and some 20 dependent instructions
DISK, PCIE, CORES = 1e9, 25e9, 8  # bytes per second, of PCIe 4.0 x16; CPU cores
PACKED_RATE, CODED_RATE = 400e6, 550e6  # weights per second and core: load_time.py, without AVX-512
TRELLIS_RATE = 1.2e9  # weights checked and laid out per second, measured on one core
TILE_LIST = 32 / 1024  # bits per weight, of the list of tiles that the kernels take
SSQR_RATE, LAYOUT_RATE = 2.4e9, 20e6  # weights checked, overflow entries laid out per second, measured on one core
USABLE = 0.92  # of device memory: vLLM's default


@dataclass(frozen=True)
class GPU:
    """Public figures, in bytes, bytes per second and Hz. warps: programs of one warp that a processor holds."""

    name: str
    architecture: str
    memory: float
    bandwidth: float
    processors: int
    clock: float
    warps: int

    def move(self, size: float) -> float:
        """Seconds to read or write so many bytes."""
        return size / (BANDWIDTH * self.bandwidth)

    def issue(self, instructions: float) -> float:
        """Seconds to issue so many instructions, counted by lane; four schedulers of 32 lanes a processor."""
        return instructions / (ISSUE * self.processors * 4 * 32 * self.clock)


@dataclass(frozen=True)
class Experts:
    """The routed experts of a decoder block. linears: output × input features, of one. chosen: experts of a token."""

    number: int
    chosen: int
    linears: tuple[tuple[int, int], ...]

    def reached(self, tokens: int) -> int:
        """Experts that so many tokens reach where each chooses at random."""
        return round(self.number * (1 - (1 - self.chosen / self.number) ** tokens))


@dataclass(frozen=True)
class Model:
    """linears: output × input features, of one decoder block. embeddings: weights of the embedding, and of lm_head."""

    blocks: int
    linears: tuple[tuple[int, int], ...]
    embeddings: int
    experts: Experts | None = None

    @property
    def weights(self) -> int:
        """Of all linears but embedding and lm_head."""
        block = sum(rows * columns for rows, columns in self.linears)
        if self.experts:
            block += self.experts.number * sum(rows * columns for rows, columns in self.experts.linears)
        return self.blocks * block


@dataclass(frozen=True)
class Format:
    """How linears are stored and multiplied.

    disk, memory: bits per weight, everything counted. seconds: of a matmul, by GPU, format, shape and tokens.
    rate: weights per second read at load. bits, overflow: of the kernel; share of weights beyond its dense range.
    head: bits of a weight of lm_head.
    """

    name: str
    disk: float
    memory: float
    seconds: "Callable[[GPU, Format, tuple[int, int], int], float]"
    rate: float = float("inf")
    bits: int = 0
    overflow: float = 0.0
    head: float = 16


def bf16_seconds(gpu: GPU, _: Format, shape: tuple[int, int], tokens: int) -> float:
    return gpu.move(2 * shape[0] * shape[1]) + LAUNCH


def launch_of(gpu: GPU, bits: int, shape: tuple[int, int], tokens: int) -> Launch:
    """The fused kernel's launch for a linear with overflow; shape: output × input features."""
    target = Target("cuda", gpu.architecture, gpu.architecture, gpu.processors)
    geometry, held = Geometry(bits, shape[1], shape[0]), bucket(tokens)
    config = config_for(target, bits, held, shape, 1)
    return plan_launch(geometry, config, 1, ceil(tokens / held), held, target)


def partial_bytes(launch: Launch, tokens: int) -> float:
    """Written and read, fp32; of tokens that a tile holds, only those that there are."""
    held = launch.tiling.tokens
    return 8 * launch.partials * tokens / (ceil(tokens / held) * held)


def fused_seconds(gpu: GPU, form: Format, shape: tuple[int, int], tokens: int) -> float:
    """The kernel for dense + sparse."""
    weights = shape[0] * shape[1]
    dense = instructions(gpu, f"{form.bits} bits", tokens)
    issued = gpu.issue((dense + form.overflow * OVERFLOW_INSTRUCTIONS[tokens]) * weights)
    launch = launch_of(gpu, form.bits, shape, tokens)
    moved = gpu.move(form.memory / 8 * weights + partial_bytes(launch, tokens))
    return max(moved, issued) + LAUNCH * (2 if tokens > 1 else 1)  # several tokens: x is transposed first


def experts_seconds(gpu: GPU, form: Format, experts: Experts, tokens: int) -> float:
    """All that a block's experts do: to the kernels those that tokens reach are one tall linear, times x once.

    Besides, an activation and a weighted sum are launched, and visits are sorted where there are several tokens. The
    instructions are those of a linear (`gate.json`: 2.23 for 2.19 at 4 bits on sm_90).
    """
    reached = experts.reached(tokens)
    products = sum(form.seconds(gpu, form, (reached * rows, columns), tokens) for rows, columns in experts.linears)
    return products + LAUNCH * (3 if tokens > 1 else 2)


def trellis_seconds(gpu: GPU, form: Format, shape: tuple[int, int], tokens: int) -> float:
    """The kernel for a trellis, all of whose tiles have the bits that are nearest."""
    weights = shape[0] * shape[1]
    issued = gpu.issue(instructions(gpu, f"trellis {form.bits} bits", tokens) * weights)
    return max(gpu.move(form.memory / 8 * weights), issued) + 2 * LAUNCH  # x is prepared first


def instructions(gpu: GPU, kernel: str, tokens: int) -> float:
    """Per weight. For 16 tokens the gate has sm_90 alone; the others are about as long."""
    case = f"{kernel}, {tokens} token{'s' if tokens > 1 else ''}"
    return GATE[gpu.architecture].get(case, GATE["sm_90"][case])["instructions_per_weight"]


def coded_seconds(gpu: GPU, form: Format, shape: tuple[int, int], tokens: int) -> float:
    """The kernel that multiplies what it decodes, or the decoder and a bf16 product."""
    weights = shape[0] * shape[1]
    turns = ceil(weights / SEGMENT_WEIGHTS / (gpu.processors * gpu.warps))
    waiting = turns * SEGMENT_WEIGHTS / MAX_LANES * STEP_CYCLES / gpu.clock
    fused = tokens <= MAX_TOKENS
    case = GATE[gpu.architecture]["multiply coded, 1 token" if fused else "decode coded"]
    decoding = max(waiting, gpu.issue(case["instructions_per_weight"] * weights))
    if fused:
        return max(decoding, gpu.move(form.memory / 8 * weights))
    return max(decoding, gpu.move((form.memory / 8 + 2) * weights)) + gpu.move(2 * weights)


def dense_sparse(
    name: str, disk: float, width: float, rate: float, bits: int, overflow: float, head: float = 16
) -> Format:
    """In memory: 16 bits an overflow entry, 32 for every row of 2048 columns, 16 for a row's scale."""
    held = width + 16 * overflow + 32 / 2048 + 16 / 4096
    return Format(name, disk, held, fused_seconds, rate, bits, overflow, head)


GPUS = (  # data sheets and architecture papers of the vendor; L4's memory is less by what ECC takes
    GPU("H200", "sm_90", 141e9, 4.8e12, 132, 1.98e9, 32),
    GPU("A100 80 GB", "sm_80", 80e9, 2.039e12, 108, 1.41e9, 32),
    GPU("RTX 4090", "sm_89", 24e9, 1.008e12, 128, 2.52e9, 24),
    GPU("RTX 3090", "sm_86", 24e9, 0.936e12, 82, 1.695e9, 16),
    GPU("L4", "sm_89", 23.6e9, 0.3e12, 58, 2.04e9, 24),
)
MODELS = {
    "Llama-3-8B": Model(32, ((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336)), 128256 * 4096),
    "Qwen3-32B": Model(64, ((10240, 5120), (5120, 8192), (51200, 5120), (5120, 25600)), 151936 * 5120),
    "Qwen3-30B-A3B": Model(
        48, ((5120, 2048), (2048, 4096)), 151936 * 2048, Experts(128, 8, ((1536, 2048), (2048, 768)))
    ),
}
# Bits of an overflow entry on disk: `dense_sparse/overflow.py`. `packed` has the mean width of the reference model.
# `coded` adds 0.08 bit of segments to the disk's, and 0.05 of tables: 16 KiB each, about ten a linear in that model.
FORMATS = (
    Format("bf16", 16, 16, bf16_seconds),
    dense_sparse("SSQR 4 bits", 4 + 0.01 * 10.5 + 16 / 4096, 4, SSQR_RATE, 4, 0.01),
    dense_sparse("SSQR 4 bits, `--lm-head 5`", 4 + 0.01 * 10.5 + 16 / 4096, 4, SSQR_RATE, 4, 0.01, head=5.18),
    dense_sparse("SSQR 3 bits", 3 + 0.01 * 9.3 + 16 / 4096, 3, SSQR_RATE, 3, 0.01),
    dense_sparse("HPTQ 3.125 `packed`", 3.125, 4.3, CORES * PACKED_RATE, 4, 0.004),
    Format("Trellis 2.125", 2.125, 2.125 + TILE_LIST, trellis_seconds, TRELLIS_RATE, bits=2),
    Format("Trellis 3.125", 3.125, 3.125 + TILE_LIST, trellis_seconds, TRELLIS_RATE, bits=3),
    Format("HPTQ 3.125 `coded`", 3.125, 3.26, coded_seconds, CORES * CODED_RATE),
)


def speed(gpu: GPU, form: Format, model: Model) -> str:
    """Tokens per second of 1 and of 16 requests, all together, to two digits; lm_head as fast as it is read."""
    rates = []
    for tokens in (1, 16):
        block = sum(form.seconds(gpu, form, shape, tokens) for shape in model.linears)
        if model.experts:
            block += experts_seconds(gpu, form, model.experts, tokens)
        rates.append(tokens / (model.blocks * block + gpu.move(form.head / 8 * model.embeddings)))
    return " / ".join(f"{float(f'{rate:.2g}'):.0f}" for rate in rates)


def traffic(gpu: GPU, bits: int, model: Model) -> list[list[str]]:
    """Launches, programs and MB moved by each linear of a block, for few and for many tokens."""
    rows = []
    for shape in model.linears:
        for tokens in (1, 16, 64, 256):
            launch = launch_of(gpu, bits, shape, tokens)
            held, partials = bits / 8 * shape[0] * shape[1] / 1e6, partial_bytes(launch, tokens) / 1e6
            launches = 2 if tokens > 1 else 1
            cells = [str(launches), str(launch.programs), str(launch.splits), f"{held:.1f}", f"{partials:.1f}"]
            rows.append([f"{shape[0]} × {shape[1]}", str(tokens), *cells])
    return rows


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--model", choices=MODELS, default="Llama-3-8B")
    options = parser.parse_args()
    model = MODELS[options.model]
    weights = model.weights
    rows = []
    for form in FORMATS:
        if model.experts and form.seconds not in (bf16_seconds, fused_seconds):
            continue  # experts are neither coded nor in a trellis
        outside = (2 + form.head / 8) * model.embeddings
        stored, held = (bits / 8 * weights + outside for bits in (form.disk, form.memory))
        load = stored / DISK + weights * (1 / form.rate + form.overflow / LAYOUT_RATE) + held / PCIE
        speeds = [speed(gpu, form, model) if held < USABLE * gpu.memory else "does not fit" for gpu in GPUS]
        rows.append([form.name, f"{stored / 1e9:.1f}", f"{held / 1e9:.1f}", f"{load:.0f}", *speeds])
    print(markdown(["", "disk, GB", "memory, GB", "load, s", *(gpu.name for gpu in GPUS)], rows))
    headings = ["linear", "tokens", "launches", "programs", "splits", "weight, MB", "partial sums, MB"]
    print(f"{GPUS[0].name}, 4 bits:\n\n" + markdown(headings, traffic(GPUS[0], 4, model)), end="")


if __name__ == "__main__":
    main()
