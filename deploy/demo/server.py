"""A `vllm serve` process that is certain to end with the program that started it."""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

START_SECONDS = 300
STOP_SECONDS = 10
INTERRUPTIONS = {signal.SIGINT, signal.SIGTERM}
# vLLM reads the first on its CPU build only, where it would otherwise take half of the machine's memory.
SERVER_ENVIRONMENT = {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}


class ServerError(RuntimeError):
    """The server ended, or did not answer in time."""


def free_port() -> int:
    """A TCP port of the loopback interface that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def serving(model: Path, name: str, log: Path) -> Iterator[str]:
    """Serve the quantized ``model`` as ``name`` on a free local port; gives the base URL of its OpenAI API.

    The server's output goes to ``log``. Raises ServerError when it does not come up. On leaving, for whatever reason,
    the server and all its children are stopped.
    """
    port = free_port()
    command = [
        *(str(Path(sys.executable).with_name("vllm")), "serve", str(model), "--quantization", "babai"),
        *("--served-model-name", name, "--host", "127.0.0.1", "--port", str(port)),
        *("--enforce-eager", "--max-num-seqs", "8", "--gpu-memory-utilization", "0.2"),
    ]
    with log.open("wb") as output:
        # Its own session: a Ctrl-C reaches only us, and the whole group can be killed at once.
        server = subprocess.Popen(
            command,
            env=os.environ | SERVER_ENVIRONMENT,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            wait_until_healthy(server, f"http://127.0.0.1:{port}/health")
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            stop(server)


def wait_until_healthy(server: subprocess.Popen, url: str) -> None:
    """Return when ``url`` answers; raises ServerError when the server ends before, or takes too long."""
    local = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if server.poll() is not None:
            raise ServerError(f"the server ended with exit status {server.returncode} before it was ready")
        try:
            local.open(url, timeout=5).close()
            return
        except OSError:  # of which urllib's errors are kinds
            time.sleep(0.25)
    raise ServerError(f"the server was not ready after {START_SECONDS} seconds")


def stop(server: subprocess.Popen) -> None:
    """Ask the server to end, then kill what is left of its process group. Signals to us wait until that is done."""
    signal.pthread_sigmask(signal.SIG_BLOCK, INTERRUPTIONS)
    try:
        server.terminate()
        with suppress(subprocess.TimeoutExpired):
            server.wait(STOP_SECONDS)
        with suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGKILL)
        server.wait()
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, INTERRUPTIONS)
