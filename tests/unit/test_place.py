"""Nothing is lost: what a command may replace, and what becomes of a run that is killed at any moment."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from vllm_babai.offline import QuantizationError, QuantizeOptions, quantize
from vllm_babai.offline.model.place import COMPLETE, MADE, RUN, check_room, claim
from vllm_babai.offline.tools.convert import convert

HOLDER = """
import sys, time
from pathlib import Path
from vllm_babai.offline.model.place import claim
with claim(Path(sys.argv[1]), "model", {"command": "quantize"}):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory, save_random_llama: Any) -> Path:
    return save_random_llama(tmp_path_factory.mktemp("model") / "source", num_hidden_layers=1)


@pytest.fixture
def options(short_text: Path) -> QuantizeOptions:
    return QuantizeOptions(calibration=str(short_text), samples=4, sequence_length=32, paths=1, lm_head=None)


@pytest.fixture(scope="module")
def quantized(source: Path, short_text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    options = QuantizeOptions(calibration=str(short_text), samples=4, sequence_length=32, paths=1)
    return quantize(source, tmp_path_factory.mktemp("quantized") / "out", options)


def files(folder: Path) -> dict[str, Any]:
    """Every file below a folder; of a report what does not depend on the clock."""
    found: dict[str, Any] = {
        str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()
    }
    if "babai_report.json" in found:
        report = json.loads(found["babai_report.json"])
        report["seconds"] = [layer.pop("seconds") for layer in report["layers"]] and None
        found["babai_report.json"] = report
    return found


def test_the_original_is_never_replaced(source: Path, options: QuantizeOptions, tmp_path: Path) -> None:
    model = shutil.copytree(source, tmp_path / "models" / "mine")
    before = files(tmp_path)
    (tmp_path / "link").symlink_to(model)
    for out in (model, model.parent, tmp_path / "link", model / ".." / "mine"):
        with pytest.raises(QuantizationError, match=r"is or holds|is a link"):
            quantize(model, out, options, overwrite=True)
    (tmp_path / "link").unlink()
    assert files(tmp_path) == before


def test_a_converted_folder_may_not_take_the_place_of_its_source(quantized: Path, tmp_path: Path) -> None:
    mine = shutil.copytree(quantized, tmp_path / "mine")
    before = files(tmp_path)
    for out in (mine, tmp_path):
        with pytest.raises(QuantizationError, match="is or holds"):
            convert(mine, out, "dense", torch.float32, overwrite=True)
    assert files(tmp_path) == before


@pytest.mark.parametrize("command", ["quantize", "convert"])
def test_only_what_babai_made_is_replaced(
    command: str, source: Path, quantized: Path, options: QuantizeOptions, tmp_path: Path
) -> None:
    def run(out: Path) -> Path:
        if command == "quantize":
            return quantize(source, out, options, overwrite=True)
        return convert(quantized, out, "dense", torch.float32, overwrite=True)

    users = tmp_path / "users"
    users.mkdir()
    (users / "precious").write_text("kept")
    with pytest.raises(
        QuantizationError, match="is not a checkpoint that babai made, and --overwrite replaces nothing"
    ):
        run(users)
    assert files(users) == {"precious": b"kept"}
    other = shutil.copytree(source, tmp_path / "other")  # an ordinary model is not ours either
    with pytest.raises(QuantizationError, match="is not a checkpoint that babai made"):
        run(other)
    assert files(other) == files(source)
    dense = convert(quantized, tmp_path / "dense", "dense", torch.float32)
    assert (dense / MADE).is_file()
    for ours in (dense, shutil.copytree(quantized, tmp_path / "quantized")):
        (ours / "left over").touch()
        assert "left over" not in files(run(ours))


@pytest.mark.parametrize("command", ["quantize", "resume", "convert"])
def test_a_partial_folder_of_somebody_else_is_left_alone(
    command: str, source: Path, quantized: Path, options: QuantizeOptions, tmp_path: Path
) -> None:
    partial = tmp_path / "out.partial"
    partial.mkdir()
    (partial / "precious").write_text("kept")
    with pytest.raises(QuantizationError, match=r"out\.partial is in the way, and no run of babai made it"):
        if command == "convert":
            convert(quantized, tmp_path / "out", "dense", torch.float32, overwrite=True)
        else:
            quantize(source, tmp_path / "out", options, resume=command == "resume", overwrite=command != "resume")
    assert files(tmp_path) == {"out.partial/precious": b"kept"}


def test_converting_leaves_an_interrupted_quantization_alone(quantized: Path, tmp_path: Path) -> None:
    partial = tmp_path / "out.partial"
    partial.mkdir()
    (partial / RUN).write_text(json.dumps({"command": "quantize", "options": {}, "model": "x"}))
    (partial / "model-00001-of-00002.safetensors").write_bytes(b"an hour's work")
    with pytest.raises(QuantizationError, match=r"out\.partial holds an interrupted quantize: finish it, or remove"):
        convert(quantized, tmp_path / "out", "dense", torch.float32, overwrite=True)
    assert (partial / "model-00001-of-00002.safetensors").read_bytes() == b"an hour's work"


class _Killed(BaseException):
    """Stands for the end of the process: nothing in the program catches it."""


def _kill_at(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Let the change of the file system number `step` from now on be the last one before the process ends."""
    count = 0

    def counted(change: Callable[..., Any]) -> Callable[..., Any]:
        def changed(*args: Any, **kwargs: Any) -> Any:
            nonlocal count
            count += 1
            if count > step:
                raise _Killed
            return change(*args, **kwargs)

        return changed

    for name in ("replace", "rename", "unlink", "rmdir", "mkdir"):
        monkeypatch.setattr(f"os.{name}", counted(getattr(__import__("os"), name)))


@pytest.mark.parametrize("over", [pytest.param("nothing", marks=pytest.mark.long), "a checkpoint"])
def test_killed_at_any_step_a_run_resumes_to_the_same_bytes(
    over: str, source: Path, quantized: Path, options: QuantizeOptions, tmp_path: Path
) -> None:
    wanted, step, complete = files(quantized), 0, False
    while not complete:
        folder = tmp_path / str(step)
        folder.mkdir()
        out = folder / "out"
        old = over == "a checkpoint"
        if old:
            shutil.copytree(quantized, out)
            (out / "old").touch()
        with pytest.MonkeyPatch.context() as monkeypatch:
            _kill_at(monkeypatch, step)
            try:
                quantize(source, out, options, overwrite=old)
                complete = True
            except _Killed:
                pass
        if not complete:
            assert not out.exists() or files(out).keys() >= wanted.keys(), f"step {step}: OUT is there, but not whole"
            quantize(source, out, options, resume=True, overwrite=old)
        assert [path.name for path in folder.iterdir()] == ["out"], f"step {step}"
        assert files(out) == wanted, f"step {step}"
        step += 1
    assert step > 8


def test_starting_again_gives_back_what_a_killed_run_had_put_aside(tmp_path: Path) -> None:
    out, partial, replaced = tmp_path / "out", tmp_path / "out.partial", tmp_path / "out.replaced"
    replaced.mkdir()
    (replaced / MADE).touch()
    partial.mkdir()
    run = {"command": "quantize", "options": {}, "model": "x"}
    (partial / RUN).write_text(json.dumps(run | {COMPLETE: True}))
    with claim(out, "model", run, overwrite=True) as place:
        assert (out / MADE).is_file() and not replaced.exists()
        assert [path.name for path in place.partial.iterdir()] == [RUN]
        assert not place.is_complete


def test_two_runs_do_not_share_a_folder(tmp_path: Path) -> None:
    out = tmp_path / "out"
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(out)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        with (
            pytest.raises(QuantizationError, match=r"out\.partial is in use by another run: wait until it has ended"),
            claim(out, "model", {"command": "quantize"}, resume=True),
        ):
            pass
    finally:
        holder.kill()
        holder.wait()
    with claim(out, "model", {"command": "quantize"}, resume=True):
        pass


@pytest.mark.parametrize("kind", ["file", "link", "dangling link", "root", "current folder"])
def test_what_cannot_become_a_folder_is_refused_before_anything_is_read(
    kind: str, options: QuantizeOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    if kind == "file":
        out.write_text("kept")
    elif kind == "root":
        out = Path("/")
    elif kind == "current folder":
        out.mkdir()
        monkeypatch.chdir(out)
        out = Path(".")
    else:
        (tmp_path / "target").mkdir()
        out.symlink_to(tmp_path / ("target" if kind == "link" else "nowhere"))
    with pytest.raises(QuantizationError, match=r"is a (file|link)|cannot be made|current folder"):
        quantize("no such model", out, options, overwrite=True)


def test_something_in_the_way_of_the_old_folder_is_named_at_once(options: QuantizeOptions, tmp_path: Path) -> None:
    (tmp_path / "out.replaced").mkdir()
    with pytest.raises(QuantizationError, match=r"out\.replaced is in the way: move it away"):
        quantize("no such model", tmp_path / "out", options)


def test_a_full_disk_is_named_before_the_run(tmp_path: Path) -> None:
    free = shutil.disk_usage(tmp_path).free
    check_room(tmp_path / "deep" / "out", free // 2, "the checkpoint")
    with pytest.raises(
        QuantizationError, match=rf"the checkpoint needs about .* GB in {tmp_path}, which has .* GB free"
    ):
        check_room(tmp_path / "deep" / "out", 2 * free + 10**9, "the checkpoint")


def disk_of(monkeypatch: pytest.MonkeyPatch, free: int) -> None:
    """Let every disk have so many bytes free."""
    usage = shutil.disk_usage(".")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=free))


def test_room_for_dense_weights_is_their_size(quantized: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dense = convert(quantized, tmp_path / "dense", "dense", torch.float32)
    size = sum(path.stat().st_size for path in dense.glob("*.safetensors"))
    disk_of(monkeypatch, int(0.9 * size))
    with pytest.raises(QuantizationError, match="the converted checkpoint needs about"):
        convert(quantized, tmp_path / "again", "dense", torch.float32)
    convert(quantized, tmp_path / "half", "dense", torch.bfloat16)


def test_room_for_a_run_counts_its_sensitivity_and_what_is_there_already(
    source: Path, options: QuantizeOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, peak = tmp_path / "out", 0

    def killed(*_: Any) -> None:
        nonlocal peak
        peak = sum(path.stat().st_size for path in (tmp_path / "out.partial").rglob("*") if path.is_file())
        raise _Killed

    with pytest.MonkeyPatch.context() as patch, pytest.raises(_Killed):
        patch.setattr("vllm_babai.offline.run_folder.seal", killed)
        quantize(source, out, options)
    disk_of(monkeypatch, int(0.7 * peak))
    with pytest.raises(QuantizationError, match="the checkpoint, with what the run keeps meanwhile, needs about"):
        quantize(source, tmp_path / "other", options)
    quantize(source, out, options, resume=True)


def test_a_name_that_is_too_long_is_refused_in_one_line(options: QuantizeOptions, source: Path, tmp_path: Path) -> None:
    with pytest.raises(QuantizationError, match=r"cannot be made: File name too long; choose another folder"):
        quantize(source, tmp_path / ("x" * 250), options)


def test_convert_keeps_files_of_one_name_in_different_folders(quantized: Path, tmp_path: Path) -> None:
    mine = shutil.copytree(quantized, tmp_path / "mine")
    index = json.loads((mine / "model.safetensors.index.json").read_text())
    names = sorted(set(index["weight_map"].values()))
    for number, name in enumerate(names):
        (mine / str(number)).mkdir()
        (mine / name).rename(mine / str(number) / "model.safetensors")
    moved = {name: f"{number}/model.safetensors" for number, name in enumerate(names)}
    index["weight_map"] = {tensor: moved[file] for tensor, file in index["weight_map"].items()}
    (mine / "model.safetensors.index.json").write_text(json.dumps(index))
    converted = convert(mine, tmp_path / "converted", "hptq", torch.float32)
    written = json.loads((converted / "model.safetensors.index.json").read_text())["weight_map"]
    kept = {name for name in index["weight_map"] if not name.endswith((".qweight", ".scales", ".overflow"))}
    assert kept <= written.keys() and set(written.values()) == set(moved.values())
