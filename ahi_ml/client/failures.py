"""Botocore's errors as ours, and which of them may pass by themselves, in one place."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from botocore import exceptions as botocore_errors
from botocore.parsers import ResponseParserError

from ahi_ml.errors import (
    AccessDeniedError,
    ConfigError,
    ConflictError,
    ConnectionFailedError,
    NotFoundError,
    ServiceError,
    ThrottledError,
)

__all__ = [
    "ATTEMPTS",
    "answer_error",
    "closed",
    "deadline_after",
    "is_late",
    "is_throttling",
    "no_answer",
    "pause_s",
    "repeat_at",
    "request_id",
    "service_error",
    "translated",
    "unsent",
]

ATTEMPTS = 8
"""Requests that one call may send, the first included."""
_DEADLINE_S = 120.0
_LEAST = 1 / 20  # of that a repetition has left when it begins: the time-out of a shorter one would hide the error

_KINDS: dict[str, tuple[type[ServiceError], str]] = {
    "ResourceNotFoundException": (NotFoundError, "check the ids; a new import makes new ones"),
    "AccessDeniedException": (AccessDeniedError, "check the credentials and the policy of their role"),
    "AccessDenied": (AccessDeniedError, "check the credentials and the policy of their role"),
    "ExpiredToken": (AccessDeniedError, "refresh the credentials"),
    "ExpiredTokenException": (AccessDeniedError, "refresh the credentials"),
    "UnrecognizedClientException": (AccessDeniedError, "check the credentials"),
    "InvalidClientTokenId": (AccessDeniedError, "check the credentials"),
    "InvalidSignatureException": (
        AccessDeniedError,
        "check the secret key, the region and this machine's clock",
    ),
    "IncompleteSignature": (AccessDeniedError, "check the credentials"),
    "IncompleteSignatureException": (AccessDeniedError, "check the credentials"),
    "MissingAuthenticationTokenException": (AccessDeniedError, "sign the request"),
    "ConflictException": (ConflictError, "the resource is locked or changed: read it again, then retry"),
    "ThrottlingException": (ThrottledError, "lower the request rate or ask for a higher quota"),
    "Throttling": (ThrottledError, "lower the request rate or ask for a higher quota"),
    "TooManyRequestsException": (ThrottledError, "lower the request rate or ask for a higher quota"),
    "ServiceQuotaExceededException": (ThrottledError, "a quota of the account is used up"),
    "ValidationException": (ServiceError, "the request is not valid"),
    "BadRequestException": (ServiceError, "the request is not valid"),
    "NotAcceptableException": (ServiceError, "the data store cannot give this representation"),
    "InternalServerException": (ServiceError, "the service failed; try again"),
}
_KINDS_OF_STATUS: dict[int, str] = {  # when a proxy answers, or the code is none of the service's
    401: "AccessDeniedException",
    403: "AccessDeniedException",
    404: "ResourceNotFoundException",
    409: "ConflictException",
    429: "ThrottlingException",
}
# What botocore's standard mode takes for throttling, and for trouble that passes.
_THROTTLED = frozenset(
    {
        "BandwidthLimitExceeded",
        "EC2ThrottledException",
        "LimitExceededException",
        "PriorRequestNotComplete",
        "ProvisionedThroughputExceededException",
        "RequestLimitExceeded",
        "RequestThrottled",
        "RequestThrottledException",
        "SlowDown",
        "ThrottledException",
        "Throttling",
        "ThrottlingException",
        "TooManyRequestsException",
        "TransactionInProgressException",
    }
)
_RETRYABLE = _THROTTLED | {"InternalServerException", "RequestTimeout", "RequestTimeoutException"}
_LONGEST_TEXT = 500  # an error page of a proxy is no message


def pause_s(attempt: int) -> float:
    """Seconds to wait after this attempt, from 1: exponential with full jitter, as botocore's. I/O: none."""
    return random.random() * float(min(2 ** (attempt - 1), 20))


def deadline_after(now: float) -> float:
    """When a call must have ended whose first request is sent now. I/O: none."""
    return now + _DEADLINE_S


def repeat_at(attempt: int, now: float, deadline: float) -> float | None:
    """When to try again after this attempt, from 1; None when too little time would be left. I/O: none."""
    at = now + pause_s(attempt)
    return None if is_late(at, deadline) else at


def is_late(now: float, deadline: float) -> bool:
    """Whether too little time is left to repeat a request now. I/O: none."""
    return now > deadline - _DEADLINE_S * _LEAST


def is_throttling(code: str, status: int) -> bool:
    """Whether an answer says that requests come too fast. I/O: none."""
    return code in _THROTTLED or status == 429


