"""Soak: `vllm serve` of a quantized model under clients that are many, hasty and rude.

    python tests/benchmarks/soak.py                         # an hour with 32 clients
    python tests/benchmarks/soak.py --minutes 5 --plot soak.png --json soak.json

Quantizes the bundled model, serves it, and lets the clients stream, chat, disconnect midway and send what a server has
to refuse: prompts that are too long, malformed JSON, an absurd `n`. Between them go greedy prompts whose tokens are
known from the dense twin in transformers. Memory, file handles and latency are noted over time; at the end the server
gets SIGTERM while it is busy. Exits with 1 if a token was wrong, an answer had an unexpected status, or the server did
not end cleanly. What it shows besides is read from the table and the plot: a leak is a line that keeps rising.

`--endings` serves the model and its dense twin for a quarter of a minute each, with and without vLLM's
`--shutdown-timeout`, and shows how long each takes to end under load.
"""

import asyncio
import os
import random
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil
import torch
from harness import DEMO, command_line, panels, report, save_plot, table
from openai import AsyncOpenAI, BadRequestError

MODEL = DEMO / "stdlib-6m"
NAME = "babai"
MAX_LENGTH = 512  # tokens of a request
NEW_TOKENS = 16
MARGIN = 0.05  # nats between the twin's two best tokens: more than float32 sums in another order can move
SAMPLE_SECONDS = 5
START_SECONDS, STOP_SECONDS = 300, 60
# vLLM's `--shutdown-timeout`. Without it the engine ends at once, and the HTTP server waits for answers without end.
DRAIN_SECONDS = 20
BUSY_SECONDS = 15  # before SIGTERM, where it is all that is looked at
TIMEOUT_SECONDS = 300  # of one request
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
}
PROMPTS = (
    "import os\nimport sys\n\ndef ",
    "class Queue:\n    def __init__(self",
    "    def __repr__(self):\n        return ",
    "    if not isinstance(",
    "    for key, value in self.",
    "    raise ValueError(",
    "    with open(filename, ",
    "    try:\n        return self._",
    "def main():\n    parser = argparse.",
    "        while True:\n            line = ",
    "    return [x for x in ",
    "from collections import ",
)


