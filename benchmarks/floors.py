"""The least that a frame costs: each step of its way alone, and all requests by the leanest client.

What is timed here uses the codec and HTTP libraries directly, not the package.
"""

from __future__ import annotations

import io
import json
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import count
from typing import Any

import boto3
import imagecodecs
import numpy as np
from botocore.auth import SigV4Auth
from botocore.awsrequest import AWSRequest

from ahi_ml import DatasetIndex, DataStore

__all__ = ["LeanClient", "convert_cpu_ms", "decode_all", "signed_requests"]

Request = tuple[str, list[str], str]

_REGION_VARIABLES = (
    "AWS_ENDPOINT_URL_MEDICAL_IMAGING",
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_REGION",
)


def signed_requests(store: DataStore, index: DatasetIndex) -> list[Request]:
    """GetImageFrame for every frame: URL and signed headers, good for some minutes."""
    url, key, secret, region = (store.environment()[name] for name in _REGION_VARIABLES)
    credentials = boto3.session.Session(key, secret, region_name=region).get_credentials()
    signer = SigV4Auth(credentials, "medical-imaging", region)
    requests = []
    for source in index.sources():
        request = AWSRequest(
            "POST",
            f"{url}/datastore/{store.datastore_id}/imageSet/{source.image_set_id}/getImageFrame",
            headers={"Content-Type": "application/json"},
            data=json.dumps({"imageFrameId": source.frame_id}),
        )
        signer.add_auth(request)
        headers = [f"{name}: {value}" for name, value in request.headers.items()]
        requests.append((request.url, headers, request.data))
    return requests


class LeanClient:
    """Many requests in flight on one thread, by libcurl's multi interface.

    Parameters
    ----------
    in_flight : int
        Requests at a time, each on a connection of its own.
    """

    def __init__(self, in_flight: int) -> None:
        import pycurl

        self._curl = pycurl
        self._multi = pycurl.CurlMulti()
        self._multi.setopt(pycurl.M_MAXCONNECTS, in_flight)
        self._handles = []
        for _ in range(in_flight):
            handle = pycurl.Curl()
            handle.setopt(pycurl.NOSIGNAL, 1)
            handle.setopt(pycurl.POST, 1)
            self._handles.append(handle)

    def fetch(self, requests: Sequence[Request]) -> list[bytes]:
        """Send all and return their bodies."""
        bodies: list[bytes] = [b""] * len(requests)
        waiting = iter(enumerate(requests))
        for handle in self._handles:
            self._next(handle, waiting)
        left = len(requests)
        while left:
            while self._multi.perform()[0] == self._curl.E_CALL_MULTI_PERFORM:
                pass
            queued, good, bad = self._multi.info_read()
            if bad:
                raise ConnectionError(f"a request failed: {bad[0][2]}")
            for handle in good:
                if (status := handle.getinfo(self._curl.RESPONSE_CODE)) != 200:
                    raise ConnectionError(f"a request was answered with {status}")
                bodies[handle.number] = handle.body.getvalue()
                left -= 1
                self._multi.remove_handle(handle)
                self._next(handle, waiting)
            if left and not queued and not good:
                self._multi.select(1.0)
        return bodies

    def _next(self, handle: Any, waiting: Any) -> None:
        with suppress(StopIteration):
            handle.number, (url, headers, body) = next(waiting)
            handle.body = io.BytesIO()
            handle.setopt(self._curl.URL, url)
            handle.setopt(self._curl.HTTPHEADER, headers)
            handle.setopt(self._curl.POSTFIELDS, body)
            handle.setopt(self._curl.WRITEDATA, handle.body)
            self._multi.add_handle(handle)

    def close(self) -> None:
        """Close the connections."""
        for handle in self._handles:
            handle.close()
        self._multi.close()


def convert_cpu_ms(bodies: Sequence[bytes], intercept: float) -> dict[str, float]:
    """CPU milliseconds a frame of decoding, of the checksum and of the way to float32, each alone.

    One thread, buffers reused.
    """
    stored = [np.array(imagecodecs.htj2k_decode(body)) for body in bodies[:64]]
    buffer, image = np.empty_like(stored[0]), np.empty(stored[0].shape, np.float32)
    return {
        "decode": _cpu_ms(lambda body: imagecodecs.htj2k_decode(body, out=buffer), bodies),
        "checksum": _cpu_ms(imagecodecs.deflate_crc32, stored),
        "to float32": _cpu_ms(lambda array: np.add(array, intercept, out=image, dtype=np.float32), stored),
    }


def _cpu_ms(work: Callable[[Any], Any], inputs: Sequence[Any]) -> float:
    work(inputs[0])
    start = time.process_time()
    for each in inputs:
        work(each)
    return (time.process_time() - start) / len(inputs) * 1e3


def decode_all(
    bodies: Sequence[bytes],
    batch: Any,
    intercept: float | None,
    threads: int,
    *,
    verify: bool = False,
    skipped: int = 0,
) -> float:
    """Decode all frames on some threads into the rows of a batch in memory; return the seconds.

    Parameters
    ----------
    bodies : sequence of bytes
        Encoded frames.
    batch : (n, rows, columns) ndarray
        Written to over and over: int16 without an intercept, float32 with one.
    intercept : float or None
        Added on the way to float32; None leaves stored values.
    threads : int
        How many.
    verify : bool
        Also compute the CRC of the stored values.
    skipped : int
        Resolution levels to leave out; the batch is as much smaller.
    """
    turn = count()
    scratch = threading.local()

    def share() -> None:
        buffer = scratch.__dict__.setdefault("buffer", np.empty(batch.shape[1:], np.int16))
        while (number := next(turn)) < len(bodies):
            row = batch[number % len(batch)]
            place = row if intercept is None else buffer
            stored = imagecodecs.htj2k_decode(bodies[number], skipres=skipped, out=place)
            if verify:
                imagecodecs.deflate_crc32(stored)
            if intercept is not None:
                np.add(stored, intercept, out=row, dtype=np.float32)

    with ThreadPoolExecutor(threads) as pool:
        start = time.perf_counter()
        for done in [pool.submit(share) for _ in range(threads)]:
            done.result()
        return time.perf_counter() - start
