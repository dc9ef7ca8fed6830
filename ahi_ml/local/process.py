"""The one server of a folder: how openers find or start it, keep it alive, and let it go.

Every opener holds a *lease*, a connection to the server that the kernel closes however the opener
ends. The server ends a few seconds after its last lease is gone and its import jobs are done. A
lock file decides which of several candidates serves.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ahi_ml.errors import ConfigError, LocalStoreError
from ahi_ml.local.faults import Faults
from ahi_ml.local.files import Endpoint, Keys, StoreFolder, hostname

__all__ = ["Lease", "attach", "environment", "proof"]

_READY_S = 30.0
_HANDSHAKE_S = 5.0


def proof(token: str, word: str) -> str:
    """What each side of a lease says instead of the token itself. I/O: none."""
    return hashlib.blake2b(f"{word}:{token}".encode(), digest_size=16).hexdigest()


@dataclass(eq=False)
class Lease:
    """A hold on a folder's server.

    Parameters
    ----------
    endpoint : Endpoint
        Where the server is.
    keys : Keys
        What requests to it are signed with.
    connection : socket
        Closed by the kernel when this process ends.
    """

    endpoint: Endpoint
    keys: Keys
    connection: socket.socket
    pid: int

    def close(self) -> None:
        """Let go. A forked child's copy changes nothing: the parent's hold stays."""
        if self.pid == os.getpid():
            self.connection.close()

    def alive(self) -> bool:
        """Whether the server still holds the other end. I/O: looks at the socket, does not wait."""
        try:
            self.connection.setblocking(False)
            return self.connection.recv(1, socket.MSG_PEEK) != b""
        except BlockingIOError:
            return True
        except OSError:
            return False


def environment(endpoint: Endpoint, keys: Keys) -> dict[str, str]:
    """Variables with which any AWS client reaches the store. I/O: none."""
    return {
        "AWS_ENDPOINT_URL_MEDICAL_IMAGING": endpoint.url,
        "AWS_DISABLE_HOST_PREFIX_INJECTION": "true",
        "AWS_ACCESS_KEY_ID": keys.access_key_id,
        "AWS_SECRET_ACCESS_KEY": keys.secret_access_key,
        "AWS_REGION": endpoint.region,
        "AWS_DEFAULT_REGION": endpoint.region,
    }


def attach(path: Path, *, create: bool = True, faults: Mapping[str, Any] | None = None) -> Lease:
    """Join the server of a folder, or start it.

    I/O: the folder's small files, a loopback connection, and a server process when none runs.
    Ready when it returns.

    Parameters
    ----------
    path : Path
        The folder.
    create : bool
        Whether to make the store when it is absent.
    faults : mapping, optional
        Knobs of the fault injector, in force while this lease lasts.

    Raises
    ------
    ConfigError
        The folder or the faults cannot be used, or the folder's server runs on another machine.
    LocalStoreError
        The server does not start; the message quotes its log.
    """
    if faults is not None:
        Faults.parse(faults)
    folder = StoreFolder.open(path, create=create)
    keys = folder.keys()
    candidate: subprocess.Popen[bytes] | None = None
    deadline = time.monotonic() + _READY_S
    while True:
        endpoint = folder.endpoint()
        if endpoint is not None and endpoint.host == hostname():
            connection = _take_lease(endpoint, faults)
            if connection is not None:
                if candidate is not None:  # it outlives us, or is reaped when it ends
                    threading.Thread(target=candidate.wait, name="ahi-ml-reaper", daemon=True).start()
                return Lease(endpoint, keys, connection, os.getpid())
        if candidate is None or candidate.poll() == 0:
            # None: nobody tried yet. 0: another candidate was first, and may have ended since.
            candidate = _start(folder)
        elif candidate.poll() is not None:
            if endpoint is not None and endpoint.host != hostname():
                raise ConfigError(
                    f"the data store {folder.root} is served by the machine {endpoint.host!r}, and its server "
                    "listens there only. Run `ahi-ml serve` there and connect(id, endpoint_url=...), or use AWS "
                    "HealthImaging"
                )
            raise LocalStoreError(f"the server of {folder.root} ended at its start: {_last_words(folder)}")
        if time.monotonic() > deadline:
            raise LocalStoreError(
                f"the server of {folder.root} was not ready after {_READY_S:.0f} s: {_last_words(folder)}"
            )
        time.sleep(0.01)


def _take_lease(endpoint: Endpoint, faults: Mapping[str, Any] | None) -> socket.socket | None:
    try:
        connection = socket.create_connection(("127.0.0.1", endpoint.lease_port), timeout=_HANDSHAKE_S)
    except OSError:
        return None
    try:
        hello = {"proof": proof(endpoint.token, "hello"), "pid": os.getpid(), "faults": faults}
        connection.sendall(json.dumps(hello, default=float).encode() + b"\n")
        with connection.makefile("rb") as answers:
            answer = answers.readline(4096).decode("ascii", "replace").strip()
    except OSError:
        answer = ""
    if answer == proof(endpoint.token, "ready"):
        connection.settimeout(None)
        return connection
    connection.close()
    return None


def _start(folder: StoreFolder) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-P", "-m", "ahi_ml.local", os.fspath(folder.root)]
    # The server outlives this process's terminal and its interrupts, and inherits nothing it would
    # keep open. It must find this package the way this process did.
    paths = os.pathsep.join(dict.fromkeys(os.fspath(entry) for entry in sys.path if entry))
    descriptor = os.open(folder.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    try:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=descriptor,
            stderr=descriptor,
            start_new_session=True,
            cwd=folder.root,
            env={**os.environ, "PYTHONPATH": paths},
        )
    finally:
        os.close(descriptor)


def _last_words(folder: StoreFolder) -> str:
    lines: list[str] = []
    with contextlib.suppress(OSError):
        lines = folder.log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return lines[-1] if lines else "its log is empty"
