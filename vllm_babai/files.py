"""Files that are there whole or not at all."""

import os
from pathlib import Path


def write_atomically(path: Path, text: str) -> None:
    """Write a text file under another name, and give it its own when it is complete. OSErrors name it."""
    unfinished = path.with_suffix(".tmp")
    try:
        unfinished.write_text(text)
    except OSError as error:
        error.filename = error.filename or str(path)  # which writing, other than opening, leaves out
        raise
    os.replace(unfinished, path)
