"""The client side of the service: sessions, errors, and the transport of frames."""

from __future__ import annotations

from ahi_ml.client.documents import image_set_document
from ahi_ml.client.failures import service_error, translated
from ahi_ml.client.partial import Part
from ahi_ml.client.sessions import AccessKeys, Connection, Service, make_connection, make_s3_client
from ahi_ml.client.threaded import Boto3Transport
from ahi_ml.client.transport import BestTransport, FrameTransport

__all__ = [
    "AccessKeys",
    "BestTransport",
    "Boto3Transport",
    "Connection",
    "FrameTransport",
    "Part",
    "Service",
    "image_set_document",
    "make_connection",
    "make_s3_client",
    "service_error",
    "translated",
]
