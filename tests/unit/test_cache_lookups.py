"""Threads that wait for the remote tier: how many, for what, and for how long."""

from __future__ import annotations

import threading
import time
from concurrent.futures import CancelledError
from typing import NoReturn

import pytest

from ahi_ml.cache.lookups import Lookups

PATIENCE_S = 20.0


def running() -> int:
    return sum(thread.name == "ahi-ml-remote-lookup" for thread in threading.enumerate())


def test_as_many_at_once_as_said_and_in_order() -> None:
    lookups, together, begun = Lookups(5), threading.Barrier(5), []

    def look(number: int) -> bytes:
        begun.append(number)
        together.wait(PATIENCE_S)  # passes five at a time
        return bytes([number])

    asked = [lookups.start(lambda number=number: look(number)) for number in range(15)]
    assert running() <= 5
    assert [each.result(PATIENCE_S) for each in asked] == [bytes([number]) for number in range(15)]
    assert set(begun[:5]) == set(range(5))


def test_threads_end_when_there_is_nothing_to_do_and_come_again() -> None:
    lookups = Lookups(3)
    for _ in range(2):
        assert {each.result(PATIENCE_S) for each in [lookups.start(lambda: b"x") for _ in range(20)]} == {b"x"}
        deadline = time.monotonic() + PATIENCE_S
        while running() and time.monotonic() < deadline:
            time.sleep(0.005)
        assert not running()


def test_cancelling_waits_for_nobody() -> None:
    lookups, begun, go = Lookups(1), threading.Event(), threading.Event()
    looked: list[int] = []

    def look(number: int) -> bytes:
        looked.append(number)
        begun.set()
        go.wait(PATIENCE_S)
        return b"late"

    asked = [lookups.start(lambda number=number: look(number)) for number in range(3)]
    assert begun.wait(PATIENCE_S)
    for future in asked[:2]:
        assert future.cancel()
        with pytest.raises(CancelledError):
            future.result(0)
    go.set()
    assert asked[2].result(PATIENCE_S) == b"late"
    assert looked == [0, 2]


def test_whatever_is_raised_is_the_answer() -> None:
    class Odd(BaseException):
        pass

    def look() -> NoReturn:
        raise Odd

    lookups = Lookups(1)
    for _ in range(3):
        with pytest.raises(Odd):
            lookups.start(look).result(PATIENCE_S)
    assert lookups.start(lambda: None).result(PATIENCE_S) is None


def test_without_more_threads_it_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def start(self: threading.Thread) -> NoReturn:
        raise RuntimeError("can't start new thread")

    lookups = Lookups(2)
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", start)
        assert [lookups.start(lambda: b"x").result(0) for _ in range(5)] == [b"x"] * 5
    assert lookups.start(lambda: b"y").result(PATIENCE_S) == b"y"
