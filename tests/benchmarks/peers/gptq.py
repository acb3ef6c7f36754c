"""GPTQ of llm-compressor on given tokens: `python tests/benchmarks/peers/gptq.py MODEL OUT BITS GROUP TOKENS`.

For `real_models.py --gptq PYTHON`, PYTHON being the interpreter of an environment with llmcompressor (0.14 was used).
Settings are the best documented ones: activation order, and scales from an observer of the mean square error. TOKENS is
a JSON file, a list of sequences. OUT gets dense weights in float32, and in peer.json what they would take as stored.
Of mixtures of experts llm-compressor sends all tokens through all experts, as it does by default.
"""

import argparse
import json
import re
import time
from pathlib import Path
from typing import Any

SCALE_BITS = 16
EXPERT = re.compile(r"(.*experts)\.(\d+)\.(gate|up|down)_proj")


def weight_of(state: dict[str, Any], linear: str) -> Any:
    """The weight of a linear in transformers' state dict, a view where it is one of an expert's."""
    found = EXPERT.fullmatch(linear)
    if found is None:
        return state[f"{linear}.weight"]
    experts, number, role = found.groups()
    if role == "down":
        return state[f"{experts}.down_proj"][int(number)]
    return state[f"{experts}.gate_up_proj"][int(number)].chunk(2)[role == "up"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("bits", type=int)
    parser.add_argument("group", type=int, help="input features per scale")
    parser.add_argument("tokens", type=Path)
    options = parser.parse_args()

    import torch
    from compressed_tensors.quantization import fake_quantize
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier
    from transformers import AutoModelForCausalLM, AutoTokenizer

    started = time.process_time()
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    tokens = json.loads(options.tokens.read_text())
    masks = [[1] * len(sequence) for sequence in tokens]
    weights = {"num_bits": options.bits, "type": "int", "symmetric": True, "strategy": "group"}
    weights |= {"group_size": options.group, "observer": "memoryless_mse"}
    scheme = {"targets": ["Linear"], "weights": weights}
    oneshot(
        model=model,
        tokenizer=tokenizer,
        dataset=Dataset.from_dict({"input_ids": tokens, "attention_mask": masks}),
        recipe=[GPTQModifier(config_groups={"group_0": scheme}, ignore=["lm_head"], actorder="static")],
        max_seq_length=len(tokens[0]),
        num_calibration_samples=len(tokens),
        pipeline="sequential",
    )
    dense = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    state, count = dense.state_dict(), 0
    with torch.no_grad():
        for name, module in model.named_modules():
            if getattr(module, "quantization_scheme", None) is None:
                continue
            how = (module.weight_scale, getattr(module, "weight_zero_point", None))
            indices = getattr(module, "weight_g_idx", None)
            weight_of(state, name).copy_(
                fake_quantize(module.weight, *how, module.quantization_scheme.weights, indices)
            )
            count += module.weight.numel()
    dense.save_pretrained(options.out)
    tokenizer.save_pretrained(options.out)
    found = {
        "bits": options.bits + SCALE_BITS / options.group,
        "weights": count,
        "cpu_seconds": time.process_time() - started,
    }
    (options.out / "peer.json").write_text(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
