"""Series as volumes: lazy xarray arrays in modality units on millimetre coordinates. Floor 5."""

from __future__ import annotations

from ahi_ml.volume.opening import open_volume

__all__ = ["open_volume"]
