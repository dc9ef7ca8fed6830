"""The frame cache: encoded frames and derived arrays on disk, one file each, found by an opaque name. Floor 2.

Readers see whole entries or none: an entry is written beside its place and moved there. A header
holds its length and CRC, so one torn by a power cut is noticed and dropped. The cache is a
convenience: a full disk or a read-only folder costs one warning, never a run.

`frames` is what callers see, `derived` the tier of results, `entries` the headers, `folder` the place both
share, `bound` when it is looked at and `eviction` what goes then; `recipe` says what may be kept, `locks` and
`flight` who downloads, `remote` keeps frames in an object store as well, `lookups` waits for it, `sealed` encrypts,
`mapped` holds what a process reads again.
"""

from ahi_ml.cache.derived import DerivedTier, ResultTier
from ahi_ml.cache.entries import CacheEntry
from ahi_ml.cache.flight import Flights
from ahi_ml.cache.folder import CacheStats
from ahi_ml.cache.frames import FrameCache
from ahi_ml.cache.locks import Claims
from ahi_ml.cache.recipe import DECODER_EPOCH, fingerprint, recipe

__all__ = [
    "DECODER_EPOCH",
    "CacheEntry",
    "CacheStats",
    "Claims",
    "DerivedTier",
    "Flights",
    "FrameCache",
    "ResultTier",
    "fingerprint",
    "recipe",
]
