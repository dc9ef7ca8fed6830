"""The REST-JSON protocol seen from the server, beside the floors: requests to calls, results to responses.

Everything follows from botocore's model of the service: routes, where a member travels, its constraints, the
status of an error. Nothing is written per operation, and nothing here knows what an operation does.
"""

from __future__ import annotations

import base64
import json
import re
import sys
import uuid
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any, Literal, NoReturn
from urllib.parse import unquote

from botocore.exceptions import DataNotFoundError
from botocore.loaders import Loader
from botocore.model import OperationModel, ServiceModel, Shape

from ahi_ml.errors import LocalStoreError

__all__ = ["Call", "HttpRequest", "HttpResponse", "Protocol", "ServiceFault"]

Mode = Literal["json", "text", "python"]  # how a value stands: in a body, in a path or query, in a result
Check = Callable[[Any, str, list[str]], Any]  # (value, where, problems) -> value as Python wants it
Write = Callable[[Any], Any]

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_LABEL = re.compile(r"\{(\w+)\+?\}")
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

_LISTED_PROBLEMS = 20


@dataclass(frozen=True, slots=True)
class HttpRequest:
    """A request as it arrived: path and query undecoded, header names in lower case."""

    method: str
    raw_path: str
    query: str
    headers: Mapping[str, str]
    body: bytes


@dataclass(frozen=True, slots=True)
class HttpResponse:
    """A response to be sent: header names in lower case, no Content-Length (the sender's business)."""

    status: int
    headers: list[tuple[bytes, bytes]]
    body: bytes | memoryview


@dataclass(frozen=True, slots=True)
class Call:
    """An operation and its parameters, named and typed as boto3 takes them."""

    operation: str
    params: dict[str, Any]


class ServiceFault(Exception):
    """An error to be answered to the client.

    Parameters
    ----------
    code : str
        Code of the service, such as ``"ValidationException"``.
    text : str
        Message for the client. It must not repeat values from the request: they may be patient data.
    status : int, optional
        HTTP status; 0 means the one the model gives `code`.
    """

    def __init__(self, code: str, text: str, status: int = 0) -> None:
        super().__init__(code, text, status)
        self.code = code
        self.text = text
        self.status = status

    def __str__(self) -> str:
        return f"{self.code}: {self.text}"


def _fail(where: str, constraint: str) -> str:
    return f"Value at '{where}' failed to satisfy constraint: {constraint}"


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
            problems.append(_fail(where, f"Member must be {noun}"))
        else:
            if refusal := judge(value):
                problems.append(_fail(where, refusal))
        return value

    return check


def _present(check: Check, value: Any, where: str, problems: list[str]) -> Any:
    if value is None:
        problems.append(_fail(where, "Member must not be null"))
        return None
    return check(value, where, problems)


def _container(shape: Any, mode: Mode) -> Check:
    """Check a list or a map."""
    is_list = shape.type_name == "list"
    kind, noun = (list, "a list") if is_list else (dict, "a map")
    limits = _size_limits(shape, _MAP_MAXIMA.get(shape.name, sys.maxsize))
    check_key = None if is_list else _check(shape.key, mode)
    check_item = _check(shape.member if is_list else shape.value, mode)

    def check(value: Any, where: str, problems: list[str]) -> Any:
        refusal = limits(len(value)) if isinstance(value, kind) else f"Member must be {noun}"
        if refusal:
            problems.append(_fail(where, refusal))
            return None
        if check_key is None:
            return [_present(check_item, item, f"{where}.{n}.member", problems) for n, item in enumerate(value, 1)]
        for key in value:  # a key is as much the client's data as a value: it does not stand in the path
            check_key(key, f"{where}.key", problems)
        return {key: _present(check_item, item, f"{where}.value", problems) for key, item in value.items()}

    return check


def _structure(shape: Any, mode: Mode, names: Iterable[str] | None = None) -> Check:
    """Check the members `names` of a structure, all of them when None."""
    members = [
        (name, name if mode == "python" else _wire_name(shape, name), _check(shape.members[name], mode))
        for name in (shape.members if names is None else names)
    ]
    required = frozenset(shape.required_members) - _token_members(shape)
    known = {key for _, key, _ in members}
    choices = ", ".join(name for name, _, _ in members) if shape.is_tagged_union else ""

    def check(value: Any, where: str, problems: list[str]) -> Any:
        if not isinstance(value, dict):
            problems.append(_fail(where, "Member must be a structure"))
            return None
        prefix = f"{where}." if where else ""
        found = {}
        for name, key, member in members:
            item = value.get(key)
            if item is not None:
                found[name] = member(item, prefix + name, problems)
            elif name in required:
                problems.append(_fail(prefix + name, "Member must not be null"))
        if choices and len(found) != 1:
            problems.append(_fail(where, f"Member must have exactly one member of the set: [{choices}]"))
        if mode == "python":  # a client may be newer than the model, our own results may not
            unknown = sorted(value.keys() - known)
            problems.extend(_fail(f"{prefix}{key}", "Member must be in the model") for key in unknown)
        return found

    return check


