"""Patient keys: what an index carries instead of patient identifiers. Floor 1."""

from __future__ import annotations

import hashlib
import os
import secrets
from dataclasses import dataclass

from ahi_ml.errors import ConfigError

__all__ = ["PATIENT_KEY_VARIABLE", "PatientHash", "patient_hash"]

PATIENT_KEY_VARIABLE = "AHI_ML_PATIENT_KEY"
_BYTES = 12


@dataclass(frozen=True, slots=True)
class PatientHash:
    """A keyed hash of identifiers.

    Parameters
    ----------
    secret : bytes
        The key. Whoever has it can test guesses of an identifier against a hash.
    made : bool
        Whether it was made by chance just now, so that nobody has it yet.
    """

    secret: bytes
    made: bool = False

    def __repr__(self) -> str:
        return "PatientHash(...)"

    def __call__(self, *identifiers: str | None) -> str | None:
        """Hash an identifier, with its issuer if there is one, to 24 hex digits. I/O: none.

        None when the first identifier is absent or blank: nobody can be told apart by it.
        """
        first = (identifiers[0] or "").strip()
        if not first:
            return None
        text = "\0".join([first, *((other or "").strip() for other in identifiers[1:])])
        key = hashlib.blake2b(self.secret).digest()  # keys of any length, 64 bytes at most go in
        return hashlib.blake2b(text.encode(), key=key, digest_size=_BYTES).hexdigest()


def patient_hash(key: str | bytes | None = None) -> PatientHash:
    """Settle the key: the argument, then ``AHI_ML_PATIENT_KEY``, then a random one. I/O: none.

    Raises
    ------
    ConfigError
        An empty key.
    """
    chosen = key if key is not None else os.environ.get(PATIENT_KEY_VARIABLE) or None
    if chosen is None:
        return PatientHash(secrets.token_hex(32).encode(), made=True)
    if not chosen:
        raise ConfigError("the patient key is empty: anybody could test guesses of a patient id against the index")
    return PatientHash(chosen.encode() if isinstance(chosen, str) else chosen)
