"""`babai tune` without a GPU: stand-ins measure, and the compiler works for a driver that launches nothing."""

import gc
import json
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from io import StringIO
from itertools import product
from pathlib import Path

import pytest
import torch
import triton
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.errors import OutOfResources

from vllm_babai.errors import QuantizationError
from vllm_babai.offline import cli
from vllm_babai.triton_kernels.configs import BUCKETS, Config, Entry, Table, Target, table_for
from vllm_babai.triton_kernels.fused import fused_kernel, multiply_fused
from vllm_babai.triton_kernels.layout import MAX_M_TILES, Geometry
from vllm_babai.triton_kernels.tuning import bench, tune
from vllm_babai.triton_kernels.tuning.bench import Bench, launchable
from vllm_babai.triton_kernels.tuning.search import PROGRAMS, kernels, search

TARGET = Target("cuda", "sm_90", "Stand-in/GPU 9", 132)
SHAPES = ((1024, 1024), (4096, 4096))
BITS = (3, 4)
STEPS = len(SHAPES) * len(BITS) * (len(BUCKETS) + 1)
EVERY = 10_000


def test_kernels_of_one_warp_are_for_few_tokens() -> None:
    few, many = kernels(16), kernels(32)
    assert {(config.rows, config.warps) for config in few} == {(64, 1), (64, 2), (64, 4), (128, 2), (128, 4)}
    assert {(config.rows, config.warps) for config in many} == {(64, 4), (128, 4)}
    for chosen in (few, many):
        assert len({replace(config, programs_per_sm=1) for config in chosen}) == len(chosen)


@given(st.sampled_from(BUCKETS), st.integers(0, 2**32))
def test_search_finds_the_least_of_separable_costs(tokens: int, seed: int) -> None:
    """Stages may matter differently to every tile, and programs too."""
    generator = random.Random(seed)
    chosen = kernels(tokens)
    cost_of_kernel = {replace(config, programs_per_sm=1): generator.random() for config in chosen}
    tiles = {(config.rows, config.warps) for config in chosen}
    cost_of_programs = {(*tile, programs): generator.random() for tile in sorted(tiles) for programs in PROGRAMS}
    measured: list[Config] = []

    def cost(config: Config) -> float:
        programs = cost_of_programs[config.rows, config.warps, config.programs_per_sm]
        return cost_of_kernel[replace(config, programs_per_sm=1)] + programs

    def measure(config: Config) -> float:
        measured.append(config)
        return cost(config)

    every = [replace(config, programs_per_sm=programs) for config in chosen for programs in PROGRAMS]
    assert search(chosen, measure) == min(every, key=cost)
    assert len(measured) == len(set(measured))
    assert len(measured) < (0.5 if tokens <= 16 else 0.75) * len(every)


@pytest.mark.parametrize("warps", [4, 8, 12, 24, 48])
def test_search_finds_a_tile_that_needs_its_own_number_of_programs(warps: int) -> None:
    """The GPU wants so many warps in flight, and tiles of few warps are a little better."""

    def measure(config: Config) -> float:
        in_flight = abs(math.log2(config.warps * config.programs_per_sm / warps))
        return in_flight + 0.1 * config.warps + config.rows / 1000 + config.stages / 1e6

    every = [replace(config, programs_per_sm=programs) for config in kernels(1) for programs in PROGRAMS]
    assert search(kernels(1), measure) == min(every, key=measure)


def test_search_trades_stages_for_programs() -> None:
    """A processor has room for 24 stages, and many programs are what it needs."""

    def measure(config: Config) -> float:
        slow = 100 if config.stages * config.programs_per_sm > 24 else 0
        return slow - config.programs_per_sm - config.stages / 10 + config.warps + config.rows

    assert search(kernels(1), measure) == Config(64, 1, 2, 12)


@pytest.fixture
def layer(monkeypatch: pytest.MonkeyPatch) -> Bench:
    """A layer on the CPU."""
    monkeypatch.setattr(bench, "copies_needed", lambda bytes_each, device: 2)
    return Bench(Geometry(4, 256, 128), torch.device("cpu"), TARGET)


def test_kernels_that_do_not_fit_are_left_out() -> None:
    def launch(config: Config) -> None:
        if config.stages == 5:
            raise OutOfResources(2, 1, "shared memory")

    chosen = kernels(1)
    assert launchable(chosen, launch) == [config for config in chosen if config.stages < 5]


def test_kernels_that_fail_only_in_company_are_not_left_out() -> None:
    failed: list[Config] = []

    def launch(config: Config) -> None:
        if config.warps == 2 and config not in failed:
            failed.append(config)
            raise SystemError("AST constructor recursion depth mismatch")

    assert launchable(kernels(1), launch) == kernels(1)
    assert len(failed) == 8


