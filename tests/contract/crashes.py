"""A store whose server is killed in the middle of whatever it does, started again, and looked at closely.

It dies by SIGKILL: from outside, after some milliseconds of work for several clients, or by its own hand
right before a statement that writes to the catalog, while it works for one client or recovers.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from catalog_check import blob_path, blobs_in_use, blobs_on_disk, problems
from driver import Cut, Driver
from scans import FAMILIES
from service_model import Model

from ahi_ml.local.files import StoreFolder
from ahi_ml.local.process import Lease, attach

WRITES = ("run_import", *["update"] * 4, *["copy"] * 4, "delete", "delete", "tag", "read")
PATIENCE_S = 20.0
LONG_AGO_S = 7200.0
"""Before the last hour, in which nothing is swept."""

# A server that kills itself when a file says so: how many more statements it may begin.
_FUSED = """
import os, signal, sys
from pathlib import Path
from ahi_ml.local import catalog, serve

fuse, make = Path(sys.argv[2]), catalog.Catalog.__init__

def burn(statement):
    if not statement.startswith("SELECT") and fuse.exists():
        left = int(fuse.read_text() or 0)
        if not left:
            os.kill(os.getpid(), signal.SIGKILL)
        fuse.write_text(str(left - 1))

def make_fused(self, path):
    make(self, path)
    self._db.set_trace_callback(burn)

