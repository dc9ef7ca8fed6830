"""Pixel arithmetic on decoded frames, floor 1: stored value to modality value to display value, and colour.

`stored` is about stored values, `rescale` makes modality values of them, `window` and `display` display values;
`lookup` is the tables that stand in for either, and `colour` is colour. The value objects say what to do and the
functions do it; they know neither files nor metadata documents, and do no I/O. The objects are frozen, hashable
and picklable; equal ones have equal `repr`, different ones different: caches use it as a fingerprint.

NumPy ufuncs write into the caller's array and release the GIL, so decode threads run in parallel. Where
exactness needs float64, it is used in blocks that stay in the processor's cache. NaN stays NaN.
"""

from ahi_ml.pixels.colour import palette_to_rgb, ybr_full_to_rgb
from ahi_ml.pixels.display import to_display, uint8
from ahi_ml.pixels.lookup import LookupTable
from ahi_ml.pixels.rescale import Rescale
from ahi_ml.pixels.stored import normalize_polarity, padding_mask, stored_range
from ahi_ml.pixels.window import VOI_FUNCTIONS, Normalize, Scale, Window

__all__ = [
    "VOI_FUNCTIONS",
    "LookupTable",
    "Normalize",
    "Rescale",
    "Scale",
    "Window",
    "normalize_polarity",
    "padding_mask",
    "palette_to_rgb",
    "stored_range",
    "to_display",
    "uint8",
    "ybr_full_to_rgb",
]
