"""What a connection of the embedded store bears of clients that nobody knows."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import uvicorn

from ahi_ml.local import connection
from ahi_ml.local.connection import BoundedConnection, make_room
from ahi_ml.local.server import CONNECTION

MOST = 8
CHUNKED = b"POST / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n"
Open = Callable[[], socket.socket]


async def echo(scope: Any, receive: Any, send: Any) -> None:
    """Answer the body; a request that names itself signed makes its connection known."""
    parts, more = [], True
    while more:
        message = await receive()
        parts.append(message.get("body", b""))
        more = message.get("more_body", False)
    body = b"".join(parts)
    scope[CONNECTION].known |= any(name == b"authorization" for name, _ in scope["headers"])
    headers = [(b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    config = uvicorn.Config(
        echo, http=BoundedConnection, limit_concurrency=MOST, ws="none", lifespan="off", log_config=None
    )
    server = uvicorn.Server(config)
    listener = socket.create_server(("127.0.0.1", 0))
    thread = threading.Thread(target=server.run, args=([listener],))
    thread.start()
    yield listener.getsockname()[1]
    server.should_exit = True
    thread.join()


@pytest.fixture
def connect(port: int) -> Iterator[Open]:
    opened: list[socket.socket] = []

    def run() -> socket.socket:
        opened.append(socket.create_connection(("127.0.0.1", port), timeout=10))
        return opened[-1]

    yield run
    for each in opened:
        each.close()


def answer(client: socket.socket) -> bytes:
    """What comes back: one answer, or nothing once the connection is cut."""
    found = b""
    try:
        while more := client.recv(2**16):
            found += more
            head, end, body = found.partition(b"\r\n\r\n")
            if end and b"content-length: %d\r\n" % len(body) in head + end:
                return body
    except ConnectionError:
        return b""
    return found


def get(client: socket.socket, *headers: bytes) -> bytes:
    client.sendall(b"\r\n".join([b"POST / HTTP/1.1", b"Host: h", b"Content-Length: 2", *headers, b"", b"ok"]))
    return answer(client)


def is_cut(client: socket.socket, piece: bytes, most: int = 2**27) -> bool:
    """Whether the server ends a connection before it took so many bytes in pieces."""
    sent = 0
    try:
        while sent < most:
            client.sendall(piece)
            sent += len(piece)
    except ConnectionError:
        return True
    return False


@pytest.mark.parametrize(
    ("start", "piece"),
    [
        pytest.param(b"GET /", b"x" * 2**16, id="path"),
        pytest.param(b"GET / HTTP/1.1\r\nA: ", b"x" * 2**16, id="header"),
        pytest.param(b"GET / HTTP/1.1\r\n", b"a: b\r\n" * 2**13, id="headers"),
        pytest.param(b"", b"\r\n" * 2**15, id="blank lines"),
        pytest.param(CHUNKED + b"1;", b"x" * 2**16, id="chunk extension"),
        pytest.param(CHUNKED, b"1\r\nx\r\n" * 2**13, id="chunks of one byte"),
        pytest.param(CHUNKED + b"0\r\nA: ", b"x" * 2**16, id="trailer"),
        pytest.param(CHUNKED + b"0\r\n", b"a: b\r\n" * 2**13, id="trailers"),
        pytest.param(CHUNKED, b"10000\r\n" + b"x" * 2**16 + b"\r\n", id="chunked body"),
        pytest.param(b"POST / HTTP/1.1\r\nContent-Length: 1000000000\r\n\r\n", b"x" * 2**16, id="body"),
    ],
)
def test_what_does_not_end_is_ended(connect: Open, start: bytes, piece: bytes) -> None:
    client = connect()
    client.sendall(start)
    assert is_cut(client, piece)
    assert get(connect()) == b"ok"


def test_long_requests_pass(connect: Open) -> None:
    client = connect()
    body = b"x" * 2**22
    for _ in range(2):
        client.sendall(b"POST / HTTP/1.1\r\nContent-Length: %d\r\nA: %s\r\n\r\n" % (len(body), b"y" * 60_000) + body)
        assert answer(client) == body
    pieces = b"".join(b"64\r\n" + b"z" * 100 + b"\r\n" for _ in range(10_000))
    client.sendall(CHUNKED + pieces + b"0\r\nChecksum: 1\r\n\r\n")
    assert answer(client) == b"z" * 1_000_000


@pytest.mark.parametrize("name", [b"Upgrade", b"upgrade", b"UPGRADE"])
def test_an_upgrade_is_not_heard(connect: Open, name: bytes) -> None:
    """As clients ask who would rather speak HTTP/2: the body must arrive all the same, and what follows it."""
    client = connect()
    assert get(client, b"Connection: Upgrade, HTTP2-Settings", name + b": h2c", b"HTTP2-Settings: AAMAAABk") == b"ok"
    assert get(client, b"Connection: Upgrade", name + b": websocket") == b"ok"
    assert get(client) == b"ok"


def test_who_lets_a_connection_be_gives_way(connect: Open) -> None:
    known = connect()
    assert get(known, b"Authorization: signed") == b"ok"
    idle = [connect() for _ in range(3 * MOST)]
    for each in idle[: 2 * MOST]:
        try:
            each.sendall(b"GET / HTTP/1.1\r\nA: ")
        except ConnectionError:
            continue
    assert get(connect()) == b"ok"
    assert get(known) == b"ok"
    assert answer(idle[0]) == b""


def test_nobody_known_gives_way(connect: Open) -> None:
    known = [connect() for _ in range(MOST - 1)]
    assert [get(each, b"Authorization: signed") for each in known] == [b"ok"] * (MOST - 1)
    client = connect()
    client.sendall(b"GET / HTTP/1.1\r\nHost: h\r\n\r\n")
    assert client.recv(100).startswith(b"HTTP/1.1 503 ")
    client.close()
    while get(known[0]) != b"ok":  # until the server has noticed
        time.sleep(0.01)


@pytest.mark.parametrize("start", [b"", b"GET / HTTP/1.1\r\nA: ", b"POST / HTTP/1.1\r\nContent-Length: 9\r\n\r\nx"])
@pytest.mark.parametrize("later", [False, True])
def test_what_does_not_come_is_not_waited_for(
    connect: Open, monkeypatch: pytest.MonkeyPatch, start: bytes, later: bool
) -> None:
    monkeypatch.setattr(connection, "_PATIENCE_S", 0.2)
    client = connect()
    if later:
        assert get(client) == b"ok"
        if not start:  # between requests it may be idle
            time.sleep(0.5)
            assert get(client) == b"ok"
            return
    client.sendall(start)
    begun = time.monotonic()
    assert answer(client) == b""
    assert time.monotonic() - begun < 5


@pytest.mark.parametrize(
    ("soft", "hard", "allowed", "expected"),
    [
        (1024, 4096, True, 1024),
        (1024, -1, True, 1024),
        (256, -1, True, 1024),
        (256, -1, False, 16),
        (1024, 1024, True, 768),
        (100, 100, True, 16),
        (-1, -1, False, 1024),
    ],
)
def test_connections_leave_files_for_the_store(
    monkeypatch: pytest.MonkeyPatch, soft: int, hard: int, allowed: bool, expected: int
) -> None:
    resource = pytest.importorskip("resource")
    limits = [(soft, hard)]

    def change(_: int, asked: tuple[int, int]) -> None:
        if not allowed:
            raise ValueError("current limit exceeds maximum limit")
        limits.append(asked)

    monkeypatch.setattr(resource, "RLIM_INFINITY", -1)
    monkeypatch.setattr(resource, "getrlimit", lambda _: limits[-1])
    monkeypatch.setattr(resource, "setrlimit", change)
    assert make_room() == expected
    assert limits[-1] == (max(soft, min(1280, hard if hard > 0 else 1280)), hard) or not allowed
