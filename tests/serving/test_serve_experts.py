"""A mixture of experts, quantized and served, against transformers with its dense twin."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import transformers
from architectures import TEXT, save_random
from twins import answer_of_twin, served_answer

from vllm_babai.offline import QuantizeOptions, quantize

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
    source = save_random(getattr(transformers, kind)(**SIZES | sizes), tmp_path / "source")
    text = tmp_path / "text.txt"
    text.write_text("\n".join(path.read_text() for path in sorted(Path(transformers.__file__).parent.glob("*.py"))[:3]))
    chosen = QuantizeOptions(calibration=str(text), samples=8, sequence_length=64, paths=1, **options)
    out = quantize(source, tmp_path / "out", chosen)
    expected = answer_of_twin(out)
    with start_servers((out, *arguments)) as (server,), ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda _: served_answer(server.client, expected.tokens, 8), range(16)))
    for answer in answers:
        assert answer.logprobs == pytest.approx(expected.logprobs, abs=0.02)
