"""AWS Signature Version 4 seen from the server, beside the floors: is this request from who it says?

Requests signed with long-lived keys, in a header as SDKs do or in the query (presigned URLs). Everything is
computed from the request itself: what a client says about its own body or query is never believed.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import NoReturn
from urllib.parse import quote, unquote, unquote_to_bytes

from ahi_ml.local.protocol import HttpRequest, ServiceFault

__all__ = ["Claim", "Verifier"]

_ALGORITHM = "AWS4-HMAC-SHA256"
_EMPTY_SHA256 = hashlib.sha256(b"").hexdigest()
_STAMP = re.compile(r"[0-9]{8}T[0-9]{6}Z")
_STAMP_FORMAT = "%Y%m%dT%H%M%SZ"
_SIGNATURE = re.compile(r"[0-9a-f]{64}")
_BLANK = " \t\r\n\f\v"  # str.split would take bytes of UTF-8 for blanks, as headers are read as Latin-1
_BLANKS = re.compile(r"[ \t\r\n\f\v]+")
_EXPIRES = re.compile(r"[0-9]{1,9}")
_SIGNED_IN_QUERY = "X-Amz-Signature="
_LONGEST_PRESIGNED_S = 604_800
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


def _split_query(query: str) -> dict[str, str]:
    fields: dict[str, str] = {}
    for pair in query.split("&"):
        name, _, text = pair.partition("=")
        name = unquote(name)
        if name.startswith("X-Amz-"):
            if name in fields:
                _incomplete("AWS query-string parameters must not repeat")
            fields[name] = unquote(text)
    for name in ("X-Amz-Algorithm", "X-Amz-Credential", "X-Amz-SignedHeaders", "X-Amz-Signature", "X-Amz-Date"):
        if not fields.get(name):
            _incomplete(f"AWS query-string parameters must include '{name}'")
    if fields["X-Amz-Algorithm"] != _ALGORITHM:
        _incomplete(f"AWS query-string parameters require the algorithm {_ALGORITHM}")
    return fields


def _plain_path(path: str) -> str:
    """A path without empty and dot segments, as signers write it. They may send it with them all the same."""
    if "//" not in path and "/." not in path:
        return path
    kept: list[str] = []
    for part in path.split("/"):
        if part == "..":
            del kept[-1:]
        elif part not in ("", "."):
            kept.append(part)
    return f"/{'/'.join(kept)}{'/' if kept and path.endswith('/') else ''}"


def _encode(text: str) -> str:
    """Encode part of a query anew, by its bytes: they need not be any encoding's."""
    return quote(unquote_to_bytes(text.encode("utf-8", "surrogatepass")), safe="")


def _canonical_query(query: str) -> str:
    if not query:
        return ""
    pairs = [(key, value) for key, _, value in (pair.partition("=") for pair in query.split("&"))]
    if not _PLAIN_QUERY.fullmatch(query):
        pairs = [(_encode(key), _encode(value)) for key, value in pairs]
    return "&".join(f"{key}={value}" for key, value in sorted(pairs))


def _canonical_request(request: HttpRequest, query: str, names: Sequence[str], payload_hash: str) -> str:
    lines = [f"{name}:{_BLANKS.sub(' ', request.headers[name].strip(_BLANK))}\n" for name in names]
    path = quote(_plain_path(request.raw_path), safe="/", errors="surrogatepass")
    return f"{request.method}\n{path}\n{_canonical_query(query)}\n{''.join(lines)}\n{';'.join(names)}\n{payload_hash}"


def _digest(key: bytes, text: str) -> bytes:
    return hmac.digest(key, text.encode(), "sha256")


