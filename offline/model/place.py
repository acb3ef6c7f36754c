"""Where a command puts the folder that it makes: what it may replace or continue, and how the folder gets its name.

While a command runs its files lie in `OUT.partial`. The file RUN in it says that the folder is babai's, and of which
command. When the checkpoint is whole RUN says so, the folder takes the name OUT, and what served the run alone is
removed, RUN last. What OUT was before waits as `OUT.replaced` meanwhile. So a kill leaves one of these:

| OUT.partial    | OUT            | OUT.replaced | what it is, and what --resume does                      |
|----------------|----------------|--------------|---------------------------------------------------------|
| RUN            | old, or absent |              | unfinished: goes on                                     |
| RUN, complete  | old, or absent |              | whole, without its name: gives it                       |
| RUN, complete  |                | old          | the same                                                |
|                | RUN, complete  | old, or none | whole: removes what served the run, and what it replaced |

Nothing else is ever removed: a folder is replaced only where it is a checkpoint that babai made, and continued or
removed only where it holds RUN.
"""

import errno
import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_babai.errors import QuantizationError
from vllm_babai.files import write_atomically
from vllm_babai.format.config import is_babai

RUN = "babai_run.json"
MADE = "babai_made.json"  # in a dense checkpoint that babai made; a quantized one says so in its config.json
COMPLETE = "complete"  # key of RUN


@dataclass(frozen=True)
class Place:
    """A folder on its way to its name. run: what RUN says of the command."""

    out: Path
    partial: Path
    replaced: Path
    run: dict[str, Any]

    @property
    def is_complete(self) -> bool:
        """Whether the checkpoint is whole, under its name or without."""
        return _read_run(self.folder).get(COMPLETE, False)

    @property
    def folder(self) -> Path:
        """Where the files are."""
        return self.partial if self.partial.exists() else self.out

    def complete(self) -> None:
        """Note that the checkpoint is whole."""
        write_atomically(self.partial / RUN, json.dumps(self.run | {COMPLETE: True}))

    def publish(self, served_the_run: list[str]) -> Path:
        """Give a whole checkpoint its name, then remove what served the run alone: names of files and folders in it.

        Can be repeated after a kill at any moment.
        """
        if self.partial.exists():
            if self.out.exists():
                self.out.rename(self.replaced)
            self.partial.rename(self.out)
        if self.replaced.exists():
            shutil.rmtree(self.replaced)
        for name in served_the_run:
            path = self.out / name
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
        (self.out / RUN).unlink(missing_ok=True)
        return self.out


def check_place(out: Path, source: str | Path, *, resume: bool = False, overwrite: bool = False) -> Path:
    """The absolute path of OUT, if a command that reads `source` may make it; nothing is changed.

    Raises QuantizationError where OUT is not a folder, holds or is `source`, exists and is not to be replaced, or was
    not made by babai.
    """
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise QuantizationError(f"{out} is a {'link' if out.is_symlink() else 'file'}: choose the name of a new folder")
    out = out.resolve()
    if not out.name:
        raise QuantizationError(f"{out} cannot be made: choose the name of a new folder")
    try:
        os.lstat(_replaced(out))  # the longest of the names
    except FileNotFoundError:
        pass
    except OSError as error:
        raise QuantizationError(f"{out} cannot be made: {error.strerror}; choose another folder") from error
    origin = Path(source).resolve()
    if origin.exists() and origin.is_relative_to(out):
        raise QuantizationError(f"{out} is or holds {source}, which is read: choose another folder")
    if Path.cwd().is_relative_to(out):
        raise QuantizationError(f"{out} is or holds the current folder: choose another")
    if out.exists() and not (resume and _read_run(out).get(COMPLETE)):
        if not overwrite:
            raise QuantizationError(f"{out} exists: choose another folder, or pass --overwrite")
        if not made_by_babai(out):
            raise QuantizationError(
                f"{out} is not a checkpoint that babai made, and --overwrite replaces nothing else: "
                "choose another folder, or remove it yourself"
            )
    partial, replaced = partial_of(out), _replaced(out)
    if partial.is_symlink() or (partial.exists() and not _is_run(partial)):
        raise QuantizationError(f"{partial} is in the way, and no run of babai made it: move it away")
    if replaced.exists() and not any(_read_run(folder).get(COMPLETE) for folder in (partial, out)):
        raise QuantizationError(f"{replaced} is in the way: move it away")
    return out


