"""Local files on their way into an import job: which go into which job, and where they lie meanwhile."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ahi_ml.client import translated
from ahi_ml.errors import ConfigError

__all__ = ["JobLimits", "LocalFile", "StagedPart", "Staging", "bucket_folder", "jobs_of", "local_files"]

_UPLOADS = 16
_DELETED_AT_ONCE = 1_000  # what DeleteObjects takes


@dataclass(frozen=True, slots=True)
class JobLimits:
    """How much goes into one import job: the service's quotas, unless the account has others.

    Parameters
    ----------
    files : int
        Files a job.
    job_bytes, file_bytes : int
        Bytes of all the files of a job, and of one file.
    """

    files: int = 5_000
    job_bytes: int = 10 * 2**30
    file_bytes: int = 10 * 2**30


@dataclass(frozen=True, slots=True)
class LocalFile:
    """A file to be imported."""

    path: Path
    size: int


def local_files(folder: Path) -> list[LocalFile]:
    """Every file under a folder, sorted, so that the files of a series stay together. I/O: walks it."""
    found = []
    for top, folders, names in os.walk(folder):
        folders.sort()
        for name in sorted(names):
            path = Path(top, name)
            if path.is_file():
                found.append(LocalFile(path, path.stat().st_size))
    return found


def jobs_of(files: Iterable[LocalFile], limits: JobLimits) -> list[list[LocalFile]]:
    """Divide files into as few jobs as their order and the limits allow. I/O: none."""
    jobs: list[list[LocalFile]] = []
    size = 0
    for file in files:
        if not jobs or len(jobs[-1]) == limits.files or size + file.size > limits.job_bytes:
            jobs.append([])
            size = 0
        jobs[-1].append(file)
        size += file.size
    return jobs


@dataclass(frozen=True, slots=True)
class StagedPart:
    """The files of one job where the job reads them.

    Parameters
    ----------
    uri : str
        ``s3://`` prefix of the job's input.
    paths : dict
        The local path of each key under it.
    """

    uri: str
    paths: dict[str, Path]


def bucket_folder(buckets: Path | None, name: str, s3: Callable[[], Any] | None) -> Path | None:
    """The folder that stands for a bucket; None when the bucket is one of S3. I/O: looks for it."""
    if buckets is None or (s3 is not None and not (buckets / name).is_dir()):
        return None
    return buckets / name


class Staging:
    """A prefix of S3 that holds files while jobs read them, or the folder that stands for it.

    Keys are numbers: the names of files may say whose they are.

    Parameters
    ----------
    uri : str
        ``s3://bucket/prefix``; everything is put under a new name below it.
    buckets : Path or None
        Folder that stands for S3, for an embedded store.
    s3 : callable or None
        Makes the S3 client for buckets that are no folder there.

    Raises
    ------
    ConfigError
        Not an ``s3://`` URI.
    """

    def __init__(self, uri: str, *, buckets: Path | None, s3: Callable[[], Any] | None) -> None:
        bucket, _, prefix = uri.removeprefix("s3://").partition("/")
        if not uri.startswith("s3://") or not bucket:
            raise ConfigError(f"staging_uri is an s3:// URI such as 's3://bucket/staging/', not {uri!r}")
        self._bucket = bucket
        self._prefix = f"{prefix}{'/' if prefix and not prefix.endswith('/') else ''}{secrets.token_hex(8)}/"
        self._root = bucket_folder(buckets, bucket, s3)
        self._connect, self._client = s3, None

    def upload(self, number: int, files: Sequence[LocalFile], done: Callable[[int], None]) -> StagedPart:
        """Put files where a job reads them.

        I/O: one upload a file, several at a time; for a folder, a link or a copy. When one fails,
        those that came before are removed.

        Parameters
        ----------
        number : int
            Of the job.
        files : sequence of LocalFile
            What to put there.
        done : callable
            Told the bytes of each file that has arrived.

        Raises
        ------
        ServiceError
            S3 said no.
        OSError
            A file cannot be read, or the folder not be written.
        """
        prefix = f"{self._prefix}{number:05}/"
        keys = [f"{prefix}{place:06}" for place in range(len(files))]
        part = StagedPart(
            f"s3://{self._bucket}/{prefix}", {key: file.path for key, file in zip(keys, files, strict=True)}
        )
        put = self._put_into_folder if self._root is not None else self._put_into_s3
        try:
            if self._root is None:
                self._s3()  # once, before threads ask for it
            with ThreadPoolExecutor(_UPLOADS, "ahi-ml-upload") as pool:
                try:
                    for file, _ in zip(files, pool.map(put, [file.path for file in files], keys), strict=True):
                        done(file.size)
                except BaseException:
                    pool.shutdown(wait=True, cancel_futures=True)
                    raise
        except BaseException:
            self.remove(part)
            raise
        return part

    def remove(self, part: StagedPart) -> None:
        """Take a part's files away again. I/O: a request for each 1,000, or the folder."""
        if self._root is not None:
            shutil.rmtree(self._root / part.uri.removeprefix(f"s3://{self._bucket}/"), ignore_errors=True)
            with suppress(OSError):  # other parts lie there still
                (self._root / self._prefix).rmdir()
            return
        with translated("DeleteObjects", part.uri):
            for keys in _pieces(list(part.paths), _DELETED_AT_ONCE):
                objects = {"Objects": [{"Key": key} for key in keys], "Quiet": True}
                self._s3().delete_objects(Bucket=self._bucket, Delete=objects)

    def _s3(self) -> Any:
        if self._client is None:
            assert self._connect is not None
            self._client = self._connect()
        return self._client

    def _put_into_s3(self, path: Path, key: str) -> None:
        with translated("PutObject", f"s3://{self._bucket}/{key}"), open(path, "rb") as file:
            self._s3().put_object(Bucket=self._bucket, Key=key, Body=file)

    def _put_into_folder(self, path: Path, key: str) -> None:
        assert self._root is not None
        place = self._root / key
        place.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        try:
            os.link(path, place)
        except OSError:  # another file system, or one without links
            shutil.copyfile(path, place)


def _pieces(items: list[str], most: int) -> Iterator[list[str]]:
    for start in range(0, len(items), most):
        yield items[start : start + most]