@dataclass(frozen=True, slots=True)
class Claim:
    """What a request says about who signed it, not confirmed yet.

    Parameters
    ----------
    key_id : str
        A key that is known, so far without proof.
    scope : tuple of str
        Date, region, service and terminator of the credential.
    stamp : str
        When it was signed.
    names : list of str
        The headers that are signed.
    signature : str
        Hexadecimal.
    query : str
        The query as far as it is signed.
    """

    key_id: str
    scope: tuple[str, ...]
    stamp: str
    names: list[str]
    signature: str
    query: str


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
        but in S3, and without empty and dot segments. What gets routed is the path with them: no parameter in
        a path may be or hold one, so that it is no other request than was signed.

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
            Of `claim` and of `confirm`.
        """
        claim = self.claim(request)
        self.confirm(claim, request)
        return claim.key_id

    def claim(self, request: HttpRequest) -> Claim:
        """Read who is said to have signed a request; its body need not be there yet. I/O: none.

        Raises
        ------
        ServiceFault
            Status 403. MissingAuthenticationTokenException: not signed. IncompleteSignatureException:
            malformed. UnrecognizedClientException: unknown key, or a session token.
            InvalidSignatureException: too old or too new, or scoped to something else.
        """
        headers, query, lasts = request.headers, request.query, None
        if authorization := headers.get("authorization"):
            fields = _split_authorization(authorization)
            credential, signed, signature = fields["Credential"], fields["SignedHeaders"], fields["Signature"]
            stamp, token = headers.get("x-amz-date", ""), headers.get("x-amz-security-token")
        elif _SIGNED_IN_QUERY in query:
            fields = _split_query(query)
            credential, signed = fields["X-Amz-Credential"], fields["X-Amz-SignedHeaders"]
            stamp, signature = fields["X-Amz-Date"], fields["X-Amz-Signature"]
            token = fields.get("X-Amz-Security-Token") or headers.get("x-amz-security-token")
            query = "&".join(pair for pair in query.split("&") if not pair.startswith(_SIGNED_IN_QUERY))
            lasts = self._validity(fields.get("X-Amz-Expires"))
        else:
            _refuse("MissingAuthenticationTokenException", "Missing Authentication Token")
        if not _STAMP.fullmatch(stamp):
            _incomplete("A signature requires existence of an 'X-Amz-Date' header in ISO 8601 basic format")
        key_id, *scope = credential.split("/")
        if len(scope) != 4:
            _incomplete("Credential must have the form KEY/DATE/REGION/SERVICE/aws4_request")
        if key_id not in self._keys:
            _refuse("UnrecognizedClientException", "The security token included in the request is invalid.")
        if token:
            # These keys come without sessions, so a token is a leftover of other credentials.
            _refuse(
                "UnrecognizedClientException",
                "The security token included in the request is invalid. This data store issues no session "
                "tokens: unset AWS_SESSION_TOKEN.",
            )
        self._check_scope(scope, stamp)
        self._check_age(stamp, self._max_skew_s if lasts is None else lasts)
        names = signed.split(";")
        self._check_signed_headers(names, headers)
        return Claim(key_id, tuple(scope), stamp, names, signature, query)

    def confirm(self, claim: Claim, request: HttpRequest) -> None:
        """Return when a claim about a request, now with its whole body, is true. I/O: none.

        Raises
        ------
        ServiceFault
            InvalidSignatureException: it is not.
        """
        body_hash = hashlib.sha256(request.body).hexdigest() if request.body else _EMPTY_SHA256
        if request.headers.get("x-amz-content-sha256", body_hash) != body_hash:
            _invalid("The body does not have the SHA-256 of the 'X-Amz-Content-SHA256' header; it must be signed")
        canonical = _canonical_request(request, claim.query, claim.names, body_hash)
        # Headers are Latin-1 here to be the bytes that were sent; what is none of it was never sent.
        canonical_hash = hashlib.sha256(canonical.encode("latin-1", "replace")).hexdigest()
        text = f"{_ALGORITHM}\n{claim.stamp}\n{'/'.join(claim.scope)}\n{canonical_hash}"
        key = self._signing_key(claim.key_id, self._keys[claim.key_id], claim.scope[0])
        if not _SIGNATURE.fullmatch(claim.signature) or not hmac.compare_digest(
            _digest(key, text).hex(), claim.signature
        ):
            _invalid()

    def _validity(self, expires: str | None) -> float:
        """How long a request signed in its query may be sent, in seconds."""
        if expires is None:
            return self._max_skew_s
        if not _EXPIRES.fullmatch(expires) or not 0 < int(expires) <= _LONGEST_PRESIGNED_S:
            _incomplete(f"'X-Amz-Expires' must be a number of seconds up to {_LONGEST_PRESIGNED_S}")
        return float(expires)

    def _check_scope(self, scope: list[str], stamp: str) -> None:
        date, region, service, terminator = scope
        if region != self._region:
            _invalid(f"Credential should be scoped to a valid region, not this one: use '{self._region}'.")
        if service != self._service:
            _invalid(f"Credential should be scoped to correct service: '{self._service}'.")
        if terminator != "aws4_request":
            _invalid("Credential should be scoped with a valid terminator: 'aws4_request'.")
        if date != stamp[:8]:
            _invalid("Date in Credential scope does not match YYYYMMDD from ISO-8601 version of date from HTTP.")

    def _check_age(self, stamp: str, lasts: float) -> None:
        now, skew = self._clock(), self._max_skew_s
        try:
            then = datetime.fromisoformat(stamp).timestamp()
        except ValueError:
            _incomplete("'X-Amz-Date' is not a date")
        if now - lasts <= then <= now + skew:
            return
        if then < now:
            limit, relation, span = now - lasts, "expired: {} is now earlier than", f"- {lasts / 60:g}"
        else:
            limit, relation, span = now + skew, "not yet current: {} is still later than", f"+ {skew / 60:g}"
        _invalid(f"Signature {relation.format(stamp)} {_stamp(limit)} ({_stamp(now)} {span} min.)")

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
