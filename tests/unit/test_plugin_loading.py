"""vLLM's own model classes, loaded with the plugin: every layer of a checkpoint gives what its dense twin's gives.

Both are of the same class, so that where all layers and all other parameters are equal, the models are. What a class
calls its layers, fuses, cuts for ranks or reads by itself is seen here.
"""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from architectures import ARCHITECTURES, configuration, save_random
from vllm_models import load_as_rank, one_process

from vllm_babai.offline import QuantizeOptions, quantize
from vllm_babai.offline.tools.convert import convert
from vllm_babai.plugin.linear import BabaiLinearMethod

README = Path(__file__).parents[1] / "README.md"
# Names that differ from the checkpoint's (falcon-h1, granite4); keys and values that blocks share, on two ranks.
ALWAYS = (("falcon-h1", 1), ("granite4", 1), ("gemma4", 2))
# What vLLM 0.32 has no class for, or needs torchvision to load.
NOT_SERVED = ("bamba", "diffllama", "olmo-hybrid", "recurrent-gemma", "qwen3-next")
WRAPPERS = ("gemma3", "llava", "mistral3", "qwen2.5-vl", "qwen3-vl", "qwen3.5", "qwen3.5-text")
# Its state-space layers have one group, see `check_groups` in plugin/config.py.
ONE_RANK = ("granite4",)
CASES = [(name, ranks) for name in ARCHITECTURES if name not in NOT_SERVED + WRAPPERS for ranks in (1, 2)]
CASES = [(name, ranks) for name, ranks in CASES if ranks == 1 or name not in ONE_RANK]


@pytest.fixture(scope="module")
def groups() -> Iterator[None]:
    with one_process():
        yield


@pytest.mark.parametrize(
    ("name", "ranks"), [case if case in ALWAYS else pytest.param(*case, marks=pytest.mark.long) for case in CASES]
)
def test_every_layer_equals_the_dense_twin(
    name: str, ranks: int, tmp_path: Path, short_text: Path, groups: None
) -> None:
    source = save_random(configuration(name), tmp_path / "source")
    options = QuantizeOptions(
        calibration=str(short_text), samples=2, sequence_length=32, paths=1, sensitivity=False, drift=False
    )
    out = quantize(source, tmp_path / "out", options)
    dense = convert(out, tmp_path / "dense", "dense", torch.float32)
    for rank in range(ranks):
        compare(load_as_rank(out, rank, ranks), load_as_rank(dense, rank, ranks))


def test_the_readme_says_what_was_tried() -> None:
    """The table of architectures in tests/README.md."""
    found = dict(re.findall(r"^ *\| ([^|]+) \| ([\w.,-]+(?:, [\w.,-]+)*) \|$", README.read_text(), re.MULTILINE))
    others = set(NOT_SERVED + WRAPPERS + ONE_RANK)
    rows = {
        "as one rank and as each of two": [name for name in ARCHITECTURES if name not in others],
        "as one rank; several are refused": ONE_RANK,
        "not tried: the class needs torchvision": WRAPPERS,
        "not tried: vLLM 0.32 has no class for them, or none without experts": NOT_SERVED,
    }
    assert found == {what: ", ".join(sorted(names)) for what, names in rows.items()}


def compare(quantized: torch.nn.Module, dense: torch.nn.Module) -> None:
    methods = {name: getattr(module, "quant_method", None) for name, module in quantized.named_modules()}
    layers = {name: method for name, method in methods.items() if isinstance(method, BabaiLinearMethod)}
    assert layers
    for name, method in layers.items():
        layer, twin = quantized.get_submodule(name), dense.get_submodule(name)
        x = torch.randn(3, method.sizes.in_features)
        expected = twin.quant_method.apply(twin, x)
        error = (method.apply(layer, x) - expected).abs().max()
        assert error < 1e-4 * expected.abs().max(), name
    others = dict(quantized.named_parameters())
    inside = tuple(f"{name}." for name in layers)
    for name, parameter in dense.named_parameters():
        if not name.startswith(inside) or name.endswith("bias"):
            assert torch.equal(parameter, others[name]), name
