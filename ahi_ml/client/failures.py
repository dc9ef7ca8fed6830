"""Botocore's errors as ours, in one place."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

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

__all__ = ["service_error", "translated"]

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
_RETRYABLE = frozenset({"ThrottlingException", "Throttling", "TooManyRequestsException", "InternalServerException"})


def service_error(operation: str, code: str, status: int, text: str, request_id: str, where: str = "") -> ServiceError:
    """The error of the tree for an answer of the service. I/O: none.

    Parameters
    ----------
    operation, code, status, text, request_id
        What was asked and what came back.
    where : str
        Safe ids for the message, such as ``"image set 0aaf..."``.
    """
    alike = _KINDS_OF_STATUS.get(status, "")
    kind, advice = _KINDS.get(code) or _KINDS.get(alike) or (ServiceError, "see the service's message")
    place = f" for {where}" if where else ""
    return kind(
        f"{operation}{place}: {code} ({status}): {text} - {advice} [request {request_id or 'unknown'}]",
        operation=operation,
        code=code,
        status=status,
        request_id=request_id,
        retryable=code in _RETRYABLE or status == 429 or status >= 500,
    )


@contextmanager
def translated(operation: str, where: str = "") -> Iterator[None]:
    """Raise botocore's errors as this package's. I/O: none.

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
        details = error.response.get("Error", {})
        meta = error.response.get("ResponseMetadata", {})
        raise service_error(
            operation,
            str(details.get("Code", "Unknown")),
            int(meta.get("HTTPStatusCode", 0)),
            str(details.get("Message", "")),
            str(meta.get("RequestId", "")),
            where,
        ) from error
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
        raise AccessDeniedError(
            f"{operation}: no usable AWS credentials: {error}. Set AWS_PROFILE, or work on a folder: "
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
        place = f" for {where}" if where else ""
        raise ConnectionFailedError(
            f"{operation}{place}: no usable answer ({type(error).__name__}): {error}. Check the network and "
            "the endpoint",
            operation=operation,
            retryable=True,
        ) from error
    except botocore_errors.BotoCoreError as error:  # of its configuration, its parameters, its data files
        raise ConfigError(f"{operation}: {error}") from error
