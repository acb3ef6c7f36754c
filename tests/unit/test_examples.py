"""The scripts of deploy/examples, run as a user runs them."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "deploy" / "examples"
SMALL = {"SAMPLES": "4", "LENGTH": "64"}


def run(command: list[str | Path], path: str, **environment: str) -> str:
    """What a command prints. path: in which programs are looked for."""
    done = subprocess.run(
        [str(word) for word in command],
        env=os.environ | {"PATH": path} | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.long  # five processes that import torch
def test_a_checkpoint_is_compared_served_and_generates(
    save_random_llama: Callable[..., Path], short_text: Path, tmp_path: Path
) -> None:
    """Serving itself is tested in tests/serving: here a program in vllm's place says how it was called."""
    model = save_random_llama(tmp_path / "model", num_hidden_layers=1)
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "vllm").write_text('#!/bin/sh\necho "called: $*"\n')
    (programs / "vllm").chmod(0o755)
    path = os.pathsep.join((str(programs), str(Path(sys.executable).parent), os.environ["PATH"]))

    out = tmp_path / "out"
    table = run([EXAMPLES / "compare.sh", model, short_text, short_text, out], path, COLUMNS="400", **SMALL)
    assert all(f"ssqr-{bits}" in table for bits in ("3.2", "4.2")), table
    assert "KL, nats" in table

    called = run([EXAMPLES / "serve.sh", model, short_text, out / "ssqr-4.2", "8123"], path, **SMALL)
    assert called == f"called: serve {out / 'ssqr-4.2'} --quantization babai --max-model-len auto --port 8123\n"

    text = run([sys.executable, EXAMPLES / "generate.py", out / "ssqr-4.2", "def read(path"], path)
    assert text.startswith("def read(path") and len(text) > len("def read(path\n")
