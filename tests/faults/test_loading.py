"""Damage to a quantized checkpoint that vLLM loads, as one rank and as each of two: named, or the same parameters.

vLLM's own loader and model class take the damaged files. What cannot be compared here, config.json and the tokenizer,
`babai inspect --verify` compares.
"""

import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from test_damage import NUMBERS, alter, cut, edit_json, flip, remove, store, swap
from vllm_models import load_as_rank, one_process

from vllm_babai.format import FORMATS

PARTS = {part for form in FORMATS.values() for part in form.dtypes}


def alter_kept(path: Path, chance: random.Random) -> str:
    """Drop, rename or change a tensor that was left as it was: an embedding, a norm, the head."""
    tensors = load_file(path)
    name = chance.choice(sorted(name for name in tensors if name.rpartition(".")[2] not in PARTS))
    kind = chance.choice(("drop", "rename", "bit", "zero"))
    tensor = tensors.pop(name)
    if kind == "rename":
        tensors[f"{name}x"] = tensor
    elif kind == "zero":
        tensors[name] = torch.zeros_like(tensor)
    elif kind == "bit":
        tensor.view(torch.uint8).view(-1)[chance.randrange(tensor.nbytes)] ^= 1 << chance.randrange(8)
        tensors[name] = tensor
    store(path, tensors)
    return f"{kind} {name}"


BLOCKS = "model-0000[12]-of-*.safetensors"
DAMAGES: list[tuple[str, Callable[[Path, random.Random], str], str]] = [
    ("altered tensor, linears", alter, BLOCKS),
    ("swapped, linears", swap, BLOCKS),
    ("altered tensor, kept", alter_kept, "*.safetensors"),
    ("flipped bytes, weights", flip, "*.safetensors"),
    ("cut file, weights", cut, "*.safetensors"),
    ("removed file, weights", remove, "*.safetensors"),
    ("edited field, index", edit_json, "model.safetensors.index.json"),
]


@pytest.fixture(scope="module", params=sorted(FORMATS))
def quantized(request: pytest.FixtureRequest, make_quantized: Callable[..., Path]) -> Path:
    """Every format, wide enough that each divides among two ranks."""
    return make_quantized(request.param, 128)


@pytest.fixture(scope="module", autouse=True)
def groups() -> Iterator[None]:
    """vLLM's process groups."""
    with one_process():
        yield


@pytest.fixture(scope="module")
def baselines() -> dict[tuple[Path, int], list[dict[str, bytes]]]:
    """What every rank of one or two holds of the sound checkpoints; filled as they are used."""
    return {}


def parameters(folder: Path, rank: int, ranks: int) -> dict[str, bytes]:
    """All that a rank holds, bit by bit."""
    model = load_as_rank(folder, rank, ranks)
    return {
        name: value.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        for name, value in model.named_parameters()
    }


def attack(folder: Path, ranks: int, baseline: list[dict[str, bytes]]) -> tuple[str, str]:
    """How the load of a damaged checkpoint ends, and why: one rank that refuses ends all."""
    verdicts = []
    for rank in range(ranks):
        try:
            held = parameters(folder, rank, ranks)
        except Exception as error:
            message = f"{type(error).__name__}: {error}"
            named = any(part in message for part in ("model.", "layers.", "embed_tokens.", "lm_head", str(folder)))
            return ("refused by name" if named else "refused without a name"), message
        verdicts.append("harmless" if held == baseline[rank] else "silent")
    return max(verdicts), f"{verdicts} of {ranks} ranks"


def run(kinds: Any, examples: int, ranks: int, quantized: Path, tmp_path: Path, figures: Any, baselines: Any) -> None:
    if (quantized, ranks) not in baselines:
        baselines[quantized, ranks] = [parameters(quantized, rank, ranks) for rank in range(ranks)]

    @settings(
        max_examples=examples,
        deadline=None,
        derandomize=True,
        phases=[Phase.generate],
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(number=NUMBERS, kind=kinds)
    def one(number: int, kind: tuple[str, Any, str]) -> None:
        name, damage, files = kind
        chance, folder = random.Random(number), tmp_path / "damaged"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(quantized, folder)
        what = damage(chance.choice(sorted(folder.glob(files))), chance)
        verdict, why = attack(folder, ranks, baselines[quantized, ranks])
        figures[f"{name}: vLLM, ranks {ranks}", verdict] += 1
        assert verdict in ("refused by name", "harmless"), f"{name} {number}: {what}: {why}"

    one()


@pytest.mark.parametrize("ranks", [pytest.param(1, marks=pytest.mark.long), 2])
def test_damage_is_refused_by_name_or_harmless(
    ranks: int, quantized: Path, tmp_path: Path, figures: Any, baselines: Any
) -> None:
    for kind in DAMAGES:
        run(st.just(kind), 1, ranks, quantized, tmp_path, figures, baselines)


@pytest.mark.long
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("kind", DAMAGES, ids=[kind for kind, _, _ in DAMAGES])
def test_damage_of_every_kind(
    kind: Any, ranks: int, quantized: Path, tmp_path: Path, figures: Any, baselines: Any
) -> None:
    run(st.just(kind), 50, ranks, quantized, tmp_path, figures, baselines)
