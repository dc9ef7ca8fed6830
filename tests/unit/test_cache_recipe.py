"""Fingerprints: the same for the same, others for others, none for what cannot be known."""

from __future__ import annotations

import enum
import functools
import math
import subprocess
import sys
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from ahi_ml.cache import fingerprint, recipe
from ahi_ml.pixels import LookupTable, Normalize, Rescale, Scale, Window


class Colour(enum.Enum):
    RED = 1
    BLUE = 2


class Named:
    def __init__(self, text: Any) -> None:
        self.text = text

    def fingerprint(self) -> Any:
        return self.text


class NamedByAttribute:
    fingerprint = "v1"


@dataclass(frozen=True)
class Theirs:
    number: float = 1.0


class WindowOfTheirs(Window):
    pass


DIFFERENT = [
    None,
    True,
    1,
    1.0,
    1 + 0j,
    "1",
    b"1",
    "None",
    "",
    math.nan,
    math.inf,
    -0.0,
    0.0,
    0.1,
    0.1 + 2**-56,
    np.float32(0.1),
    np.float64(0.1),
    np.dtype("f4"),
    np.dtype(">f4"),
    np.dtype("i2"),
    "dtype(<f4)",
    (),
    ((),),
    (1, 2),
    ((1, 2),),
    ("1, 2",),
    ("a", "b"),
    ("a', 'b",),
    set(),
    {1, 2},
    {},
    {"a": 1},
    {"a": 1, "b": 2},
    {"a: 1, b": 2},
    Colour.RED,
    Colour.BLUE,
    np.zeros(2),
    np.zeros(2, "f4"),
    np.zeros((2, 1)),
    np.ones(2),
    Window(40, 400),
    Window(40, 401),
    Window(40, 400, "SIGMOID"),
    Scale(40, 400),
    Normalize(0.5, 2.0),
    Normalize((0.5,), (2.0,)),
    Rescale(1, -1024),
    LookupTable(0, bytes(512)),
    LookupTable(0, b"\1\0" + bytes(510)),
    (Window(40, 400), Scale(0, 1)),
    (Scale(0, 1), Window(40, 400)),
    Named("v1"),
    Named("v2"),
    NamedByAttribute(),
]


def test_different_things_have_different_fingerprints() -> None:
    texts = [fingerprint(thing) for thing in DIFFERENT]
    assert all(isinstance(text, str) and text for text in texts)
    seen: dict[Any, Any] = {}
    for thing, text in zip(DIFFERENT, texts, strict=True):
        assert text not in seen, f"{thing!r} and {seen[text]!r} are both {text}"
        seen[text] = thing


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (Window(40, 400), Window(40.0, 400.0, "linear")),
        (math.nan, -math.nan),
        (np.float32, np.dtype("f4")),
        (np.zeros((4, 6))[::2, ::3], np.zeros((2, 2))),
        ({"a": 1, "b": 2}, {"b": 2, "a": 1}),
        ({"x", "y", "z"}, {"z", "y", "x"}),
        ([Window(40, 400)], (Window(40, 400),)),
    ],
    ids=["floats", "nan", "dtypes", "arrays", "dicts", "sets", "sequences"],
)
def test_equal_things_have_equal_fingerprints(one: Any, other: Any) -> None:
    assert fingerprint(one) == fingerprint(other)
    assert fingerprint(one) is not None


def _endless() -> list[Any]:
    inside: list[Any] = []
    inside.append(inside)
    return inside


@pytest.mark.parametrize(
    "thing",
    [
        lambda image: image,
        len,
        functools.partial(len),
        object(),
        Window,
        Named,
        Theirs(),
        WindowOfTheirs(40, 400),
        Named(None),
        Named(""),
        Named(5),
        {1: 2},
        _endless(),
        np.array([object()]),
        np.ma.masked_array([1, 2], [True, False]),
        np.zeros(2, "i4,f4"),
        iter([1]),
        bytearray(b"x"),
    ],
    ids=lambda thing: type(thing).__name__,
)
def test_what_cannot_be_known_has_none(thing: Any) -> None:
    assert fingerprint(thing) is None
    assert fingerprint((Window(40, 400), thing)) is None
    assert fingerprint({"steps": [thing]}) is None
    assert recipe(output="stored", steps=(thing,)) is None


def test_a_function_may_be_given_a_fingerprint() -> None:
    def step(image: Any) -> None: ...

    assert fingerprint(step) is None
    step.fingerprint = "v1"  # type: ignore[attr-defined]
    assert "v1" in str(fingerprint(step))


def test_an_error_in_a_fingerprint_is_the_users_to_see() -> None:
    class Broken:
        def fingerprint(self) -> str:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fingerprint(Broken())


def test_a_recipe_names_its_parts() -> None:
    one = recipe(output="stored", reduce=0, steps=())
    assert one == recipe(steps=(), reduce=0, output="stored")
    assert one != recipe(output="stored", reduce=1, steps=())
    assert one != recipe(output="stored", reduce=0, steps=(), padding="keep")


def test_it_is_the_same_in_every_process() -> None:
    code = (
        "from ahi_ml.cache import recipe\nfrom ahi_ml.pixels import *\nimport numpy as np\n"
        "print(recipe(steps=(Window(40, 400), Normalize(0.5, 2), LookupTable(0, bytes(512))), names={'x', 'y', 'z'}, "
        "dtype=np.float32))"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={"PYTHONHASHSEED": seed}
        ).stdout
        for seed in ("0", "1", "2")
    }
    assert len(outputs) == 1
    assert outputs.pop().startswith("{")
