"""`babai push` against a stand-in for the hub's API on this machine."""

import base64
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from vllm_babai.offline import QuantizeOptions, quantize

BABAI = Path(sys.executable).with_name("babai")
TOKEN = "hf_of-the-test"


class Hub(ThreadingHTTPServer):
    """As much of the hub as an upload needs. files: path → content, once committed."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.address = f"http://127.0.0.1:{self.server_port}"
        self.stored: dict[str, bytes] = {}  # large files by their hash
        self.files: dict[str, bytes] = {}
        self.visibility: str | None = None


class Answer(BaseHTTPRequestHandler):
    server: Hub

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.headers["Authorization"] != f"Bearer {TOKEN}":
            return self.say({"error": "who are you?"}, 401)
        if self.path == "/api/repos/create":
            self.server.visibility = json.loads(body).get("visibility")
            return self.say({"url": f"{self.server.address}/org/name"})
        if self.path.endswith("/validate-yaml"):
            return self.say({"errors": [], "warnings": []})
        if "/preupload/" in self.path:
            kinds = {True: "lfs", False: "regular"}
            return self.say(
                {
                    "files": [
                        {"path": file["path"], "uploadMode": kinds[file["path"].endswith(".safetensors")]}
                        | {"shouldIgnore": False}
                        for file in json.loads(body)["files"]
                    ]
                }
            )
        if self.path.endswith("/objects/batch"):
            wanted = json.loads(body)["objects"]
            actions = [{"upload": {"href": f"{self.server.address}/store/{each['oid']}"}} for each in wanted]
            return self.say(
                {"objects": [each | {"actions": action} for each, action in zip(wanted, actions, strict=True)]}
            )
        if "/commit/" in self.path:
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    self.server.files[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    self.server.files[value["path"]] = self.server.stored[value["oid"]]
            return self.say({"commitUrl": f"{self.server.address}/org/name/commit/1", "commitOid": "1"})
        return self.say({"error": self.path}, 404)

    def do_PUT(self) -> None:
        self.server.stored[self.path.split("/")[-1]] = self.rfile.read(int(self.headers["Content-Length"]))
        self.say({})

    def do_GET(self) -> None:
        self.say({"error": self.path}, 404)

    def say(self, answer: dict[str, Any], status: int = 200) -> None:
        body = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def hub() -> Iterator[Hub]:
    with Hub() as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture(scope="module")
def quantized(
    save_random_llama: Callable[..., Path], short_text: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    folder = tmp_path_factory.mktemp("push")
    model = save_random_llama(folder / "tiny", num_hidden_layers=1)
    return quantize(model, folder / "out", QuantizeOptions(calibration=str(short_text), samples=2, sequence_length=32))


def push(hub: Hub, *arguments: str | Path, token: str = TOKEN) -> subprocess.CompletedProcess[str]:
    online = {"HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "127.0.0.1"}
    settings = online | {"HF_ENDPOINT": hub.address, "HF_TOKEN": token}
    command = [BABAI, "push", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | settings)


def test_every_file_arrives(hub: Hub, quantized: Path) -> None:
    done = push(hub, quantized, "org/name", "--private")
    assert done.returncode == 0, done.stderr
    assert "vllm serve org/name --quantization babai" in done.stdout
    assert hub.visibility == "private"
    assert hub.files == {path.name: path.read_bytes() for path in quantized.iterdir()}


@pytest.mark.parametrize(
    ("folder", "repository", "token", "message"),
    [
        ("tiny", "org/name", TOKEN, "is not quantized"),
        ("out", "no/such/name", TOKEN, "no/such/name is no name of a repository"),
        ("out", "org/name", "hf_of-nobody", "the hub does not take it"),
    ],
)
def test_what_cannot_be_published_is_refused(
    hub: Hub, quantized: Path, folder: str, repository: str, token: str, message: str
) -> None:
    done = push(hub, quantized.with_name(folder), repository, token=token)
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
    assert not hub.files
