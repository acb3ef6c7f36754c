"""What happens around a run: interruption, resumption, refusals, failures, and how much memory it takes."""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from vllm_babai.offline import QuantizationError, QuantizeOptions, quantize
from vllm_babai.offline.tools.evaluate import evaluate

MEMORY_BENCHMARK = Path(__file__).parents[1] / "benchmarks" / "memory.py"
BLOCKS = 12
RUN = """
import sys, torch
from vllm_babai.offline import QuantizeOptions, quantize
torch.set_num_threads(int(sys.argv[4]))
options = QuantizeOptions(calibration=sys.argv[3], samples=8, sequence_length=32)
quantize(sys.argv[1], sys.argv[2], options)
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory, save_random_llama: Any) -> Path:
    return save_random_llama(tmp_path_factory.mktemp("model") / "source", num_hidden_layers=BLOCKS)


@pytest.fixture
def options(short_text: Path) -> QuantizeOptions:
    return QuantizeOptions(calibration=str(short_text), samples=8, sequence_length=32)


def contents(folder: Path) -> dict[str, bytes | dict[str, Any]]:
    """All files of a checkpoint by name; of the report what does not depend on the clock."""
    files: dict[str, Any] = {path.name: path.read_bytes() for path in folder.iterdir()}
    report = json.loads(files.pop("babai_report.json"))
    del report["seconds"]
    for layer in report["layers"]:
        del layer["seconds"]
    return files | {"babai_report.json": report}


@pytest.fixture(scope="module")
def uninterrupted(
    source: Path, short_text: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, bytes | dict[str, Any]]:
    options = QuantizeOptions(calibration=str(short_text), samples=8, sequence_length=32)
    return contents(quantize(source, tmp_path_factory.mktemp("whole") / "out", options))


@pytest.fixture(scope="module")
def interrupted(source: Path, short_text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a run that was killed when its second block was done."""
    folder = tmp_path_factory.mktemp("interrupted")
    arguments = [str(source), str(folder / "out"), str(short_text), str(torch.get_num_threads())]
    process = subprocess.Popen([sys.executable, "-c", RUN, *arguments], stdout=subprocess.DEVNULL)
    try:
        second = folder / "out.partial" / f"model-00002-of-{BLOCKS + 1:05}.safetensors"
        while not second.exists():
            assert process.poll() is None, "the run ended before it could be killed"
            time.sleep(0.002)
    finally:
        process.kill()
    assert process.wait() == -signal.SIGKILL
    return folder


@pytest.fixture
def killed(interrupted: Path, tmp_path: Path) -> Path:
    """OUT of such a run, to do with as the test likes."""
    assert [path.name for path in interrupted.iterdir()] == ["out.partial"]
    shutil.copytree(interrupted, tmp_path, dirs_exist_ok=True)
    return tmp_path / "out"


def test_a_killed_run_resumes_to_the_same_bytes(
    killed: Path, source: Path, options: QuantizeOptions, uninterrupted: dict[str, Any]
) -> None:
    assert not killed.exists()
    done = list(killed.with_name("out.partial").glob("*.safetensors"))
    assert 2 <= len(done) < BLOCKS
    written = {path.name: path.stat().st_mtime_ns for path in done}
    quantize(source, killed, options, resume=True)
    assert contents(killed) == uninterrupted
    assert all((killed / name).stat().st_mtime_ns == then for name, then in written.items())
    assert [path.name for path in killed.parent.iterdir()] == ["out"]


def test_an_interrupted_run_is_neither_mixed_with_another_nor_lost(
    killed: Path,
    source: Path,
    short_text: Path,
    options: QuantizeOptions,
    tmp_path: Path,
    uninterrupted: dict[str, Any],
) -> None:
    with pytest.raises(QuantizationError, match=r"holds an interrupted run: pass --resume to go on, --overwrite"):
        quantize(source, killed, options)
    other = QuantizeOptions(bits=3, calibration=str(short_text), samples=8, sequence_length=32, seed=1)
    with pytest.raises(QuantizationError, match=r"had other --bits \(4\), --seed \(0\)"):
        quantize(source, killed, other, resume=True)
    changed = shutil.copytree(source, tmp_path / "changed")
    (changed / "config.json").write_text((changed / "config.json").read_text() + "\n")
    with pytest.raises(QuantizationError, match="had other model files"):
        quantize(changed, killed, options, resume=True)
    assert not killed.exists()
    quantize(source, killed, options, overwrite=True)
    assert contents(killed) == uninterrupted


def test_resume_without_an_interrupted_run_starts_one(
    source: Path, options: QuantizeOptions, tmp_path: Path, uninterrupted: dict[str, Any]
) -> None:
    assert contents(quantize(source, tmp_path / "deep" / "out", options, resume=True)) == uninterrupted


