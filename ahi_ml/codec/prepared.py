"""How one encoded frame is decoded, worked out once: at lower resolutions that takes as long as a tenth of decoding.

Floor 1; no I/O.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np

from ahi_ml.codec import jpeg2000, progressive, reduced
from ahi_ml.codec.decoders import DECODERS, Decoder, match
from ahi_ml.codec.pixelformat import PixelFormat
from ahi_ml.codec.syntaxes import JPEG_2000, SYNTAXES, describe
from ahi_ml.errors import DecodeError, UnsupportedTransferSyntaxError
from ahi_ml.types import AnyArray, Buffer

__all__ = ["Prepared", "prepare"]

_EXTRA_HINTS = {"video": "video frames are not decoded: read the bytes with store.reader.fetch() and a video library"}


class Prepared:
    """A frame that is ready to be decoded, as often as wanted, by any number of threads.

    I/O: none. It refers to the encoded bytes, which must stay as they are.
    """

    __slots__ = ("_decode", "_size", "_syntax", "wanted")

    def __init__(self, decode: Callable[[AnyArray | None], AnyArray], wanted: PixelFormat, syntax: str, size: int):
        self._decode, self._syntax, self._size, self.wanted = decode, syntax, size, wanted

    def __call__(self, out: AnyArray | None = None) -> AnyArray:
        """Decode, into `out` if given, which has the shape and dtype of `wanted`: here nobody looks.

        Raises
        ------
        DecodeError
            As `codec.decode`.
        """
        try:
            return self._decode(out)
        except DecodeError:
            raise
        except Exception as error:
            raise _told(error, self._syntax, self._size) from error


def prepare(
    data: Buffer,
    syntax: str,
    pixels: PixelFormat,
    *,
    reduce: int = 0,
    extremes: tuple[int, int] | None = None,
) -> Prepared:
    """Work out how a frame is decoded: what needs to be done once for a frame that is decoded many times.

    I/O: none.

    Parameters
    ----------
    data, syntax, pixels, reduce, extremes : bytes-like, str, PixelFormat, int, (int, int)
        As for `codec.decode`.

    Returns
    -------
    Prepared
        Call it to decode, with the array to decode into or without.

    Raises
    ------
    UnsupportedTransferSyntaxError, DecodeError, ConfigError
        As `codec.decode`.
    """
    known = SYNTAXES.get(syntax)
    decoder = DECODERS.get(known.codec) if known else None
    if known is None or decoder is None:
        hint = _EXTRA_HINTS.get(known.codec, "") if known else "nothing here reads it"
        raise UnsupportedTransferSyntaxError(f"cannot decode transfer syntax {describe(syntax)}: {hint}")
    wanted = pixels.reduced(reduce) if reduce else pixels
    work: Callable[[AnyArray | None], AnyArray]
    try:
        if not reduce:
            work = partial(_whole, decoder, data, syntax, pixels)
        else:
            work = _lower(decoder, data, syntax, pixels, reduce, extremes)
    except DecodeError:
        raise
    except Exception as error:
        raise _told(error, syntax, len(data)) from error
    return Prepared(work, wanted, syntax, len(data))


def _lower(
    decoder: Decoder,
    data: Buffer,
    syntax: str,
    pixels: PixelFormat,
    reduce: int,
    extremes: tuple[int, int] | None,
) -> Callable[[AnyArray | None], AnyArray]:
    differences = False
    if SYNTAXES[syntax].codec in JPEG_2000:
        low = reduced.low_pass_of(data, syntax, pixels, reduce, extremes) if pixels.blends else None
        if low is not None:
            return low
        info = jpeg2000.inspect(data)
        progressive.check_complete(data, info)
        differences = info.in_differences
    return partial(_shrunk, decoder, data, syntax, pixels, reduce, differences)


def _whole(decoder: Decoder, data: Buffer, syntax: str, pixels: PixelFormat, out: AnyArray | None) -> AnyArray:
    image = match(decoder(data, syntax, pixels, out), pixels, syntax)
    if out is None or image is out:
        return image
    np.copyto(out, image)
    return out


def _shrunk(
    decoder: Decoder,
    data: Buffer,
    syntax: str,
    pixels: PixelFormat,
    reduce: int,
    differences: bool,
    out: AnyArray | None,
) -> AnyArray:
    """Decode all of a frame and shrink it."""
    image = match(decoder(data, syntax, pixels, None), pixels, syntax)
    return reduced.shrink(image, pixels, reduce, colour_transform=differences, out=out)


def _told(error: Exception, syntax: str, size: int) -> DecodeError:
    """What a codec raised, as an error that names the syntax: they have errors of their own, some of them bare."""
    return DecodeError(f"{describe(syntax)}: {error} ({size} bytes)")