def service_error(operation: str, code: str, status: int, text: str, request_id: str, where: str = "") -> ServiceError:
    """The error of the tree for an answer of the service. I/O: none.

    Parameters
    ----------
    operation, code, status, text, request_id
        What was asked and what came back.
    where : str
        Safe ids for the message, such as ``"image set 0aaf..."``.
    """
    alike = "Throttling" if code in _THROTTLED else _KINDS_OF_STATUS.get(status, "")
    kind, advice = _KINDS.get(code) or _KINDS.get(alike) or (ServiceError, "see the service's message")
    # An image set that is still being processed cannot be read yet; a write that conflicts stays wrong.
    unready = kind is ConflictError and operation.startswith("Get")
    place = f" for {where}" if where else ""
    text = text if len(text) <= _LONGEST_TEXT else f"{text[:_LONGEST_TEXT]}..."
    return kind(
        f"{operation}{place}: {code} ({status}): {text} - {advice} [request {request_id or 'unknown'}]",
        operation=operation,
        code=code,
        status=status,
        request_id=request_id,
        retryable=code in _RETRYABLE or is_throttling(code, status) or status >= 500 or unready,
    )


def answer_error(operation: str, answer: Mapping[str, Any], where: str = "") -> ServiceError:
    """The error of the tree for an error response as botocore's parsers give it. I/O: none."""
    details, meta = answer.get("Error", {}), answer.get("ResponseMetadata", {})
    return service_error(
        operation,
        str(details.get("Code", "Unknown")),
        int(meta.get("HTTPStatusCode", 0)),
        str(details.get("Message", "")),
        request_id(meta),
        where,
    )


def request_id(meta: Mapping[str, Any]) -> str:
    """The service's id of a request, from the metadata that botocore gives an answer; empty without one. I/O: none."""
    # Of a page that is no error document botocore leaves the id in the headers.
    return str(meta.get("RequestId") or meta.get("HTTPHeaders", {}).get("x-amzn-requestid", ""))


def no_answer(operation: str, why: str, where: str = "", request_id: str = "") -> ConnectionFailedError:
    """The error when nothing came back, or nothing that can be used. I/O: none.

    Parameters
    ----------
    operation, why
        What was asked and what came back.
    where : str
        Safe ids for the message.
    request_id : str
        Of an answer that cannot be used.
    """
    place = f" for {where}" if where else ""
    why = re.sub(r"//\S*@", "//***@", why)  # the URL of a proxy may hold a password
    known = f" [request {request_id}]" if request_id else ""
    return ConnectionFailedError(
        f"{operation}{place}: no usable answer: {why}. Check the network and the endpoint{known}",
        operation=operation,
        request_id=request_id,
        retryable=True,
    )


def closed(operation: str, where: str = "") -> ConnectionFailedError:
    """The error of a request that closing the connection has ended or forbids. I/O: none."""
    place = f" for {where}" if where else ""
    return ConnectionFailedError(f"{operation}{place}: the connection to the data store is closed", operation=operation)


def unsent(operation: str, cause: Exception, where: str = "") -> ServiceError:
    """The error for something unforeseen. Its text may quote header values and stays out. I/O: none."""
    place = f" for {where}" if where else ""
    error = ServiceError(f"{operation}{place}: failed by {type(cause).__name__}", operation=operation)
    error.__cause__ = cause
    return error


@contextmanager
def translated(operation: str, where: str = "", request_id: str = "") -> Iterator[None]:
    """Raise botocore's errors as this package's. I/O: none.

    Parameters
    ----------
    operation : str
        What is asked.
    where : str
        Safe ids for the message.
    request_id : str
        Of the answer, where it has begun to come.

    Raises
    ------
    ServiceError
        Or one of its kinds, chained to botocore's error.
    ConfigError
        No region or no such profile: nothing was sent.
    """
    try:
        yield
    except botocore_errors.ClientError as error:
        raise answer_error(operation, error.response, where) from error
    except (
        botocore_errors.NoCredentialsError,
        botocore_errors.PartialCredentialsError,
        botocore_errors.CredentialRetrievalError,
        botocore_errors.TokenRetrievalError,
        botocore_errors.SSOError,
        botocore_errors.LoginError,
        botocore_errors.NoAuthTokenError,
        botocore_errors.MetadataRetrievalError,
    ) as error:
        place = f" for {where}" if where else ""
        raise AccessDeniedError(
            f"{operation}{place}: no usable AWS credentials: {error}. Set AWS_PROFILE, or work on a folder: "
            "connect('my-store')",
            operation=operation,
        ) from error
    except (botocore_errors.NoRegionError, botocore_errors.ProfileNotFound) as error:
        raise ConfigError(f"{operation}: {error}. Pass region= or profile= to connect") from error
    except (
        botocore_errors.ConnectionError,
        botocore_errors.HTTPClientError,
        botocore_errors.IncompleteReadError,
        botocore_errors.ResponseStreamingError,
        ResponseParserError,
    ) as error:
        raise no_answer(operation, f"{error} ({type(error).__name__})", where, request_id) from error
    except botocore_errors.BotoCoreError as error:  # of its configuration, its parameters, its data files
        raise ConfigError(f"{operation}: {error}") from error
