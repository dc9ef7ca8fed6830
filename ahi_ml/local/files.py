"""The files of an embedded store's folder: which they are, and the small private ones among them."""

from __future__ import annotations

import json
import os
import re
import secrets
import socket
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ahi_ml.errors import ConfigError

__all__ = ["REGION", "Endpoint", "Keys", "StoreFolder"]

REGION = "us-east-1"
_ACCOUNT = "123456789012"


@dataclass(frozen=True, slots=True)
class Keys:
    """Secrets of one store: made with it, never shown.

    Parameters
    ----------
    access_key_id, secret_access_key : str
        Sign requests.
    page_secret : str
        Hex; signs page tokens.
    """

    access_key_id: str
    secret_access_key: str
    page_secret: str

    def __repr__(self) -> str:
        return "Keys(...)"


@dataclass(frozen=True, slots=True)
class Endpoint:
    """How to reach the server of a folder.

    Parameters
    ----------
    url : str
        ``http://127.0.0.1:port``.
    lease_port : int
        Where holders connect to keep the server alive.
    host : str
        Name of the machine it runs on.
    pid : int
        Its process.
    token : str
        Proves to both sides of a lease that they have read this file.
    region, account : str
        What the store's ARNs and signatures say.
    """

    url: str
    lease_port: int
    host: str
    pid: int
    token: str
    region: str = REGION
    account: str = _ACCOUNT

    def __repr__(self) -> str:
        return f"Endpoint({self.url!r}, pid={self.pid})"


def write_private(path: Path, value: Any) -> None:
    """Write JSON that only the user can read, whole or not at all. I/O: one file."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}")
    with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
        json.dump(value, file)
    os.replace(temporary, path)


@dataclass(frozen=True, slots=True)
class StoreFolder:
    """The folder of an embedded store.

    Parameters
    ----------
    root : Path
        Absolute.
    """

    root: Path

    @classmethod
    def open(cls, path: Path, *, create: bool = True) -> StoreFolder:
        """Find or make a store folder.

        I/O: creates the folder (mode 0700) and its keys when absent.

        Raises
        ------
        ConfigError
            The folder holds other things, is absent although it must exist, or cannot be made.
        """
        folder = cls(Path(os.path.realpath(path.expanduser())))
        try:
            # Another opener may be making the keys right now.
            names = [name for name in os.listdir(folder.root) if not name.lstrip(".").startswith("keys.json.")]
        except FileNotFoundError:
            if not create:
                raise ConfigError(
                    f"there is no embedded data store in {folder.root} on this machine. To use one store from "
                    "several machines, run `ahi-ml serve` where the folder is, or use AWS HealthImaging"
                ) from None
            names = []
        except NotADirectoryError:
            raise ConfigError(f"{folder.root} is a file: an embedded data store is a folder") from None
        except OSError as error:
            raise ConfigError(f"cannot use {folder.root} as a data store: {error.strerror}") from error
        if names and not any(name in names for name in ("keys.json", "catalog.sqlite", "server.lock", "settings.json")):
            raise ConfigError(
                f"{folder.root} holds other files and is no embedded data store: name a new or an empty folder "
                "(to import DICOM files from it, pass it to import_dicom)"
            )
        try:
            folder.root.mkdir(mode=0o700, parents=True, exist_ok=True)
            folder.root.chmod(0o700)
        except OSError as error:
            raise ConfigError(f"cannot make a data store in {folder.root}: {error.strerror}") from error
        return folder

    @property
    def catalog(self) -> Path:
        """The SQLite file."""
        return self.root / "catalog.sqlite"

    @property
    def blobs(self) -> Path:
        """The folder of encoded frames."""
        return self.root / "blobs"

    @property
    def buckets(self) -> Path:
        """The folder that stands for S3."""
        return self.root / "s3"

    @property
    def settings(self) -> Path:
        """What is set for this store; see `settings`."""
        return self.root / "settings.json"

    @property
    def lock(self) -> Path:
        """Locked by the server for as long as it lives."""
        return self.root / "server.lock"

    @property
    def log(self) -> Path:
        """The server's log."""
        return self.root / "server.log"

    @property
    def endpoint_file(self) -> Path:
        """Where the server says how it is reached."""
        return self.root / "endpoint.json"

    def keys(self) -> Keys:
        """The store's secrets, made on first use. I/O: one private file."""
        path = self.root / "keys.json"
        for _ in range(2):
            try:
                return Keys(**json.loads(path.read_text(encoding="utf-8")))
            except FileNotFoundError:
                made = Keys(
                    access_key_id="AKIA"
                    + "".join(secrets.choice("ABCDEFGHIJKLMNOPQRSTUVWXYZ234567") for _ in range(16)),
                    secret_access_key=re.sub(r"[-_=]", "x", secrets.token_urlsafe(40))[:40],
                    page_secret=secrets.token_hex(32),
                )
                self._make_once(path, asdict(made))
        raise ConfigError(f"cannot make keys in {self.root}")

    @staticmethod
    def _make_once(path: Path, value: Any) -> None:
        """Several openers may race here: whoever links first wins, the others read it."""
        temporary = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}")
        write_private(temporary, value)
        try:
            os.link(temporary, path)
        except FileExistsError:
            pass
        except OSError:  # a file system without links
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)

    def endpoint(self) -> Endpoint | None:
        """What the running server wrote, or the last one left behind. I/O: one file."""
        try:
            return Endpoint(**json.loads(self.endpoint_file.read_text(encoding="utf-8")))
        except (FileNotFoundError, ValueError, TypeError):
            return None

    def publish(self, endpoint: Endpoint) -> None:
        """Say how the server is reached. I/O: one private file."""
        write_private(self.endpoint_file, asdict(endpoint))

    def withdraw(self) -> None:
        """Take the endpoint back. I/O: removes one file."""
        self.endpoint_file.unlink(missing_ok=True)


def hostname() -> str:
    """The name of this machine, as endpoints record it."""
    return socket.gethostname()
