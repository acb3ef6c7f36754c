"""A mixture of experts, quantized and served, against transformers with its dense twin."""

import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from architectures import BUNDLED, TEXT
from transformers import AutoModelForCausalLM, AutoTokenizer

from vllm_babai.offline import QuantizeOptions, quantize
from vllm_babai.offline.tools.convert import convert

PROMPT = "class Error(Exception):\n    pass\n\n\ndef parse(text, *, strict=False):\n"
SIZES = TEXT | {"head_dim": 32, "max_position_embeddings": 512, "num_experts_per_tok": 2}
MANY = {"num_experts": 8, "moe_intermediate_size": 32}
ONE = ("--dtype", "float32")
# Name → class and sizes of the configuration, options of the quantizer and of the server.
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any], tuple[str, ...]]] = {
    "mixtral": ("MixtralConfig", {"num_local_experts": 4}, {"format": "hptq", "rate": 4.0}, ONE),
    "qwen2-moe": ("Qwen2MoeConfig", MANY | {"shared_expert_intermediate_size": 64}, {"target_bits": 4.3}, ONE),
    "qwen3-moe": (
        "Qwen3MoeConfig",
        MANY,
        {},
        (*ONE, "--enforce-eager", "--tensor-parallel-size", "2", "--enable-expert-parallel"),
    ),
}
FIRST, *OTHERS = CASES


@pytest.mark.parametrize("case", [FIRST, *(pytest.param(name, marks=pytest.mark.long) for name in OTHERS)])
def test_served_as_the_dense_twin(case: str, tmp_path: Path, start_servers: Callable[..., Any]) -> None:
    kind, sizes, options, arguments = CASES[case]
    torch.manual_seed(0)
    config = getattr(transformers, kind)(**SIZES | sizes)
    source = tmp_path / "source"
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(source)
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copyfile(BUNDLED / file, source / file)
    text = tmp_path / "text.txt"
    text.write_text("\n".join(path.read_text() for path in sorted(Path(transformers.__file__).parent.glob("*.py"))[:3]))
    chosen = QuantizeOptions(calibration=str(text), samples=8, sequence_length=64, paths=1, **options)
    out = quantize(source, tmp_path / "out", chosen)
    dense = convert(out, tmp_path / "dense", "dense", torch.float32)

    tokenizer = AutoTokenizer.from_pretrained(source)
    model = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32).eval()
    tokens = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    with torch.inference_mode():
        expected = model(tokens).logits[0, :-1].log_softmax(-1).gather(1, tokens[0, 1:, None])[:, 0]
    with start_servers((out, *arguments)) as (server,):

        def ask(_: int) -> list[float]:
            asked = {"model": "babai", "prompt": tokens[0].tolist(), "max_tokens": 8, "temperature": 0}
            (choice,) = server.client.completions.create(**asked, extra_body={"prompt_logprobs": 0}).choices
            return [next(iter(token.values()))["logprob"] for token in choice.prompt_logprobs[1:]]

        with ThreadPoolExecutor(16) as pool:
            answers = list(pool.map(ask, range(16)))
    for answer in answers:
        assert answer == pytest.approx(expected.tolist(), abs=0.02)
