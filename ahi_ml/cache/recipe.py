"""What tells results apart: canonical text of everything that changes their bytes. No I/O.

Equal texts must mean equal results, so whatever is not known to be described whole (functions, objects of others,
random state) has no fingerprint, and is not cached.
"""

from __future__ import annotations

import dataclasses
import enum
import hashlib
from typing import Any

import numpy as np

__all__ = ["DECODER_EPOCH", "fingerprint", "recipe"]

DECODER_EPOCH = 3
"""Raised by one whenever the package decodes or converts the same bytes to other values; part of every derived key."""

_DEEPEST = 32


def recipe(**parts: Any) -> str | None:
    """Return the canonical text of named options, such as ``recipe(output="modality", reduce=0, steps=steps)``.

    I/O: none.

    Returns
    -------
    str or None
        None when one of them has no `fingerprint`.
    """
    return fingerprint(parts)


def fingerprint(value: Any) -> str | None:
    """Return a canonical text of a value: the same in every process, and another for any other value.

    I/O: none, unless the value's own fingerprint does some.

    Parameters
    ----------
    value : object
        None, numbers, strings, bytes, enumeration members, dtypes, arrays of numbers; tuples, lists and sets of
        these, and dicts with strings for keys; frozen dataclasses of this package, such as its frame steps; anything
        with an attribute or method `fingerprint` that gives a string.

    Returns
    -------
    str or None
        None for everything else. Long values are hashed.
    """
    try:
        return _describe(value, 0)
    except _Unknown:
        return None


class _Unknown(Exception):
    """Somewhere inside is a value that cannot be described."""


def _describe(value: Any, depth: int) -> str:
    kind = type(value)
    if depth > _DEEPEST:
        raise _Unknown
    if value is None or kind in (bool, int, float, complex, str):
        return repr(value)  # of floats: the shortest text that reads back the same; every NaN is "nan"
    if kind is bytes:
        return f"bytes({_digest(value)})"
    if kind is np.ndarray or isinstance(value, np.generic):  # no subclasses: a masked array has a mask
        return _describe_array(np.asarray(value))
    if isinstance(value, np.dtype):
        return _describe_dtype(value)
    if kind is type and issubclass(value, np.generic):
        return _describe_dtype(np.dtype(value))
    if isinstance(value, enum.Enum):
        return f"{_class_name(kind)}.{value.name}"
    if kind in (tuple, list):
        return f"[{', '.join(_describe(each, depth + 1) for each in value)}]"
    if kind in (set, frozenset):
        return f"set{{{', '.join(sorted(_describe(each, depth + 1) for each in value))}}}"
    if kind is dict:
        if not all(type(key) is str for key in value):
            raise _Unknown
        return f"{{{', '.join(f'{key!r}: {_describe(value[key], depth + 1)}' for key in sorted(value))}}}"
    if isinstance(value, type):
        raise _Unknown
    return _describe_object(value, depth)


def _describe_object(value: Any, depth: int) -> str:
    kind = type(value)
    own = getattr(value, "fingerprint", None)
    if callable(own):
        own = own()
    if isinstance(own, str) and own:
        return f"{_class_name(kind)}({str(own)!r})"
    # Not those of others: what they compute with may lie outside of their fields.
    ours = kind.__module__.partition(".")[0] == __name__.partition(".")[0]
    if not (ours and dataclasses.is_dataclass(kind) and kind.__dataclass_params__.frozen):  # type: ignore[attr-defined]
        raise _Unknown
    fields = (f"{each.name}={_describe(getattr(value, each.name), depth + 1)}" for each in dataclasses.fields(kind))
    return f"{_class_name(kind)}({', '.join(fields)})"


def _describe_dtype(dtype: np.dtype[Any]) -> str:
    if dtype.hasobject or dtype.fields:
        raise _Unknown
    return f"dtype({dtype.str})"


def _describe_array(array: np.ndarray[Any, Any]) -> str:
    return f"array({_describe_dtype(array.dtype)}, {array.shape}, {_digest(array.tobytes())})"


def _digest(data: bytes) -> str:
    return f"{len(data)}, {hashlib.blake2b(data, digest_size=16).hexdigest()}"


def _class_name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"
