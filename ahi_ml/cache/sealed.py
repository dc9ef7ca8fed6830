"""Encrypted entries: a cipher of the user's around what the cache keeps, and the tier of results that uses it.

What is written is the cipher's output, in the frame of any other entry: names are hashes anyway, and headers say sizes
and checksums (of the encrypted bytes) only. Encrypted and plain entries may lie in one folder; neither is taken for
the other.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from ahi_ml.cache.derived import result_key
from ahi_ml.cache.entries import DERIVED_START, EncodedHeader, derived_beginning, derived_header
from ahi_ml.cache.folder import CacheFolder
from ahi_ml.perprocess import PerProcess
from ahi_ml.types import AnyArray, Buffer

__all__ = ["Cipher", "SealedTier"]

_LOG = logging.getLogger(__name__)


@dataclass(slots=True)
class _Warned:
    """Whether this process has said that entries cannot be decrypted."""

    said: bool = False


@dataclass(frozen=True)
class Cipher:
    """How entries are encrypted.

    Parameters
    ----------
    encrypt, decrypt : callable
        From bytes to bytes, such as those of `cryptography.fernet.Fernet`. Used by several threads at once, and
        pickled with the cache for worker processes: a key should come from where those can find it as well.
    """

    encrypt: Callable[[bytes], bytes]
    decrypt: Callable[[bytes], bytes]
    _warned: PerProcess[_Warned] = field(default_factory=lambda: PerProcess(_Warned), repr=False, compare=False)

    def seal(self, data: Buffer) -> bytes:
        """Encrypt. I/O: the callable's."""
        return self.encrypt(bytes(data))

    def open(self, data: Buffer) -> bytes | None:
        """Decrypt; None, and one warning, for what another key has made. I/O: the callable's."""
        try:
            return self.decrypt(bytes(data))
        except Exception as error:  # every library has its own
            warned = self._warned.get()
            if not warned.said:
                warned.said = True
                _LOG.warning("entries of the cache cannot be decrypted, and are replaced: %s", type(error).__name__)
            return None


class SealedTier:
    """Results of one recipe, encrypted; otherwise as `DerivedTier`, without its speed: each is decrypted and copied.

    Every entry is checked whenever it is read.

    Parameters
    ----------
    folder : CacheFolder
        Where the entries lie.
    cipher : Cipher
        Around them.
    datastore_id, recipe : str
        As for `DerivedTier`.

    I/O: none until used.
    """

    def __init__(self, folder: CacheFolder, cipher: Cipher, datastore_id: str, recipe: str) -> None:
        self._folder, self._cipher = folder, cipher
        self._key = f"sealed\0{result_key(datastore_id, recipe)}"

    def _name(self, key: str) -> str:
        return hashlib.blake2b(f"{self._key}{key}".encode(), digest_size=16).hexdigest()

    def read_many(self, keys: Sequence[str], outs: Sequence[AnyArray] | AnyArray) -> list[bool | None]:
        """Read results into arrays; see `DerivedTier.read_many`. I/O: one file each."""
        found = [self._read(key, out) for key, out in zip(keys, outs, strict=True)]
        misses = found.count(None)
        size = sum(out.nbytes for out, verdict in zip(outs, found, strict=True) if verdict is not None)
        self._folder.count(derived_hits=len(found) - misses, derived_misses=misses, bytes=size)
        return found

    def _read(self, key: str, out: AnyArray) -> bool | None:
        entry = self._folder.read_entry(self._name(key))
        if entry is None or not entry[0].sealed:
            return None
        raw = self._cipher.open(entry[1])
        if raw is None or len(raw) != DERIVED_START + out.nbytes:
            return None
        for verified in (True, False):
            beginning = derived_beginning(out, verified=verified)
            if beginning is not None and raw.startswith(beginning):
                np.copyto(out, np.frombuffer(raw, out.dtype, offset=DERIVED_START).reshape(out.shape))
                return verified
        return None

    def write(self, key: str, array: AnyArray, verified: bool) -> bool:
        """Store a result; see `DerivedTier.write`. I/O: one file."""
        array = np.asarray(array, order="C")
        header = derived_header(array, verified=verified)
        if header is None or self._folder.state().disabled:
            return False
        sealed = self._cipher.seal(header + array.tobytes())
        return self._folder.write(
            self._name(key), EncodedHeader.of(sealed, verified=verified, sealed=True).pack(), sealed
        )

    def drop(self, key: str) -> None:
        """Forget a result, if it is there. I/O: removes one file."""
        self._folder.drop(self._folder.place(self._name(key)))
