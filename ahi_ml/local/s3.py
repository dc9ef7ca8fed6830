"""Buckets of S3 itself, for import jobs of an embedded store that may use them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from io import BytesIO
from typing import IO, Any

import botocore.session
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

from ahi_ml.local.uris import InputFile

__all__ = ["S3Bucket", "connect_s3"]


class S3Bucket:
    """A bucket of S3.

    Parameters
    ----------
    client : botocore client
        For ``s3``.
    name : str
        Of the bucket.
    """

    def __init__(self, client: Any, name: str) -> None:
        self._client, self._name = client, name

    def files(self, prefix: str) -> Iterator[InputFile]:
        """Yield the objects whose keys begin with `prefix`, sorted. I/O: a request for each 1,000."""
        with self._as_os_error("list"):
            for page in self._client.get_paginator("list_objects_v2").paginate(Bucket=self._name, Prefix=prefix):
                for found in page.get("Contents", ()):
                    key, size = found["Key"], found["Size"]
                    if not key.endswith("/"):  # what consoles make for a folder
                        yield InputFile(key, size, partial(self._read, key))

    def _read(self, key: str) -> IO[bytes]:
        with self._as_os_error("read"):
            return BytesIO(self._client.get_object(Bucket=self._name, Key=key)["Body"].read())

    def check_writable(self, prefix: str) -> None:
        """Raise when the bucket is not there. I/O: one request; only writing shows the rest."""
        with self._as_os_error("find"):
            self._client.head_bucket(Bucket=self._name)

    def write(self, key: str, text: str) -> None:
        """Write an object. I/O: one request."""
        with self._as_os_error("write"):
            self._client.put_object(Bucket=self._name, Key=key, Body=text.encode())

    @contextmanager
    def _as_os_error(self, verb: str) -> Iterator[None]:
        try:
            yield
        except ClientError as error:
            code = error.response.get("Error", {}).get("Code", "unknown")
            raise OSError(f"cannot {verb} in the S3 bucket {self._name}: {code}") from error
        except BotoCoreError as error:
            raise OSError(f"cannot {verb} in the S3 bucket {self._name}: {type(error).__name__}") from error


def connect_s3(region: str, *, connections: int) -> Any:
    """An S3 client with the credentials and endpoint of this process's AWS settings. I/O: reads those.

    Raises
    ------
    OSError
        They cannot be used.
    """
    session = botocore.session.Session()
    try:
        return session.create_client(
            "s3",
            region_name=session.get_config_variable("region") or region,
            config=Config(max_pool_connections=connections, retries={"mode": "standard"}),
        )
    except BotoCoreError as error:
        raise OSError(f"cannot use S3: {error}") from error
