"""The disk caches that `peers` compares, each in its own format, each read in a process of its own.

A peer writes the frames once, from ``.npy`` files, and gives batches of them as tensors. It is imported only
where it is used, and `ahi_ml` not at all.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
import types
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from torch.utils.data import DataLoader, Dataset

from benchmarks.runner import cpu_s

__all__ = ["PEERS", "Column", "Peer", "Warm", "Way", "load", "measure", "write"]

warnings.filterwarnings("ignore", "This DataLoader will create")  # more workers than cores are among the sweep
warnings.filterwarnings("ignore", "The given NumPy array is not writable")  # collating only reads it


@dataclass(frozen=True)
class Warm:
    """What came of some warm epochs.

    Parameters
    ----------
    seconds, cpu_ms : float
        Of an epoch; user and system time of the process and its workers a frame.
    frames : int
        Of an epoch.
    checksum : int
        Of all pixels, in any order: all must give the same.
    """

    seconds: float
    cpu_ms: float
    frames: int
    checksum: int


@dataclass(frozen=True)
class Way:
    """How to load from a peer.

    Parameters
    ----------
    batch_size, workers : int
        Of the loader.
    threads : int, optional
        Of torch, which copies a batch on as many; by default its own choice. Those of worker processes are
        one each.
    """

    batch_size: int
    workers: int
    threads: int | None = None


@dataclass(frozen=True)
class Peer:
    """A way to keep frames and to load them again.

    Parameters
    ----------
    package : str
        What has to be installed.
    write : callable
        Takes a new folder, the ``.npy`` files and the frames a shard.
    batches : callable
        Takes that folder, the files, batch size and number of workers; gives what can be iterated over
        again and again, for batches ``(n, 1, rows, columns)``.
    halves : bool
        Whether batches of half the size are worth a try.
    """

    package: str
    write: Callable[[Path, list[str], int], None]
    batches: Callable[[Path, list[str], int, int], Iterable[Any]]
    halves: bool = False

    @property
    def installed(self) -> bool:
        """Whether it can run."""
        return find_spec(self.package) is not None


@dataclass(frozen=True)
class Column:
    """The images of batches that hold more.

    Parameters
    ----------
    batches : iterable
        Of mappings or sequences.
    name : object
        Key or place of the image.
    """

    batches: Iterable[Any]
    name: Any

    def __iter__(self) -> Iterator[torch.Tensor]:
        for batch in self.batches:
            yield batch[self.name]


def _read(file: str) -> torch.Tensor:
    return torch.from_numpy(np.load(file))


def _nothing(folder: Path, files: list[str], shard: int) -> None:
    """The files are the format, or memory is."""


def _torch(dataset: Any, batch_size: int | None, workers: int, loader: Any = DataLoader) -> Any:
    return loader(dataset, batch_size=batch_size, num_workers=workers, persistent_workers=workers > 0)


class _Files(Dataset[torch.Tensor]):
    def __init__(self, files: list[str], mapped: bool) -> None:
        self._files = files
        self._mode: Any = "r" if mapped else None

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, item: int) -> torch.Tensor:
        return torch.from_numpy(np.load(self._files[item], mmap_mode=self._mode))


def _npy(folder: Path, files: list[str], batch_size: int, workers: int) -> Any:
    return _torch(_Files(files, mapped=False), batch_size, workers)


def _mapped_npy(folder: Path, files: list[str], batch_size: int, workers: int) -> Any:
    return _torch(_Files(files, mapped=True), batch_size, workers)


def _write_litdata(folder: Path, files: list[str], shard: int) -> None:
    import litdata

    litdata.optimize(_read, files, str(folder), chunk_size=shard, num_workers=1, verbose=False)


def _litdata(folder: Path, files: list[str], batch_size: int, workers: int) -> Any:
    import litdata

    dataset = litdata.StreamingDataset(str(folder), cache_dir=str(folder.with_suffix(".cache")))
    return _torch(dataset, batch_size, workers, litdata.StreamingDataLoader)


def _streaming() -> Any:
    # Its vision data sets, not used here, import torchvision, which PyPI has for torch with CUDA only.
    sys.modules.setdefault("streaming.vision", types.ModuleType("streaming.vision"))
    import streaming

    return streaming


def _write_streaming(folder: Path, files: list[str], shard: int) -> None:
    first = np.load(files[0])
    column = f"ndarray:{first.dtype}:{','.join(map(str, first.shape))}"
    limit = (first.nbytes + 64) * shard
    with _streaming().MDSWriter(columns={"image": column}, out=str(folder), size_limit=limit) as writer:
        for file in files:
            writer.write({"image": np.load(file)})


def _mds(folder: Path, files: list[str], batch_size: int, workers: int) -> Any:
    streaming = _streaming()
    dataset = streaming.StreamingDataset(local=str(folder), batch_size=batch_size, num_canonical_nodes=1)
    return Column(_torch(dataset, batch_size, workers, streaming.StreamingDataLoader), "image")


def _write_persistent(folder: Path, files: list[str], shard: int) -> None:
    for _ in _persistent_dataset(folder, files):
        pass


def _persistent_dataset(folder: Path, files: list[str]) -> Any:
    from monai.data import PersistentDataset
    from monai.transforms import Lambda

    return PersistentDataset(files, Lambda(_read, track_meta=False), cache_dir=folder)


def _persistent(folder: Path, files: list[str], batch_size: int, workers: int) -> Any:
    return _torch(_persistent_dataset(folder, files), batch_size, workers)


def _memory(folder: Path, files: list[str], batch_size: int, workers: int) -> Any:
    from monai.data import CacheDataset
    from monai.transforms import Lambda

    dataset = CacheDataset(files, Lambda(_read, track_meta=False), copy_cache=False, progress=False)
    return _torch(dataset, batch_size, workers)


def _write_webdataset(folder: Path, files: list[str], shard: int) -> None:
    import webdataset

    folder.mkdir()
    with webdataset.ShardWriter(f"{folder}/%06d.tar", maxcount=shard, verbose=0) as writer:
        for number, file in enumerate(files):
            writer.write({"__key__": f"{number:06}", "npy": np.load(file)})


def _webdataset(folder: Path, files: list[str], batch_size: int, workers: int) -> Any:
    import webdataset

    shards = [str(path) for path in sorted(folder.glob("*.tar"))]
    dataset = webdataset.WebDataset(shards, shardshuffle=False).decode().to_tuple("npy").map_tuple(torch.from_numpy)
    return Column(_torch(dataset.batched(batch_size), None, workers, webdataset.WebLoader), 0)


PEERS = {
    "LitData": Peer("litdata", _write_litdata, _litdata, halves=True),
    "MosaicML Streaming": Peer("streaming", _write_streaming, _mds),
    "MONAI PersistentDataset": Peer("monai", _write_persistent, _persistent),
    "DataLoader over .npy": Peer("torch", _nothing, _npy),
    "DataLoader over .npy, mapped": Peer("torch", _nothing, _mapped_npy),
    "WebDataset": Peer("webdataset", _write_webdataset, _webdataset),
    "MONAI CacheDataset, in memory": Peer("monai", _nothing, _memory),
}


def write(name: str, folder: Path, files: list[str], shard: int) -> None:
    """Write a peer's own format into a new folder."""
    _keep_temporary_files_in(folder.parent)
    PEERS[name].write(folder, files, shard)


