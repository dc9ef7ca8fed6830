"""Frames made of what the cache's remote tier answered."""

from __future__ import annotations

from time import perf_counter

from ahi_ml.cache import FrameCache
from ahi_ml.errors import ChecksumError, DecodeError, UnsupportedTransferSyntaxError
from ahi_ml.reader.batch import Task
from ahi_ml.reader.making import make_frame
from ahi_ml.types import AnyArray

__all__ = ["make_from_remote"]


def make_from_remote(task: Task, cache: FrameCache, datastore_id: str, raw: bytes | None) -> AnyArray | None:
    """Make a frame of an answer of the remote tier, and keep the answer in the folder.

    I/O: one file.

    Parameters
    ----------
    task : Task
        Of the frame.
    cache : FrameCache
        Whose remote tier answered.
    datastore_id : str
        Part of the cache's key.
    raw : bytes or None
        The answer, unchecked; None when nothing is there.

    Returns
    -------
    ndarray, or None
        None when the frame must be fetched: it is not there, or wrong.

    Raises
    ------
    UnsupportedTransferSyntaxError
        Nothing here can decode it.
    CacheError
        Others can look into the folder.
    """
    batch, source = task.batch, task.source
    started = perf_counter()
    # Not by way of the folder, which may refuse to be written.
    form = batch.form(source.profile)
    entry = cache.accept(datastore_id, source.frame_id, raw, form.levels)
    if entry is None:
        return None
    read_s = perf_counter() - started
    try:
        out = batch.out(task.slot)
        verified, decode_s, convert_s = make_frame(source, task.options, entry, out, form)
    except UnsupportedTransferSyntaxError:
        raise
    except (ChecksumError, DecodeError):
        cache.drop(datastore_id, source.frame_id)  # kept without a check, and wrong
        return None
    batch.keep(task.slot, out, verified=verified)
    batch.count(
        cached=1,
        verified=verified,
        unverified=not verified,
        read_s=read_s,
        decode_s=decode_s,
        convert_s=convert_s,
    )
    return out
