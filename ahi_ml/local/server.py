"""The HTTP face of the embedded store: a bare ASGI callable over the operations.

It authenticates before it parses, answers frames on the event loop (a look-up and one file read)
and everything else in threads.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import struct
import uuid
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

from ahi_ml.local.injector import Fate
from ahi_ml.local.operations import Context, call
from ahi_ml.local.protocol import HttpRequest, HttpResponse, Protocol, ServiceFault
from ahi_ml.local.signature import Verifier

__all__ = ["CONNECTION", "Application"]

_LOG = logging.getLogger(__name__)
_MOST_BODY = 4 * 2**20  # 260,000 characters to copy, each escaped in JSON, or 1,000 paths of metadata files
_INLINE = frozenset({"GetImageFrame"})
CONNECTION = "ahi_ml.connection"
"""Where the scope of a request holds its connection: faults cut it, and a good signature makes it a known one."""
_NO_ANSWER = HttpResponse(500, [], b"")
_RESET = struct.pack("ii", 1, 0)  # struct linger: closing sends RST

Message = dict[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


class Application:
    """The ASGI application.

    Parameters
    ----------
    context : Context
        What the operations work with.
    verifier : Verifier
        Checks the signature of every request.
    """

    def __init__(self, context: Context, verifier: Verifier) -> None:
        self._context = context
        self._verifier = verifier
        self._protocol = Protocol()
        self._threads = ThreadPoolExecutor(8, "ahi-ml-operation")
        self._injector = context.injector

    def close(self) -> None:
        """End the threads, once their operations are done."""
        self._threads.shutdown()

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            return
        request_id = str(uuid.uuid4())
        fate: Fate = "answer"
        try:
            fate, response = await self._answer(scope, receive, request_id)
        except ServiceFault as fault:
            response = self._protocol.serialise_fault(fault, request_id)
        except Exception:
            _LOG.exception("request %s", request_id)
            failure = ServiceFault("InternalServerException", f"The request {request_id} failed; see the server's log")
            response = self._protocol.serialise_fault(failure, request_id)
        if delay := self._injector.delay_s():
            await asyncio.sleep(delay)
        if fate == "reset":
            await _cut(scope, reset=True)
            return
        body = self._injector.corrupt(response.body) if fate == "corrupt" else response.body
        head = {"type": "http.response.start", "status": response.status}
        await send({**head, "headers": [*response.headers, (b"content-length", b"%d" % len(body))]})
        if fate == "truncate" and len(body) > 1:
            await send({"type": "http.response.body", "body": body[: len(body) // 2], "more_body": True})
            await _cut(scope, reset=False)
            return
        await send({"type": "http.response.body", "body": body})

    async def _answer(self, scope: Message, receive: Receive, request_id: str) -> tuple[Fate, HttpResponse]:
        head = HttpRequest(
            scope["method"],
            scope["raw_path"].decode("latin-1"),
            scope["query_string"].decode("latin-1"),
            _headers(scope["headers"]),
            b"",
        )
        claim = self._verifier.claim(head)  # nobody sends bodies who does not even claim to be somebody
        request = replace(head, body=await _body(receive))
        self._verifier.confirm(claim, request)
        scope[CONNECTION].known = True
        asked = self._protocol.parse(request)
        self._injector.admit(asked.operation)
        if self._injector.resets(asked.operation):
            return "reset", _NO_ANSWER
        if asked.operation in _INLINE and not self._context.catalog.busy():
            result = call(self._context, asked.operation, asked.params)
        else:
            loop = asyncio.get_running_loop()
            result = await loop.run_in_executor(self._threads, call, self._context, asked.operation, asked.params)
        return self._injector.fate(asked.operation), self._protocol.serialise(asked.operation, result, request_id)


def _headers(sent: list[tuple[bytes, bytes]]) -> dict[str, str]:
    headers: dict[str, str] = {}
    for name, value in sent:
        key, text = name.decode("latin-1"), value.decode("latin-1")
        headers[key] = f"{headers[key]},{text}" if key in headers else text  # repeated ones are one, as they are signed
    return headers


async def _cut(scope: Message, *, reset: bool) -> None:
    """End the connection of a request: with a reset, or after what was written has gone out."""
    transport = scope[CONNECTION].transport
    if reset:
        transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
        transport.abort()
    else:
        transport.close()
    while not transport.is_closing():
        await asyncio.sleep(0)
    await asyncio.sleep(0)  # the protocol learns of it in the loop's next round, and then expects no answer
    await asyncio.sleep(0)


async def _body(receive: Receive) -> bytes:
    message = await receive()
    parts = [message.get("body", b"")]
    size = len(parts[0])
    while message.get("more_body") and size <= _MOST_BODY:
        message = await receive()
        parts.append(message.get("body", b""))
        size += len(parts[-1])
    if size > _MOST_BODY:
        raise ServiceFault("RequestEntityTooLargeException", f"A request has at most {_MOST_BODY} bytes", 413)
    return parts[0] if len(parts) == 1 else b"".join(parts)