@dataclass
class Served:
    """What the soak saw. answers: kind of request → of each when it was answered, as `samples` count, and how long that
    took. faults: what must not happen, in words. samples: (seconds since the start, resident bytes, file handles) of
    the server and its children. ending: seconds from SIGTERM to its end; None where it still ran after STOP_SECONDS.
    """

    started: float = field(default_factory=time.monotonic)
    answers: dict[str, list[tuple[float, float]]] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)
    samples: list[tuple[float, int, int]] = field(default_factory=list)
    checked: int = 0
    ending: float | None = None

    def now(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self.started


@dataclass(frozen=True)
class Probe:
    """A prompt and the tokens with which the dense twin goes on, as text."""

    prompt: str
    answer: str


class Clients:
    """The requests that a client may send; each is a method, and every one checks its answer."""

    def __init__(self, port: int, probes: list[Probe], served: Served) -> None:
        self.root = f"http://127.0.0.1:{port}"
        self.openai = AsyncOpenAI(base_url=f"{self.root}/v1", api_key="none", max_retries=0, timeout=TIMEOUT_SECONDS)
        self.http = httpx.AsyncClient(timeout=TIMEOUT_SECONDS)
        self.probes, self.served = probes, served
        self.kinds: list[Callable[[random.Random], Awaitable[None]]] = [
            *(self.probe, self.stream, self.chat, self.disconnect),
            *(self.too_long, self.malformed, self.absurd_n),
        ]

    async def loop(self, seed: int, stop: asyncio.Event) -> None:
        """Send one request after the other until told to stop."""
        dice = random.Random(seed)
        while not stop.is_set():
            kind = dice.choice(self.kinds)
            asked = self.served.now()
            try:
                await kind(dice)
            except Exception as error:
                if not stop.is_set():
                    self.served.faults.append(f"{kind.__name__}: {type(error).__name__}: {error}")
            answered = self.served.now()
            self.served.answers.setdefault(kind.__name__, []).append((answered, answered - asked))

    async def probe(self, dice: random.Random) -> None:
        """A greedy completion, compared with the dense twin's."""
        probe = dice.choice(self.probes)
        answer = await self.openai.completions.create(
            model=NAME, prompt=probe.prompt, max_tokens=NEW_TOKENS, temperature=0
        )
        self.served.checked += 1
        if answer.choices[0].text != probe.answer:
            self.served.faults.append(f"wrong tokens for {probe.prompt!r}: {answer.choices[0].text!r}")

    async def stream(self, dice: random.Random) -> None:
        """A streamed completion, read to its end."""
        tokens = dice.randint(1, 64)
        chunks = await self.openai.completions.create(
            model=NAME, prompt=dice.choice(PROMPTS), max_tokens=tokens, stream=True, extra_body={"ignore_eos": True}
        )
        received = [chunk async for chunk in chunks]
        if received[-1].choices[0].finish_reason != "length":
            self.served.faults.append(f"stream: ended with {received[-1].choices[0].finish_reason}")

    async def chat(self, dice: random.Random) -> None:
        """A chat message."""
        messages: Any = [{"role": "user", "content": dice.choice(PROMPTS)}]
        answer = await self.openai.chat.completions.create(model=NAME, messages=messages, max_tokens=NEW_TOKENS)
        if not answer.choices:
            self.served.faults.append("chat: no choice in the answer")

    async def disconnect(self, dice: random.Random) -> None:
        """A stream whose reader goes away after a few chunks."""
        body = {"model": NAME, "prompt": dice.choice(PROMPTS), "max_tokens": 256, "stream": True, "ignore_eos": True}
        async with self.http.stream("POST", f"{self.root}/v1/completions", json=body) as answer:
            lines = answer.aiter_lines()
            for _ in range(dice.randint(1, 8)):
                await anext(lines)

    async def too_long(self, dice: random.Random) -> None:
        """A prompt beyond the model's positions, which is to be refused."""
        prompt = [dice.randrange(100, 4000) for _ in range(2 * MAX_LENGTH)]
        await self._refused("too_long", prompt=prompt, max_tokens=NEW_TOKENS)

    async def absurd_n(self, dice: random.Random) -> None:
        """A million answers to one prompt, which is to be refused."""
        await self._refused("absurd_n", prompt=dice.choice(PROMPTS), n=1_000_000, max_tokens=1)

    async def malformed(self, dice: random.Random) -> None:
        """Half a JSON document."""
        body = '{"model": "babai", "prompt": "import os'[: dice.randint(1, 38)]
        headers = {"content-type": "application/json"}
        answer = await self.http.post(f"{self.root}/v1/completions", content=body, headers=headers)
        if not 400 <= answer.status_code < 500:
            self.served.faults.append(f"malformed: status {answer.status_code}")

    async def _refused(self, kind: str, **request: Any) -> None:
        with suppress(BadRequestError):
            await self.openai.completions.create(model=NAME, **request)
            self.served.faults.append(f"{kind}: was not refused")


def prepare(folder: Path) -> tuple[dict[str, Path], list[Probe]]:
    """The bundled model, quantized and as its dense twin; the probes are what the twin says, where it is sure of it."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from vllm_babai.offline import QuantizeOptions, quantize
    from vllm_babai.offline.tools.convert import convert

    text = runpy.run_path(str(DEMO / "text.py"))
    text["write_jsonl"](folder / "calibration.jsonl", text["CALIBRATION_MODULES"])
    options = QuantizeOptions(calibration=str(folder / "calibration.jsonl"), samples=16, sequence_length=256)
    quantized = quantize(MODEL, folder / "quantized", options)
    dense = convert(quantized, folder / "dense", "dense", torch.float32)
    twin, tokenizer = AutoModelForCausalLM.from_pretrained(dense).eval(), AutoTokenizer.from_pretrained(dense)
    probes = []
    for prompt in PROMPTS:
        tokens = tokenizer(prompt, return_tensors="pt")
        found = twin.generate(
            **tokens, max_new_tokens=NEW_TOKENS, do_sample=False, output_scores=True, return_dict_in_generate=True
        )
        best = torch.log_softmax(torch.stack(found.scores), -1).topk(2).values
        if float((best[..., 0] - best[..., 1]).min()) > MARGIN:
            answer = found.sequences[0, tokens["input_ids"].shape[1] :]
            probes.append(Probe(prompt, tokenizer.decode(answer, skip_special_tokens=True)))
    return {"quantized": quantized, "dense": dense}, probes


@asynccontextmanager
async def running_server(model: Path, drain: int) -> Any:
    """The process of `vllm serve` and its port, once it is ready; its log lies next to the model.

    drain: seconds that requests get to end in after SIGTERM.
    """
    log = model.with_suffix(".log")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [str(Path(sys.executable).with_name("vllm")), "serve", str(model), "--shutdown-timeout", str(drain)]
    command += ["--host", "127.0.0.1", "--port", str(port), "--served-model-name", NAME, "--dtype", "float32"]
    command += ["--max-model-len", str(MAX_LENGTH), "--max-num-seqs", "16", "--gpu-memory-utilization", "0.2"]
    with log.open("w") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=output, env=os.environ | ENVIRONMENT, start_new_session=True
        )
    try:
        async with httpx.AsyncClient() as client:
            for _ in range(START_SECONDS):
                if process.poll() is not None:
                    raise RuntimeError(f"the server stopped:\n{log.read_text()[-3000:]}")
                with suppress(httpx.TransportError):
                    if (await client.get(f"http://127.0.0.1:{port}/health")).is_success:
                        break
                await asyncio.sleep(1)
            else:
                raise RuntimeError(f"the server is not ready:\n{log.read_text()[-3000:]}")
        yield process, port
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


async def watch(pid: int, served: Served, stop: asyncio.Event) -> None:
    """Note memory and file handles of a process and its children until told to stop."""
    while not stop.is_set():
        memory = handles = 0
        for process in (psutil.Process(pid), *psutil.Process(pid).children(recursive=True)):
            with suppress(psutil.NoSuchProcess):
                memory, handles = memory + process.memory_info().rss, handles + process.num_fds()
        served.samples.append((served.now(), memory, handles))
        with suppress(TimeoutError):
            await asyncio.wait_for(stop.wait(), SAMPLE_SECONDS)


async def soak(model: Path, probes: list[Probe], clients: int, seconds: float, drain: int) -> Served:
    """Serve the model to so many clients for so long, then end it while they still ask."""
    async with running_server(model, drain) as (process, port):
        served = Served()
        stop_watch, stop_clients = asyncio.Event(), asyncio.Event()
        asking = Clients(port, probes, served)
        tasks = [asyncio.create_task(asking.loop(seed, stop_clients)) for seed in range(clients)]
        watching = asyncio.create_task(watch(process.pid, served, stop_watch))
        for left in range(int(seconds), 0, -30):
            print(f"{left / 60:.1f} minutes left, {sum(map(len, served.answers.values()))} requests", flush=True)
            await asyncio.sleep(min(30, left))
        stop_watch.set()
        await watching
        stop_clients.set()  # what fails from here on fails because the server is told to end
        await end(process, served)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    return served


async def end(process: subprocess.Popen, served: Served) -> None:
    """Send SIGTERM, and note how long the server takes to end, and whether it does."""
    started = time.monotonic()
    process.send_signal(signal.SIGTERM)
    try:
        status = await asyncio.to_thread(process.wait, STOP_SECONDS)
    except subprocess.TimeoutExpired:
        served.faults.append(f"the server still ran {STOP_SECONDS} seconds after SIGTERM")
        return
    served.ending = time.monotonic() - started
    if status not in (0, -signal.SIGTERM):
        served.faults.append(f"the server ended with status {status} after SIGTERM")


def compare_endings(models: dict[str, Path], probes: list[Probe], clients: int, json_file: Path | None) -> None:
    """Report how long each model's server takes to end under load, with and without time for its requests."""
    found = []
    shown = table(f"SIGTERM under {clients} clients", ("model", "--shutdown-timeout", "seconds to the end"))
    for drain in (0, DRAIN_SECONDS):
        for name, model in models.items():
            ending = asyncio.run(soak(model, probes, clients, BUSY_SECONDS, drain)).ending
            found.append({"model": name, "shutdown_timeout": drain, "seconds": ending})
            shown.add_row(name, str(drain), f"not within {STOP_SECONDS}" if ending is None else f"{ending:.1f}")
    report(found, [shown], json_file)


def quantiles(seconds: list[float]) -> dict[str, float]:
    """How many there are, their median and the value that 99% do not exceed."""
    ordered = sorted(seconds)
    late = ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))]
    return {"requests": len(ordered), "median": ordered[len(ordered) // 2], "99%": late}


def by_minute(served: Served) -> list[dict[str, float]]:
    """Of every whole minute, and of what is left at the end: requests, their seconds, the most memory and handles."""
    found = []
    for minute in range(int(served.samples[-1][0] / 60) + 1):
        answered = [s for answers in served.answers.values() for at, s in answers if int(at / 60) == minute]
        inside = [(memory, handles) for at, memory, handles in served.samples if int(at / 60) == minute]
        if answered and inside:
            memory, handles = (max(values) for values in zip(*inside, strict=True))
            found.append({"minute": minute, **quantiles(answered), "mib": memory / 2**20, "handles": handles})
    return found


def draw(minutes: list[dict[str, float]], path: Path) -> None:
    """Memory, file handles and latency over time."""
    figure, (memory, handles, latency) = panels(3)
    for panel, names, label in (
        (memory, ("mib",), "resident memory of the server, MiB"),
        (handles, ("handles",), "open file handles"),
        (latency, ("median", "99%"), "seconds of a request"),
    ):
        for name in names:
            panel.plot([one["minute"] for one in minutes], [one[name] for one in minutes], label=name)
        most = max(one[name] for one in minutes for name in names)
        panel.set(xlabel="minutes", ylabel=label, ylim=(0, 1.1 * most))
    latency.legend()
    save_plot(figure, path)


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--plot", type=Path, help="PNG of memory, file handles and latency over time")
    parser.add_argument("--json", type=Path, help="file for all figures")
    parser.add_argument("--endings", action="store_true", help="only compare how long servers take to end")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        models, probes = prepare(Path(folder))
        if options.endings:
            return compare_endings(models, probes, options.clients, options.json)
        model = models["quantized"]
        served = asyncio.run(soak(model, probes, options.clients, 60 * options.minutes, DRAIN_SECONDS))
    drawn = table(f"{options.clients} clients, {options.minutes:g} minutes", ("request", "sent", "median s", "99% s"))
    kinds = {kind: quantiles([seconds for _, seconds in answers]) for kind, answers in sorted(served.answers.items())}
    for kind, found in kinds.items():
        drawn.add_row(kind, str(found["requests"]), f"{found['median']:.2f}", f"{found['99%']:.2f}")
    settled = served.samples[len(served.samples) // 5 :]  # after the caches have filled
    growth = table("server", ("", "a fifth in", "end"))
    growth.add_row("memory, MiB", f"{settled[0][1] / 2**20:.0f}", f"{settled[-1][1] / 2**20:.0f}")
    growth.add_row("file handles", str(settled[0][2]), str(settled[-1][2]))
    minutes = by_minute(served)
    ended = {"checked": served.checked, "faults": served.faults, "ending": served.ending}
    report({"kinds": kinds, "minutes": minutes, **ended}, [drawn, growth], options.json)
    print(f"{served.checked} greedy answers compared with the dense twin ({len(probes)} prompts)")
    if options.plot:
        draw(minutes, options.plot)
    for fault in served.faults[:20]:
        print(f"fault: {fault}")
    print(f"{len(served.faults)} faults")
    raise SystemExit(1 if served.faults else 0)


if __name__ == "__main__":
    main()
