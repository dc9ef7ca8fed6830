"""From the encoded bytes of a frame to what was asked for: decode, verify, convert."""

from __future__ import annotations

import threading
from functools import partial
from time import perf_counter
from typing import Any, NamedTuple

import numpy as np

from ahi_ml.cache import CacheEntry
from ahi_ml.codec import Prepared, crc32, prepare
from ahi_ml.errors import ChecksumError, ConfigError, DataError, DecodeError
from ahi_ml.index import FrameProfile, FrameSource
from ahi_ml.reader.options import ReadOptions
from ahi_ml.reader.values import Conversion, conversion
from ahi_ml.types import AnyArray

__all__ = ["Form", "Made", "make_frame"]

Made = tuple[bool, float, float]  # of a frame, see `make_frame`; a class of its own would be a Python call a frame

_SCRATCH = threading.local()
_KIND = FrameSource._fields.index("kind")  # from there on it says all that decoding depends on
_NOTHING = None, None


class Form(NamedTuple):
    """What frames of one kind are made into.

    Parameters
    ----------
    shape, dtype : tuple of int, dtype
        Of the result.
    decoded : tuple of (tuple of int, dtype)
        Shape and dtype of the stored values it is made of.
    as_stored : bool
        Whether it is those very values.
    convert : callable
        Writes it, where it is not.
    levels : int
        Resolution levels that decoding leaves out.
    """

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    decoded: tuple[tuple[int, ...], np.dtype[Any]]
    as_stored: bool
    convert: Conversion
    levels: int

    @classmethod
    def of(cls, kind: FrameProfile, options: ReadOptions) -> Form:
        """The form of frames of a kind. I/O: none."""
        levels = options.levels(kind)
        dtype, pixels = options.result_dtype(kind), kind.pixels.reduced(levels)
        as_stored = options.output == "stored" and dtype == pixels.dtype
        shape, convert = kind.shape(options.output, options.reduce), conversion(kind, options)
        return cls(shape, dtype, (pixels.shape, pixels.dtype), as_stored, convert, levels)


def make_frame(
    source: FrameSource, options: ReadOptions, entry: CacheEntry, out: AnyArray, form: Form, *, again: bool = False
) -> Made:
    """Decode, verify and convert a frame into `out`.

    I/O: none.

    Parameters
    ----------
    source, options : FrameSource, ReadOptions
        Which frame, and what to make of it.
    entry : CacheEntry
        The encoded frame, or the part of it that is to be decoded.
    out : ndarray
        Written to.
    form : Form
        Of frames of this kind.
    again : bool
        Whether it was fetched for the second time.

    Returns
    -------
    tuple of bool, float and float
        Whether its pixels are known to be right: compared with the data store's checksum, now or when they were
        cached. Seconds of decoding and verifying, and of what was made of stored values.

    Raises
    ------
    ChecksumError, DecodeError, DataError, ConfigError
        The pixels differ from the checksum or, where none can be compared, from the extremes that the data store
        tells; the bytes are no frame; nobody knows its colours; `out` has another form.
    """
    verified, of_pixels = entry.verified, False
    if not verified and options.verify:
        # The data store's checksums are of all bytes, or of all pixels: a part of either cannot be compared.
        compared = source.profile.checksum_of if source.checksum is not None else "unknown"
        if compared == "samples":
            of_pixels = form.levels == 0
        elif compared == "unknown":
            form = _looking_at_extremes(form, source, again)
        elif entry.whole:
            if crc32(entry.data) != source.checksum:
                raise _mismatch(source, "encoded bytes", again)
            verified = True
    if out.shape != form.shape or out.dtype != form.dtype:
        raise ConfigError(f"the array to read into is {out.dtype}{out.shape}, the frame is {form.dtype}{form.shape}")
    started = perf_counter()
    direct = form.as_stored and out.flags.c_contiguous
    try:
        place = out if direct else _scratch_array(*form.decoded)
        stored = _prepared(source, form.levels, entry)(place)
    except DecodeError as error:
        raise _told(error, source) from error
    if of_pixels:
        if crc32(stored) != source.checksum:
            raise _mismatch(source, "decoded pixels", again)
        verified = True
    decoded = perf_counter()
    if direct:
        return verified, decoded - started, 0.0
    try:
        form.convert(stored, out)
    except ChecksumError:
        raise
    except ConfigError as error:
        raise type(error)(f"{_named(source)}: {error}") from error
    except DataError as error:
        raise _told(error, source) from error
    return verified, decoded - started, perf_counter() - decoded


def _looking_at_extremes(form: Form, source: FrameSource, again: bool) -> Form:
    """A form that compares stored values with the extremes that the data store tells of the whole frame.

    In its conversion, so that frames with a checksum, which are nearly all, take no step for it.
    """
    if form.levels or source.extremes is None:
        return form
    return form._replace(as_stored=False, convert=partial(_within_extremes, form.convert, source, again))


def _within_extremes(convert: Conversion, source: FrameSource, again: bool, stored: AnyArray, out: AnyArray) -> None:
    found = int(stored.min()), int(stored.max())
    if found != source.extremes:
        raise _mismatch(source, "decoded pixels", again, "lowest and highest value")
    convert(stored, out)


def _prepared(source: FrameSource, reduce: int, entry: CacheEntry) -> Prepared:
    """How to decode an entry, which is found once for one that is kept in memory."""
    notes, depends = entry.notes, source[_KIND:]
    if notes is not None:
        depended, prepared = notes.get("prepared", _NOTHING)
        if depended == depends:
            return prepared  # type: ignore[no-any-return]
    profile = source.profile
    prepared = prepare(entry.data, profile.syntax, profile.pixels, reduce=reduce, extremes=source.extremes)
    if notes is not None:
        notes["prepared"] = depends, prepared
    return prepared


def _scratch_array(shape: tuple[int, ...], dtype: np.dtype[Any]) -> AnyArray:
    """This thread's array of a form: fresh pages cost as much as the conversion."""
    array: AnyArray | None = getattr(_SCRATCH, "array", None)
    if array is None or array.shape != shape or array.dtype != dtype:
        array = _SCRATCH.array = np.empty(shape, dtype)
    return array


def _told(error: DataError, source: FrameSource) -> DataError:
    """The same error, which names its frame."""
    return type(error)(f"{_named(source)}: {error}", image_set_id=source.image_set_id, frame_id=source.frame_id)


def _named(source: FrameSource) -> str:
    return f"frame {source.frame_id} of image set {source.image_set_id}"


def _mismatch(source: FrameSource, what: str, again: bool, of: str = "checksum") -> ChecksumError:
    return ChecksumError(
        f"{_named(source)}: its {what} differ from the data store's "
        f"{of}{', twice' if again else ''}. Report the frame; verify=False reads it all the same",
        image_set_id=source.image_set_id,
        frame_id=source.frame_id,
    )