def _check(shape: Shape, mode: Mode) -> Check:
    if shape.type_name == "structure":
        return _structure(shape, mode)
    return (_container if shape.type_name in ("list", "map") else _leaf)(shape, mode)


def _wire_name(shape: Any, name: str) -> str:
    return str(shape.members[name].serialization.get("name", name))


def _token_members(shape: Any) -> frozenset[str]:
    return frozenset(name for name, member in shape.members.items() if member.metadata.get("idempotencyToken"))


def _epoch_seconds(value: Any) -> Any:
    if isinstance(value, datetime):
        value = (value if value.tzinfo else value.replace(tzinfo=UTC)).timestamp()
    return round(value, 3)


def _write(shape: Any, names: Iterable[str] | None = None) -> Write | None:
    """Return what turns a value into plain JSON, None when nothing needs turning. `names` as above."""
    if shape.type_name == "timestamp":
        return _epoch_seconds
    if shape.type_name == "blob":
        return lambda value: base64.b64encode(value).decode()
    if shape.type_name == "structure":
        kept = shape.members if names is None else names
        turns = [(n, _wire_name(shape, n), _write(shape.members[n])) for n in kept]
        return lambda value: {
            key: item if turn is None else turn(item)
            for name, key, turn in turns
            if (item := value.get(name)) is not None
        }
    if shape.type_name == "list" and (item_turn := _write(shape.member)):
        return lambda value: [item_turn(item) for item in value]
    if shape.type_name == "map" and (value_turn := _write(shape.value)):
        return lambda value: {key: value_turn(item) for key, item in value.items()}
    return None


def _members_at(shape: Any, location: str | None) -> list[str]:
    return [n for n, m in shape.members.items() if m.serialization.get("location") == location]


class _Input:
    """Where the members of one operation's request travel, and the checks for them."""

    def __init__(self, operation: OperationModel) -> None:
        shape: Any = operation.input_shape
        self.name = operation.name
        names = {_wire_name(shape, name): name for name in _members_at(shape, "uri")}
        path = operation.http["requestUri"].partition("?")[0]
        labels = [names[label] for label in _LABEL.findall(path)]
        self.labels = [(name, _check(shape.members[name], "text")) for name in labels]
        # The last label takes slashes when its values have them: SDKs encode those of an ARN, others may not.
        greedy = path.endswith("+}")
        if path.endswith("}") and "/" in shape.members[labels[-1]].metadata.get("pattern", ""):
            greedy = True
        literals = [re.escape(text) for text in _LABEL.split(path)[::2]]
        self.pattern = f"{operation.http['method']} {'([^/]*)'.join(literals)}"
        if greedy:
            self.pattern = self.pattern.removesuffix("([^/]*)") + "(.+)"
        self.query = [
            (n, _wire_name(shape, n), shape.members[n].type_name == "list", _check(shape.members[n], "text"))
            for n in _members_at(shape, "querystring")
        ]
        self.required = frozenset(shape.required_members)
        self.tokens = _token_members(shape)
        self.payload: str | None = shape.serialization.get("payload")
        self.body: Check | None = None
        if self.payload is not None:
            self.body = _check(shape.members[self.payload], "json")
        elif in_body := _members_at(shape, None):
            self.body = _structure(shape, "json", in_body)


class _Output:
    """Where the members of one operation's result travel, and the writers for them."""

    def __init__(self, operation: OperationModel) -> None:
        shape: Any = operation.output_shape
        self.status: int = operation.http.get("responseCode", 200)
        self.headers = [(n, _wire_name(shape, n).lower().encode()) for n in _members_at(shape, "header")]
        self.payload: str | None = shape.serialization.get("payload")
        self.check = _structure(shape, "python")
        body = shape if self.payload is None else shape.members[self.payload]
        self.is_stream = self.payload is not None and body.type_name == "blob"
        self.write = _write(body, _members_at(shape, None) if self.payload is None else None)


_JSON = (b"content-type", b"application/json")


def _reject_constant(text: str) -> NoReturn:
    raise ValueError("NaN and infinities are not JSON")


_decode_json = json.JSONDecoder(parse_constant=_reject_constant).decode
_encode_json = json.JSONEncoder(separators=(",", ":")).encode


def _read_body(body: bytes) -> dict[str, Any] | None:
    if not body:
        return None
    try:
        document = _decode_json(body.decode())
    except (ValueError, RecursionError):  # nesting is bounded by the parser's own recursion limit
        raise ServiceFault("SerializationException", "The request body is not a JSON document", 400) from None
    if document is not None and not isinstance(document, dict):
        raise ServiceFault("SerializationException", "The request body is not a JSON object", 400)
    return document


def _read_query(query: str) -> dict[str, list[str]]:
    """Decode a query; a plus sign stays one, as in the signature."""
    members: dict[str, list[str]] = {}
    for pair in query.split("&") if query else ():
        key, _, value = pair.partition("=")
        members.setdefault(unquote(key), []).append(unquote(value))
    return members


