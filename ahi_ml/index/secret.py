"""The secret of an index's patient keys: who keeps it, and that it goes to no other machine."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from ahi_ml.errors import ConfigError
from ahi_ml.index.tables import private_file
from ahi_ml.privacy import PATIENT_KEY_VARIABLE
from ahi_ml.remote import RemoteFile, local_or_remote
from ahi_ml.types import PathType

__all__ = ["PatientSecret", "secret_for"]


@dataclass(slots=True)
class PatientSecret:
    """What the patient keys of an index were hashed with; its selections share it.

    Parameters
    ----------
    value : bytes
        The secret.
    kept : bool
        Whether it lies anywhere but here: with the user, who gave it, or in a file beside a saved index.
    """

    value: bytes
    kept: bool

    def __repr__(self) -> str:
        return f"PatientSecret(..., kept={self.kept})"

    @staticmethod
    def file_of(path: Path) -> Path:
        """Where the secret of an index lies. I/O: none."""
        return path.with_name(f"{path.name}.key")

    @classmethod
    def beside(cls, path: Path) -> PatientSecret | None:
        """The secret beside a saved index, if it is there. I/O: reads it."""
        try:
            return cls(cls.file_of(path).read_bytes(), kept=True)
        except OSError:
            return None

    def keep_beside(self, path: Path) -> None:
        """Write the secret beside a saved index. I/O: one file, mode 0600."""
        with private_file(self.file_of(path)) as file:
            file.write(self.value)
        self.kept = True

    def check_kept(self, remote: RemoteFile) -> None:
        """Refuse to save where the secret does not go, while it lies nowhere else. I/O: none.

        Raises
        ------
        ConfigError
            It was made for this index and would be lost.
        """
        if not self.kept:
            raise ConfigError(
                f"{remote} is remote, and the secret of patient keys never goes there. The one of this index was made "
                "for it and would be lost, so that no later data could get the same keys: save the index to a local "
                f"file first, which keeps the secret beside it, or build it with index(patient_key=...) or "
                f"{PATIENT_KEY_VARIABLE}"
            )


def secret_for(path: PathType) -> bytes | None:
    """The secret to build an index with that will be saved to a path: what lies beside it, if anything does.

    I/O: may read it.

    Raises
    ------
    ConfigError
        A URL that cannot be used, or no ``AHI_ML_PATIENT_KEY`` for it: said before the work, not after it.
    """
    place = local_or_remote(path)
    if not isinstance(place, RemoteFile):
        file = PatientSecret.file_of(place)
        return file.read_bytes() if file.exists() else None  # one that cannot be read is not to be replaced
    place.check()
    if not os.environ.get(PATIENT_KEY_VARIABLE):
        raise ConfigError(
            f"{place} is remote, and the secret of patient keys never goes there: set {PATIENT_KEY_VARIABLE} to one "
            "that you keep, or write the index to a local file"
        )
    return None
