"""The client side of the service: sessions, errors, and the transport of frames."""

from __future__ import annotations

from ahi_ml.client.failures import service_error, translated
from ahi_ml.client.sessions import AccessKeys, Service, make_client
from ahi_ml.client.transport import Boto3Transport, FrameTransport

__all__ = [
    "AccessKeys",
    "Boto3Transport",
    "FrameTransport",
    "Service",
    "make_client",
    "service_error",
    "translated",
]
