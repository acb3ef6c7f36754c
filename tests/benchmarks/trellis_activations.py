"""How activations best become fp16 for the trellis form's kernels: `python tests/benchmarks/trellis_activations.py`.

The bundled model, with massive activations put in: one feature in SPACING of what `down_proj` reads is multiplied by a
factor, and its column divided by it, so that in exact arithmetic nothing changes. What every linear reads is rounded to
bfloat16, as vLLM has it, and then to fp16 in one of four ways. Printed: the loss against bfloat16 alone in nats per
token, and the share of tokens whose logits are not finite.
"""

import argparse
import inspect
from collections.abc import Callable

import torch
from harness import DEMO, command_line, markdown
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

FACTORS = (1.0, 2.0**12, 2.0**18, 2.0**24)
SPACING, WINDOWS, LENGTH = 64, 4, 256


def per_token(x: Tensor) -> Tensor:
    """What the kernels do: the largest of a token between 2^14 and 2^15."""
    exponent = torch.frexp(x.abs().amax(-1, keepdim=True)).exponent - 15
    return torch.ldexp(torch.ldexp(x, -exponent).half().float(), exponent)


WAYS: dict[str, Callable[[Tensor], Tensor]] = {
    "unscaled": lambda x: x.half().float(),
    "times 2^-6": lambda x: 2.0**6 * (x * 2.0**-6).half().float(),
    "times 2^-12": lambda x: 2.0**12 * (x * 2.0**-12).half().float(),
    "a power of two per token": per_token,
    "bfloat16 alone": lambda x: x,
}


def with_massive_activations(factor: float) -> torch.nn.Module:
    model = AutoModelForCausalLM.from_pretrained(DEMO / "stdlib-6m", dtype=torch.float32).eval()
    for name, module in model.named_modules():
        if name.endswith("mlp"):
            module.up_proj.weight.data[::SPACING] *= factor
            module.down_proj.weight.data[:, ::SPACING] /= factor
    return model


@torch.no_grad()
def log_probabilities(model: torch.nn.Module, tokens: Tensor, way: str) -> Tensor:
    """Of all tokens, fp32 [windows, length, vocabulary], with the inputs of linears rounded."""
    hooks = [
        module.register_forward_pre_hook(lambda _, inputs: (WAYS[way](inputs[0].bfloat16().float()),))
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and "lm_head" not in name
    ]
    try:
        return model(tokens).logits.log_softmax(-1)
    finally:
        for hook in hooks:
            hook.remove()


def main() -> None:
    command_line(__doc__).parse_args()
    tokenizer = AutoTokenizer.from_pretrained(DEMO / "stdlib-6m")
    ids = tokenizer(inspect.getsource(argparse), return_tensors="pt").input_ids[0, : WINDOWS * LENGTH]
    tokens, rows = ids.view(WINDOWS, LENGTH), []
    for factor in FACTORS:
        model = with_massive_activations(factor)
        exact = log_probabilities(model, tokens, "bfloat16 alone")
        cells = []
        for way in list(WAYS)[:-1]:
            found = log_probabilities(model, tokens, way)
            broken = found.isnan().any(-1)
            loss = (exact.exp() * (exact - found)).sum(-1)[~broken].mean()
            cells.append(f"{loss:.1e}" if not broken.any() else f"{broken.float().mean():.0%} not finite")
        rows.append([f"{factor:.0f}", *cells])
    print(markdown(["times", *list(WAYS)[:-1]], rows), end="")


if __name__ == "__main__":
    main()
