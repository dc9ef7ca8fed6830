"""One download a frame: those of this process that want a frame somebody downloads wait, and then look again."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from ahi_ml.cache.locks import Claims

__all__ = ["Flights"]

_LOOK_EVERY_S = 0.005
_PATIENCE_S = 120.0  # no download takes longer: whoever still holds a claim then has been stopped


class Flights:
    """Downloads under way in one process, and what waits for them or for those of other processes.

    Parameters
    ----------
    claims : Claims
        Between processes.

    I/O: that of `claims`. A thread runs while something waits for another process.
    """

    def __init__(self, claims: Claims) -> None:
        self._claims = claims
        self._lock = threading.Lock()
        self._held: set[str] = set()
        self._waiting: dict[str, list[Callable[[], None]]] = {}
        self._since: dict[str, float] = {}  # of what waits for other processes
        self._overdue: set[str] = set()  # and has waited long enough
        self._looking = False

    def join(self, name: str, again: Callable[[], None]) -> bool:
        """Take a download on, or wait for the one that is under way.

        Parameters
        ----------
        name : str
            Of the frame, see `FrameCache.name`.
        again : callable
            Called, in any thread, when the other download has ended one way or the other: look into the
            cache again, and join again if need be. It must not block.

        Returns
        -------
        bool
            True when the download is the caller's, who must `land` it. False when `again` will be called.
        """
        with self._lock:
            free = name not in self._held and name not in self._waiting
            if free and (name in self._overdue or self._claims.try_claim(name)):
                self._overdue.discard(name)
                self._held.add(name)
                return True
            self._waiting.setdefault(name, []).append(again)
            self._since.setdefault(name, time.monotonic())
            if name not in self._held and not self._looking:
                self._looking = True
                threading.Thread(target=self._look, name="ahi-ml-flights", daemon=True).start()
            return False

    def land(self, name: str) -> None:
        """Say that a download of one's own has ended; whoever waits looks again."""
        with self._lock:
            self._held.discard(name)
            self._claims.release(name)
            waiting = self._waiting.pop(name, [])
            self._since.pop(name, None)
        for again in waiting:
            again()

    def _look(self) -> None:
        """Wait for other processes: a claim that can be had is one that they have given back.

        One that is held for longer than any download takes is a stopped process's: the frame is downloaded anyhow.
        """
        pause = threading.Event()
        while True:
            ended: list[Callable[[], None]] = []
            with self._lock:
                for name in [name for name in self._waiting if name not in self._held]:
                    free = self._claims.try_claim(name)
                    if free:
                        self._claims.release(name)
                    elif time.monotonic() - self._since[name] > _PATIENCE_S:
                        self._overdue.add(name)
                    else:
                        continue
                    ended += self._waiting.pop(name)
                    del self._since[name]
                self._looking = bool(self._waiting.keys() - self._held)
                looking = self._looking
            for again in ended:
                again()
            if not looking:
                return
            pause.wait(_LOOK_EVERY_S)
