"""One download a frame: those of this process that want a frame somebody downloads wait, and then look again."""

from __future__ import annotations

import threading
from collections.abc import Callable

from ahi_ml.cache.locks import Claims

__all__ = ["Flights"]

_LOOK_EVERY_S = 0.005


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
            if name not in self._held and name not in self._waiting and self._claims.try_claim(name):
                self._held.add(name)
                return True
            self._waiting.setdefault(name, []).append(again)
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
        for again in waiting:
            again()

    def _look(self) -> None:
        """Wait for other processes: a claim that can be had is one that they have given back."""
        pause = threading.Event()
        while True:
            ended: list[Callable[[], None]] = []
            with self._lock:
                for name in [name for name in self._waiting if name not in self._held]:
                    if self._claims.try_claim(name):
                        self._claims.release(name)
                        ended += self._waiting.pop(name)
                self._looking = bool(self._waiting.keys() - self._held)
                looking = self._looking
            for again in ended:
                again()
            if not looking:
                return
            pause.wait(_LOOK_EVERY_S)
