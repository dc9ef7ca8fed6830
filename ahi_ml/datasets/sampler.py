"""`ResumableSampler`: which rows this rank takes in an epoch, and a state to go on from. Floor 6.

What an epoch's order is stands in `orders`; here stand the positions in it: ranks, what is left over, and how far
an epoch has come. Positions are global, of all ranks together, so that a state fits any number of ranks.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping, Sized
from functools import partial
from itertools import islice
from typing import Any, Literal, cast

import numpy as np
import torch.distributed
from torch.utils.data.distributed import DistributedSampler

from ahi_ml.datasets.orders import Order, Shuffle, block_order, global_order, index_order
from ahi_ml.errors import ConfigError, SnapshotDriftError
from ahi_ml.index import DatasetIndex

__all__ = ["EpochRows", "ResumableSampler"]

_CHUNK = 4096  # rows made at a time
_FINGERPRINT_ROWS = 64


class ResumableSampler(DistributedSampler[int]):
    """Rows of an epoch for this rank: seeded, shared out, resumable at any sample on any number of ranks.

    Rank r takes positions r, r + n, r + 2 n, ... of one order that depends on seed and epoch alone; so at equal
    global batch size the global batches are the same for any number of ranks. Each iteration is an epoch, the next
    one unless `set_epoch` names it, and the dataset is told, if it has a ``set_epoch``, so that augmentation
    follows. Being a `DistributedSampler`, trainers use it as it is.

    It works with any DataLoader, ``sampler=`` or in a ``BatchSampler``, with `FrameLoader`, and
    with torchdata's ``StatefulDataLoader``. The last two keep its state themselves: save theirs. A plain
    DataLoader with workers draws ahead of the loop, so there the loop says how many samples it has got:
    ``sampler.state_dict(taken=batches * batch_size)``.

    I/O: none.

    Parameters
    ----------
    dataset : sized or int
        What is sampled, or its length.
    seed : int
        Of the order.
    shuffle : {"global", "block"} or bool
        "global" (or True): any row anywhere, 4 bytes a row. "block": rows that are neighbours in the index, so
        mostly of one image set, stay within a window of the order; nothing is kept a row. False: as in the index.
    num_replicas, rank : int, optional
        Ranks, and which one this is. By default torch.distributed's when an iteration begins, else ``WORLD_SIZE`` and
        ``RANK`` from the environment, else one.
    drop_last : bool
        Leave out what cannot be shared out equally, at the end of the order: for training.
    pad : bool
        Without `drop_last`, whether ranks that would get one sample less get one of the first once more, as
        in `DistributedSampler`. False, for evaluation: each sample exactly once, shares differ by one at most.
    block : int
        For "block": neighbours that stay together.
    window : int
        For "block": positions they are spread over, `block` or more.

    Raises
    ------
    ConfigError
        Options that cannot work.

    Examples
    --------
    >>> sampler = ResumableSampler(frames, seed=0, drop_last=True)
    >>> loader = DataLoader(frames, batch_size=32, sampler=sampler, num_workers=4)
    >>> for number, batch in enumerate(loader, 1):
    ...     step(batch)
    ...     state = sampler.state_dict(taken=32 * number)
    """

    tells_dataset = True
    """Whether the dataset is told the epoch. `FrameLoader`, which says it with each batch, needs no telling."""

    def __init__(
        self,
        dataset: Sized | int,
        *,
        seed: int = 0,
        shuffle: Literal["global", "block"] | bool = "global",
        num_replicas: int | None = None,
        rank: int | None = None,
        drop_last: bool = False,
        pad: bool = True,
        block: int = 128,
        window: int = 4096,
    ) -> None:
        if shuffle not in ("global", "block", True, False):
            raise ConfigError(f"shuffle is 'global', 'block', True or False, not {shuffle!r}")
        length = dataset if isinstance(dataset, int) else len(dataset)
        seed = int(seed)  # of any kind: a state is for json
        if seed < 0 or length < 0:
            raise ConfigError(f"seed and length are 0 or more, not {seed} and {length}")
        if not 1 <= block <= window:
            raise ConfigError(f"block is 1 or more and window no less, not {block} and {window}")
        self._order: Shuffle = "none" if not shuffle else "block" if shuffle == "block" else "global"
        self._length, self._block, self._window, self._pad = length, block, window, pad
        self._asked = num_replicas, rank
        self._fingerprint: str | None = None
        self._latest: EpochRows | None = None  # the iteration that began last, if no epoch was named since
        self._loaded = (0, 0)
        self._epoch_named = False
        source = cast(Any, range(length) if isinstance(dataset, int) else dataset)
        super().__init__(source, *self._place(), shuffle=bool(shuffle), seed=seed, drop_last=drop_last)
        self._settle()

    def __repr__(self) -> str:
        return (
            f"<ResumableSampler: {self._length:,} samples, shuffle={self._order!r}, seed {self.seed}, "
            f"rank {self.rank} of {self.num_replicas}, epoch {self.epoch}>"
        )

    def __len__(self) -> int:
        """Samples of a whole epoch for this rank."""
        self._settle()
        return self.num_samples

    def __iter__(self) -> EpochRows:
        """The rows of an epoch for this rank, or what is left of it after `load_state_dict`. I/O: none."""
        return EpochRows(self)

    def set_epoch(self, epoch: int) -> None:
        """Say which epoch the next iteration is. What a state has consumed of that very epoch stays. I/O: none."""
        if epoch < 0:
            raise ConfigError(f"epochs count from 0, not {epoch}")
        self.epoch = int(epoch)
        self._latest = None
        self._epoch_named = True

    def state_dict(self, taken: int | None = None) -> dict[str, Any]:
        """Where the latest iteration stands, or where the first one will begin.

        I/O: none. Save that of rank 0; it fits any rank.

        Parameters
        ----------
        taken : int, optional
            Samples that this rank's loop has got from the loader since the iteration began. By default what the
            loader has drawn, which is more when it reads ahead.

        Returns
        -------
        dict
            Seed, epoch, samples consumed by all ranks, and what to know dataset and order by: some 200 bytes.

        Raises
        ------
        ConfigError
            `taken` that cannot be.
        """
        if self._latest is not None:
            return self._latest.state_dict(taken)
        if taken:
            raise ConfigError(f"{taken} samples taken, but no iteration has begun")
        return self.state_at(*self.upcoming())

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state: the next iteration is the rest of its epoch, later ones are whole.

        I/O: none. The state's seed becomes the sampler's. After a state of a finished epoch comes the next
        epoch, unless `set_epoch` names the finished one, of which nothing is left.

        Parameters
        ----------
        state : mapping
            Of `state_dict`, from any number of ranks.

        Raises
        ------
        ConfigError
            Not such a state, or one of another kind of order.
        SnapshotDriftError
            A state of another dataset.
        """
        try:
            seed, epoch, consumed, length = (int(state[name]) for name in ("seed", "epoch", "consumed", "length"))
            order, fingerprint = str(state["order"]), state["dataset"]
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError(f"not a state of a ResumableSampler: {error!r}") from error
        mine = self.state_at(0, 0)
        if order != mine["order"]:
            raise ConfigError(f"the state is of order {order!r}, this sampler's is {mine['order']!r}")
        if length != self._length:
            raise SnapshotDriftError(f"the state is of a dataset of {length:,} samples, this one has {self._length:,}")
        if None not in (fingerprint, mine["dataset"]) and fingerprint != mine["dataset"]:
            raise SnapshotDriftError("the state is of another dataset of the same length, or of its rows reordered")
        if min(seed, epoch, consumed) < 0 or consumed > length:
            raise ConfigError(f"no such place: seed {seed}, epoch {epoch}, {consumed:,} of {length:,} samples")
        self.seed, self.epoch = seed, epoch
        self._loaded, self._latest, self._epoch_named = (epoch, consumed), None, False

    # What its iterations and FrameLoader build on

    def upcoming(self) -> tuple[int, int]:
        """Epoch and global position at which the next iteration will begin. I/O: none."""
        if self._latest is not None:
            return self.epoch + 1, 0
        epoch, consumed = self._loaded
        if epoch != self.epoch:
            return self.epoch, 0
        if consumed and consumed == self._length and not self._epoch_named:
            return epoch + 1, 0
        return epoch, consumed

    def begin(self, rows: EpochRows, epoch: int) -> None:
        """Note that an iteration begins or goes on, and tell the dataset its epoch. I/O: none."""
        self.epoch, self._latest, self._loaded = epoch, rows, (0, 0)
        self._settle()
        if not self.tells_dataset:
            return
        dataset: Any = self.dataset
        while not hasattr(dataset, "set_epoch") and hasattr(dataset, "dataset"):  # torch's Subset and its like
            dataset = dataset.dataset
        if hasattr(dataset, "set_epoch"):
            dataset.set_epoch(epoch)

    def share(self, remaining: int) -> int:
        """How many of the last samples of an epoch this rank takes. I/O: none."""
        whole, rest = divmod(remaining, self.num_replicas)
        more = bool(rest) and not self.drop_last and (self._pad or self.rank < rest)
        return whole + more

    def rows(self, epoch: int, start: int, count: int) -> Iterator[int]:
        """Yield rows from a global position on. I/O: none."""
        order = self._make_order(epoch)
        for first in range(0, count, _CHUNK):
            steps = np.arange(first, min(first + _CHUNK, count))
            yield from order((start + self.rank + steps * self.num_replicas) % self._length).tolist()

    def state_at(self, epoch: int, consumed: int) -> dict[str, Any]:
        """The state at a place. I/O: none."""
        order = f"block {self._block} {self._window}" if self._order == "block" else self._order
        return {
            "seed": self.seed,
            "epoch": epoch,
            "consumed": min(consumed, self._length),
            "length": self._length,
            "order": order,
            "dataset": self._dataset_fingerprint(),
        }

    def _make_order(self, epoch: int) -> Order:
        if self._order == "none" or not self._length:
            return index_order
        make = partial(block_order, block=self._block, window=self._window) if self._order == "block" else global_order
        return make(self._length, self.seed, epoch)

    def _dataset_fingerprint(self) -> str | None:
        """Hash of some rows: unlike a snapshot id it knows their order, and costs the same for any length."""
        index = getattr(self.dataset, "index", None)
        if self._fingerprint is None and isinstance(index, DatasetIndex):
            rows = np.unique(np.linspace(0, max(len(index) - 1, 0), min(_FINGERPRINT_ROWS, len(index)), dtype=np.int64))
            text = repr([list(row.values()) for row in index.details(rows)])
            self._fingerprint = hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
        return self._fingerprint

    def _place(self) -> tuple[int, int]:
        replicas, rank = 1, 0
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            replicas, rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
        elif "WORLD_SIZE" in os.environ and "RANK" in os.environ:
            replicas, rank = int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"])
        asked_replicas, asked_rank = self._asked
        replicas = replicas if asked_replicas is None else asked_replicas
        rank = rank if asked_rank is None else asked_rank
        if not 0 <= rank < replicas:
            raise ConfigError(f"rank {rank} of {replicas} ranks")
        return replicas, rank

    def _settle(self) -> None:
        """Look up the ranks again: a sampler may be made before the process group is."""
        self.num_replicas, self.rank = self._place()
        self.num_samples = self.share(self._length)
        self.total_size = self.num_samples * self.num_replicas


