"""What every operation works with: the stores, the account, page tokens and shared look-ups."""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import json
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from ahi_ml.local.accesses import Accesses
from ahi_ml.local.blobs import BlobStore
from ahi_ml.local.catalog import Catalog, Datastore, ImageSet
from ahi_ml.local.ingest.runner import JobRunner
from ahi_ml.local.injector import Injector
from ahi_ml.local.protocol import ServiceFault
from ahi_ml.local.settling import Settling

__all__ = ["Context"]

_LOG = logging.getLogger(__name__)
_PAGE = 50
_AGAIN_S = 5.0
Row = TypeVar("Row")


def _now() -> float:
    return round(time.time(), 3)  # what answers show, so that a search by them finds it


@dataclass(frozen=True, slots=True)
class Context:
    """The parts of a running embedded store.

    Parameters
    ----------
    catalog, blobs, jobs
        Where things are kept and done.
    region, account : str
        What ARNs say.
    secret : bytes
        Signs page tokens.
    settling : Settling
        Does afterwards what answers promise, one after the other.
    injector : Injector
        Faults in force.
    accesses : Accesses
        When image sets were last used.
    clock : callable
        Seconds since the epoch.
    """

    catalog: Catalog
    blobs: BlobStore
    jobs: JobRunner
    region: str
    account: str
    secret: bytes
    settling: Settling
    injector: Injector
    accesses: Accesses
    clock: Callable[[], float] = _now

    def datastore_arn(self, datastore_id: str) -> str:
        """The ARN of a data store."""
        return f"arn:aws:medical-imaging:{self.region}:{self.account}:datastore/{datastore_id}"

    def image_set_arn(self, datastore_id: str, image_set_id: str) -> str:
        """The ARN of an image set."""
        return f"{self.datastore_arn(datastore_id)}/imageset/{image_set_id}"

    def datastore(self, datastore_id: str, *, active: bool = True) -> Datastore:
        """A data store, or the service's fault when it is not there or not ACTIVE."""
        store = self.catalog.datastore(datastore_id)
        if store is None:
            raise ServiceFault("ResourceNotFoundException", f"Datastore with id {datastore_id} does not exist")
        if active and store.status == "DELETED":
            raise ServiceFault("ResourceNotFoundException", f"Datastore with id {datastore_id} does not exist")
        if active and store.status != "ACTIVE":
            raise ServiceFault("ConflictException", f"Datastore with id {datastore_id} is {store.status}")
        return store

    def later(self, work: Callable[[], None], failed: Callable[[], None]) -> None:
        """Settle a write after its answer, in one transaction. I/O: the catalog, in another thread.

        Parameters
        ----------
        work : callable
            Settles the write.
        failed : callable
            Settles it as failed when `work` raises, and is tried until it succeeds: nothing stays LOCKED.
        """

        def run() -> None:
            try:
                with self.catalog.transaction():
                    work()
            except Exception:
                _LOG.exception("a write failed")
                settle()

        def settle() -> None:
            try:
                failed()
            except Exception:
                _LOG.exception("a failed write could not be settled")
                self.settling.submit(settle, _AGAIN_S)  # a disk that is full may have room again

        self.settling.submit(run, self.injector.faults.slow_s)

    def image_set(
        self, datastore_id: str, image_set_id: str, *, deleted: bool = False, active: bool = True
    ) -> ImageSet:
        """An image set, or the service's fault; deleted ones only when asked for. `active` as in `datastore`."""
        self.datastore(datastore_id, active=active)
        found = self.catalog.image_set(datastore_id, image_set_id)
        if found is None or (found.deleted is not None and not deleted):
            raise ServiceFault(
                "ResourceNotFoundException",
                f"ImageSet with id {image_set_id} does not exist in this datastore",
            )
        return found

    def page(
        self,
        params: dict[str, Any],
        read: Callable[[Sequence[Any] | None, int], list[Row]],
        position: Callable[[Row], Sequence[Any]],
        *,
        bound_to: Any,
    ) -> tuple[list[Row], str | None]:
        """One page of a listing and the token of the next.

        Parameters
        ----------
        params : dict
            The request's, with ``maxResults`` and ``nextToken``.
        read : callable
            Rows after a position (None at the start), at most so many.
        position : callable
            A row's place in the order, JSON-able.
        bound_to : JSON-able
            What the listing is of: a token is good for the same request only.
        """
        size = params.get("maxResults") or _PAGE
        after = self._open_token(params.get("nextToken"), bound_to)
        rows = read(after, size + 1)
        token = self._make_token(position(rows[size - 1]), bound_to) if len(rows) > size else None
        return rows[:size], token

    def _seal(self, text: bytes, bound_to: Any) -> bytes:
        query = json.dumps(bound_to, sort_keys=True, default=str).encode()
        return hmac.new(self.secret, query + b"\0" + text, hashlib.sha256).digest()[:16]

    def _veil(self, text: bytes, seal: bytes) -> bytes:
        """Hide or show a position: it may be a study's date. The seal makes each veil another one."""
        veil = hashlib.shake_256(b"veil" + self.secret + seal).digest(len(text))
        return bytes(a ^ b for a, b in zip(text, veil, strict=True))

    def _make_token(self, position: Sequence[Any], bound_to: Any) -> str:
        text = json.dumps(list(position)).encode()
        seal = self._seal(text, bound_to)
        return base64.urlsafe_b64encode(seal + self._veil(text, seal)).decode()

    def _open_token(self, token: str | None, bound_to: Any) -> list[Any] | None:
        if token is None:
            return None
        try:
            data = base64.b64decode(token.encode(), b"-_", validate=True)
        except (binascii.Error, ValueError):
            data = b""
        seal, text = data[:16], self._veil(data[16:], data[:16])
        # The last characters of Base64 hold bits that decoding leaves out.
        as_made = base64.urlsafe_b64encode(data).decode() == token
        if not (as_made and text and hmac.compare_digest(seal, self._seal(text, bound_to))):
            raise ServiceFault("ValidationException", "The nextToken is not valid for this request")
        return json.loads(text)  # type: ignore[no-any-return]
