"""How encoded frames arrive: many GetImageFrame requests in flight, one future each."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol

from ahi_ml.client.failures import translated
from ahi_ml.errors import ConnectionFailedError

__all__ = ["Boto3Transport", "FrameTransport"]


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