class EpochRows(Iterator[int]):
    """One iteration of a `ResumableSampler`. It begins with the first row asked for.

    Making one changes nothing: torch's loaders make some that they never use. It has a state of
    its own because torchdata restores iterators, not just samplers.

    I/O: none.

    Parameters
    ----------
    sampler : ResumableSampler
        Whose.
    """

    def __init__(self, sampler: ResumableSampler) -> None:
        self._sampler = sampler
        self._place: tuple[int, int] | None = None  # epoch and global position of the first row
        self._rows: Iterator[int] | None = None
        self._replicas = self._count = self._drawn = 0

    def begin(self) -> int:
        """Begin, if not begun, and return the epoch. I/O: none."""
        if self._place is None:
            self._place = self._sampler.upcoming()
        epoch, start = self._place
        if self._rows is None:
            sampler = self._sampler
            sampler.begin(self, epoch)
            self._replicas, self._count = sampler.num_replicas, sampler.share(sampler._length - start)
            self._rows = sampler.rows(epoch, start, self._count)
        return epoch

    def __next__(self) -> int:
        """The next row of this rank."""
        if self._rows is None:
            self.begin()
        assert self._rows is not None
        row = next(self._rows)
        self._drawn += 1
        return row

    @property
    def count(self) -> int:
        """How many rows of this rank it has in all, once it has begun."""
        return self._count

    def take(self, count: int) -> list[int]:
        """The next rows of this rank, at most so many. I/O: none."""
        self.begin()
        assert self._rows is not None
        rows = list(islice(self._rows, count))
        self._drawn += len(rows)
        return rows

    def state_dict(self, taken: int | None = None) -> dict[str, Any]:
        """Where it stands, after `taken` rows or all that were drawn; see `ResumableSampler.state_dict`. I/O: none."""
        epoch, start = self._place or self._sampler.upcoming()
        if taken is not None and taken < 0:
            raise ConfigError(f"{taken} samples taken")
        taken = self._drawn if taken is None else taken
        if self._rows is not None and self._sampler.drop_last and taken >= self._count:
            return self._sampler.state_at(epoch, self._sampler._length)  # what is dropped is done with
        return self._sampler.state_at(epoch, start + min(taken, self._count) * self._replicas)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Make this very iteration the rest of the state's epoch, even if nothing is left of it. I/O: none."""
        self._sampler.load_state_dict(state)
        self._place, self._rows, self._drawn = (int(state["epoch"]), int(state["consumed"])), None, 0
        self._sampler.begin(self, self._place[0])
