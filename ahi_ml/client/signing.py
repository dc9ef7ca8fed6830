"""SigV4 for one request shape, GetImageFrame: the same bytes botocore's signer makes, in microseconds.

Everything about credentials, their refresh included, stays botocore's; what is derived from them once
a day is kept.
"""

from __future__ import annotations

import hmac
import json
import time
from collections.abc import Callable
from hashlib import sha256
from typing import Any
from urllib.parse import quote

__all__ = ["FrameSigner"]

_SERVICE = "medical-imaging"
_CONTENT_TYPE = "application/json"


class FrameSigner:
    """Signs GetImageFrame requests.

    I/O: none, but for the refresh of temporary credentials by botocore.

    Parameters
    ----------
    credentials : botocore credentials
        Asked for frozen values at each request, which refreshes them when due.
    region : str
        Of the credential scope.
    host : str
        Value of the Host header, with its port unless that is the scheme's own.
    clock : callable
        Seconds since the epoch.
    """

    def __init__(self, credentials: Any, region: str, host: str, *, clock: Callable[[], float] = time.time) -> None:
        self._credentials = credentials
        self._region = region
        self._host = host
        self._clock = clock
        self._derived: tuple[str, str, bytes] = ("", "", b"")
        self._stamped: tuple[int, str] = (-1, "")

    def body(self, frame_id: str) -> bytes:
        """The body of the request. I/O: none."""
        return json.dumps({"imageFrameId": frame_id}).encode()

    def headers(self, path: str, body: bytes) -> list[str]:
        """Header lines of a signed request, Host excepted (the HTTP library sends it).

        Parameters
        ----------
        path : str
            As it is sent, percent-encoded.
        body : bytes
            What is sent.
        """
        frozen = self._credentials.get_frozen_credentials()
        stamp = self._stamp()
        date = stamp[:8]
        names = "content-type;host;x-amz-date"
        canonical = f"content-type:{_CONTENT_TYPE}\nhost:{self._host}\nx-amz-date:{stamp}\n"
        lines = [f"Content-Type: {_CONTENT_TYPE}", f"X-Amz-Date: {stamp}"]
        if frozen.token:
            names += ";x-amz-security-token"
            canonical += f"x-amz-security-token:{frozen.token}\n"
            lines.append(f"X-Amz-Security-Token: {frozen.token}")
        request = f"POST\n{quote(path, safe='/~')}\n\n{canonical}\n{names}\n{sha256(body).hexdigest()}"
        scope = f"{date}/{self._region}/{_SERVICE}/aws4_request"
        text = f"AWS4-HMAC-SHA256\n{stamp}\n{scope}\n{sha256(request.encode()).hexdigest()}"
        signature = hmac.digest(self._key(frozen.secret_key, date), text.encode(), "sha256").hex()
        lines.append(
            f"Authorization: AWS4-HMAC-SHA256 Credential={frozen.access_key}/{scope}, "
            f"SignedHeaders={names}, Signature={signature}"
        )
        return lines

    def _stamp(self) -> str:
        second = int(self._clock())
        if self._stamped[0] != second:
            self._stamped = (second, time.strftime("%Y%m%dT%H%M%SZ", time.gmtime(second)))
        return self._stamped[1]

    def _key(self, secret: str, date: str) -> bytes:
        if self._derived[:2] != (secret, date):
            key = f"AWS4{secret}".encode()
            for part in (date, self._region, _SERVICE, "aws4_request"):
                key = hmac.digest(key, part.encode(), "sha256")
            self._derived = (secret, date, key)
        return self._derived[2]
