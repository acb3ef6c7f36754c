"""Models and texts that several test files share."""

import json
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import BUNDLED, TEXT, save_random
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

DEMO = Path(__file__).parents[2] / "deploy" / "demo"


@pytest.fixture(scope="session")
def bundled_model() -> Path:
    """The trained model that comes with the project: 6 blocks, hidden size 256."""
    return BUNDLED


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    """The bundled model's tokenizer, of 4096 tokens; the tiny models use it, too."""
    return AutoTokenizer.from_pretrained(BUNDLED)


@pytest.fixture(scope="session")
def calibration_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demonstration's calibration text as .jsonl, more than 65,536 tokens."""
    text = runpy.run_path(str(DEMO / "text.py"))
    path = tmp_path_factory.mktemp("text") / "calibration.jsonl"
    text["write_jsonl"](path, text["CALIBRATION_MODULES"])
    return path


@pytest.fixture(scope="session")
def short_text(calibration_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some thousand tokens as .txt."""
    path = tmp_path_factory.mktemp("text") / "short.txt"
    path.write_text(json.loads(calibration_file.read_text().splitlines()[0])["text"][:30_000])
    return path


@pytest.fixture(scope="session")
def save_random_model() -> Callable[..., Path]:
    """Function that saves a randomly initialized model of a configuration with the bundled tokenizer."""
    return save_random


@pytest.fixture(scope="session")
def save_random_llama(save_random_model: Callable[..., Path]) -> Callable[..., Path]:
    """Function that saves a tiny Llama to a folder; sizes are those of LlamaConfig that matter to the test."""

    def save(folder: Path, **sizes: int) -> Path:
        return save_random_model(LlamaConfig(**TEXT | sizes), folder)

    return save


@pytest.fixture(scope="session")
def captured(calibration_file: Path, tokenizer: Any) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Weight, float32 [out, in], and Hessian XᵀX / tokens, float64 [in, in], of the bundled model's linears by name.

    One linear of each group that shares its input; captured from the original model with plain forward hooks.
    """
    model = AutoModelForCausalLM.from_pretrained(BUNDLED, dtype=torch.float32).eval()
    text = "".join(json.loads(line)["text"] for line in calibration_file.read_text().splitlines())
    tokens = torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"][: 16 * 256]).view(16, 256)
    inputs: dict[str, list[torch.Tensor]] = {}

    def note(name: str) -> Callable[..., None]:
        return lambda _, args: inputs.setdefault(name, []).append(args[0].flatten(0, 1).double())

    linears = {
        name: module
        for name, module in model.model.layers.named_modules(prefix="model.layers")
        if name.endswith(("q_proj", "o_proj", "up_proj", "down_proj"))
    }
    for name, module in linears.items():
        module.register_forward_pre_hook(note(name))
    with torch.inference_mode():
        for batch in tokens.split(4):
            model(batch)
    rows = {name: torch.cat(batches) for name, batches in inputs.items()}
    return {name: (linears[name].weight.detach(), x.T @ x / len(x)) for name, x in rows.items()}
