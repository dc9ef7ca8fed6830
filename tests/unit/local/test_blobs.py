"""Blobs: what the sweep leaves alone."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from ahi_ml.local.blobs import BlobStore


def test_a_blob_that_becomes_wanted_is_not_swept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An old blob that nobody refers to, and an import that brings the same bytes between two steps of the sweep."""
    blobs = BlobStore(tmp_path / "blobs")
    digest = blobs.put(b"wanted again")
    os.utime(blobs.path(digest), (0, 0))
    bringing = threading.Thread(target=blobs.put, args=(b"wanted again",))
    unlink = Path.unlink

    def meanwhile(path: Path, missing_ok: bool = False) -> None:
        if path == blobs.path(digest):
            bringing.start()
            bringing.join(0.2)  # it may have to wait for the sweep
        unlink(path, missing_ok)

    monkeypatch.setattr(Path, "unlink", meanwhile)
    blobs.sweep([])
    bringing.join()
    assert blobs.read(digest) == b"wanted again"