@contextmanager
def claim(
    out: Path, source: str | Path, run: dict[str, Any], *, resume: bool = False, overwrite: bool = False
) -> Iterator[Place]:
    """The place of a command, from an interrupted run of it where `resume` says so; no other process may have it.

    run: what the command is, compared with what an interrupted one was. Raises QuantizationError like `check_place`,
    and when an interrupted run is there that is not to be continued, was another, or is still running.
    """
    out = check_place(out, source, resume=resume, overwrite=overwrite)
    place = place_of(out, run)
    earlier = _read_run(place.folder)
    goes_on = resume and bool(earlier)
    if goes_on:
        wanted = {key: value for key, value in earlier.items() if key != COMPLETE}
        if wanted != run:
            raise QuantizationError(
                f"--resume: the interrupted run in {place.folder} had other {_differences(wanted, run)}"
            )
    else:
        if place.partial.exists():
            _check_removable(place, earlier, overwrite)
        make_folder(place.partial)
    with _locked(place.folder):
        if not goes_on:
            _start_afresh(place)
        yield place


def place_of(out: Path, run: dict[str, Any]) -> Place:
    """The place of a command that makes OUT, unclaimed."""
    out = out.resolve()
    return Place(out, partial_of(out), _replaced(out), run)


def made_by_babai(folder: Path) -> bool:
    """Whether a folder is a checkpoint that `babai` wrote, quantized or dense."""
    if (folder / MADE).is_file():
        return True
    try:
        return is_babai(json.loads((folder / "config.json").read_text()))
    except (OSError, ValueError):
        return False


def make_folder(path: Path) -> None:
    """Make a folder and those above it. Raises QuantizationError that says why it cannot be made."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise QuantizationError(f"{path} cannot be made: {error.strerror}; choose another folder") from error


def check_room(folder: Path, needed: int, what: str) -> None:
    """Raise QuantizationError where the disk of `folder`, which need not exist yet, has less than `needed` bytes."""
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise QuantizationError(
            f"{what} needs about {needed / 1e9:.1f} GB in {existing}, which has {free / 1e9:.1f} GB free: "
            "make room, or choose a folder on another disk"
        )


def _check_removable(place: Place, earlier: dict[str, Any], overwrite: bool) -> None:
    """Raise QuantizationError where `OUT.partial` holds work that this command may not throw away."""
    if earlier and earlier.get("command") != place.run["command"]:
        raise QuantizationError(
            f"{place.partial} holds an interrupted {earlier.get('command', 'run')}: finish it, or remove the folder"
        )
    if earlier and place.run["command"] == "quantize" and not overwrite:
        raise QuantizationError(
            f"{place.partial} holds an interrupted run: pass --resume to go on, --overwrite to start again"
        )


def _start_afresh(place: Place) -> None:
    """Make `OUT.partial` anew; what an interrupted run had already put aside becomes OUT again."""
    if place.replaced.exists() and not place.out.exists():
        place.replaced.rename(place.out)
    elif place.replaced.exists():
        shutil.rmtree(place.replaced)
    for path in place.partial.iterdir():
        if path.name != RUN:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    write_atomically(place.partial / RUN, json.dumps(place.run))


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold a folder against other processes, under any name that it gets; the process's end ends it, too.

    Raises QuantizationError where another holds it. Some network file systems have no locks: there nothing is held.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(descriptor)
        raise QuantizationError(f"{folder} is in use by another run: wait until it has ended") from error
    except OSError as error:
        if error.errno not in (errno.ENOTSUP, errno.ENOSYS, errno.ENOLCK):
            raise
    try:
        yield
    finally:
        os.close(descriptor)


def partial_of(out: Path) -> Path:
    """Where the files are while a command makes OUT."""
    return out.with_name(out.name + ".partial")


def _replaced(out: Path) -> Path:
    return out.with_name(out.name + ".replaced")


def _is_run(partial: Path) -> bool:
    """Whether a folder is a run's: it holds RUN, or nothing yet but what was to become RUN."""
    if _read_run(partial):
        return True
    return partial.is_dir() and {path.name for path in partial.iterdir()} <= {Path(RUN).with_suffix(".tmp").name}


def _read_run(folder: Path) -> dict[str, Any]:
    """What RUN in a folder says; empty where there is none that can be read."""
    with suppress(OSError, ValueError):
        run = json.loads((folder / RUN).read_text())
        if isinstance(run, dict):
            return run
    return {}


def _differences(earlier: dict[str, Any], now: dict[str, Any]) -> str:
    """What an interrupted run was told otherwise, for a message."""
    if earlier.get("command") != now["command"]:
        return f"work to do ({earlier.get('command')})"
    if earlier["model"] != now["model"]:
        return "model files"
    changed = [key for key, value in now["options"].items() if earlier["options"].get(key) != value]
    return ", ".join(f"--{key.replace('_', '-')} ({earlier['options'].get(key)})" for key in changed)
