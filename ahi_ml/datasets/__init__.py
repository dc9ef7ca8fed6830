"""PyTorch datasets and loaders over an index. The one place that imports torch."""

from __future__ import annotations

from ahi_ml.datasets.collate import list_collate, pad_collate
from ahi_ml.datasets.frames import FrameDataset
from ahi_ml.datasets.loader import FrameLoader
from ahi_ml.datasets.profile import LoadingStats, Profile
from ahi_ml.datasets.sampler import ResumableSampler
from ahi_ml.datasets.seeding import sample_seed

__all__ = [
    "FrameDataset",
    "FrameLoader",
    "LoadingStats",
    "Profile",
    "ResumableSampler",
    "list_collate",
    "pad_collate",
    "sample_seed",
]
