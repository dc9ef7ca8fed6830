"""`AhiFileSystem`: data stores as a read-only fsspec file system, ``ahi://``. Floor 5.

Anything that takes fsspec URLs reads metadata documents and encoded frames with it. Which path is what
stands in `places`, what directories hold in `listing`, how bytes come in `contents`. Decoding is not
here: a frame's file holds the bytes that the data store keeps.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Generator, Sequence
from contextlib import closing
from typing import Any, NoReturn

from fsspec.spec import AbstractBufferedFile, AbstractFileSystem
from fsspec.utils import tokenize

from ahi_ml.client import Service, make_connection
from ahi_ml.errors import ConfigError
from ahi_ml.filesystem import listing
from ahi_ml.filesystem.contents import contents
from ahi_ml.filesystem.listing import Entry
from ahi_ml.filesystem.places import Place, as_os_errors, missing
from ahi_ml.perprocess import PerProcess
from ahi_ml.store import DataStore, connect
from ahi_ml.types import PathType

__all__ = ["AhiFile", "AhiFileSystem"]

_FSSPEC_OPTIONS = {"use_listings_cache", "listings_expiry_time", "max_paths", "asynchronous", "loop"}


class _ByStore(type(AbstractFileSystem)):  # type: ignore[misc]
    """fsspec reuses instances by the text of their options; two `DataStore` objects may have the same text."""

    def __call__(cls, *arguments: Any, **options: Any) -> Any:
        store = options.get("store")
        if store is None:
            return super().__call__(*arguments, **options)
        made = super().__call__(*arguments, **{**options, "skip_instance_cache": True})
        made._fs_token_ = tokenize(made._fs_token_, id(store))  # what equality and dask go by
        return made


class AhiFileSystem(AbstractFileSystem, metaclass=_ByStore):  # type: ignore[misc]
    """Data stores of AWS HealthImaging, or embedded ones, as files that can be read.

    ::

        ahi://<data store id>/<image set id>/metadata.json               the latest version
        ahi://<data store id>/<image set id>/versions/<n>/metadata.json  version n
        ahi://<data store id>/<image set id>/frames/<frame id>           encoded, as stored

    Names are ids and nothing else. Documents are JSON in UTF-8, unpacked; they hold what identifies the
    patient, and no copy of them is kept. Frames go through the store's cache; a frame that is in it is
    read from it without asking whether its image set is still there. Nothing can be written.

    ``frames`` lists the latest version's; the frames of older versions can be read by their path. The
    service tells no file's size before it is read: ``ls`` and ``find`` give None, and ``info``, ``size``
    and ``du`` read the file to tell it. There are no partial reads in the service either: a range costs
    the whole frame, once.

    Threads may share an instance; processes get their own by pickling (options only, never keys or
    connections) or forking. Listings are kept until `invalidate_cache`, or as ``listings_expiry_time`` says.

    I/O: none to build one. The methods say what they cost where it is not one request.

    Parameters
    ----------
    target : str or path, optional
        As `connect` takes it: a folder, or the id of the one data store to show. Without it every data
        store of the account can be reached by its id.
    region, profile, endpoint_url : str, optional
        As `connect` takes them.
    store : DataStore, optional
        An open data store instead: with its cache, endpoint and name.
    **options
        fsspec's own: ``use_listings_cache``, ``listings_expiry_time``, ``max_paths``.

    Raises
    ------
    ConfigError
        Options that do not go together, or that nobody knows.

    Examples
    --------
    >>> import fsspec
    >>> files = fsspec.filesystem("ahi", target="my-store")
    >>> (datastore_id,) = files.ls("", detail=False)
    >>> documents = files.glob(f"{datastore_id}/*/metadata.json")
    """

    protocol = "ahi"

    def __init__(
        self,
        target: PathType | None = None,
        *,
        region: str | None = None,
        profile: str | None = None,
        endpoint_url: str | None = None,
        store: DataStore | None = None,
        **options: Any,
    ) -> None:
        if unknown := sorted(options.keys() - _FSSPEC_OPTIONS):
            raise ConfigError(
                f"ahi:// has no option {', '.join(unknown)}: target, region, profile, endpoint_url and store. "
                "Credentials come from boto3's own places, so that no pickled file system carries them"
            )
        if store is not None and (target is not None or region or profile or endpoint_url):
            raise ConfigError("store= is open already: target, region, profile and endpoint_url do not apply")
        super().__init__(**options)
        self._service = Service(region, profile, endpoint_url)
        self._client = PerProcess(lambda: make_connection(self._service).client)
        self._stores: dict[str, DataStore] = {}
        self._one: PerProcess[DataStore] | None = None
        if store is not None:
            self._one = PerProcess(lambda: store)
        elif target is not None:
            self._one = PerProcess(lambda: self._connect(target))

    def _connect(self, target: PathType) -> DataStore:
        service = self._service
        return connect(
            target, region=service.region, profile=service.profile, endpoint_url=service.endpoint_url, create=False
        )

    def _store_of(self, place: Place) -> DataStore:
        if self._one is None:
            # For an id this sends nothing; of two threads' stores, one stays.
            return self._stores.get(place.datastore_id) or self._stores.setdefault(
                place.datastore_id, self._connect(place.datastore_id)
            )
        store = self._one.get()
        if store.datastore_id != place.datastore_id:
            raise missing(place.path)
        return store

    def _place(self, path: Any) -> Place:
        return Place.of(self._strip_protocol(path))

    # Looking

    def ls(self, path: str, detail: bool = True, *, refresh: bool = False, **options: Any) -> list[Any]:
        """What a directory holds.

        I/O: none when it was listed before. Else, for a data store, one request for every 50 image sets
        (no metadata is read, no storage tier changed); for ``versions`` one for every 50; for ``frames``
        the latest metadata document; for an image set one, or none when its data store was listed.

        Parameters
        ----------
        path : str
            A directory, or a file: then the list holds its `info`.
        detail : bool
            Entries as `info` gives them, sizes None; or names alone.
        refresh : bool
            Ask even if it was listed before.

        Raises
        ------
        FileNotFoundError
            There is no such directory.
        PermissionError
            The credentials do not do.
        """
        place = self._place(path)
        if place.is_file:
            entry = self.info(path)
            return [entry] if detail else [entry["name"]]
        entries = self._entries(place, refresh=refresh)
        # Copies: callers write into what they get.
        return [dict(entry) for entry in entries.values()] if detail else sorted(entries)

    def _listed(self, path: str) -> dict[str, Entry]:
        """What a directory held when it was listed, by name; nothing when it was not."""
        try:
            found: dict[str, Entry] = self.dircache[path]
        except KeyError:  # also when it expired just now
            return {}
        return found

    def _entries(self, place: Place, *, refresh: bool) -> dict[str, Entry]:
        if not refresh and (known := self._listed(place.path)):
            return known
        with as_os_errors(place.path):
            if place.kind == "root":
                if self._one is not None:
                    entries = [listing.directory(self._one.get().datastore_id)]
                else:
                    entries = listing.datastores(self._client.get())
            else:
                store = self._store_of(place)
                if place.kind in ("image_set", "version") and (refresh or self._known(place) is None):
                    listing.looked_up(place, store)
                entries = listing.listed(place, store)
        named = self.dircache[place.path] = {entry["name"]: entry for entry in entries}
        return named

    def _known(self, place: Place) -> Entry | None:
        """The entry of a path that a listing has shown, or whose own listing is there."""
        if (entry := self._listed(self._parent(place.path)).get(place.path)) is not None:
            return dict(entry)
        return listing.directory(place.path) if self._listed(place.path) else None

    def _entry(self, place: Place) -> Entry:
        """The entry of something that exists, without reading documents or frames."""
        if place.kind == "root":
            return listing.directory("")
        if (entry := self._known(place)) is None:
            with as_os_errors(place.path):
                entry = listing.looked_up(place, self._store_of(place))
        return entry

    def info(self, path: str, **options: Any) -> Entry:
        """Name, type and size of a path; of image sets also dates, latest version, primary and tier.

        I/O: a file is read, because nothing else tells its size; a frame stays in the cache. A directory
        costs one request, or none when it was listed.

        Raises
        ------
        FileNotFoundError
            There is no such path.
        PermissionError
            The credentials do not do.
        """
        place = self._place(path)
        return listing.file(place.path, len(self._read(place))) if place.is_file else self._entry(place)

    def exists(self, path: str, **options: Any) -> bool:
        """Whether there is such a path; errors but FileNotFoundError are raised, not taken for absence.

        I/O: at most one request. A frame that no listing has shown is read, into the cache.
        """
        try:
            place = self._place(path)
            if place.kind != "frame":
                self._entry(place)
            elif self._known(place) is None:
                self._read(place)
        except FileNotFoundError:
            return False
        return True

    def isdir(self, path: str) -> bool:
        """Whether a path is a directory that exists. I/O: none for the path of a file; else as `exists`."""
        return not self._is_named_as_file(path) and self.exists(path)

    def isfile(self, path: str) -> bool:
        """Whether a path is a file that exists. I/O: none for the path of a directory; else as `exists`."""
        return self._is_named_as_file(path) and self.exists(path)

    def _is_named_as_file(self, path: str) -> bool:
        try:
            return self._place(path).is_file
        except FileNotFoundError:
            return False

    def invalidate_cache(self, path: str | None = None) -> None:
        """Forget listings: all of them, or a path's, those below it, and the one it stands in. I/O: none."""
        if path is None:
            self.dircache.clear()
        else:
            path = self._strip_protocol(path)
            for known in list(self.dircache):
                if known in (path, self._parent(path)) or known.startswith(f"{path}/") or not path:
                    self.dircache.pop(known, None)
        super().invalidate_cache(path)

    # Reading

    def _read(self, place: Place) -> bytes:
        (outcome,) = contents([place], self._store_of)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    def _file(self, path: Any) -> Place:
        place = self._place(path)
        if not place.is_file:
            self._entry(place)  # or it is no directory either
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), place.path)
        return place

    def _open(self, path: str, mode: str = "rb", **options: Any) -> AhiFile:
        if mode != "rb":
            self._refuse(path)
        return AhiFile(self, path, self._read(self._file(path)))

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **options: Any) -> bytes:
        """The bytes of a file, or a slice of them. I/O: the whole file, whatever the slice.

        Raises
        ------
        FileNotFoundError, IsADirectoryError, PermissionError
            As for any file.
        """
        return self._read(self._file(path))[start:end]

    def cat_ranges(
        self,
        paths: list[str],
        starts: int | list[int | None] | None,
        ends: int | list[int | None] | None,
        max_gap: int | None = None,
        on_error: str = "return",
        **options: Any,
    ) -> list[Any]:
        """Slices of many files, in the order given.

        I/O: each file once, however many of its slices are asked for; many requests under way together.

        Parameters
        ----------
        paths : list of str
            Files; one may stand several times.
        starts, ends : int, None, or list of them
            Of each slice, as Python slices.
        max_gap : None
            Not supported: there is nothing to join, files are read whole.
        on_error : {"return", "raise"}
            Errors in the places of the slices, or the first one raised.

        Returns
        -------
        list of bytes
        """
        if max_gap is not None:
            raise NotImplementedError("max_gap joins reads of parts; ahi:// reads whole files")
        if not isinstance(paths, list):
            raise TypeError(f"paths is a list, not a {type(paths).__name__}")
        first, last = (each if isinstance(each, list) else [each] * len(paths) for each in (starts, ends))
        if len(first) != len(paths) or len(last) != len(paths):
            raise ValueError(f"{len(paths)} paths, {len(first)} starts, {len(last)} ends: one each, or one for all")
        wanted: dict[str, list[int]] = {}
        for number, path in enumerate(paths):
            wanted.setdefault(self._strip_protocol(path), []).append(number)
        parts: list[Any] = [None] * len(paths)
        with closing(self._outcomes(list(wanted))) as outcomes:
            for path, outcome in outcomes:
                if isinstance(outcome, Exception) and on_error != "return":
                    raise outcome
                for number in wanted[path]:
                    parts[number] = outcome if isinstance(outcome, Exception) else outcome[first[number] : last[number]]
        return parts

    def cat(self, path: Any, recursive: bool = False, on_error: str = "raise", **options: Any) -> Any:
        """The bytes of a file; of several paths, a pattern or a directory, a dict of them.

        I/O: each file once, many requests under way together; listings for patterns and directories.

        Parameters
        ----------
        path : str or list of str
            Files, or patterns; with `recursive` directories too.
        recursive : bool
            Read all files below a directory.
        on_error : {"raise", "omit", "return"}
            The first error is raised, files with errors are left out, or errors stand in their places.
        """
        paths = self.expand_path(path, recursive=recursive)
        if not isinstance(path, list) and paths == [self._strip_protocol(path)]:
            return self.cat_file(paths[0])
        if recursive:  # directories came along
            paths = [each for each in paths if self._is_named_as_file(each)]
        found: dict[str, Any] = {}
        with closing(self._outcomes(paths)) as outcomes:
            for each, outcome in outcomes:
                if isinstance(outcome, Exception):
                    if on_error == "raise":
                        raise outcome
                    if on_error != "return":
                        continue
                found[each] = outcome
        return found

    def _outcomes(self, paths: Sequence[str]) -> Generator[tuple[str, bytes | Exception]]:
        """Yield each path with its bytes, or with what went wrong."""
        places: list[Place] = []
        for path in paths:
            try:
                places.append(self._file(path))
            except OSError as error:
                yield path, error
        with closing(contents(places, self._store_of)) as outcomes:
            yield from zip((place.path for place in places), outcomes, strict=True)

    # Writing

    def _refuse(self, *arguments: Any, **options: Any) -> NoReturn:
        """Nothing can be written: the service imports DICOM files and knows no others. I/O: none.

        Raises
        ------
        OSError
            EROFS, always. `DataStore.import_dicom` brings images into a data store.
        """
        path = next((each for each in reversed([*arguments, *options.values()]) if isinstance(each, str)), None)
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), path)

    mkdir = makedirs = rmdir = touch = pipe_file = put_file = put = cp_file = copy = mv = rm = rm_file = _rm = _refuse


class AhiFile(AbstractBufferedFile):  # type: ignore[misc]
    """A file of `AhiFileSystem`, opened to read: all of it is in memory. I/O: none after it was opened."""

    def __init__(self, fs: AhiFileSystem, path: str, data: bytes) -> None:
        self._data = data
        super().__init__(fs, path, "rb", cache_type="none", size=len(data))
        self.details = listing.file(path, len(data))

    def _fetch_range(self, start: int, end: int) -> bytes:
        return self._data[start:end]
