"""Medical images from AWS HealthImaging in notebooks, training loops and batch jobs.

Public names load on first use (PEP 562), so that ``import ahi_ml`` costs next to nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ahi_ml._version import __version__

if TYPE_CHECKING:
    from ahi_ml import errors, local, pixels
    from ahi_ml.datasets import FrameDataset, FrameLoader, ResumableSampler
    from ahi_ml.errors import AhiError
    from ahi_ml.features import extract_features
    from ahi_ml.geometry import Geometry
    from ahi_ml.index import DatasetIndex
    from ahi_ml.store import DataStore, connect
    from ahi_ml.volume import open_volume

__all__ = [
    "AhiError",
    "DataStore",
    "DatasetIndex",
    "FrameDataset",
    "FrameLoader",
    "Geometry",
    "ResumableSampler",
    "__version__",
    "connect",
    "errors",
    "extract_features",
    "local",
    "open_volume",
    "pixels",
]

_HOME = {
    "AhiError": "errors",
    "DataStore": "store",
    "DatasetIndex": "index",
    "FrameDataset": "datasets",
    "FrameLoader": "datasets",
    "Geometry": "geometry",
    "ResumableSampler": "datasets",
    "connect": "store",
    "extract_features": "features",
    "open_volume": "volume",
}


def __getattr__(name: str) -> Any:
    if name in ("errors", "local", "pixels"):
        return import_module(f"{__name__}.{name}")
    if name in _HOME:
        value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
