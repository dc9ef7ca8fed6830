"""From the encoded bytes of a frame to what was asked for: decode, verify, convert."""

from __future__ import annotations

import threading
from time import perf_counter

import numpy as np

from ahi_ml.codec import PixelFormat, crc32, decode
from ahi_ml.errors import ChecksumError, ConfigError, DecodeError
from ahi_ml.index import FrameSource
from ahi_ml.reader.options import ReadOptions
from ahi_ml.reader.values import convert_values
from ahi_ml.types import AnyArray, Buffer

__all__ = ["Made", "make_frame"]

_SCRATCH = threading.local()


class Made:
    """A frame as it was made: whether its pixels are known to be right, and what it took.

    Parameters
    ----------
    verified : bool
        Whether they were compared with the data store's checksum, now or when they were cached.
    decode_s, convert_s : float
        Seconds.
    """

    __slots__ = ("convert_s", "decode_s", "verified")

    def __init__(self, verified: bool, decode_s: float, convert_s: float) -> None:
        self.verified, self.decode_s, self.convert_s = verified, decode_s, convert_s


def make_frame(
    source: FrameSource,
    options: ReadOptions,
    data: Buffer,
    out: AnyArray,
    *,
    trusted: bool,
    whole: bool = True,
    again: bool = False,
) -> Made:
    """Decode, verify and convert a frame into `out`.

    I/O: none.

    Parameters
    ----------
    source, options : FrameSource, ReadOptions
        Which frame, and what to make of it.
    data : bytes-like
        The encoded frame, or the part of it that `options.reduce` needs.
    out : ndarray
        Written to.
    trusted : bool
        Whether the bytes were compared with the checksum before.
    whole : bool
        Whether `data` is all of the frame.
    again : bool
        Whether they were fetched for the second time.

    Raises
    ------
    ChecksumError, DecodeError, ConfigError
        The pixels differ from the checksum; the bytes are no frame; `out` has another form.
    """
    profile = source.profile
    check = options.verify and not trusted and source.checksum is not None
    # The data store's checksums are of all bytes, or of all pixels: a part of either cannot be compared.
    of_bytes = check and profile.checksum_of == "bytes" and whole
    of_pixels = check and profile.checksum_of == "samples" and options.reduce == 0
    if of_bytes and crc32(data) != source.checksum:
        raise _mismatch(source, "encoded bytes", again)
    shape, dtype = profile.shape(options.output, options.reduce), options.result_dtype(profile)
    if out.shape != shape or out.dtype != dtype:
        raise ConfigError(f"the array to read into is {out.dtype}{out.shape}, the frame is {dtype}{shape}")
    started = perf_counter()
    direct = options.output == "stored" and dtype == profile.pixels.dtype and out.flags.c_contiguous
    try:
        place = out if direct else _scratch_array(profile.pixels.reduced(options.reduce))
        extremes = source.extremes if options.reduce else None
        stored = decode(data, profile.syntax, profile.pixels, out=place, reduce=options.reduce, extremes=extremes)
    except DecodeError as error:
        where = f"frame {source.frame_id} of image set {source.image_set_id}"
        raise type(error)(f"{where}: {error}", image_set_id=source.image_set_id, frame_id=source.frame_id) from error
    if of_pixels and crc32(stored) != source.checksum:
        raise _mismatch(source, "decoded pixels", again)
    decoded = perf_counter()
    if not direct:
        convert_values(stored, profile, options, out)
    return Made(trusted or of_bytes or of_pixels, decoded - started, perf_counter() - decoded)


def _scratch_array(pixels: PixelFormat) -> AnyArray:
    """This thread's array of a shape: fresh pages cost as much as the conversion."""
    key = (pixels.shape, pixels.dtype)
    arrays = _SCRATCH.__dict__
    if arrays.get("key") != key:
        arrays["key"], arrays["array"] = key, np.empty(*key)
    return arrays["array"]  # type: ignore[no-any-return]


def _mismatch(source: FrameSource, what: str, again: bool) -> ChecksumError:
    return ChecksumError(
        f"frame {source.frame_id} of image set {source.image_set_id}: its {what} differ from the data store's "
        f"checksum{', twice' if again else ''}. Report the frame; verify=False reads it all the same",
        image_set_id=source.image_set_id,
        frame_id=source.frame_id,
    )
