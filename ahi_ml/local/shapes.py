"""The shapes of botocore's model as checks and writers, beside the floors: one value in, what Python or JSON wants out.

A check validates a value that a client sent (or that a handler made) against the constraints of its shape and
converts it; it lists every problem instead of stopping at the first. A writer turns a result into plain JSON.
"""

from __future__ import annotations

import base64
import re
import sys
from collections.abc import Callable, Iterable
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any, Literal

from botocore.model import Shape

from ahi_ml.errors import LocalStoreError

__all__ = ["Check", "Mode", "Write", "check_of", "problem", "structure_check", "token_members", "wire_name", "write_of"]

Mode = Literal["json", "text", "python"]  # how a value stands: in a body, in a path or query, in a result
Check = Callable[[Any, str, list[str]], Any]  # (value, where, problems) -> value as Python wants it
Write = Callable[[Any], Any]

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_INTEGER = re.compile(r"-?[0-9]{1,19}")

# A patterned text without a maximum could be as long as a body. The figure lies below the number of digits
# int() takes, because version ids are digits.
_LONGEST_WITHOUT_MAXIMUM = 4096

# Python's matcher needs exponential time for the first form when the text ends in blanks; the second accepts
# the same texts in linear time.
_LINEAR_PATTERNS = {"[a-zA-Z0-9!-~]+([a-zA-Z0-9!-~ ]*[a-zA-Z0-9!-~]+)*": "[!-~](?:[ -~]*[!-~])?"}
_NESTED_REPEATS = re.compile(r"[+*}]\)(?:[+*]|\{[0-9]+,\})")

# botocore's copy of the model leaves out the bounds of maps.
_MAP_MAXIMA = {"TagMap": 50}


def problem(where: str, constraint: str) -> str:
    """What a client is told about a value; it never repeats the value."""
    return f"Value at '{where}' failed to satisfy constraint: {constraint}"


def check_of(shape: Shape, mode: Mode) -> Check:
    """Return the check of a shape's values."""
    if shape.type_name == "structure":
        return structure_check(shape, mode)
    return (_container if shape.type_name in ("list", "map") else _leaf)(shape, mode)


def structure_check(shape: Any, mode: Mode, names: Iterable[str] | None = None) -> Check:
    """Check the members `names` of a structure, all of them when None."""
    members = [
        (name, name if mode == "python" else wire_name(shape, name), check_of(shape.members[name], mode))
        for name in (shape.members if names is None else names)
    ]
    required = frozenset(shape.required_members) - token_members(shape)
    known = {key for _, key, _ in members}
    choices = ", ".join(name for name, _, _ in members) if shape.is_tagged_union else ""

    def check(value: Any, where: str, problems: list[str]) -> Any:
        if not isinstance(value, dict):
            problems.append(problem(where, "Member must be a structure"))
            return None
        prefix = f"{where}." if where else ""
        found = {}
        for name, key, member in members:
            item = value.get(key)
            if item is not None:
                found[name] = member(item, prefix + name, problems)
            elif name in required:
                problems.append(problem(prefix + name, "Member must not be null"))
        if choices and len(found) != 1:
            problems.append(problem(where, f"Member must have exactly one member of the set: [{choices}]"))
        if mode == "python":  # a client may be newer than the model, our own results may not
            unknown = sorted(value.keys() - known)
            problems.extend(problem(f"{prefix}{key}", "Member must be in the model") for key in unknown)
        return found

    return check


def _container(shape: Any, mode: Mode) -> Check:
    """Check a list or a map."""
    is_list = shape.type_name == "list"
    kind, noun = (list, "a list") if is_list else (dict, "a map")
    limits = _size_limits(shape, _MAP_MAXIMA.get(shape.name, sys.maxsize))
    check_key = None if is_list else check_of(shape.key, mode)
    check_item = check_of(shape.member if is_list else shape.value, mode)

    def check(value: Any, where: str, problems: list[str]) -> Any:
        refusal = limits(len(value)) if isinstance(value, kind) else f"Member must be {noun}"
        if refusal:
            problems.append(problem(where, refusal))
            return None
        if check_key is None:
            return [_present(check_item, item, f"{where}.{n}.member", problems) for n, item in enumerate(value, 1)]
        for key in value:  # a key is as much the client's data as a value: it does not stand in the path
            check_key(key, f"{where}.key", problems)
        return {key: _present(check_item, item, f"{where}.value", problems) for key, item in value.items()}

    return check


def _present(check: Check, value: Any, where: str, problems: list[str]) -> Any:
    if value is None:
        problems.append(problem(where, "Member must not be null"))
        return None
    return check(value, where, problems)


