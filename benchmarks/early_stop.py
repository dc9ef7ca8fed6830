"""When hanging up pays: reading the first part of a body and reconnecting, against reading all of it.

The service has no partial reads. Whoever needs the first quarter of a MiB of a frame can read on, and keep
the connection, or stop, and pay for another one. Measured over TLS on loopback, with a server that waits as a
network would (`_ROUND_TRIP_S` for the connection, the handshake and each answer) and sends as fast as one
connection to the service does (`_BYTES_A_SECOND`).
"""

from __future__ import annotations

import multiprocessing
import socket
import ssl
import subprocess
import tempfile
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

from ahi_ml.client.partial import WORTH_BYTES
from benchmarks.runner import Measurement, Ratio, result, take_turns

__all__ = ["run"]

_ROUND_TRIP_S = 0.002  # within a region
_BYTES_A_SECOND = 100e6
_NEEDED = 256 * 1024
_PIECE = 64 * 1024
_SAVED = {"1/4 MiB": 1 << 18, "1/2 MiB": 1 << 19, "1 MiB": 1 << 20, "2 MiB": 1 << 21, "4 MiB": 1 << 22}


@dataclass(frozen=True)
class _Size:
    rounds: int
    frames: int


_SIZES = {"toy": _Size(1, 2), "small": _Size(5, 10), "full": _Size(11, 20)}


def run(size: str = "small", rounds: int | None = None) -> dict[str, Any]:
    """Measure; see the module. `rounds` overrides how often everything is repeated."""
    asked = _SIZES[size]
    turns = rounds or asked.rounds
    with tempfile.TemporaryDirectory(prefix="ahi-ml-benchmark-") as name:
        certificate = _certificate(Path(name))
        ours, theirs = multiprocessing.Pipe()
        server = multiprocessing.get_context("spawn").Process(target=_serve, args=(certificate, theirs), daemon=True)
        server.start()
        port = ours.recv()
        works = {
            f"{way}, {label} saved": partial(_read, port, certificate, asked.frames, _NEEDED + saved, way == "stop")
            for label, saved in _SAVED.items()
            for way in ("drain", "stop")
        }
        took = take_turns(works, turns)
        server.kill()
        server.join()
    times = {name: Measurement(name, "ms/frame", [each * 1e3 for each in values]) for name, values in took.items()}
    ratios = [
        Ratio(
            f"drain / stop, {label} saved",
            times[f"drain, {label} saved"].p50 / times[f"stop, {label} saved"].p50,
            at_least=1.0 if saved >= WORTH_BYTES else None,
        )
        for label, saved in _SAVED.items()
    ]
    parameters = {
        "frames": asked.frames,
        "rounds": turns,
        "needed_bytes": _NEEDED,
        "round_trip_s": _ROUND_TRIP_S,
        "bytes_a_second": _BYTES_A_SECOND,
        "threshold_bytes": WORTH_BYTES,
    }
    return result("early_stop", size, parameters, list(times.values()), ratios)


def _read(port: int, certificate: Path, frames: int, total: int, stop: bool) -> float:
    """Seconds a frame: one after the other, in one handle."""
    import pycurl

    handle = pycurl.Curl()
    handle.setopt(pycurl.URL, f"https://localhost:{port}/{total}")
    handle.setopt(pycurl.CAINFO, str(certificate))
    handle.setopt(pycurl.BUFFERSIZE, 512 * 1024)

    def one() -> None:
        body = BytesIO()

        def write(data: bytes) -> int | None:
            body.write(data)
            return 0 if stop and body.tell() >= _NEEDED else None

        handle.setopt(pycurl.WRITEFUNCTION, write)
        try:
            handle.perform()
        except pycurl.error as error:
            if not (stop and error.args[0] == pycurl.E_WRITE_ERROR):
                raise

    one()
    start = time.perf_counter()
    for _ in range(frames):
        one()
    took = time.perf_counter() - start
    handle.close()
    return took / frames


def _certificate(folder: Path) -> Path:
    """Key and self-signed certificate of localhost, in one file."""
    path = folder / "server.pem"
    command = (
        "openssl req -x509 -newkey rsa:2048 -nodes -days 1 -subj /CN=localhost -addext subjectAltName=DNS:localhost"
    )
    outputs = ("-keyout", str(path), "-out", str(folder / "cert.pem"))
    subprocess.run([*command.split(), *outputs], check=True, capture_output=True)
    with path.open("ab") as file:
        file.write((folder / "cert.pem").read_bytes())
    return path


def _serve(certificate: Path, ready: Any) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    listener = socket.create_server(("127.0.0.1", 0))
    ready.send(listener.getsockname()[1])
    while True:
        connection, _ = listener.accept()
        threading.Thread(target=_answer_all, args=(context, connection), daemon=True).start()


def _answer_all(context: ssl.SSLContext, connection: socket.socket) -> None:
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    time.sleep(2 * _ROUND_TRIP_S)  # of TCP, and of TLS 1.3
    with suppress(OSError), context.wrap_socket(connection, server_side=True) as wrapped:
        head = b""
        while data := wrapped.recv(4096):
            head += data
            if b"\r\n\r\n" not in head:
                continue
            total = int(head.split(b" ", 2)[1][1:])
            head = b""
            time.sleep(_ROUND_TRIP_S)
            wrapped.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % total)
            piece, start = bytes(_PIECE), time.perf_counter()
            for sent in range(0, total, _PIECE):
                time.sleep(max(start + sent / _BYTES_A_SECOND - time.perf_counter(), 0))
                wrapped.sendall(piece[: total - sent])
