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


def test_blobs_of_earlier_stores_are_read_and_kept(tmp_path: Path) -> None:
    """They lie in 256 folders, by two digits."""
    store = BlobStore(tmp_path / "blobs")
    digest = store.put(b"a frame of an earlier version")
    old = store.root / digest[:2] / digest[2:]
    old.parent.mkdir()
    store.path(digest).rename(old)
    assert store.read(digest) == b"a frame of an earlier version"
    assert store.sweep([digest], older_than_s=-1) == 0
    assert store.read(digest) == b"a frame of an earlier version"
    assert store.sweep([], older_than_s=-1) == 1
