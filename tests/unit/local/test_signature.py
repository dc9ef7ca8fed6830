"""Signatures against botocore's own signer: what it signs passes, anything altered since does not."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any
from urllib.parse import quote, urlsplit

import boto3
import pytest
from botocore.auth import SigV4Auth, SigV4QueryAuth
from botocore.awsrequest import AWSRequest
from botocore.config import Config
from botocore.credentials import Credentials
from hypothesis import given, settings
from hypothesis import strategies as st
from test_protocol import FULL, IMAGE_SET_ARN, MINIMAL, OPERATIONS, Client, boto3_name

from ahi_ml.local.protocol import HttpRequest, Protocol, ServiceFault
from ahi_ml.local.signature import Verifier

KEY, SECRET = "AKIDEXAMPLE", "wJalrXUtnFEMI/K7MDENG+bPxRfiCY"
REGION = "us-east-1"
SENT = {name: Client().request(name, FULL[name]) for name in OPERATIONS}


def verifier(**options: Any) -> Verifier:
    # Requests are signed when the module is loaded; a long test run must not make them expire.
    return Verifier({"OTHER": "other", KEY: SECRET}, REGION, **(options or {"max_skew_s": 86_400}))


def refuse(request: HttpRequest, **options: Any) -> ServiceFault:
    with pytest.raises(ServiceFault) as caught:
        verifier(**options).verify(request)
    assert caught.value.status == 403
    assert SECRET not in caught.value.text
    return caught.value


def with_headers(request: HttpRequest, **changes: str | None) -> HttpRequest:
    headers = {name: text for name, text in request.headers.items() if name.replace("-", "_") not in changes}
    added = {name.replace("_", "-"): text for name, text in changes.items() if text is not None}
    return replace(request, headers=headers | added)


def sign(
    method: str = "GET",
    path: str = "/datastore",
    query: str = "",
    body: bytes = b"",
    *,
    headers: dict[str, str] | None = None,
    credentials: tuple[str, str, str | None] = (KEY, SECRET, None),
    scope: tuple[str, str] = ("medical-imaging", REGION),
    signer: type[SigV4Auth] = SigV4Auth,
) -> HttpRequest:
    """Sign a request with botocore as if its URL had been typed exactly so."""
    url = f"http://127.0.0.1:8080{path}" + (f"?{query}" if query else "")
    request = AWSRequest(method, url, headers or {}, body)
    signer(Credentials(*credentials), *scope).add_auth(request)
    parts = urlsplit(request.url)
    names = {name.lower(): text for name, text in request.headers.items()}
    return HttpRequest(method, parts.path, parts.query, {"host": "127.0.0.1:8080"} | names, body)


class Past(SigV4Auth):
    def _modify_request_before_signing(self, request: Any) -> None:
        request.context["timestamp"] = "20200101T000000Z"
        super()._modify_request_before_signing(request)


class WithoutHost(SigV4Auth):
    def headers_to_sign(self, request: Any) -> Any:
        headers = super().headers_to_sign(request)
        del headers["host"]
        return headers


class Unsorted(SigV4Auth):
    def canonical_headers(self, headers_to_sign: Any) -> str:
        return "\n".join(reversed(super().canonical_headers(headers_to_sign).split("\n")))

    def signed_headers(self, headers_to_sign: Any) -> str:
        return ";".join(reversed(super().signed_headers(headers_to_sign).split(";")))


SAMPLE = sign("POST", "/tags/arn%3Aaws%2Fx", "a=1&b=%2F", b'{"x": 1}', headers={"X-Amz-Meta": "two  words"})
MOMENT = datetime.strptime(SAMPLE.headers["x-amz-date"], "%Y%m%dT%H%M%SZ").replace(tzinfo=UTC).timestamp()


@pytest.mark.parametrize("params", [FULL, MINIMAL], ids=["full", "minimal"])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_requests_of_boto3_pass(operation: str, params: dict[str, Any]) -> None:
    assert verifier().verify(Client().request(operation, params[operation])) == KEY


@pytest.mark.parametrize("path", [quote(IMAGE_SET_ARN, safe=""), quote(IMAGE_SET_ARN, safe="/"), IMAGE_SET_ARN])
def test_arn_in_path_in_any_encoding(path: str) -> None:
    assert verifier().verify(sign("GET", f"/tags/{path}")) == KEY


@pytest.mark.parametrize(
    "path",
    ["/", "//", "/.", "/..", "/a//b", "/a/./b", "/a/../b", "/a/..", "/../a", "/a/b/", "/a//", "/.a/b..", "/a/.../b"],
)
def test_segments_that_say_nothing_are_not_signed(path: str) -> None:
    assert verifier().verify(sign("GET", path)) == KEY
    assert refuse(replace(sign("GET", path), raw_path="/c")).code == "InvalidSignatureException"


@pytest.mark.parametrize(
    "query",
    [
        "nextToken=a%2Bb%3D%2F%20c",
        "b=2&a=1",
        "a=2&a=1&a=10",
        "empty&a=",
        "a-b=1&a=1&aB=1&a_b=~.-_",
        "%C3%A9=%F0%9F%99%82",
    ],
)
def test_queries(query: str) -> None:
    assert verifier().verify(sign("GET", query=query)) == KEY


def test_query_is_signed_by_meaning() -> None:
    # Signers that escape by their own lights still sign the canonical form.
    signed = sign("GET", query="nextToken=a%2Fb~")
    assert verifier().verify(replace(signed, query="nextToken=a/b%7e")) == KEY


@given(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=20),
    st.dictionaries(
        st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=5),
        st.text(st.characters(exclude_categories=["Cs"]), max_size=9),
        max_size=4,
    ),
    st.binary(max_size=50),
)
@settings(max_examples=200, deadline=None)
def test_whatever_botocore_signs_passes(label: str, query: dict[str, str], body: bytes) -> None:
    path = "/tags/x" + quote(label, safe="-_~")  # dots out: botocore resolves dot segments before it signs
    path = path.replace(".", "%2E")
    text = "&".join(f"{quote(key, safe='')}={quote(value, safe='')}" for key, value in query.items())
    assert verifier().verify(sign("POST", path, text, body)) == KEY


def test_passes_over_a_socket() -> None:
    """Verify what really stands on the wire, after the HTTP client had its hands on it."""
    seen: list[HttpRequest] = []

    class Handler(BaseHTTPRequestHandler):
        def answer(self) -> None:
            body = self.rfile.read(int(self.headers.get("content-length", 0)))
            path, _, query = self.path.partition("?")
            headers = {name.lower(): text for name, text in self.headers.items()}
            seen.append(HttpRequest(self.command, path, query, headers, body))
            self.send_response(200)
            self.send_header("content-length", "2")
            self.end_headers()
            self.wfile.write(b"{}")

        do_GET = do_POST = do_DELETE = answer

        def log_message(self, *_: Any) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        client = boto3.client(
            "medical-imaging",
            region_name=REGION,
            endpoint_url=f"http://127.0.0.1:{server.server_port}",
            aws_access_key_id=KEY,
            aws_secret_access_key=SECRET,
            config=Config(inject_host_prefix=False),
        )
        for operation in OPERATIONS:
            getattr(client, boto3_name(client, operation))(**FULL[operation])
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
    protocol = Protocol()
    for operation, request in zip(OPERATIONS, seen, strict=True):
        assert verifier().verify(request) == KEY
        assert protocol.parse(request).params == FULL[operation]


def flips(text: str) -> Iterator[str]:
    """Flip each character of a text in turn, within printable ASCII."""
    for place, char in enumerate(text):
        flipped = chr(ord(char) ^ 1)
        yield text[:place] + (flipped if flipped.isprintable() else "!") + text[place + 1 :]


def altered(request: HttpRequest) -> Iterator[tuple[str, HttpRequest]]:
    for text in flips(request.method):
        yield "method", replace(request, method=text)
    for text in flips(request.raw_path):
        yield "path", replace(request, raw_path=text)
    for text in flips(request.query):
        yield "query", replace(request, query=text)
    for place in range(len(request.body)):
        body = bytearray(request.body)
        body[place] ^= 0x20
        yield "body", replace(request, body=bytes(body))
    yield "body", replace(request, body=request.body + b" ")
    signed = request.headers["authorization"].partition("SignedHeaders=")[2].partition(",")[0].split(";")
    for name in [*signed, "authorization"]:
        for text in flips(request.headers[name]):
            yield name, replace(request, headers={**request.headers, name: text})
        others = {each: text for each, text in request.headers.items() if each != name}
        yield f"no {name}", replace(request, headers=others)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_nothing_can_be_altered(operation: str) -> None:
    request = SENT[operation]
    judge = verifier()
    assert judge.verify(request) == KEY
    accepted = []
    for what, other in altered(request):
        try:
            judge.verify(other)
        except ServiceFault as fault:
            refused = fault.status == 403
        else:
            refused = False
        if not refused:
            accepted.append((what, other))
    assert accepted == []


@given(st.sampled_from(OPERATIONS), st.data())
@settings(max_examples=300, deadline=None)
def test_any_authorization_is_verified_or_refused(operation: str, data: st.DataObject) -> None:
    good = SENT[operation].headers["authorization"]
    start = data.draw(st.integers(0, len(good)))
    text = good[:start] + data.draw(st.text(max_size=20)) + good[start + data.draw(st.integers(0, 30)) :]
    date = data.draw(st.just(SENT[operation].headers["x-amz-date"]) | st.text(max_size=16))
    request = with_headers(SENT[operation], authorization=text, x_amz_date=date)
    if (text, date) != (good, SENT[operation].headers["x-amz-date"]):
        refuse_or_same(request, good)


def refuse_or_same(request: HttpRequest, good: str) -> None:
    try:
        verifier().verify(request)
    except ServiceFault as fault:
        outcome = fault.status
    else:
        outcome = 200
    blanks = str.maketrans("", "", " \t")  # they carry no meaning
    same = request.headers["authorization"].translate(blanks) == good.translate(blanks)
    assert outcome == 403 or same


@given(st.text(max_size=30), st.text(max_size=30), st.text(max_size=30))
@settings(max_examples=200, deadline=None)
def test_odd_text_is_refused(path: str, query: str, value: str) -> None:
    odd = replace(with_headers(SAMPLE, host=value + "\ud800"), raw_path="/\ud800" + path, query="\udfff" + query)
    refuse(odd)


def test_unsigned_and_malformed() -> None:
    assert refuse(with_headers(SAMPLE, authorization=None)).code == "MissingAuthenticationTokenException"
    good = SAMPLE.headers["authorization"]
    for text in (
        "Basic YTpi",
        "AWS4-HMAC-SHA256",
        good.replace("AWS4-HMAC-SHA256", "AWS4-HMAC-SHA512"),
        good.replace("Signature=", "Sig="),
        good.partition(", Signature")[0],
        good + ", Signature=" + "0" * 64,
        good + ", Extra=1",
        good.replace("/aws4_request", ""),
        good.replace("/medical", "/x/medical"),
    ):
        assert refuse(with_headers(SAMPLE, authorization=text)).code == "IncompleteSignatureException", text
    for date in (None, "", "yesterday", "20240230T000000Z", SAMPLE.headers["x-amz-date"][:-1] + "z"):
        request = with_headers(SAMPLE, x_amz_date=date)
        if date and date.startswith("2024"):
            scoped = good.replace(SAMPLE.headers["x-amz-date"][:8], "20240230")
            request = with_headers(request, authorization=scoped)
        assert refuse(request).code == "IncompleteSignatureException"


def test_blanks_between_parameters_are_optional() -> None:
    tight = SAMPLE.headers["authorization"].replace(", ", ",")
    assert verifier().verify(with_headers(SAMPLE, authorization=tight)) == KEY


class Presigned(SigV4QueryAuth):
    """Leaves the body out of the query, where botocore would move it as if it were a form."""

    def __init__(self, *given: Any) -> None:
        super().__init__(*given, expires=900)

    def add_auth(self, request: Any) -> None:
        self._hash = hashlib.sha256(request.data).hexdigest()
        request.data = b""
        super().add_auth(request)

    def payload(self, request: Any) -> str:
        return self._hash


def test_presigned_requests_pass() -> None:
    body = json.dumps({"imageFrameId": "0" * 32}).encode()
    request = sign("POST", "/datastore/x/imageSet/y/getImageFrame", "version=1", body, signer=Presigned)
    assert "authorization" not in request.headers
    assert verifier().verify(request) == KEY
    for altered in (
        replace(request, body=body + b" "),
        replace(request, method="GET"),
        replace(request, raw_path="/datastore/x/imageSet/z/getImageFrame"),
        replace(request, query=request.query.replace("version=1", "version=2")),
        replace(request, query=request.query + "&more=1"),
        replace(request, query=request.query.replace("X-Amz-Expires=900", "X-Amz-Expires=901")),
        with_headers(request, host="127.0.0.1:8081"),
    ):
        assert refuse(altered).code == "InvalidSignatureException"


def test_presigned_requests_expire() -> None:
    request = sign(signer=Presigned)
    stamp = re.search("X-Amz-Date=([^&]*)", request.query)
    assert stamp is not None
    signed = datetime.strptime(stamp[1], "%Y%m%dT%H%M%SZ").replace(tzinfo=UTC).timestamp()
    assert verifier(clock=lambda: signed + 899).verify(request) == KEY
    late = refuse(request, clock=lambda: signed + 901)
    assert (late.code, late.status) == ("InvalidSignatureException", 403)
    assert late.text.startswith("Signature expired: ")
    assert refuse(request, clock=lambda: signed - 301).text.startswith("Signature not yet current: ")
    for wrong in ("0", "-1", "604801", "1e3", "", "9" * 5_000):
        other = replace(request, query=request.query.replace("X-Amz-Expires=900", f"X-Amz-Expires={wrong}"))
        assert refuse(other).code == "IncompleteSignatureException"


def test_presigned_requests_say_all_of_it_once() -> None:
    query = sign(signer=Presigned).query
    for name in ("Algorithm", "Credential", "Date", "SignedHeaders"):
        without = replace(SAMPLE, headers={"host": "h"}, query=query.replace(f"X-Amz-{name}=", "Other="))
        assert f"'X-Amz-{name}'" in refuse(without).text
    repeated = replace(SAMPLE, headers={"host": "h"}, query=f"{query}&X-Amz-Algorithm=AWS4-HMAC-SHA256")
    assert refuse(repeated).code == "IncompleteSignatureException"
    unknown = replace(SAMPLE, headers={"host": "h"}, query=query.replace(KEY, "AKIAOTHER"))
    assert refuse(unknown).code == "UnrecognizedClientException"


def test_signed_headers_are_bytes() -> None:
    """What is signed of a header are the bytes that are sent, whatever they mean."""
    name = "modalit\N{LATIN SMALL LETTER A WITH GRAVE}"  # its second byte would be a blank in Latin-1
    signed = sign(headers={"X-Amz-Meta": name})
    as_sent = with_headers(signed, x_amz_meta=name.encode().decode("latin-1"))
    assert verifier().verify(as_sent) == KEY


def test_a_query_is_bytes() -> None:
    once = sign(query="nextToken=%FF%FE")
    assert verifier().verify(once) == KEY


def test_a_claim_is_read_before_the_body() -> None:
    request = sign("POST", body=b"{}")
    claim = verifier().claim(replace(request, body=b""))
    verifier().confirm(claim, request)
    with pytest.raises(ServiceFault):
        verifier().confirm(claim, replace(request, body=b"{} "))


def test_unknown_keys_and_session_tokens() -> None:
    assert refuse(sign(credentials=("NOBODY", SECRET, None))).code == "UnrecognizedClientException"
    fault = refuse(sign(credentials=(KEY, SECRET, "token")))
    assert fault.code == "UnrecognizedClientException"
    assert "AWS_SESSION_TOKEN" in fault.text
    assert refuse(sign(credentials=(KEY, "wrong", None))).code == "InvalidSignatureException"
    assert refuse(sign(credentials=("OTHER", SECRET, None))).code == "InvalidSignatureException"


@pytest.mark.parametrize(
    ("scope", "text"),
    [
        (("medical-imaging", "eu-west-1"), "use 'us-east-1'"),
        (("s3", REGION), "correct service: 'medical-imaging'"),
    ],
)
def test_scope(scope: tuple[str, str], text: str) -> None:
    fault = refuse(sign(scope=scope))
    assert fault.code == "InvalidSignatureException"
    assert text in fault.text


def test_date_and_end_of_scope() -> None:
    good = SAMPLE.headers["authorization"]
    moved = with_headers(SAMPLE, authorization=good.replace(f"/{SAMPLE.headers['x-amz-date'][:8]}/", "/20200101/"))
    assert "Date in Credential scope" in refuse(moved).text
    ended = with_headers(SAMPLE, authorization=good.replace("aws4_request", "aws4_response"))
    assert "terminator" in refuse(ended).text


def test_age() -> None:
    for seconds in (-300, 0, 300):
        assert verifier(clock=lambda seconds=seconds: MOMENT + seconds).verify(SAMPLE) == KEY
    stamp = SAMPLE.headers["x-amz-date"]
    late = refuse(SAMPLE, clock=lambda: MOMENT + 301)
    assert late.code == "InvalidSignatureException"
    assert late.text.startswith(f"Signature expired: {stamp} is now earlier than ")
    assert late.text.endswith(" - 5 min.)")
    early = refuse(SAMPLE, clock=lambda: MOMENT - 301)
    assert early.text.startswith(f"Signature not yet current: {stamp} is still later than ")
    assert early.text.endswith(" + 5 min.)")
    assert verifier(clock=lambda: MOMENT + 3600, max_skew_s=3600).verify(SAMPLE) == KEY


def test_signed_headers() -> None:
    good = SAMPLE.headers["authorization"]
    names = "host;x-amz-date;x-amz-meta"
    assert f"SignedHeaders={names}," in good
    for other in (
        "x-amz-date;x-amz-meta",
        "x-amz-date;host;x-amz-meta",
        f"host;{names}",
        f"absent;{names}",
        "host",
    ):
        fault = refuse(with_headers(SAMPLE, authorization=good.replace(names, other)))
        assert fault.code == "InvalidSignatureException"
    assert "'Host' must be" in refuse(sign(signer=WithoutHost)).text
    assert "sorted" in refuse(sign(signer=Unsorted)).text
    added = refuse(with_headers(SAMPLE, x_amz_extra="1"))
    assert "not signed" in added.text
    assert verifier().verify(with_headers(SAMPLE, user_agent="any", x_amzn_trace_id="any")) == KEY
    assert verifier().verify(with_headers(SAMPLE, x_amz_meta=" two \t words ")) == KEY


def test_hash_of_the_body_is_computed() -> None:

    body = json.dumps({"a": "é"}).encode()
    right = hashlib.sha256(body).hexdigest()
    good = sign("POST", body=body, headers={"X-Amz-Content-SHA256": right})
    assert verifier().verify(good) == KEY
    for claimed in (
        "UNSIGNED-PAYLOAD",
        "STREAMING-AWS4-HMAC-SHA256-PAYLOAD",
        hashlib.sha256(b"").hexdigest(),
        "",
    ):
        fault = refuse(sign("POST", body=body, headers={"X-Amz-Content-SHA256": claimed}))
        assert fault.code == "InvalidSignatureException"
    fault = refuse(replace(good, body=body + b" "))
    assert fault.code == "InvalidSignatureException"


def test_signing_key_follows_secret_and_date() -> None:
    keys = {KEY: SECRET}
    now = [MOMENT]
    judge = Verifier(keys, REGION, clock=lambda: now[0], max_skew_s=1e9)
    for request in (SAMPLE, sign(signer=Past), SAMPLE):
        assert judge.verify(request) == KEY
    keys[KEY] = "rotated"
    with pytest.raises(ServiceFault):
        judge.verify(SAMPLE)
    assert judge.verify(sign(credentials=(KEY, "rotated", None))) == KEY
    del keys[KEY]
    with pytest.raises(ServiceFault):
        judge.verify(SAMPLE)


def test_secrets_stay_out_of_repr() -> None:
    judge = verifier()
    judge.verify(SAMPLE)
    assert SECRET not in repr(judge)