def test_a_broken_gpu_is_no_reason_to_leave_out_kernels() -> None:
    def launch(config: Config) -> None:
        raise RuntimeError("an illegal memory access was encountered")

    with pytest.raises(RuntimeError, match="illegal memory access"):
        launchable(kernels(1), launch)


class CompilingDriver:
    """Compiles for a GPU that is not there, and counts launches."""

    def __init__(self) -> None:
        self.launches = 0
        self.utils = self

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 10_000}

    def load_binary(self, name: str, binary: bytes, shared: int, device: int) -> tuple[object, object, int, int, int]:
        return object(), object(), 0, 0, 1024

    def unload_module(self, module: object) -> None:
        pass

    def launcher_cls(self, source: object, metadata: object):
        def launch(*arguments: object) -> None:
            self.launches += 1

        return launch


@pytest.fixture
def compiling(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[CompilingDriver]:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    fake = CompilingDriver()
    fused_kernel.device_caches.clear()
    monkeypatch.setattr(driver, "_active", fake)
    yield fake
    fused_kernel.device_caches.clear()
    gc.collect()  # kernels are unloaded by the driver of the day


def test_what_is_measured_has_been_compiled_before(
    layer: Bench, compiling: CompilingDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled: list[object] = []
    monkeypatch.setattr(triton.knobs.runtime, "jit_post_compile_hook", lambda **facts: compiled.append(facts["key"]))
    chosen = [Config(64, 1, 2, 4), Config(64, 2, 2, 4), Config(64, 2, 4, 4)]
    assert layer.usable(chosen, 1) == chosen[:2]  # four stages take more shared memory than there is
    assert len(compiled) == 3 and compiling.launches == 2
    other_shape = Bench(Geometry(4, 4096, 1024), torch.device("cpu"), TARGET)
    for one in (layer, other_shape):
        x = torch.zeros(1, one.geometry.in_features, dtype=torch.bfloat16)
        for config, programs in product(chosen[:2], PROGRAMS):
            launched = replace(config, programs_per_sm=programs)
            multiply_fused(x, one.layouts[0], one.geometry, launched, 1, TARGET)
    assert len(compiled) == 3 and compiling.launches == 2 + 2 * 2 * len(PROGRAMS)


@dataclass
class Hand:
    """What the stand-in has measured, and when Ctrl-C comes."""

    measured: list[tuple[Geometry, Config | None, int]] = field(default_factory=list)
    stop_after: int = EVERY

    def measure(self, geometry: Geometry, config: Config | None, m: int) -> None:
        if len(self.measured) >= self.stop_after:
            raise KeyboardInterrupt
        self.measured.append((geometry, config, m))


class StandIn(Bench):
    """Measures nothing: 128 rows are best for large layers, 64 for small ones."""

    hand: Hand

    def usable(self, configs, tokens: int) -> list[Config]:
        return [config for config in configs if config.stages < 4]

    def fused_seconds(self, config: Config, tokens: int, m: int) -> float:
        self.hand.measure(self.geometry, config, m)
        rows = 128 if self.geometry.in_features > 2000 else 64
        return m + abs(config.rows - rows) + abs(config.programs_per_sm - tokens / 8) + config.warps / 10

    def dequantized_seconds(self, m: int) -> float:
        self.hand.measure(self.geometry, None, m)
        return 150.0 if self.geometry.in_features > 2000 else math.inf


@pytest.fixture
def hand(monkeypatch: pytest.MonkeyPatch) -> Hand:
    hand = Hand()
    monkeypatch.setattr(StandIn, "hand", hand, raising=False)
    monkeypatch.setattr(tune, "Bench", StandIn)
    monkeypatch.setattr(Target, "of", lambda device: TARGET)
    return hand


def run(path: Path) -> str:
    """Tune, and return what was said."""
    console = Console(file=StringIO(), width=300)
    assert tune.tune("cuda", path, SHAPES, BITS, console) == path
    return console.file.getvalue()


def test_the_table_has_every_problem_and_its_best_configuration(hand: Hand, tmp_path: Path) -> None:
    path = tmp_path / "new" / "table.json"
    said = run(path)
    table = Table.read(path)
    assert [(e.bits, e.out_features, e.in_features, e.tokens) for e in table.entries] == [
        (bits, *shape, tokens) for bits in BITS for shape in SHAPES for tokens in BUCKETS
    ]
    assert {entry.config.rows for entry in table.entries if entry.in_features == 4096} == {128}
    assert {entry.config.programs_per_sm for entry in table.entries if entry.tokens == 64} == {8}
    assert table.entries[0].config.warps == 1
    assert table.dequantize_from == MAX_M_TILES * BUCKETS[-1] + 1  # the middle of 192, 192, never and never
    assert f"{STEPS} of {STEPS} measured" in said and "dequantizing first from 513 tokens on" in said
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("stop_after", [0, 1, 40, 100, 460])
def test_an_interrupted_run_goes_on_where_it_stopped(hand: Hand, tmp_path: Path, stop_after: int) -> None:
    run(tmp_path / "whole.json")
    whole, hand.measured = hand.measured, []

    path = tmp_path / "table.json"
    hand.stop_after = stop_after
    with pytest.raises(KeyboardInterrupt):
        run(path)
    assert not path.exists()
    unfinished = path.with_name("table.json.partial")
    results = json.loads(unfinished.read_text())["results"]
    hand.stop_after = EVERY
    said = run(path)
    assert ("going on" in said) == bool(results)
    assert path.read_text() == (tmp_path / "whole.json").read_text()
    assert set(hand.measured) == set(whole)
    assert len(hand.measured) < len(whole) + 70  # at most one step is measured again
    assert not unfinished.exists()


def test_an_unfinished_run_is_no_table(hand: Hand, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune, "FOLDER", tmp_path)
    hand.stop_after = 100
    with pytest.raises(KeyboardInterrupt):
        tune.tune("cuda", None, SHAPES, BITS, Console(file=StringIO()))
    assert [path.name for path in tmp_path.iterdir()] == ["Stand-in_GPU_9.json.partial"]
    monkeypatch.setattr("vllm_babai.triton_kernels.configs.FOLDER", tmp_path)
    generic = Table(100, (Entry(4, 1, 64, 64, Config(64, 2, 2, 2)),))
    generic.write(tmp_path / "sm_90.json")
    assert table_for(Target("cuda", "sm_90", TARGET.name, 7)) == generic


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ('{"made_by": {', "is damaged"),
        ("[]", "is damaged"),
        (b"\xff", "is damaged"),
        ({"GPU": "another"}, "is of {'GPU': 'another'"),
        ({"triton": "1.0.0"}, "'triton': '1.0.0'"),
    ],
)
def test_an_unfinished_run_that_is_of_no_use_is_not_used(
    hand: Hand, tmp_path: Path, content: str | bytes | dict[str, str], complaint: str
) -> None:
    path, unfinished = tmp_path / "table.json", tmp_path / "table.json.partial"
    hand.stop_after = 100
    with pytest.raises(KeyboardInterrupt):
        run(path)
    if isinstance(content, dict):
        earlier = json.loads(unfinished.read_text())
        unfinished.write_text(json.dumps(earlier | {"made_by": earlier["made_by"] | content}))
    else:
        unfinished.write_bytes(content if isinstance(content, bytes) else content.encode())
    hand.stop_after, hand.measured = EVERY, []
    said = run(path)
    assert complaint in said and "starting again" in said
    assert hand.measured[0][0] == Geometry(BITS[0], *reversed(SHAPES[0]))


