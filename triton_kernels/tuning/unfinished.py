"""The file that keeps what `babai tune` has measured, so that an interrupted run goes on where it stopped."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from rich.console import Console

from vllm_babai import __version__
from vllm_babai.errors import QuantizationError
from vllm_babai.files import write_atomically
from vllm_babai.triton_kernels.configs import Table, Target


@dataclass(frozen=True)
class Unfinished:
    """Results of a run by the names of its steps, in a file next to the table until that is complete.

    table: where the table goes. made_by: what the results hold for.
    """

    table: Path
    made_by: dict[str, str]
    results: dict[str, Any]

    @classmethod
    def open(cls, table: Path, target: Target, console: Console) -> "Unfinished":
        """Read what an interrupted run has left, if it is of use; say so if it is not.

        Raises QuantizationError if `table` cannot be written.
        """
        if table.is_dir():
            raise QuantizationError(f"--out {table} is a folder: name a file")
        unfinished = cls(table, {"GPU": target.name, "vllm-babai": __version__, "triton": triton.__version__}, {})
        try:
            table.parent.mkdir(parents=True, exist_ok=True)
            unfinished._read(console)
            unfinished._write()
        except OSError as error:
            raise QuantizationError(f"cannot write {table}: {error}; name a place for the table by --out") from error
        return unfinished

    @property
    def path(self) -> Path:
        """The file; not a name that a table is looked for under."""
        return self.table.with_name(self.table.name + ".partial")

    def add(self, name: str, result: Any) -> None:
        """Keep a result, which JSON can hold."""
        self.results[name] = result
        self._write()

    def publish(self, table: Table) -> None:
        """Put the table in its place, and remove the file."""
        table.write(self.table)
        self.path.unlink()

    def _read(self, console: Console) -> None:
        if not self.path.exists():
            return
        try:
            content = json.loads(self.path.read_text())
            made_by, results = content["made_by"], dict(content["results"])
        except (ValueError, KeyError, TypeError):
            console.out(f"{self.path} is damaged: starting again", highlight=False)
            return
        if made_by != self.made_by:
            console.out(f"{self.path} is of {made_by}, not {self.made_by}: starting again", highlight=False)
            return
        self.results.update(results)

    def _write(self) -> None:
        write_atomically(self.path, json.dumps({"made_by": self.made_by, "results": self.results}, indent=1))