def load(name: str, folder: Path, files: list[str], way: Way, epochs: int) -> Warm:
    """Warm epochs of a peer."""
    _keep_temporary_files_in(folder.parent)
    if way.threads:
        torch.set_num_threads(way.threads)
    return measure(PEERS[name].batches(folder, files, way.batch_size, way.workers), epochs)


def _keep_temporary_files_in(folder: Path) -> None:
    # LitData and Streaming leave locks and folders behind.
    os.environ["TMPDIR"] = tempfile.tempdir = str(folder)


def measure(batches: Iterable[torch.Tensor], epochs: int) -> Warm:
    """Time some epochs, after two others."""
    checksum = sum(zlib.crc32(image.numpy()) for batch in batches for image in batch)
    frames = sum(len(batch) for batch in batches)  # the first starts workers, the second makes buffers
    workers = psutil.Process().children(recursive=True)  # the store's server is somebody else's child
    cpu, start = cpu_s(workers), time.perf_counter()
    for _ in range(epochs):
        seen = sum(len(batch) for batch in batches)
        if seen != frames:
            raise RuntimeError(f"an epoch of {frames} frames and one of {seen}")
    seconds = (time.perf_counter() - start) / epochs
    return Warm(seconds, (cpu_s(workers) - cpu) / (frames * epochs) * 1e3, frames, checksum)
