"""Settings of one embedded store, kept in its folder as ``settings.json`` and read when a job starts."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from ahi_ml.errors import ConfigError
from ahi_ml.local.files import StoreFolder, write_private

__all__ = ["Limits", "Settings", "configure"]


@dataclass(frozen=True, slots=True)
class Limits:
    """The service's limits of one import job.

    Parameters
    ----------
    files, folders : int
        How many may lie under the input prefix.
    job_bytes, file_bytes : int
        Bytes of all the files of a job, and of one file.
    """

    files: int = 5_000
    folders: int = 10_000
    job_bytes: int = 10 * 2**30
    file_bytes: int = 10 * 2**30


@dataclass(frozen=True, slots=True)
class Settings:
    """What can be set for one embedded store.

    Parameters
    ----------
    limits : Limits
        Of import jobs.
    s3 : bool
        Whether buckets that have no folder under ``s3/`` are asked for on S3 itself, with the AWS
        credentials of the server's process. Otherwise every bucket is a folder there.
    """

    limits: Limits = field(default_factory=Limits)
    s3: bool = False

    @classmethod
    def parse(cls, values: Mapping[str, Any]) -> Settings:
        """Build from plain data.

        Raises
        ------
        ConfigError
            An unknown name, or a value of the wrong kind.
        """
        limits = values.get("limits", {})
        known = {each.name for each in fields(Limits)}
        if unknown := (set(values) - {"limits", "s3"}) | (set(limits) - known):
            raise ConfigError(
                f"unknown settings {sorted(unknown)}: known are 's3', and 'limits' with {', '.join(sorted(known))}"
            )
        for name, value in limits.items():
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(f"the limit {name!r} is a whole number, 1 or more")
        if not isinstance(values.get("s3", False), bool):
            raise ConfigError("the setting 's3' is true or false")
        return cls(Limits(**limits), values.get("s3", False))

    @classmethod
    def read(cls, path: Path) -> Settings:
        """Read a store's settings; all defaults when it has none. I/O: one file.

        Raises
        ------
        ConfigError
            The file holds no settings.
        """
        try:
            return cls.parse(json.loads(path.read_text(encoding="utf-8")))
        except FileNotFoundError:
            return cls()
        except (ValueError, TypeError, AttributeError) as error:
            raise ConfigError(f"{path} holds no settings of an embedded store: {error}") from error


def configure(folder: str | os.PathLike[str], *, limits: Mapping[str, int] | None = None, s3: bool = False) -> None:
    """Set what can be set for the embedded store in a folder, for jobs that start from now on.

    I/O: makes the folder when absent, and writes its ``settings.json``.

    Parameters
    ----------
    folder : path
        Of the store.
    limits : mapping, optional
        Limits of import jobs that differ from the service's; see `Limits`.
    s3 : bool
        Take buckets that are no folders of the store from S3 itself; see `Settings`.

    Raises
    ------
    ConfigError
        A value that cannot be, or a folder that is no store.
    """
    settings = Settings.parse({"limits": dict(limits or {}), "s3": s3})
    write_private(StoreFolder.open(Path(folder)).settings, asdict(settings))