catalog.Catalog.__init__ = make_fused
sys.exit(serve.serve_folder(Path(sys.argv[1])))
"""


def refuse_torn_answers(client: Any) -> Any:
    """Make a client notice a body that is not there: botocore takes a head without one for an empty answer."""

    def check(http_response: Any, model: Any, **_: Any) -> None:
        length = int(http_response.headers.get("content-length", 0))
        if not model.has_streaming_output and len(http_response.content) != length:
            raise ConnectionError("the answer ends before its end")

    client.meta.events.register("after-call.medical-imaging", check)
    return client


class CrashingStore:
    """An embedded store in a folder of its own, with its model.

    Parameters
    ----------
    folder : Path
        New. Files to import are put beside the store.
    client_of : callable
        Makes a client from a lease.
    slow_s : float
        The store's slow mode: how long writes stay LOCKED.
    """

    def __init__(self, folder: Path, client_of: Callable[[Lease], Any], *, slow_s: float = 0.0) -> None:
        self.folder, self.files = folder / "store", folder / "files"
        self.files.mkdir(parents=True)
        self._fuse = folder / "fuse"
        self._client_of, self._faults = client_of, {"slow_s": slow_s} if slow_s else None
        self.model, self.lock = Model(), threading.RLock()
        self.driver = Driver(None, self.model, self.files, lock=self.lock)
        self.cuts: list[str] = []
        self._serve()

    def _spawn(self) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [sys.executable, "-P", "-c", _FUSED, str(self.folder), str(self._fuse)],
            stdin=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        )

    def _published(self) -> bool:
        endpoint = StoreFolder(self.folder).endpoint()
        return endpoint is not None and endpoint.pid == self._server.pid

    def _serve(self) -> None:
        self._server = self._spawn()
        deadline = time.monotonic() + PATIENCE_S
        while not self._published():
            assert self._server.poll() is None, "the server ended at its start"
            assert time.monotonic() < deadline, "the server does not start"
            time.sleep(0.005)
        self.lease = attach(self.folder, faults=self._faults)
        assert self.lease.endpoint.pid == self._server.pid
        self.driver.client = refuse_torn_answers(self._client_of(self.lease))

    def kill(self) -> None:
        """End the server without a word."""
        self._server.kill()
        self._server.wait(PATIENCE_S)
        self.lease.close()

    def crash_at_statement(
        self, seed: int, *, left: int, left_in_recovery: int | None, operations: Sequence[str] = WRITES, most: int = 8
    ) -> bool:
        """Let the server die before a statement, and the next one while it recovers, and check that all is well.

        Parameters
        ----------
        left, left_in_recovery : int
            How many statements that write to the catalog each of the two may begin before.
        operations, most
            What is drawn from for the first of them, and how often.

        Returns
        -------
        bool
            Whether it died: a few operations may need fewer statements.
        """
        rng = random.Random(seed)
        self._fuse.write_text(str(left))
        for _ in range(most):
            try:
                getattr(self.driver, rng.choice(operations))(rng)
            except Cut as cut:
                self._server.wait(PATIENCE_S)
                self._fuse.unlink()
                self.kill()
                self.restart(left=left_in_recovery)
                self._resolve([(self.driver, cut)])
                return True
        self._fuse.unlink(missing_ok=True)
        return False

    def crash_under_load(self, seed: int, *, workers: int, delay_s: float, again_after_s: float | None = None) -> None:
        """Kill the server while some threads work on it, start it again, and check that all is well.

        Parameters
        ----------
        delay_s : float
            From the first requests to the end.
        again_after_s : float, optional
            Kill the next server too, so long after its start: it may be recovering.
        """
        rng = random.Random(seed)
        families = rng.sample(FAMILIES, len(FAMILIES))
        drivers = [
            Driver(
                self.driver.client,
                self.model,
                self.files,
                lock=self.lock,
                families=families[number::workers],
                most_scans=10,
            )
            for number in range(workers)
        ]
        seeds = [rng.randrange(2**32) for _ in drivers]
        cuts: list[Cut | None] = [None] * workers
        errors: list[BaseException] = []
        begin = threading.Barrier(workers + 1)

        def work(number: int) -> None:
            source, driver = random.Random(seeds[number]), drivers[number]
            begin.wait()
            try:
                if number == 0 and source.random() < 0.3:
                    driver.create_store(source)
                while True:
                    getattr(driver, source.choice(WRITES))(source)
            except Cut as cut:
                cuts[number] = cut
            except BaseException as error:  # told by the test's own thread
                errors.append(error)

        threads = [threading.Thread(target=work, args=(number,)) for number in range(workers)]
        for thread in threads:
            thread.start()
        begin.wait()
        time.sleep(delay_s)
        self.kill()
        for thread in threads:
            thread.join(PATIENCE_S)
            assert not thread.is_alive()
        if errors:
            raise errors[0]
        assert all(cuts)
        self.restart(again_after_s=again_after_s)
        self._resolve([(driver, cut) for driver, cut in zip(drivers, cuts, strict=True) if cut is not None])

    def _resolve(self, cuts: list[tuple[Driver, Cut]]) -> None:
        for driver, cut in cuts:
            driver.client = self.driver.client
            self.cuts.append(cut.what.split(" ")[0])
            try:
                cut.resolve()
            except AssertionError as error:
                raise AssertionError(f"after the crash during {cut.what}: {error}") from error
        self.driver.check_everything()
        assert problems(self.folder, settled=True) == []

    def restart(self, *, again_after_s: float | None = None, left: int | None = None) -> None:
        """Start the server of a dead store, once or twice; what nobody refers to is swept when it is old."""
        assert problems(self.folder, settled=False) == []
        orphan, temporary, young = (f"{number:02x}" + os.urandom(19).hex() for number in (1, 2, 3))
        temporary = f"{temporary[:2]}.{temporary[2:]}.1.2"
        for name in (orphan, temporary, young):
            blob_path(self.folder, name).parent.mkdir(parents=True, exist_ok=True)
            blob_path(self.folder, name).write_bytes(b"nobody's")
        for name in blobs_on_disk(self.folder) - {young}:
            then = time.time() - LONG_AGO_S
            os.utime(blob_path(self.folder, name), (then, then))
        if again_after_s is not None:
            self._server = self._spawn()
            time.sleep(again_after_s)
            self._server.kill()
        if left is not None:
            self._fuse.write_text(str(left))
            self._server = self._spawn()
            while self._server.poll() is None and not self._published():
                time.sleep(0.005)
            self._fuse.unlink()
            self._server.kill()
        self._server.wait(PATIENCE_S)
        assert problems(self.folder, settled=False) == []
        self._serve()
        wanted = blobs_in_use(self.folder) | {young}
        deadline = time.monotonic() + PATIENCE_S
        while (there := blobs_on_disk(self.folder)) != wanted:
            assert time.monotonic() < deadline, f"not swept: {there - wanted}; gone: {wanted - there}"
            time.sleep(0.005)

    def close(self) -> None:
        """End the store."""
        self.kill()
