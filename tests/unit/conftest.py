"""Models and texts that several test files share."""

import json
import runpy
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer, LlamaConfig, PreTrainedConfig

DEMO = Path(__file__).parents[2] / "deploy" / "demo"
BUNDLED = DEMO / "stdlib-6m"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json")


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

    def save(config: PreTrainedConfig, folder: Path, **save_options: Any) -> Path:
        torch.manual_seed(0)
        wrapper = hasattr(config, "vision_config")
        kind = AutoModelForImageTextToText if wrapper else AutoModelForCausalLM
        model = kind.from_config(config, dtype=torch.float32)
        for name, parameter in model.named_parameters():
            if name.endswith(("bias", "norm.weight")):  # transformers starts them at 0 and 1, which would hide mistakes
                parameter.data += 0.1 * torch.randn_like(parameter)
        model.save_pretrained(folder, **save_options)
        for file in TOKENIZER_FILES:
            shutil.copyfile(BUNDLED / file, folder / file)
        return folder

    return save


@pytest.fixture(scope="session")
def save_random_llama(save_random_model: Callable[..., Path]) -> Callable[..., Path]:
    """Function that saves a tiny Llama to a folder; sizes are those of LlamaConfig that matter to the test."""
    tiny = {
        "vocab_size": 4096,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
    }

    def save(folder: Path, **sizes: int) -> Path:
        return save_random_model(LlamaConfig(**tiny | sizes), folder)

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
