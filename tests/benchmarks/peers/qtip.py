"""One linear by QTIP's own code and by babai's trellis, with one Hessian.

    python tests/benchmarks/peers/qtip.py REPOSITORY MODEL TEXT [--linears NAME …]

REPOSITORY is a clone of github.com/Cornell-RelaxML/qtip (its last commit was used); it runs on the CPU, since its
search is in PyTorch. QTIP (arXiv 2406.11235): random Hadamard transforms, block LDLQ, Viterbi through all 2^16 states,
settings of its example.sh. exllamav3's trellis is that code with another multiplier, and its search runs on GPUs
only. QTIP gets its bits for the code alone: the signs and the scale, 16 bits per row and column as it stores them, are
not counted. Babai gets the same bits with everything counted.
"""

import sys
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))

from harness import command_line, report, table

from vllm_babai.format.trellis.blob import Trellis
from vllm_babai.offline.options import QuantizeOptions
from vllm_babai.offline.scales.trellis import search_trellis
from vllm_babai.offline.solver.factor import factorize
from vllm_babai.offline.solver.lattice import Lattice

DAMPING = 0.01  # of the mean diagonal, on both sides: QTIP's `--sigma_reg` and babai's `--damping`
SCALE = 0.9  # `--scale_override` of QTIP's example
TILE = 16
ONLY_ON_GPUS = ("qtip_kernels", "fast_hadamard_transform", "glog", "accelerate")  # imported there, not used here


def hessian_of(model: Any, linear: str, tokens: Tensor) -> Tensor:
    """XᵀX / tokens of a linear's inputs, float64 [in, in]. tokens: [sequences, length]."""
    sums: list[Tensor] = []

    def note(_: object, inputs: tuple[Tensor, ...]) -> None:
        x = inputs[0].reshape(-1, inputs[0].shape[-1]).double()
        sums.append(x.T @ x)

    hook = model.get_submodule(linear).register_forward_pre_hook(note)
    with torch.inference_mode():
        for sequence in tokens:
            model(sequence[None])
    hook.remove()
    return torch.stack(sums).sum(0) / tokens.numel()


def babai(weight: Tensor, hessian: Tensor, bits: int) -> tuple[Tensor, float]:
    """Weight less its quantized one, [out, in], and bits per weight of what is stored."""
    factor = factorize(hessian, "reverse", DAMPING)
    lattice = Lattice(factor, paths=QuantizeOptions(format="trellis", target_bits=bits).row_paths)
    solution = search_trellis(weight.T[factor.order].contiguous(), lattice, bits, seed=0)
    residual = torch.empty_like(weight.T)
    residual[factor.order] = solution.residual
    return residual.T, 8 * Trellis.encode(solution.weight).trellis.nbytes / weight.numel()


def qtip(repository: Path, weight: Tensor, hessian: Tensor, bits: int) -> Tensor:
    """Weight less its quantized one, [out, in]: the steps of QTIP's finetune.py, without the finetuning."""
    for name in ONLY_ON_GPUS:
        sys.modules.setdefault(name, MagicMock(spec=ModuleType(name)))
    sys.path.insert(0, str(repository))
    from lib import utils  # type: ignore[import-not-found]
    from lib.algo import ldlq  # type: ignore[import-not-found]
    from lib.codebook.bitshift import bitshift_codebook  # type: ignore[import-not-found]

    torch.manual_seed(0)
    code = bitshift_codebook(L=16, K=bits, V=2, tlut_bits=9, decode_mode="quantlut_sym")
    rows, columns = weight.shape
    left, right = (2.0 * torch.randint(2, (size,)) - 1 for size in (columns, rows))
    damped = utils.regularize_H(hessian.float().clone(), DAMPING)
    turned = utils.matmul_hadUt(utils.matmul_hadUt(weight.T * right).T * left)
    basis = utils.matmul_hadUt(utils.matmul_hadUt(damped * left).T * left)
    scale = turned.square().mean().sqrt() / (code.lut.double().square().mean().sqrt().float() * SCALE)
    lower, _ = utils.block_LDL(basis, TILE)
    lower.diagonal().zero_()
    how = SimpleNamespace(td_x=TILE, td_y=TILE, V=2)
    found, _ = ldlq.LDLQ(turned / scale, lower, code, how, buf_cols=TILE, for_kernel=False)
    residual = turned - found * scale
    return (utils.matmul_hadU((utils.matmul_hadU(residual) * left).T) * right).T


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("repository", type=Path)
    parser.add_argument("model", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--linears", nargs="+", default=["model.layers.10.self_attn.q_proj"])
    parser.add_argument("--bits", type=int, default=2)
    parser.add_argument("--sequences", type=int, default=16, help="of 512 tokens, for the Hessian")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()
    text = AutoTokenizer.from_pretrained(options.model)(options.text.read_text(), return_tensors="pt")["input_ids"][0]
    tokens = text[: options.sequences * 512].view(-1, 512)
    drawn = table(f"{options.bits} bits: error of a linear's outputs", ("linear", "QTIP", "babai", "bits", "seconds"))
    figures = {}
    for linear in options.linears:
        weight = model.get_submodule(linear).weight.detach().float()
        hessian = hessian_of(model, linear, tokens)

        def relative(residual: Tensor, of: Tensor = weight, by: Tensor = hessian) -> float:
            return float(((residual.double() @ by) * residual).sum() / ((of.double() @ by) * of).sum())

        clock = [time.perf_counter()]
        ours, bits = babai(weight, hessian, options.bits)
        clock.append(time.perf_counter())
        theirs = relative(qtip(options.repository, weight, hessian, options.bits))
        clock.append(time.perf_counter())
        seconds = f"{clock[1] - clock[0]:.0f} and {clock[2] - clock[1]:.0f}"
        drawn.add_row(linear, f"{theirs:.5f}", f"{relative(ours):.5f}", f"{bits:.3f}", seconds)
        figures[linear] = {"qtip": theirs, "babai": relative(ours), "bits": bits}
        print(linear, figures[linear], seconds, flush=True)
    report(figures, [drawn], options.json)


if __name__ == "__main__":
    main()