def test_a_place_that_cannot_be_written_is_found_out_first(hand: Hand, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(QuantizationError, match=r"cannot write .*--out"):
        run(tmp_path / "file" / "table.json")
    with pytest.raises(QuantizationError, match="is a folder"):
        run(tmp_path)
    assert not hand.measured


def test_a_gpu_that_compiles_nothing(hand: Hand, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(StandIn, "usable", lambda self, configs, tokens: [])
    with pytest.raises(QuantizationError, match="3 bits, 1024 × 1024, 1 tokens: none of the kernels compiles"):
        run(tmp_path / "table.json")


@pytest.mark.parametrize("device", ["cpu", "nonsense", "cuda:99"])
def test_tuning_needs_a_gpu(device: str, tmp_path: Path) -> None:
    with pytest.raises(QuantizationError, match=f"--device {device}: "):
        tune.tune(device, tmp_path / "table.json")
    assert not list(tmp_path.iterdir())


def babai(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """Exit status of the command."""
    monkeypatch.setattr("sys.argv", ["babai", *arguments])
    with pytest.raises(SystemExit) as left:
        cli.main()
    return left.value.code


def test_command(
    hand: Hand, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "table.json"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    hand.stop_after = 500
    assert babai(monkeypatch, "tune", "--out", str(path)) == 130
    assert "interrupted: the same command goes on where it stopped" in capfd.readouterr().err
    hand.stop_after = EVERY
    assert babai(monkeypatch, "tune", "--out", str(path)) == 0
    said = capfd.readouterr().out
    assert "going on with" in said and "written; the kernels look in" in said.replace("\n", "")
    assert Table.read(path).lookup(4, 1, 4096, 4096).rows == 128


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_command_without_a_gpu(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    assert babai(monkeypatch, "tune") == 2
    assert "there is none here" in capfd.readouterr().err
