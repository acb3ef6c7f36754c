"""A checkpoint, its dense twin, and real `vllm serve` processes."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import openai
import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file

from vllm_babai.format import SSQR, CheckpointConfig, LatticeWeight

MODEL = Path(__file__).parents[2] / "deploy" / "demo" / "stdlib-6m"
BITS = 4
START_SECONDS, STOP_SECONDS = 480, 60
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
}


class Checkpoints(NamedTuple):
    """Folders of the same lattice point."""

    quantized: Path
    dense: Path


class Server:
    """A running `vllm serve`, compiled as vLLM does by default unless the options have --enforce-eager."""

    def __init__(self, model: Path, log: Path, cache: Path, *options: str) -> None:
        assert "--enforce-eager" in options or shutil.which("g++"), "vLLM compiles models on a CPU with g++: install it"
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        vllm = Path(sys.executable).with_name("vllm")
        command = [
            vllm,
            "serve",
            model,
            "--host",
            "127.0.0.1",
            "--port",
            str(self.port),
            "--served-model-name",
            "babai",
        ]
        command += ["--max-model-len", "512", "--gpu-memory-utilization", "0.2", *options]
        self.log = log
        with log.open("w") as output:
            self.process = subprocess.Popen(
                command,
                stdout=output,
                stderr=output,
                env={**os.environ, **ENVIRONMENT, "VLLM_CACHE_ROOT": str(cache)},
                start_new_session=True,
            )
        self.client = openai.OpenAI(base_url=f"http://127.0.0.1:{self.port}/v1", api_key="none", max_retries=0)

    def wait_until_ready(self) -> None:
        for _ in range(START_SECONDS):
            assert self.process.poll() is None, f"the server stopped:\n{self.log.read_text()[-5000:]}"
            try:
                if httpx.get(f"http://127.0.0.1:{self.port}/health").is_success:
                    return
            except httpx.TransportError:
                pass
            time.sleep(1)
        raise TimeoutError(f"the server is not ready:\n{self.log.read_text()[-5000:]}")

    def terminate(self) -> int:
        """SIGTERM, as a container runtime sends it; returns the exit status."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout=STOP_SECONDS)

    def wait_for_processes(self) -> list[str]:
        """Names of what the server started and left running, after a grace period."""
        for _ in range(STOP_SECONDS):
            running = [process.info["name"] for process in self._processes()]
            if not running:
                return []
            time.sleep(1)
        return running

    def kill(self) -> None:
        """End what is left. The group's number is certainly its own only until its leader is waited for."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        for process in self._processes():
            with suppress(psutil.NoSuchProcess):
                process.kill()

    def _processes(self) -> list[psutil.Process]:
        group = []
        for process in psutil.process_iter(["name", "status"]):
            with suppress(ProcessLookupError):
                if os.getpgid(process.pid) == self.process.pid and process.info["status"] != psutil.STATUS_ZOMBIE:
                    group.append(process)
        return group


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Checkpoints:
    """The bundled model in both forms: every linear, and the embedding that is its head, too, rounded to nearest on a
    lattice with about 1% overflow.
    """
    quantized: dict[str, torch.Tensor] = {}
    dense: dict[str, torch.Tensor] = {}
    for name, weight in load_file(MODEL / "model.safetensors").items():
        if not name.endswith(("_proj.weight", "embed_tokens.weight")):
            quantized[name] = dense[name] = weight
            continue
        scales = (weight.float().abs().quantile(0.99, dim=1, keepdim=True) / 7.5).bfloat16()
        lattice = LatticeWeight((weight.float() / scales.float()).round().short(), scales)
        for tensor_name, tensor in SSQR.encode(lattice, BITS).tensors().items():
            quantized[name.removesuffix("weight") + tensor_name] = tensor
        dense[name] = lattice.dequantize()
    folder = tmp_path_factory.mktemp("checkpoints")
    config = json.loads((MODEL / "config.json").read_text())
    config["quantization_config"] = CheckpointConfig(
        "ssqr", BITS, overrides={"model.embed_tokens": {}}, embedding="model.embed_tokens"
    ).to_dict()
    for name, tensors in (("quantized", quantized), ("dense", dense)):
        shutil.copytree(MODEL, folder / name)
        save_file(tensors, folder / name / "model.safetensors", {"format": "pt"})
    (folder / "quantized" / "config.json").write_text(json.dumps(config))
    return Checkpoints(folder / "quantized", folder / "dense")


@pytest.fixture(scope="session")
def start_servers(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """Context manager that runs servers side by side, one for each (model, *options).

    All of a session share a cache of compiled graphs, which none of the user's servers sees.
    """
    cache = tmp_path_factory.mktemp("vllm-cache")

    @contextmanager
    def start(*arguments: tuple[Path | str, ...]) -> Iterator[list[Server]]:
        logs = tmp_path_factory.mktemp("logs")
        servers = [Server(model, logs / f"{i}.log", cache, *options) for i, (model, *options) in enumerate(arguments)]
        try:
            for server in servers:
                server.wait_until_ready()
            yield servers
        finally:
            for server in servers:
                server.kill()

    return start
