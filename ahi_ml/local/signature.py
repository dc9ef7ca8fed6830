"""AWS Signature Version 4 seen from the server, beside the floors: is this request from who it says?

Header-signed requests with long-lived keys only, as SDKs send them. Everything is computed from the request
itself: what a client says about its own body or query is never believed.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import NoReturn
from urllib.parse import quote, unquote

from ahi_ml.local.protocol import HttpRequest, ServiceFault

__all__ = ["Verifier"]

_ALGORITHM = "AWS4-HMAC-SHA256"
_EMPTY_SHA256 = hashlib.sha256(b"").hexdigest()
_STAMP = re.compile(r"[0-9]{8}T[0-9]{6}Z")
_STAMP_FORMAT = "%Y%m%dT%H%M%SZ"
_SIGNATURE = re.compile(r"[0-9a-f]{64}")
_PLAIN_QUERY = re.compile(r"[A-Za-z0-9_.~=&-]*")
_MISMATCH = (
    "The request signature we calculated does not match the signature you provided. "
    "Check your AWS Secret Access Key and signing method."
)


def _refuse(code: str, text: str) -> NoReturn:
    raise ServiceFault(code, text, 403)


def _incomplete(text: str) -> NoReturn:
    _refuse("IncompleteSignatureException", text)


def _invalid(text: str = _MISMATCH) -> NoReturn:
    _refuse("InvalidSignatureException", text)


def _split_authorization(value: str) -> dict[str, str]:
    algorithm, _, rest = value.strip(" \t").partition(" ")
    if algorithm != _ALGORITHM:
        _incomplete(f"Authorization header requires the algorithm {_ALGORITHM}")
    fields: dict[str, str] = {}
    for part in rest.split(","):
        name, equals, text = part.strip(" \t").partition("=")
        if not equals or name in fields:
            _incomplete("Authorization header is malformed")
        fields[name] = text
    for name in ("Credential", "SignedHeaders", "Signature"):
        if not fields.get(name):
            _incomplete(f"Authorization header requires '{name}' parameter")
    if len(fields) != 3:
        _incomplete("Authorization header has parameters it must not have")
    return fields


def _encode(text: str, safe: str = "") -> str:
    # Lone surrogates are encoded as they stand: they never match a signature, and must not raise either.
    return quote(text, safe=safe, errors="surrogatepass")


def _canonical_query(query: str) -> str:
    if not query:
        return ""
    pairs = [(key, value) for key, _, value in (pair.partition("=") for pair in query.split("&"))]
    if not _PLAIN_QUERY.fullmatch(query):
        pairs = [(_encode(unquote(key)), _encode(unquote(value))) for key, value in pairs]
    return "&".join(f"{key}={value}" for key, value in sorted(pairs))


def _canonical_request(request: HttpRequest, names: list[str], payload_hash: str) -> str:
    lines = [f"{name}:{' '.join(request.headers[name].split())}\n" for name in names]
    return (
        f"{request.method}\n{_encode(request.raw_path, '/')}\n{_canonical_query(request.query)}\n"
        f"{''.join(lines)}\n{';'.join(names)}\n{payload_hash}"
    )


def _digest(key: bytes, text: str) -> bytes:
    return hmac.digest(key, text.encode("utf-8", "surrogatepass"), "sha256")


class Verifier:
    """Verifies the signatures of requests. Caches one signing key per access key; safe in any thread.

    I/O: none.

    Parameters
    ----------
    keys : mapping of str to str
        Secret access key of each access key id. Read at each request, so that keys can be added.
    region : str
        Region that credentials must be scoped to.
    service : str, optional
        Signing name that credentials must be scoped to.
    clock : callable, optional
        Seconds since the epoch.
    max_skew_s : float, optional
        How far the time of a request may lie from the clock, either way.
    """

    def __init__(
        self,
        keys: Mapping[str, str],
        region: str,
        service: str = "medical-imaging",
        *,
        clock: Callable[[], float] = time.time,
        max_skew_s: float = 300,
    ) -> None:
        self._keys = keys
        self._region = region
        self._service = service
        self._clock = clock
        self._max_skew_s = max_skew_s
        self._signing_keys: dict[str, tuple[str, str, bytes]] = {}  # by id: date, secret, key

    def __repr__(self) -> str:
        return f"Verifier({len(self._keys)} keys, region={self._region!r}, service={self._service!r})"

    def verify(self, request: HttpRequest) -> str:
        """Return the access key id that signed a request.

        The canonical path is the path as sent, encoded once more (``%3A`` becomes ``%253A``), as everywhere
        but in S3. Dot segments are not resolved: what was signed is what gets routed.

        I/O: none.

        Parameters
        ----------
        request : HttpRequest
            The request with its whole body.

        Returns
        -------
        str
            The access key id.

        Raises
        ------
        ServiceFault
            Status 403. MissingAuthenticationTokenException: not signed. IncompleteSignatureException:
            malformed or presigned. UnrecognizedClientException: unknown key, or a session token.
            InvalidSignatureException: too old or too new, scoped to something else, or not the signature.
        """
        headers = request.headers
        authorization = headers.get("authorization", "")
        if "X-Amz-Signature=" in request.query:
            _incomplete("Presigned requests are not accepted: sign with the Authorization header")
        if not authorization:
            _refuse("MissingAuthenticationTokenException", "Missing Authentication Token")
        fields = _split_authorization(authorization)
        stamp = headers.get("x-amz-date", "")
        if not _STAMP.fullmatch(stamp):
            _incomplete("Authorization header requires existence of an 'X-Amz-Date' header in ISO 8601 basic format")
        scope = fields["Credential"].split("/")
        if len(scope) != 5:
            _incomplete("Credential must have the form KEY/DATE/REGION/SERVICE/aws4_request")
        key_id = scope[0]
        secret = self._keys.get(key_id)
        if secret is None:
            _refuse("UnrecognizedClientException", "The security token included in the request is invalid.")
        if headers.get("x-amz-security-token"):
            # These keys come without sessions, so a token is a leftover of other credentials.
            _refuse(
                "UnrecognizedClientException",
                "The security token included in the request is invalid. This data store issues no session "
                "tokens: unset AWS_SESSION_TOKEN.",
            )
        self._check_scope(scope, stamp)
        self._check_age(stamp)
        names = fields["SignedHeaders"].split(";")
        self._check_signed_headers(names, headers)

        body_hash = hashlib.sha256(request.body).hexdigest() if request.body else _EMPTY_SHA256
        if headers.get("x-amz-content-sha256", body_hash) != body_hash:
            _invalid("The body does not have the SHA-256 of the 'X-Amz-Content-SHA256' header; it must be signed")
        canonical = _canonical_request(request, names, body_hash)
        canonical_hash = hashlib.sha256(canonical.encode("utf-8", "surrogatepass")).hexdigest()
        text = f"{_ALGORITHM}\n{stamp}\n{'/'.join(scope[1:])}\n{canonical_hash}"
        expected = _digest(self._signing_key(key_id, secret, scope[1]), text).hex()
        given = fields["Signature"]
        if not _SIGNATURE.fullmatch(given) or not hmac.compare_digest(expected, given):
            _invalid()
        return key_id

    def _check_scope(self, scope: list[str], stamp: str) -> None:
        _, date, region, service, terminator = scope
        if region != self._region:
            _invalid(f"Credential should be scoped to a valid region, not this one: use '{self._region}'.")
        if service != self._service:
            _invalid(f"Credential should be scoped to correct service: '{self._service}'.")
        if terminator != "aws4_request":
            _invalid("Credential should be scoped with a valid terminator: 'aws4_request'.")
        if date != stamp[:8]:
            _invalid("Date in Credential scope does not match YYYYMMDD from ISO-8601 version of date from HTTP.")

    def _check_age(self, stamp: str) -> None:
        now, skew = self._clock(), self._max_skew_s
        try:
            then = datetime.fromisoformat(stamp).timestamp()
        except ValueError:
            _incomplete("'X-Amz-Date' is not a date")
        if now - skew <= then <= now + skew:
            return
        expired = then < now
        limit = _stamp(now - skew if expired else now + skew)
        relation = "expired: {} is now earlier than" if expired else "not yet current: {} is still later than"
        sign = "-" if expired else "+"
        _invalid(f"Signature {relation.format(stamp)} {limit} ({_stamp(now)} {sign} {skew / 60:g} min.)")

    def _check_signed_headers(self, names: list[str], headers: Mapping[str, str]) -> None:
        if "host" not in names:
            _invalid("'Host' must be a 'SignedHeader' in the AWS Authorization.")
        if names != sorted(set(names)) or not all(name in headers for name in names):
            _invalid("SignedHeaders must be sorted, unique and present.")
        for name in headers:
            if name.startswith("x-amz-") and name not in names:
                _invalid("There were headers present in the request which were not signed: 'X-Amz-*'")

    def _signing_key(self, key_id: str, secret: str, date: str) -> bytes:
        cached = self._signing_keys.get(key_id)
        if cached is not None and cached[0] == date and cached[1] == secret:
            return cached[2]
        key = f"AWS4{secret}".encode()
        for text in (date, self._region, self._service, "aws4_request"):
            key = _digest(key, text)
        self._signing_keys[key_id] = (date, secret, key)
        return key


def _stamp(moment: float) -> str:
    return datetime.fromtimestamp(moment, UTC).strftime(_STAMP_FORMAT)
