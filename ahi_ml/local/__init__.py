"""The embedded data store: the service's protocol on loopback. Most of its users need `connect` only."""

from ahi_ml.local.settings import Limits, Settings, configure

__all__ = ["Limits", "Settings", "configure"]
