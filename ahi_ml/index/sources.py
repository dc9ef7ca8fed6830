"""What the reader must know of frames: one `FrameSource` each, or `FrameSources`, which makes them when asked."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from typing import NamedTuple

from ahi_ml.errors import MetadataError
from ahi_ml.index.profile import FrameProfile

__all__ = ["FrameSource", "FrameSources"]


class FrameSource(NamedTuple):
    """One frame to read.

    Parameters
    ----------
    image_set_id, frame_id : str
        Where the data store has it.
    checksum : int or None
        CRC-32 of its full resolution.
    kind : FrameProfile or MetadataError
        Shared by the frames of its kind; an error where the metadata does not suffice to decode them.
    minimum, maximum : int or None
        Extremes of its stored values, as the data store says.
    """

    image_set_id: str
    frame_id: str
    checksum: int | None
    kind: FrameProfile | MetadataError
    minimum: int | None = None
    maximum: int | None = None

    @property
    def extremes(self) -> tuple[int, int] | None:
        """Lowest and highest stored value, where the data store says them."""
        return None if self.minimum is None or self.maximum is None else (self.minimum, self.maximum)

    @property
    def problem(self) -> MetadataError | None:
        """Why the frame cannot be decoded, if it cannot."""
        return self.kind if isinstance(self.kind, MetadataError) else None

    @property
    def profile(self) -> FrameProfile:
        """How the frame is decoded.

        Raises
        ------
        MetadataError
            The metadata does not suffice.
        """
        if isinstance(self.kind, MetadataError):
            raise self.kind
        return self.kind


class FrameSources(Sequence[FrameSource]):
    """Frames to read. What finds a result in the cache is there at once; the rest, when a frame is looked at.

    A slice is of the same kind, and makes no frame either.

    Parameters
    ----------
    frame_ids : list of str
        As in `FrameSource`, and so are `kinds`.
    kinds : list of FrameProfile or MetadataError
        See there.
    distinct : collection of FrameProfile or MetadataError
        The kinds, each once.
    make : callable
        Gives the frames as a list.
    """

    def __init__(
        self,
        frame_ids: list[str],
        kinds: list[FrameProfile | MetadataError],
        distinct: Collection[FrameProfile | MetadataError],
        make: Callable[[], list[FrameSource]],
    ) -> None:
        self.frame_ids, self.kinds = frame_ids, kinds
        self.distinct = distinct
        self._make: Callable[[], list[FrameSource]] | None = make
        self._made: list[FrameSource] = []

    @classmethod
    def of(cls, sources: Sequence[FrameSource]) -> FrameSources:
        """The same, of frames in any sequence. I/O: none."""
        if isinstance(sources, FrameSources):
            return sources
        made = list(sources)
        kinds = [source.kind for source in made]
        distinct = {id(kind): kind for kind in kinds}.values()
        return cls([source.frame_id for source in made], kinds, distinct, lambda: made)

    def all(self) -> list[FrameSource]:
        """All of them. I/O: none."""
        make = self._make
        if make is not None:  # two threads may both make them: they are equal
            self._made, self._make = make(), None
        return self._made

    def __len__(self) -> int:
        return len(self.frame_ids)

    def __getitem__(self, place):  # type: ignore[no-untyped-def]
        if isinstance(place, slice):
            kinds = self.kinds[place]
            distinct = self.distinct if len(self.distinct) == 1 else {id(kind): kind for kind in kinds}.values()
            return FrameSources(self.frame_ids[place], kinds, distinct, lambda: self.all()[place])
        return self.all()[place]

    def __iter__(self) -> Iterator[FrameSource]:
        return iter(self.all())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"<FrameSources: {len(self):,} frames>"