class Protocol:
    """The protocol of one service, compiled from its model. Holds no other state; safe in any thread.

    I/O: reads botocore's model of the service.

    Parameters
    ----------
    service : str, optional
        The service's name in botocore.

    Raises
    ------
    LocalStoreError
        botocore does not have the model.
    """

    def __init__(self, service: str = "medical-imaging") -> None:
        try:
            description = Loader().load_service_model(service, "service-2")
        except DataNotFoundError as error:
            raise LocalStoreError(f"botocore has no model of {service!r}: update boto3") from error
        model = ServiceModel(description, service)
        errors: Any = model.error_shapes
        operations = [model.operation_model(name) for name in model.operation_names]
        self._outputs = {operation.name: _Output(operation) for operation in operations}
        self._statuses: dict[str, int] = {
            shape.error_code: int(shape.metadata["error"]["httpStatusCode"]) for shape in errors
        }
        # One alternation for all routes, those with fewest labels first: the more specific route is meant.
        inputs = sorted(map(_Input, operations), key=lambda each: len(each.labels))
        self._inputs = {each.name: each for each in inputs}
        self._match = re.compile("|".join(f"(?P<{each.name}>{each.pattern})" for each in inputs), re.S).fullmatch

    @property
    def operations(self) -> tuple[str, ...]:
        """Names of the operations, such as ``"GetImageFrame"``."""
        return tuple(self._outputs)

    def parse(self, request: HttpRequest) -> Call:
        """Find the operation a request asks for; decode and validate its parameters.

        Idempotency tokens that the client left out are filled in. Unknown members are ignored, as the service
        does. A payload member is present when a body is, even an empty object.

        I/O: none.

        Parameters
        ----------
        request : HttpRequest
            The request, its signature already verified.

        Returns
        -------
        Call
            Parameters as boto3 takes them: bytes for blobs, aware UTC datetimes for timestamps.

        Raises
        ------
        ServiceFault
            UnknownOperationException, SerializationException or ValidationException.
        """
        match = self._match(f"{request.method} {request.raw_path}")
        if match is None or match.lastgroup is None or match.lastindex is None:
            raise ServiceFault("UnknownOperationException", "No operation has this method and path", 404)
        route = self._inputs[match.lastgroup]
        params: dict[str, Any] = {}
        problems: list[str] = []
        for n, (name, check) in enumerate(route.labels, match.lastindex + 1):  # labels: groups in the route's
            params[name] = check(unquote(match[n]), name, problems)
        if route.query:
            sent = _read_query(request.query)
            for name, key, is_list, check in route.query:
                values = sent.get(key)
                if values is not None:
                    params[name] = check(values if is_list else values[-1], name, problems)
                elif name in route.required:
                    problems.append(_fail(name, "Member must not be null"))
        if route.body is not None:
            document = _read_body(request.body)
            if route.payload is None:
                params |= route.body(document or {}, "", problems)
            elif document is not None:
                params[route.payload] = route.body(document, route.payload, problems)
            elif route.payload in route.required:
                problems.append(_fail(route.payload, "Member must not be null"))
        if problems:
            count = f"{len(problems)} validation error{'s' if len(problems) > 1 else ''} detected: "
            raise ServiceFault("ValidationException", count + "; ".join(problems[:_LISTED_PROBLEMS]), 400)
        for name in route.tokens - params.keys():
            params[name] = str(uuid.uuid4())
        return Call(route.name, params)

    def serialise(self, operation: str, result: dict[str, Any], request_id: str) -> HttpResponse:
        """Build the response that carries a result.

        Members that are None or unknown to the model are left out. A streamed blob is passed on, not copied.

        I/O: none.

        Parameters
        ----------
        operation : str
            Name of the operation.
        result : dict
            The result as boto3 would show it.
        request_id : str
            Identifier of the request, for the client's logs.
        """
        output = self._outputs[operation]
        headers = [(b"x-amzn-requestid", request_id.encode("ascii"))]
        for name, header in output.headers:
            value = result.get(name)
            if value is not None:
                headers.append((header, str(value).encode("latin-1")))
        payload: Any = result if output.payload is None else result.get(output.payload)
        if output.is_stream:
            return HttpResponse(output.status, headers, b"" if payload is None else payload)
        headers.append(_JSON)
        document = output.write(payload) if output.write and payload is not None else {}
        return HttpResponse(output.status, headers, _encode_json(document).encode())

    def serialise_fault(self, fault: ServiceFault, request_id: str) -> HttpResponse:
        """Build the response that carries an error. I/O: none."""
        headers = [
            (b"x-amzn-requestid", request_id.encode("ascii")),
            (b"x-amzn-errortype", fault.code.encode("ascii")),
            _JSON,
        ]
        status = fault.status or self.error_status(fault.code)
        return HttpResponse(status, headers, _encode_json({"message": fault.text}).encode())

    def error_status(self, code: str) -> int:
        """Return the HTTP status the model gives an error code, 500 when it has none."""
        return self._statuses.get(code, 500)

    def check(self, operation: str, result: dict[str, Any]) -> list[str]:
        """List what is missing, malformed or unknown in a result; empty when all is well. I/O: none."""
        problems: list[str] = []
        self._outputs[operation].check(result, "", problems)
        return problems
