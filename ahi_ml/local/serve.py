"""The body of a server process: lock the folder, listen, publish, count leases, end in order."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import logging
import os
import secrets
import signal
import socket
import sys
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock, Timeout

from ahi_ml.local.faults import Faults
from ahi_ml.local.files import Endpoint, StoreFolder, hostname
from ahi_ml.local.process import proof

if TYPE_CHECKING:
    from ahi_ml.local.blobs import BlobStore
    from ahi_ml.local.catalog import Catalog
    from ahi_ml.local.injector import Injector

__all__ = ["serve_folder"]

_LOG = logging.getLogger(__name__)
_LINGER_S = 3.0
_FIRST_LEASE_S = 30.0
_LOCK_S = 15.0
_LOCK_ELSEWHERE_S = 2.0
_MOST_STRANGERS = 64
_LOOPBACK = "127.0.0.1"
_ANY = {"0.0.0.0": _LOOPBACK, "::": "[::1]"}


def serve_folder(
    path: Path,
    *,
    host: str = _LOOPBACK,
    port: int = 0,
    faults: Faults | None = None,
    until_stopped: bool = False,
    on_ready: Callable[[Endpoint], None] = lambda endpoint: None,
) -> int:
    """Serve a folder until its leases are gone, or until a signal.

    I/O: everything the embedded store does.

    Parameters
    ----------
    path : Path
        The folder.
    host, port
        Where to listen; port 0 picks a free one.
    faults : Faults, optional
        In force unless a lease brings its own.
    until_stopped : bool
        Serve without leases too, as ``ahi-ml serve`` does.
    on_ready : callable
        Told the endpoint once requests are answered.

    Returns
    -------
    int
        0 when it served, or when another process serves the folder already; 1 when the lock
        could not be had and nobody seems to serve.
    """
    folder = StoreFolder.open(path)
    lock = FileLock(folder.lock, mode=0o600)
    started = time.monotonic()
    while True:  # the last server of the folder may be on its way out
        try:
            lock.acquire(timeout=0.05)
            break
        except Timeout:
            served = folder.endpoint()
            here = served is None or served.host == hostname()
            if served is not None and here and not until_stopped:
                return 0
            if time.monotonic() - started > (_LOCK_S if here else _LOCK_ELSEWHERE_S):
                sys.stderr.write("another process holds the lock of this folder\n")
                return 1
    try:
        folder.withdraw()  # a killed server's, or another machine's: whoever holds the lock says where it is
        logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
        asyncio.run(_serve(folder, host, port, faults or Faults(), until_stopped, on_ready))
    finally:
        lock.release()
    return 0


async def _serve(
    folder: StoreFolder,
    host: str,
    port: int,
    faults: Faults,
    until_stopped: bool,
    on_ready: Callable[[Endpoint], None],
) -> None:
    # Heavy imports come after the lock is won: a candidate that loses costs a bare interpreter.
    import uvicorn

    from ahi_ml.local import memory
    from ahi_ml.local.accesses import Accesses
    from ahi_ml.local.blobs import BlobStore
    from ahi_ml.local.catalog import Catalog
    from ahi_ml.local.connection import BoundedConnection, make_room
    from ahi_ml.local.ingest.runner import JobRunner
    from ahi_ml.local.injector import Injector
    from ahi_ml.local.operations import Context
    from ahi_ml.local.operations.datastores import recover_datastores
    from ahi_ml.local.operations.writes import recover_writes
    from ahi_ml.local.server import Application
    from ahi_ml.local.settling import Settling
    from ahi_ml.local.signature import Verifier

    # An import makes and keeps many small objects, none of them in cycles: looking through them takes a twentieth
    # of its time.
    gc.freeze()
    gc.set_threshold(50_000, 50, 50)
    memory.keep()
    warnings.filterwarnings("ignore", module="pydicom")  # remarks on odd values; a job's report has its own
    logging.getLogger("pydicom").setLevel(logging.CRITICAL)
    logging.getLogger("uvicorn.error").setLevel(logging.ERROR)  # or whoever sends rubbish fills the disk
    keys = folder.keys()
    catalog = Catalog(folder.catalog)
    blobs = BlobStore(folder.blobs)
    injector = Injector()
    injector.set(faults)
    jobs = JobRunner(catalog, blobs, folder, injector)
    jobs.recover()
    listener = _listen(host, port)
    address = _ANY.get(host, f"[{host}]" if ":" in host else host)
    endpoint = Endpoint(
        url=f"http://{address}:{listener.getsockname()[1]}",
        lease_port=0,
        host=hostname(),
        pid=os.getpid(),
        token=secrets.token_hex(16),
    )
    settling = Settling()
    secret = bytes.fromhex(keys.page_secret)
    accesses = Accesses(catalog, settling)
    context = Context(catalog, blobs, jobs, endpoint.region, endpoint.account, secret, settling, injector, accesses)
    recover_writes(context)
    recover_datastores(context)
    # Nobody waits for the sweep, and its thread ends with the process wherever it is.
    threading.Thread(target=_sweep, args=(blobs, catalog), name="ahi-ml-sweep", daemon=True).start()
    verifier = Verifier({keys.access_key_id: keys.secret_access_key}, endpoint.region)
    application = Application(context, verifier)
    config = uvicorn.Config(
        application,
        http=BoundedConnection,
        limit_concurrency=make_room(),
        ws="none",
        lifespan="off",
        access_log=False,
        log_config=None,
        proxy_headers=False,
        server_header=False,
        timeout_keep_alive=300,
        timeout_graceful_shutdown=5,
    )
    server = uvicorn.Server(config)

    def stop() -> None:
        folder.withdraw()
        server.should_exit = True
        leases.refuse()

    if threading.current_thread() is threading.main_thread():
        # uvicorn ends in order on this signal, and then raises it again for the handler it found.
        signal.signal(signal.SIGTERM, lambda number, frame: stop())
    leases = _Leases(injector, faults, endpoint.token, stop, lambda: jobs.idle, until_stopped)
    holders = await asyncio.start_server(leases.hold, _LOOPBACK, 0)
    endpoint = Endpoint(**{**_fields(endpoint), "lease_port": holders.sockets[0].getsockname()[1]})
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    watching = asyncio.create_task(leases.watch())
    try:
        while not server.started and not serving.done():
            await asyncio.sleep(0.002)
        folder.publish(endpoint)
        on_ready(endpoint)
        await serving
    finally:
        stop()
        watching.cancel()
        holders.close()
        leases.drop_all()
        await asyncio.sleep(0)  # lets the closed leases go, so that holders notice before the last job ends
        application.close()
        await asyncio.to_thread(jobs.close)
        settling.close()
        catalog.close()


def _listen(host: str, port: int) -> socket.socket:
    """A listening socket whose connections asyncio sends without delay.

    asyncio looks at the protocol number for that, which `socket.create_server` leaves 0: answers,
    written as a head and a body, would then wait 40 ms for the client's delayed acknowledgement.
    """
    (family, kind, _, _, address), *_ = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    listener = socket.socket(family, kind, socket.IPPROTO_TCP)
    try:
        if os.name == "posix":
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(1024)
    except BaseException:
        listener.close()
        raise
    return listener


def _sweep(blobs: BlobStore, catalog: Catalog) -> None:
    try:
        blobs.sweep(catalog.blobs())
    except Exception:  # the server may be closing the catalog; the next one sweeps again
        _LOG.debug("the sweep of unused blobs was cut short", exc_info=True)


def _fields(endpoint: Endpoint) -> dict[str, object]:
    return {name: getattr(endpoint, name) for name in Endpoint.__dataclass_fields__}


class _Leases:
    """The connections that keep the server alive."""

    def __init__(
        self,
        injector: Injector,
        faults: Faults,
        token: str,
        stop: Callable[[], None],
        idle: Callable[[], bool],
        until_stopped: bool,
    ) -> None:
        self._injector, self._faults, self._token = injector, faults, token
        self._stop, self._idle, self._until_stopped = stop, idle, until_stopped
        self._held: dict[asyncio.StreamWriter, Faults | None] = {}
        self._strangers: dict[asyncio.StreamWriter, None] = {}  # have not greeted yet, oldest first
        self._quiet_since = time.monotonic() + _FIRST_LEASE_S - _LINGER_S
        self._stopping = False

    async def hold(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One lease, from its greeting to the end of its connection."""
        self._strangers[writer] = None
        if len(self._strangers) > _MOST_STRANGERS:
            oldest = next(iter(self._strangers))
            del self._strangers[oldest]
            oldest.close()  # whoever wants a lease greets at once
        try:
            hello = json.loads(await asyncio.wait_for(reader.readline(), 10))
            if self._stopping or hello.get("proof") != proof(self._token, "hello"):
                return
            self._held[writer] = Faults.parse(hello["faults"]) if hello.get("faults") else None
            self._strangers.pop(writer, None)
            self._apply_faults()
            writer.write(proof(self._token, "ready").encode() + b"\n")
            await writer.drain()
            await reader.read()  # returns when the holder is gone, however it went
        except (OSError, ValueError, TypeError, AttributeError, TimeoutError, RecursionError):
            return
        finally:
            self._strangers.pop(writer, None)
            if self._held.pop(writer, False) is not False:
                self._quiet_since = time.monotonic()
                self._apply_faults()
            writer.close()

    def _apply_faults(self) -> None:
        asked = [faults for faults in self._held.values() if faults is not None]
        chosen = asked[-1] if asked else self._faults
        if chosen is not self._injector.faults:  # setting them again would begin their state anew
            self._injector.set(chosen)

    async def watch(self) -> None:
        """End the server when nobody has held it for a while and its jobs are done."""
        while True:
            await asyncio.sleep(0.1)
            if self._until_stopped:
                continue
            if self._held or not self._idle():
                self._quiet_since = max(self._quiet_since, time.monotonic())
            elif time.monotonic() - self._quiet_since > _LINGER_S:
                self._stop()
                return

    def refuse(self) -> None:
        """Take no further leases: who asks looks for, or starts, the next server."""
        self._stopping = True

    def drop_all(self) -> None:
        """Close what is left, so that holders notice."""
        for writer in self._held:
            with contextlib.suppress(OSError):
                writer.close()
