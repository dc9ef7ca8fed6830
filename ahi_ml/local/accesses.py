"""When image sets were last read or written, and the storage tier that follows from it.

Reads are many and must not wait for the catalog: what they note is shown at once and written after a while. A
server that is killed forgets the last of it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

from ahi_ml.local.catalog import Catalog, ImageSet
from ahi_ml.local.settling import Settling

__all__ = ["Accesses"]

_LOG = logging.getLogger(__name__)
_WRITTEN_AFTER_S = 10.0
_ARCHIVED_AFTER_S = 30 * 86_400.0


class Accesses:
    """The last access of each image set. Safe to use from many threads.

    Parameters
    ----------
    catalog : Catalog
        Where accesses are kept.
    settling : Settling
        Writes them.
    clock : callable
        Seconds since the epoch.
    """

    def __init__(self, catalog: Catalog, settling: Settling, clock: Callable[[], float] = time.time) -> None:
        self._catalog = catalog
        self._settling = settling
        self._clock = clock
        self._noted: dict[str, float] = {}

    def note(self, image_set_id: str) -> None:
        """An image set is accessed now. I/O: none yet."""
        if not self._noted:
            self._settling.submit(self._write, _WRITTEN_AFTER_S)
        self._noted[image_set_id] = self._clock()

    def shown(self, found: ImageSet) -> dict[str, Any]:
        """What answers say about the accesses of an image set. I/O: none."""
        last = self._noted.get(found.id, found.accessed)
        archived = self._clock() - last > _ARCHIVED_AFTER_S
        return {
            "lastAccessedAt": last,
            "storageTier": "ARCHIVE_INSTANT_ACCESS" if archived else "FREQUENT_ACCESS",
        }

    def _write(self) -> None:
        noted = self._noted.copy()
        try:
            with self._catalog.transaction():
                for image_set_id, moment in noted.items():
                    self._catalog.touch(image_set_id, moment)
        except Exception:
            _LOG.exception("accesses could not be written")
        for image_set_id, moment in noted.items():
            if self._noted.get(image_set_id) == moment:
                self._noted.pop(image_set_id, None)
        if self._noted:
            self._settling.submit(self._write, _WRITTEN_AFTER_S)
