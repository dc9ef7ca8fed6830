"""The REST-JSON protocol seen from the server, beside the floors: requests to calls, results to responses.

Everything follows from botocore's model of the service: routes, where a member travels, its constraints (see
`shapes`), the status of an error. Nothing is written per operation, and nothing here knows what an operation does.
"""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn
from urllib.parse import unquote

from botocore.exceptions import DataNotFoundError
from botocore.loaders import Loader
from botocore.model import OperationModel, ServiceModel

from ahi_ml.errors import LocalStoreError
from ahi_ml.local.shapes import Check, check_of, problem, structure_check, token_members, wire_name, write_of

__all__ = ["Call", "HttpRequest", "HttpResponse", "Protocol", "ServiceFault"]

_LABEL = re.compile(r"\{(\w+)\+?\}")
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


def _members_at(shape: Any, location: str | None) -> list[str]:
    return [n for n, m in shape.members.items() if m.serialization.get("location") == location]


class _Input:
    """Where the members of one operation's request travel, and the checks for them."""

    def __init__(self, operation: OperationModel) -> None:
        shape: Any = operation.input_shape
        self.name = operation.name
        names = {wire_name(shape, name): name for name in _members_at(shape, "uri")}
        path = operation.http["requestUri"].partition("?")[0]
        labels = [names[label] for label in _LABEL.findall(path)]
        self.labels = [(name, check_of(shape.members[name], "text")) for name in labels]
        # The last label takes slashes when its values have them: SDKs encode those of an ARN, others may not.
        greedy = path.endswith("+}")
        if path.endswith("}") and "/" in shape.members[labels[-1]].metadata.get("pattern", ""):
            greedy = True
        literals = [re.escape(text) for text in _LABEL.split(path)[::2]]
        self.pattern = f"{operation.http['method']} {'([^/]*)'.join(literals)}"
        if greedy:
            self.pattern = self.pattern.removesuffix("([^/]*)") + "(.*)"
        self.query = [
            (n, wire_name(shape, n), shape.members[n].type_name == "list", check_of(shape.members[n], "text"))
            for n in _members_at(shape, "querystring")
        ]
        self.required = frozenset(shape.required_members)
        self.tokens = token_members(shape)
        self.payload: str | None = shape.serialization.get("payload")
        self.body: Check | None = None
        if self.payload is not None:
            self.body = check_of(shape.members[self.payload], "json")
        elif in_body := _members_at(shape, None):
            self.body = structure_check(shape, "json", in_body)


class _Output:
    """Where the members of one operation's result travel, and the writers for them."""

    def __init__(self, operation: OperationModel) -> None:
        shape: Any = operation.output_shape
        self.status: int = operation.http.get("responseCode", 200)
        self.headers = [(n, wire_name(shape, n).lower().encode()) for n in _members_at(shape, "header")]
        self.payload: str | None = shape.serialization.get("payload")
        self.check = structure_check(shape, "python")
        body = shape if self.payload is None else shape.members[self.payload]
        self.is_stream = self.payload is not None and body.type_name == "blob"
        self.write = write_of(body, _members_at(shape, None) if self.payload is None else None)


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
                    problems.append(problem(name, "Member must not be null"))
        if route.body is not None:
            document = _read_body(request.body)
            if route.payload is None:
                params |= route.body(document or {}, "", problems)
            elif document is not None:
                params[route.payload] = route.body(document, route.payload, problems)
            elif route.payload in route.required:
                problems.append(problem(route.payload, "Member must not be null"))
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
