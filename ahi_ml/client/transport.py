"""How encoded frames arrive: many GetImageFrame requests in flight, one future each."""

from __future__ import annotations

import logging
import os
import threading
from concurrent.futures import Future
from contextlib import suppress
from typing import Any, Protocol
from urllib.parse import urlsplit

from botocore.httpsession import ProxyConfiguration, get_cert_path
from botocore.utils import get_environ_proxies

from ahi_ml.client.failures import closed, translated
from ahi_ml.client.lean import CurlTransport
from ahi_ml.client.multi import LeanEndpoint
from ahi_ml.client.partial import Part
from ahi_ml.client.sessions import Connection
from ahi_ml.client.threaded import Boto3Transport

__all__ = ["BestTransport", "FrameTransport", "lean_endpoint"]

_LOG = logging.getLogger(__name__)


class FrameTransport(Protocol):
    """Something that fetches frames."""

    def fetch(self, image_set_id: str, frame_id: str, part: Part | None = None) -> Future[bytes]:
        """Start fetching the encoded bytes of a frame, or of its first part. I/O: one request, in the background.

        Until the frame has come the future may be cancelled: then its callbacks have been called, no further
        request is sent for it, and one that is under way ends as soon as can be.
        """
        ...

    def stats(self) -> dict[str, float]:
        """Counts so far: requests, retried, throttled, delayed, wait_s; see `governor.Counts`. I/O: none."""
        ...

    def close(self) -> None:
        """Cancel what has not started and end the threads."""
        ...


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
        with suppress(ImportError):
            import pycurl  # noqa: F401 - takes some milliseconds: here, where no frame is waited for
        self._lock = threading.Lock()
        self._lean: CurlTransport | None = None
        self._boto3: Boto3Transport | None = None
        self._tried = False
        self._closed = False

    def fetch(self, image_set_id: str, frame_id: str, part: Part | None = None) -> Future[bytes]:
        """Start fetching the encoded bytes of a frame; see `FrameTransport`."""
        return self._chosen().fetch(image_set_id, frame_id, part)

    def _chosen(self) -> FrameTransport:
        if self._lean is not None and not self._connection.hooked:
            return self._lean
        with self._lock:
            if self._closed:
                raise closed("GetImageFrame")
            if not self._tried:
                try:
                    endpoint = lean_endpoint(self._connection)
                    if endpoint is not None:
                        self._lean = CurlTransport(endpoint, self._datastore_id, governor=self._connection.governor)
                    self._tried = True
                except Exception:  # credentials, mostly: boto3 meets the same and names the frame
                    _LOG.debug("boto3 fetches this frame", exc_info=True)
            if self._lean is not None and not self._connection.hooked:
                return self._lean
            if self._boto3 is None:
                connection = self._connection
                self._boto3 = Boto3Transport(
                    connection.client,
                    self._datastore_id,
                    governor=connection.governor,
                    single=connection.single,
                )
            return self._boto3

    def stats(self) -> dict[str, float]:
        """Counts of requests so far, by either way; see `Counts`. I/O: none."""
        return self._connection.governor.stats("GetImageFrame")

    def close(self) -> None:
        """Close whichever was used."""
        with self._lock:
            self._closed = True
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
    with translated("GetImageFrame"):
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
    # As the client reads them, NO_PROXY included: for the endpoint, without the prefix of an operation.
    proxies = config.proxies if config.proxies is not None else get_environ_proxies(client.meta.endpoint_url)
    trusted = session.get_config_variable("ca_bundle") or os.environ.get("REQUESTS_CA_BUNDLE") or True
    certificate = config.client_cert
    return LeanEndpoint(
        base_url=base,
        credentials=credentials,
        region=client.meta.region_name,
        proxy=ProxyConfiguration(proxies).proxy_url_for(base) or "",
        ca_bundle=get_cert_path(trusted),
        client_certificate=(certificate, None) if isinstance(certificate, str) else certificate,
        connect_timeout_s=_seconds(config.connect_timeout),
        read_timeout_s=_seconds(config.read_timeout),
    )


def _seconds(timeout: Any) -> float:
    return float(timeout[0] if isinstance(timeout, list | tuple) else timeout or 60)