def _leaf(shape: Shape, mode: Mode) -> Check:
    kind, as_text = shape.type_name, mode == "text"
    convert: Callable[[Any], Any]
    judge: Callable[[Any], str]
    match kind:
        case "string":
            noun, convert, judge = "a string", _instance(str), _string_limits(shape)
        case "integer" | "long":
            noun, judge = "an integer", _number_limits(shape)
            convert = _to_integer if as_text else _instance(int)
        case "float" | "double":
            noun, judge = "a number", _number_limits(shape)
            convert = float if as_text else _instance(int, float)
        case "boolean":
            noun, judge = "a boolean", lambda value: ""
            convert = {"true": True, "false": False}.__getitem__ if as_text else _instance(bool)
        case "timestamp":
            noun, convert, judge = "a timestamp", _to_time, lambda value: ""
        case "blob":
            limits = _size_limits(shape)
            noun, judge = "Base64 text", lambda value: limits(memoryview(value).nbytes)
            convert = partial(base64.b64decode, validate=True)
            if mode == "python":
                noun, convert = "bytes", _instance(bytes, bytearray, memoryview)
        case _:
            raise LocalStoreError(f"the service model has a shape of unknown type {kind!r}: {shape.name}")

    def check(value: Any, where: str, problems: list[str]) -> Any:
        try:
            value = convert(value)
        except (KeyError, OverflowError, TypeError, ValueError):
            problems.append(problem(where, f"Member must be {noun}"))
        else:
            if refusal := judge(value):
                problems.append(problem(where, refusal))
        return value

    return check


def _compile_pattern(pattern: str | None) -> re.Pattern[str] | None:
    """Return a Java-style pattern for `fullmatch`, None when it cannot be checked safely.

    A model newer than this code may bring a pattern that Python cannot express, or one that takes exponential
    time. Letting a value pass is then better than not starting, or than standing still.
    """
    if pattern is None:
        return None
    pattern = _LINEAR_PATTERNS.get(pattern, pattern).replace(r"\p{ASCII}", r"[\x00-\x7F]")
    if _NESTED_REPEATS.search(pattern):
        return None
    try:
        return re.compile(pattern, re.ASCII)  # in Java \d and \w are ASCII
    except re.error:
        return None


def _size_limits(shape: Shape, high: int = sys.maxsize) -> Callable[[int], str]:
    low, high = shape.metadata.get("min", 0), shape.metadata.get("max", high)

    def judge(size: int) -> str:
        if size > high:
            return f"Member must have length less than or equal to {high}"
        return f"Member must have length greater than or equal to {low}" if size < low else ""

    return judge


def _string_limits(shape: Shape) -> Callable[[str], str]:
    allowed: list[str] = shape.metadata.get("enum", [])
    if allowed:
        refusal = f"Member must satisfy enum value set: [{', '.join(allowed)}]"
        return lambda value: "" if value in allowed else refusal
    pattern = shape.metadata.get("pattern")
    compiled = _compile_pattern(pattern)
    size = _size_limits(shape, _LONGEST_WITHOUT_MAXIMUM if pattern else sys.maxsize)

    def judge(value: str) -> str:
        if refusal := size(len(value)):  # the length first: it bounds what the pattern costs
            return refusal
        if compiled is not None and compiled.fullmatch(value) is None:
            return f"Member must satisfy regular expression pattern: {pattern}"
        return "" if value.isascii() or _encodable(value) else "Member must be valid Unicode text"

    return judge


def _encodable(value: str) -> bool:
    # JSON can spell half a surrogate pair; no file, database or response could hold it.
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _number_limits(shape: Shape) -> Callable[[float], str]:
    bits = {"integer": 31, "long": 63}.get(shape.type_name, 1024)
    low, high = shape.metadata.get("min", -(1 << bits)), shape.metadata.get("max", (1 << bits) - 1)

    def judge(value: float) -> str:
        if value > high:
            return f"Member must have value less than or equal to {high}"
        return "" if value >= low else f"Member must have value greater than or equal to {low}"

    return judge


def _instance(*kinds: type) -> Callable[[Any], Any]:
    def convert(value: Any) -> Any:
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            raise TypeError
        return value

    return convert


def _to_integer(value: str) -> int:
    if not _INTEGER.fullmatch(value):  # int() takes blanks and underscores too
        raise ValueError
    return int(value)


def _to_time(value: Any) -> datetime:
    if isinstance(value, datetime):
        return value
    if isinstance(value, str):
        moment = datetime.fromisoformat(value)
        return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).astimezone(UTC)
    return _EPOCH + timedelta(seconds=_instance(int, float)(value))


def write_of(shape: Any, names: Iterable[str] | None = None) -> Write | None:
    """Return what turns a value into plain JSON, None when nothing needs turning. `names` as in `structure_check`."""
    if shape.type_name == "timestamp":
        return _epoch_seconds
    if shape.type_name == "blob":
        return lambda value: base64.b64encode(value).decode()
    if shape.type_name == "structure":
        kept = shape.members if names is None else names
        turns = [(n, wire_name(shape, n), write_of(shape.members[n])) for n in kept]
        return lambda value: {
            key: item if turn is None else turn(item)
            for name, key, turn in turns
            if (item := value.get(name)) is not None
        }
    if shape.type_name == "list" and (item_turn := write_of(shape.member)):
        return lambda value: [item_turn(item) for item in value]
    if shape.type_name == "map" and (value_turn := write_of(shape.value)):
        return lambda value: {key: value_turn(item) for key, item in value.items()}
    return None


def _epoch_seconds(value: Any) -> Any:
    if isinstance(value, datetime):
        value = (value if value.tzinfo else value.replace(tzinfo=UTC)).timestamp()
    return round(value, 3)


def wire_name(shape: Any, name: str) -> str:
    """Return what a member is called on the wire."""
    return str(shape.members[name].serialization.get("name", name))


def token_members(shape: Any) -> frozenset[str]:
    """Return the members that are idempotency tokens, which a client may leave out."""
    return frozenset(name for name, member in shape.members.items() if member.metadata.get("idempotencyToken"))
