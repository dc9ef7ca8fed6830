"""Files that lie elsewhere: what a path that is an fsspec URL needs to be written and fetched whole. Floor 1.

Everything is fsspec's; here stands only what this package asks of it: a file appears whole or not at all,
and what tells whether it has changed. Options and credentials are those of fsspec's own configuration
(``FSSPEC_S3_ENDPOINT_URL``, ``AWS_PROFILE``, ...), so that none travel in pickles.
"""

from __future__ import annotations

import hashlib
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from ahi_ml.errors import ConfigError
from ahi_ml.types import PathType

__all__ = ["RemoteFile", "local_or_remote", "refuse_password"]

_URL = re.compile(r"[A-Za-z][\w+.-]*(::[A-Za-z][\w+.-]*)*://")
# Secret keys of S3 may have slashes. A number before the first slash is a port elsewhere; S3's URLs have none.
_PASSWORD = re.compile(r"://[^/@\[]*:(?!\d+[/?#])[^@]*@|\bs3a?://[^/@]*:[^@]*@")
# What file systems call the things that change with the contents. A size alone is no proof of anything.
_TELLING = (
    "ETag",
    "etag",
    "md5",
    "md5Hash",
    "Content-MD5",
    "Digest",
    "checksum",
    "generation",
    "VersionId",
    "LastModified",
    "Last-Modified",
    "last_modified",
    "mtime",
    "modified",
    "updated",
    "created",
)


def refuse_password(url: str) -> None:
    """Refuse a URL with a password in it. I/O: none.

    Raises
    ------
    ConfigError
        There is one: it would travel in pickles and stand in messages.
    """
    if _PASSWORD.search(url):
        # Which part of it is secret is anybody's guess.
        raise ConfigError(
            f"the {url.partition('://')[0]}:// URL holds a password: put it into fsspec's configuration instead"
        )


def local_or_remote(path: PathType) -> Path | RemoteFile:
    """An absolute `Path` for a file of this machine, a `RemoteFile` for an fsspec URL. I/O: none.

    A ``file://`` URL is local, and a `Path` always is.

    Raises
    ------
    ConfigError
        A URL with a password in it.
    """
    if isinstance(path, str) and _URL.match(path):
        if not path.startswith(("file://", "local://")):
            return RemoteFile(path)
        from fsspec.implementations.local import LocalFileSystem

        path = LocalFileSystem._strip_protocol(path)
    return Path(path).expanduser().absolute()


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """A file that fsspec reaches.

    I/O: none until a method says so.

    Parameters
    ----------
    url : str
        As fsspec takes it: ``s3://bucket/key``, ``memory://name``.

    Raises
    ------
    ConfigError
        A password in the URL.
    """

    url: str

    def __post_init__(self) -> None:
        refuse_password(self.url)

    def __str__(self) -> str:
        """The URL without user, password and query, which may hold a signature."""
        return re.sub(r"//[^/@]*@", "//", self.url.partition("?")[0])

    def _reached(self, **options: Any) -> tuple[Any, str]:
        import fsspec.core

        try:
            fs, path = fsspec.core.url_to_fs(self.url, **options)
        except ImportError as error:
            raise ConfigError(f"{self} needs another package: {error}. For s3:// pip install 'ahi_ml[s3]'") from error
        except ValueError as error:
            raise ConfigError(f"{self} is no URL that fsspec knows: {error}") from error
        return fs, path

    def check(self) -> None:
        """Make sure that fsspec knows the protocol, before hours of work for this file. I/O: none.

        Raises
        ------
        ConfigError
            An unknown protocol, or one whose package is not installed.
        """
        self._reached()

    def fingerprint(self) -> str | None:
        """Something that changes whenever the file does; None where the file system tells nothing of it.

        I/O: one look at the file's properties, past fsspec's listings.

        Raises
        ------
        FileNotFoundError
            No such file.
        OSError
            It cannot be reached.
        """
        fs, path = self._reached()
        with _os_errors(self):
            fs.invalidate_cache(path)
            found = fs.info(path)
        telling = [f"{name}={found[name]}" for name in _TELLING if found.get(name) is not None]
        if not telling:
            return None
        return hashlib.blake2b("\0".join([*telling, f"size={found.get('size')}"]).encode(), digest_size=16).hexdigest()

    def download(self, file: IO[bytes]) -> None:
        """Copy the file into an open one. I/O: all of it.

        Raises
        ------
        FileNotFoundError
            No such file.
        OSError
            It cannot be reached, or came short.
        """
        fs, path = self._reached()
        with _os_errors(self), fs.open(path, "rb") as source:
            shutil.copyfileobj(source, file, 2**22)
            size = getattr(source, "size", None)
        if size is not None and file.tell() != size:
            raise OSError(f"{self} has {size} bytes and {file.tell()} came: try again")

    @contextmanager
    def whole(self) -> Iterator[IO[bytes]]:
        """A file to write that takes the place of this one once it is whole.

        I/O: a temporary file of this machine, mode 0600; then one upload, in an fsspec transaction: the file
        appears when it is complete, or what was there stays.

        Raises
        ------
        ConfigError
            As `check`, before anything is written.
        OSError
            It cannot be written.
        """
        # An instance of its own: a transaction is a state of the instance, which threads may share.
        fs, path = self._reached(skip_instance_cache=True)
        with tempfile.TemporaryFile(prefix="ahi-ml-") as file:
            yield file
            file.seek(0)
            with _os_errors(self), fs.transaction, fs.open(path, "wb") as target:
                shutil.copyfileobj(file, target, 2**22)


@contextmanager
def _os_errors(file: RemoteFile) -> Iterator[None]:
    """Raise what file systems raise as OSError: their clients' own errors too, which nobody could name here."""
    try:
        yield
    except (OSError, ConfigError):
        raise
    except Exception as error:
        raise OSError(f"{file} cannot be reached: {type(error).__name__}: {error}") from error
