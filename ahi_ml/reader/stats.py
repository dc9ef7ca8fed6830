"""What a reader counts, and how long its threads were at what."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["ReaderStats"]


@dataclass(slots=True)
class ReaderStats:
    """Counts of frames, and seconds of the threads that read them.

    Parameters
    ----------
    cached, fetched : int
        Where the bytes came from.
    verified, unverified : int
        Whether the pixels were compared with a checksum, now or when they were cached.
    refetched : int
        Frames whose first bytes failed the comparison.
    bytes_fetched : int
        Encoded bytes over the network.
    read_s, decode_s, convert_s : float
        Seconds in the cache's files, in decoding and verifying, and in what is made of stored values: summed
        over threads, so that there are as many in a second as threads.
    """

    cached: int = 0
    fetched: int = 0
    verified: int = 0
    unverified: int = 0
    refetched: int = 0
    bytes_fetched: int = 0
    read_s: float = 0.0
    decode_s: float = 0.0
    convert_s: float = 0.0

    def add(self, other: ReaderStats) -> None:
        """Add the counts and seconds of other frames. I/O: none."""
        for name in self.__slots__:
            setattr(self, name, getattr(self, name) + getattr(other, name))
