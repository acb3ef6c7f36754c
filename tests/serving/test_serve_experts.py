"""A mixture of experts, quantized and served, against transformers with its dense twin."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import transformers
from architectures import TEXT, save_random
from twins import LATENT, answer_of_twin, served_answer

from vllm_babai.offline import QuantizeOptions, quantize

SIZES = TEXT | {"head_dim": 32, "max_position_embeddings": 512, "num_experts_per_tok": 2}
WIDE = {"hidden_size": 128}  # for classes that divide it among the heads, whatever head_dim says
MANY = {"num_experts": 8, "moe_intermediate_size": 32}
LATENT_EXPERTS = (
    MANY
    | LATENT
    | {
        "n_routed_experts": 8,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
        "n_group": 1,
        "topk_group": 1,
        "topk_method": "greedy",
    }
)
ONE = ("--dtype", "float32")
# Name → class and sizes of the configuration, options of the quantizer and of the server.
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any], tuple[str, ...]]] = {
    "mixtral": ("MixtralConfig", {"num_local_experts": 4}, {"format": "hptq", "rate": 4.0}, ONE),
    "qwen2-moe": (
        "Qwen2MoeConfig",
        MANY | WIDE | {"shared_expert_intermediate_size": 64},
        {"target_bits": 4.3},
        ONE,
    ),
    "qwen3-moe": (
        "Qwen3MoeConfig",
        MANY,
        {},
        (*ONE, "--enforce-eager", "--tensor-parallel-size", "2", "--enable-expert-parallel"),
    ),
    "olmoe": ("OlmoeConfig", WIDE | {"num_experts": 8}, {}, (*ONE, "--enforce-eager", "--tensor-parallel-size", "2")),
    "gpt-oss": ("GptOssConfig", {"num_local_experts": 4}, {}, (*ONE, "--enforce-eager")),
    "trellis": ("MixtralConfig", {"num_local_experts": 4}, {"format": "trellis", "target_bits": 3.5}, ONE),
    "trellis on two ranks": (
        "MixtralConfig",
        WIDE | {"num_local_experts": 4, "intermediate_size": 128},
        {"format": "trellis", "target_bits": 3.5},
        (*ONE, "--enforce-eager", "--tensor-parallel-size", "2"),
    ),
    "deepseek-v2": ("DeepseekV2Config", LATENT_EXPERTS, {"target_bits": 4.3}, (*ONE, "--enforce-eager")),
}
FIRST, *OTHERS = CASES


def check_chat(client: Any) -> None:
    """A conversation is answered, and in pieces the same."""
    asked: Any = {"model": "babai", "messages": [{"role": "user", "content": "def add(a, b):"}]}
    asked |= {"max_tokens": 8, "temperature": 0}
    whole = client.chat.completions.create(**asked).choices[0].message.content
    pieces = [chunk.choices[0].delta.content or "" for chunk in client.chat.completions.create(**asked, stream=True)]
    assert whole and len(pieces) > 1
    assert whole == "".join(pieces)


@pytest.mark.parametrize("case", [FIRST, *(pytest.param(name, marks=pytest.mark.long) for name in OTHERS)])
def test_served_as_the_dense_twin(case: str, tmp_path: Path, start_servers: Callable[..., Any]) -> None:
    kind, sizes, options, arguments = CASES[case]
    source = save_random(getattr(transformers, kind)(**SIZES | sizes), tmp_path / "source")
    text = tmp_path / "text.txt"
    text.write_text("\n".join(path.read_text() for path in sorted(Path(transformers.__file__).parent.glob("*.py"))[:3]))
    chosen = QuantizeOptions(calibration=str(text), samples=8, sequence_length=64, paths=1, **options)
    out = quantize(source, tmp_path / "out", chosen)
    expected = answer_of_twin(out)
    with start_servers((out, *arguments)) as (server,), ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda _: served_answer(server.client, expected.tokens, 8), range(16)))
        if case != "gpt-oss":  # whose chat vLLM writes in tokens that the small vocabulary has not
            check_chat(server.client)
    for answer in answers:
        assert answer.logprobs == pytest.approx(expected.logprobs, abs=0.02)
