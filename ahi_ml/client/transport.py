"""How encoded frames arrive: many GetImageFrame requests in flight, one future each."""

from __future__ import annotations

import logging
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol
from urllib.parse import urlsplit

from botocore.httpsession import get_cert_path
from botocore.utils import get_environ_proxies

from ahi_ml.client.failures import translated
from ahi_ml.client.lean import CurlTransport, LeanEndpoint
from ahi_ml.client.sessions import Connection
from ahi_ml.errors import ConnectionFailedError

__all__ = ["BestTransport", "Boto3Transport", "FrameTransport", "lean_endpoint"]

_LOG = logging.getLogger(__name__)


class FrameTransport(Protocol):
    """Something that fetches frames."""

    def fetch(self, image_set_id: str, frame_id: str) -> Future[bytes]:
        """Start fetching the encoded bytes of a frame. I/O: one request, in the background."""
        ...

    def close(self) -> None:
        """Cancel what has not started and end the threads."""
        ...


class Boto3Transport:
    """GetImageFrame through a boto3 client in threads: its retries, its credentials, its hooks.

    Parameters
    ----------
    client : boto3 client
        With a connection pool of at least `in_flight`.
    datastore_id : str
        The data store.
    in_flight : int
        Requests at a time.
    """

    def __init__(self, client: Any, datastore_id: str, *, in_flight: int = 32) -> None:
        self._client = client
        self._datastore_id = datastore_id
        self._threads = ThreadPoolExecutor(in_flight, "ahi-ml-fetch")

    def fetch(self, image_set_id: str, frame_id: str) -> Future[bytes]:
        """Start fetching the encoded bytes of a frame.

        I/O: one request, in the background. The future raises `ServiceError` or one of its kinds.
        """
        return self._threads.submit(self._fetch, image_set_id, frame_id)

    def _fetch(self, image_set_id: str, frame_id: str) -> bytes:
        with translated("GetImageFrame", f"frame {frame_id} of image set {image_set_id}"):
            answer = self._client.get_image_frame(
                datastoreId=self._datastore_id,
                imageSetId=image_set_id,
                imageFrameInformation={"imageFrameId": frame_id},
            )
            data: bytes = answer["imageFrameBlob"].read()
        if not data:
            raise ConnectionFailedError(
                f"GetImageFrame for frame {frame_id} of image set {image_set_id}: an empty body",
                operation="GetImageFrame",
                retryable=True,
            )
        return data

    def close(self) -> None:
        """Cancel what has not started and end the threads. I/O: waits for requests under way."""
        self._threads.shutdown(wait=False, cancel_futures=True)


class BestTransport:
    """The lean transport where it can do what the client would do, boto3 where it cannot.

    I/O: none until the first `fetch`.

    Parameters
    ----------
    connection : Connection
        The client, its session, and whether it carries handlers of somebody else's.
    datastore_id : str
        The data store.
    """

    def __init__(self, connection: Connection, datastore_id: str) -> None:
        self._connection = connection
        self._datastore_id = datastore_id
        self._lock = threading.Lock()
        self._lean: CurlTransport | None = None
        self._boto3: Boto3Transport | None = None
        self._tried = False

    def fetch(self, image_set_id: str, frame_id: str) -> Future[bytes]:
        """Start fetching the encoded bytes of a frame; see `FrameTransport`."""
        return self._chosen().fetch(image_set_id, frame_id)

    def _chosen(self) -> FrameTransport:
        if self._lean is not None and not self._connection.hooked:
            return self._lean
        with self._lock:
            if not self._tried:
                self._tried = True
                endpoint = lean_endpoint(self._connection)
                self._lean = CurlTransport(endpoint, self._datastore_id) if endpoint is not None else None
            if self._lean is not None and not self._connection.hooked:
                return self._lean
            if self._boto3 is None:
                self._boto3 = Boto3Transport(self._connection.client, self._datastore_id)
            return self._boto3

    def close(self) -> None:
        """Close whichever was used."""
        for transport in (self._lean, self._boto3):
            if transport is not None:
                transport.close()


def lean_endpoint(connection: Connection) -> LeanEndpoint | None:
    """What the client would use for GetImageFrame; None when only the client itself can do it.

    I/O: may load credentials, as the client's first request would.
    """
    try:
        import pycurl  # noqa: F401
    except ImportError:
        _LOG.info("frames are fetched by boto3: pycurl is not installed")
        return None
    client, session = connection.client, connection.session
    config = client.meta.config
    credentials = session.get_credentials()
    if credentials is None or getattr(config, "proxies_config", None) or config.signature_version not in (None, "v4"):
        return None
    with translated("GetImageFrame"):
        # The client's own rules for regions, FIPS, dual stack and host prefixes, applied to this operation.
        url = client.generate_presigned_url(
            "get_image_frame",
            Params={
                "datastoreId": "0" * 32,
                "imageSetId": "0" * 32,
                "imageFrameInformation": {"imageFrameId": "0" * 32},
            },
        )
    parts = urlsplit(url)
    base = f"{parts.scheme}://{parts.netloc}{parts.path.partition('/datastore/')[0]}"
    proxies = config.proxies if config.proxies is not None else get_environ_proxies(base)
    certificate = config.client_cert
    return LeanEndpoint(
        base_url=base,
        credentials=credentials,
        region=client.meta.region_name,
        proxy=(proxies or {}).get(parts.scheme, ""),
        ca_bundle=get_cert_path(session.get_config_variable("ca_bundle") or True),
        client_certificate=(certificate, None) if isinstance(certificate, str) else certificate,
        connect_timeout_s=_seconds(config.connect_timeout),
        read_timeout_s=_seconds(config.read_timeout),
    )


def _seconds(timeout: Any) -> float:
    return float(timeout[0] if isinstance(timeout, list | tuple) else timeout or 60)
