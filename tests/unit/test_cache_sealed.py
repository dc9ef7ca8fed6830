"""Encrypted entries: nothing readable on the disk, the same results, and a wrong key costs a download."""

from __future__ import annotations

import logging
import pickle
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ahi_ml.cache import CacheEntry, FrameCache
from ahi_ml.errors import ConfigError

STORE, FRAME = "d" * 32, "f" * 32
DATA = b"the encoded bytes of a frame " * 400
IMAGE = np.arange(64 * 48, dtype=np.int16).reshape(64, 48)
PREFIXES = (4000, 1000)


class Key:
    """A cipher that a test can look through: bytes are turned by a key, and checked."""

    def __init__(self, turn: int) -> None:
        self.turn = turn

    def encrypt(self, data: bytes) -> bytes:
        return bytes([self.turn]) + bytes(each ^ self.turn for each in zlib.crc32(data).to_bytes(4, "big") + data)

    def decrypt(self, data: bytes) -> bytes:
        plain = bytes(each ^ self.turn for each in data[1:])
        if zlib.crc32(plain[4:]).to_bytes(4, "big") != plain[:4]:
            raise ValueError("another key")
        return plain[4:]


def sealed(folder: Path, turn: int = 0x5A, **options: Any) -> FrameCache:
    key = Key(turn)
    return FrameCache(folder, encrypt=key.encrypt, decrypt=key.decrypt, **options)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def everything(folder: Path) -> bytes:
    return b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())


class TestFrames:
    @pytest.mark.parametrize("verified", [True, False])
    def test_a_round_trip(self, folder: Path, verified: bool) -> None:
        cache = sealed(folder)
        cache.put(STORE, FRAME, DATA, verified=verified, prefixes=PREFIXES)
        assert DATA[:20] not in everything(folder)
        for reduce in (0, 1, 2):
            assert cache.get(STORE, FRAME, reduce) == CacheEntry(DATA, verified, True)
        assert cache.stats()["hits"] == 3
        assert cache.verify()["corrupt"] == 0

    def test_plain_and_sealed_are_not_taken_for_each_other(self, folder: Path) -> None:
        plain, cache = FrameCache(folder), sealed(folder)
        cache.put(STORE, FRAME, DATA, verified=True)
        assert plain.get(STORE, FRAME) is None
        plain.put(STORE, FRAME, DATA, verified=True)
        assert cache.get(STORE, FRAME) is None
        assert plain.stats()["corrupt"] == cache.stats()["corrupt"] == 0

    def test_another_key(self, folder: Path, caplog: pytest.LogCaptureFixture) -> None:
        sealed(folder).put(STORE, FRAME, DATA, verified=True)
        other = sealed(folder, 0x33)
        with caplog.at_level(logging.WARNING, "ahi_ml"):
            assert other.get(STORE, FRAME) is other.get(STORE, FRAME) is None
        assert len(caplog.records) == 1
        assert "cannot be decrypted" in caplog.text
        assert other.stats()["misses"] == 2
        other.put(STORE, FRAME, DATA, verified=True)
        assert other.get(STORE, FRAME) == CacheEntry(DATA, True, True)

    def test_parts_are_not_kept(self, folder: Path) -> None:
        cache = sealed(folder)
        cache.put(STORE, FRAME, DATA[:1000], verified=False, whole=False, prefixes=PREFIXES)
        assert cache.get(STORE, FRAME, 2) is None

    def test_damage_is_noticed_before_the_cipher(self, folder: Path, caplog: pytest.LogCaptureFixture) -> None:
        cache = sealed(folder)
        cache.put(STORE, FRAME, DATA, verified=True)
        (path,) = folder.glob("frames/*/*")
        raw = bytearray(path.read_bytes())
        raw[-1] ^= 1
        path.write_bytes(raw)
        assert cache.get(STORE, FRAME) is None
        assert cache.stats()["corrupt"] == 1
        assert not caplog.records

    def test_the_remote_tier_gets_no_plain_bytes(self, tmp_path: Path) -> None:
        remote: dict[str, Any] = {"remote": f"file://{tmp_path / 'remote'}", "remote_options": {"auto_mkdir": True}}
        cache = sealed(tmp_path / "one", **remote)
        cache.put(STORE, FRAME, DATA, verified=True)
        cache.flush()
        assert everything(tmp_path / "remote")
        assert DATA[:20] not in everything(tmp_path / "remote")
        other = sealed(tmp_path / "two", **remote)
        assert other.get(STORE, FRAME) == CacheEntry(DATA, True, True)
        assert other.stats()["remote_hits"] == 1
        assert FrameCache(tmp_path / "three", **remote).get(STORE, FRAME) is None


class TestResults:
    @pytest.mark.parametrize("verified", [True, False])
    def test_a_round_trip(self, folder: Path, verified: bool) -> None:
        cache = sealed(folder)
        tier = cache.derived(STORE, "recipe")
        assert tier.read_many(["a"], [np.empty_like(IMAGE)]) == [None]
        assert tier.write("a", IMAGE, verified)
        assert IMAGE[:4].tobytes() not in everything(folder)
        out = np.empty_like(IMAGE)
        assert tier.read_many(["a", "b"], [out, np.empty_like(IMAGE)]) == [verified, None]
        np.testing.assert_array_equal(out, IMAGE)
        stats = cache.stats()
        assert (stats["derived_hits"], stats["derived_misses"], stats["bytes"]) == (1, 2, IMAGE.nbytes)

    def test_what_does_not_fit_is_a_miss(self, folder: Path) -> None:
        tier = sealed(folder).derived(STORE, "recipe")
        tier.write("a", IMAGE, True)
        outs = [np.empty_like(IMAGE, np.uint16), np.empty((48, 64), np.int16), np.empty((3, 3), np.int16)]
        assert tier.read_many(["a"] * 3, outs) == [None] * 3
        assert sealed(folder, 0x11).derived(STORE, "recipe").read_many(["a"], [np.empty_like(IMAGE)]) == [None]
        assert sealed(folder).derived(STORE, "other").read_many(["a"], [np.empty_like(IMAGE)]) == [None]
        assert FrameCache(folder).derived(STORE, "recipe").read_many(["a"], [np.empty_like(IMAGE)]) == [None]


def test_it_travels(folder: Path) -> None:
    cache = sealed(folder)
    cache.put(STORE, FRAME, DATA, verified=True)
    again = pickle.loads(pickle.dumps(cache))
    assert again.get(STORE, FRAME) == CacheEntry(DATA, True, True)
    tier = pickle.loads(pickle.dumps(cache.derived(STORE, "recipe")))
    assert tier.write("a", IMAGE, True)


def test_one_without_the_other(folder: Path) -> None:
    with pytest.raises(ConfigError, match="belong together"):
        FrameCache(folder, encrypt=Key(1).encrypt)
