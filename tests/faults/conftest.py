"""Tiny quantized checkpoints of every format, and the command `babai` in this process."""

import json
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from vllm_babai.format import FORMATS
from vllm_babai.offline import QuantizeOptions, quantize
from vllm_babai.offline.cli import main

BUNDLED = Path(__file__).parents[2] / "deploy" / "demo" / "stdlib-6m"
SIZES = {
    "vocab_size": 4096,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
}

OUTCOMES = (
    "refused by name",
    "refused without a name",
    "traceback",
    "silent",
    "seen by --verify",
    "harmless",
)
FIGURES = pytest.StashKey[Counter[tuple[str, str]]]()


def pytest_configure(config: pytest.Config) -> None:
    """Start to count."""
    config.stash[FIGURES] = Counter()


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """The table of the attack: what was tried, by kind, and how it ended."""
    figures = config.stash[FIGURES]
    if not figures:
        return
    kinds = sorted({kind for kind, _ in figures})
    terminalreporter.section("attack")
    terminalreporter.write_line(f"{'kind':32}{'tried':>8}" + "".join(f"{outcome:>24}" for outcome in OUTCOMES))
    for kind in [*kinds, "all"]:
        counts = [
            sum(number for (one, ended), number in figures.items() if kind in (one, "all") and ended == outcome)
            for outcome in OUTCOMES
        ]
        terminalreporter.write_line(f"{kind:32}{sum(counts):>8}" + "".join(f"{count:>24}" for count in counts))


@pytest.fixture
def figures(request: pytest.FixtureRequest) -> Counter[tuple[str, str]]:
    """(kind of attack, outcome) → how often."""
    return request.config.stash[FIGURES]


@dataclass(frozen=True)
class Outcome:
    """What a command left: its exit status, or the name of the exception that would have been a traceback."""

    status: int
    out: str
    error: str
    traceback: str | None = None

    @property
    def refused(self) -> bool:
        """Whether the command refused in one line, the last after those that tell of progress, and by its status."""
        lines = self.error.strip().splitlines()
        errors = [line for line in lines if line.startswith("error: ")]
        return self.traceback is None and self.status == 2 and errors == lines[-1:]


@pytest.fixture
def babai(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """Function that runs the command in this process; nothing is fetched from the network."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)

    def run(*arguments: Any) -> Outcome:
        monkeypatch.setattr("sys.argv", ["babai", *map(str, arguments)])
        status, traceback = 0, None
        capsys.readouterr()
        try:
            main()
        except SystemExit as left:
            status = left.code if isinstance(left.code, int) else 0
        except Exception as error:  # in a process of its own it would be a traceback
            traceback = f"{type(error).__name__}: {error}"
        out, error_text = capsys.readouterr()
        return Outcome(status, out, error_text, traceback)

    return run


@pytest.fixture(scope="session")
def make_source(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """Function that saves a Llama of two blocks of this width, once, with the bundled model's tokenizer."""
    base = tmp_path_factory.mktemp("faults")

    def make(width: int) -> Path:
        folder = base / str(width) / "source"
        if not folder.exists():
            sizes = SIZES | {"hidden_size": width, "intermediate_size": width}
            torch.manual_seed(0)
            AutoModelForCausalLM.from_config(LlamaConfig(**sizes), dtype=torch.float32).save_pretrained(folder)
            for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
                shutil.copyfile(BUNDLED / name, folder / name)
        return folder

    return make


@pytest.fixture(scope="session")
def source(make_source: Callable[[int], Path]) -> Path:
    """The smallest: linears are 32 × 32 and less."""
    return make_source(32)


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some thousand tokens as .txt."""
    path = tmp_path_factory.mktemp("faults") / "text.txt"
    path.write_text(json.dumps(SIZES) * 60)
    return path


@pytest.fixture(scope="session")
def make_quantized(make_source: Callable[[int], Path], text: Path) -> Callable[..., Path]:
    """Function that quantizes the model of a width to a format, once."""

    def make(form: str, width: int = 32) -> Path:
        source = make_source(width)
        folder = source.with_name(form)
        options = QuantizeOptions(
            format=form,  # type: ignore[arg-type]
            calibration=str(text),
            samples=4,
            sequence_length=32,
            paths=1,
            target_bits=3.0 if form == "trellis" else None,  # which it does not do without
        )
        return folder if folder.exists() else quantize(source, folder, options)

    return make


@pytest.fixture(scope="session")
def ssqr(make_quantized: Callable[..., Path]) -> Path:
    """The tiny model in the dense + sparse format."""
    return make_quantized("ssqr")


@pytest.fixture(scope="session", params=sorted(FORMATS))
def quantized(request: pytest.FixtureRequest, make_quantized: Callable[..., Path]) -> Path:
    """The tiny model in every format."""
    return make_quantized(request.param)
