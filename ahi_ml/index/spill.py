"""Private files for indexes that travel to other processes without having been saved."""

from __future__ import annotations

import os
import shutil
import tempfile
import weakref
from pathlib import Path

__all__ = ["spill_path"]


def spill_path(owner: object) -> Path:
    """A path in a new private folder that goes when `owner` does, in this process only.

    The owner is what selections share, not a selection: one given to a process as an argument is
    forgotten here before the other side has opened the file.

    I/O: makes the folder, mode 0700. A process forked from this one leaves it alone.
    """
    folder = Path(tempfile.mkdtemp(prefix="ahi-ml-index-"))
    weakref.finalize(owner, _remove, folder, os.getpid())
    return folder / "index.arrow"


def _remove(folder: Path, pid: int) -> None:
    if os.getpid() == pid:
        shutil.rmtree(folder, ignore_errors=True)