def test_an_existing_folder_is_only_replaced_when_told_to(
    source: Path, options: QuantizeOptions, tmp_path: Path, uninterrupted: dict[str, Any]
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious").write_text("kept")
    for resume in (False, True):
        with pytest.raises(QuantizationError, match=r"out exists: choose another folder, or pass --overwrite"):
            quantize(source, out, options, resume=resume)
    with pytest.raises(QuantizationError, match=r"out is not a checkpoint that babai made"):
        quantize(source, out, options, overwrite=True)
    assert [path.name for path in out.iterdir()] == ["precious"]
    (out / "babai_made.json").touch()  # as a dense checkpoint of babai's has it
    quantize(source, out, options, overwrite=True)
    assert contents(out) == uninterrupted
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.fixture
def damaged(source: Path, tmp_path: Path) -> Path:
    """The model with a NaN in its last block."""
    folder = shutil.copytree(source, tmp_path / "damaged")
    tensors = load_file(folder / "model.safetensors")
    tensors[f"model.layers.{BLOCKS - 1}.mlp.up_proj.weight"][3, 4] = torch.nan
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_a_run_that_fails_leaves_no_folder_of_that_name(
    damaged: Path, options: QuantizeOptions, tmp_path: Path
) -> None:
    with pytest.raises(QuantizationError, match=f"layers.{BLOCKS - 1}.mlp.up_proj.weight has NaN or Inf"):
        quantize(damaged, tmp_path / "out", options)
    assert not (tmp_path / "out").exists()


def test_a_run_that_fails_leaves_what_it_was_to_replace(
    damaged: Path, options: QuantizeOptions, tmp_path: Path
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "babai_made.json").write_text("kept")  # a dense checkpoint of babai's, which may be replaced
    with pytest.raises(QuantizationError, match="has NaN or Inf"):
        quantize(damaged, tmp_path / "out", options, overwrite=True)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["babai_made.json"]


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("bits", 6, "--bits must be one of"),
        ("overflow", 0.5, "--overflow must be from 0 to 0.2, not 0.5"),
        ("group_size", 16, "--group-size must be one of"),
        ("order", "random", "--order must be one of min-pivot, activation, natural, reverse, not random"),
        ("samples", 0, "--samples must be positive"),
        ("sequence_length", -1, "--sequence-length must be 0 or more, not -1"),
        ("dtype", "int8", "--dtype int8 is not among float32, bfloat16, float16, float64"),
        ("damping", -0.1, "--damping must be from 0 to 1"),
        ("paths", 0, "--paths must be from 1 to 1024, not 0"),
        ("ignore", ["("], r"--ignore \( is not a regular expression"),
    ],
)
def test_options_out_of_range_are_named(field: str, value: Any, message: str) -> None:
    with pytest.raises(QuantizationError, match=message):
        QuantizeOptions(**{field: value})


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"sequence_length": 65}, "--sequence-length 65 exceeds the model's 64 positions"),
        ({"device": "tpu"}, "--device must be auto, cpu or cuda, not tpu"),
        ({"samples": 10_000}, r"tokens; 10000 samples of 32 need 320000"),
    ],
)
def test_options_that_do_not_suit_the_model_are_named(
    changed: dict[str, Any], message: str, source: Path, short_text: Path, tmp_path: Path
) -> None:
    options = QuantizeOptions(**{"calibration": str(short_text), "samples": 8, "sequence_length": 32} | changed)
    with pytest.raises(QuantizationError, match=message):
        quantize(source, tmp_path / "out", options)
    assert not list(tmp_path.iterdir())


def test_a_model_without_tokenizer_is_named(source: Path, options: QuantizeOptions, tmp_path: Path) -> None:
    bare = shutil.copytree(source, tmp_path / "bare", ignore=shutil.ignore_patterns("tokenizer*"))
    with pytest.raises(QuantizationError, match=r"bare has no tokenizer that can be loaded: copy the original model's"):
        quantize(bare, tmp_path / "out", options)
    with pytest.raises(QuantizationError, match=r"bare has no tokenizer that can be loaded"):
        evaluate(bare, options.calibration, window=32)
    assert [path.name for path in tmp_path.iterdir()] == ["bare"]


def test_folders_that_hold_no_model_are_named(source: Path, options: QuantizeOptions, tmp_path: Path) -> None:
    with pytest.raises(QuantizationError, match=r"has no config\.json"):
        quantize(tmp_path, tmp_path / "out", options)
    (tmp_path / "model-q4_k_m.gguf").touch()
    with pytest.raises(QuantizationError, match=r"holds GGUF files, .* start from the original weights"):
        quantize(tmp_path, tmp_path / "out", options)
    (tmp_path / "model-q4_k_m.gguf").unlink()
    (tmp_path / "config.json").write_text((source / "config.json").read_text())
    with pytest.raises(QuantizationError, match="has no safetensors weights"):
        quantize(tmp_path, tmp_path / "out", options)
    for path in source.glob("tokenizer*"):
        shutil.copyfile(path, tmp_path / path.name)
    save_file({"model.norm.weight": torch.ones(64)}, tmp_path / "model.safetensors")
    with pytest.raises(QuantizationError, match=r"lacks tensors in the checkpoint: .*embed_tokens\.weight"):
        quantize(tmp_path, tmp_path / "out", options)
    assert not (tmp_path / "out.partial").exists()


def test_a_quantized_model_is_refused(source: Path, options: QuantizeOptions, tmp_path: Path) -> None:
    out = quantize(source, tmp_path / "out", options)
    with pytest.raises(QuantizationError, match="is already quantized \(babai\); start from the original weights"):
        quantize(out, tmp_path / "again", options)


@pytest.mark.long
def test_memory_does_not_grow_with_the_number_of_blocks() -> None:
    def measure(blocks: int) -> dict[str, int]:
        sizes = ["--hidden", "384", "--blocks", str(blocks), "--samples", "4", "--sequence-length", "64"]
        command = [sys.executable, str(MEMORY_BENCHMARK), *sizes, "--json"]
        return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)["results"]

    few, many = measure(2), measure(16)
    added = many["model_bytes"] - few["model_bytes"]
    assert added == 14 * many["block_bytes"] > 90 * 2**20
    assert many["peak_bytes"] - few["peak_bytes"] < 0.4 * added
