"""The ways to load an epoch that `cold_epoch` compares, each as a function for a process of its own.

Each makes its loader, reads two epochs and says how long they took. The first is the epoch as a user
sees it: making the loader, starting workers and their clients are in it. In the second everything runs
already.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import boto3
import numpy as np
import openjpeg
import psutil
import torch
from botocore.config import Config
from torch.utils.data import DataLoader, Dataset

import ahi_ml
from ahi_ml.codec import crc32
from benchmarks.runner import cpu_s

warnings.filterwarnings("ignore", "This DataLoader will create")  # more workers than cores are meant: they wait

__all__ = ["Asked", "Epochs", "frame_loader", "plain_loader", "torch_loader"]


@dataclass(frozen=True)
class Asked:
    """What to load.

    Parameters
    ----------
    folder, index : Path
        The embedded store, which somebody else keeps running with its faults, and the frames.
    batch_size : int
        Frames a batch.
    repeat : int
        How often to go over the second epoch, for a measurable time. 0 takes the first for the second:
        a slow loader without workers has next to no start-up to tell apart.
    """

    folder: Path
    index: Path
    batch_size: int
    repeat: int = 1


@dataclass(frozen=True)
class Epochs:
    """What came of it.

    Parameters
    ----------
    first_batch_s, first_s, second_s : float
        Until the first batch, the whole first epoch, and the second (the mean of its repetitions).
    frames : int
        Of an epoch.
    cpu_ms : float
        User and system time of the process and its workers a frame, in the second epoch.
    checksum : int
        Of the first image: all ways must give the same pixels.
    """

    first_batch_s: float
    first_s: float
    second_s: float
    frames: int
    cpu_ms: float
    checksum: int


def frame_loader(asked: Asked) -> Epochs:
    """`FrameLoader`: threads."""
    store, dataset = _dataset(asked)
    with store:
        return _measure(lambda: ahi_ml.FrameLoader(dataset, batch_size=asked.batch_size), asked.repeat)


def torch_loader(asked: Asked, workers: int) -> Epochs:
    """Torch's own DataLoader over `FrameDataset`."""
    store, dataset = _dataset(asked)
    with store:
        return _measure(lambda: _torch(dataset, asked, workers), asked.repeat)


def plain_loader(asked: Asked, workers: int) -> Epochs:
    """What a competent user writes without the package: boto3 and OpenJPEG in a DataLoader."""
    with ahi_ml.connect(asked.folder, cache=asked.folder.parent / "no-cache") as store:
        index = ahi_ml.DatasetIndex.load(asked.index)
        dataset = PlainDataset(store, index)
        return _measure(lambda: _torch(dataset, asked, workers), asked.repeat)


def _dataset(asked: Asked) -> tuple[ahi_ml.DataStore, ahi_ml.FrameDataset]:
    # Whoever has an index has searched the store, so its connection is no part of an epoch.
    store = ahi_ml.connect(asked.folder, cache=asked.folder.parent / "no-cache")
    return store, ahi_ml.FrameDataset(store, ahi_ml.DatasetIndex.load(asked.index), cache=None)


def _torch(dataset: Dataset[Any], asked: Asked, workers: int) -> DataLoader[Any]:
    return DataLoader(dataset, asked.batch_size, num_workers=workers, persistent_workers=workers > 0)


class PlainDataset(Dataset[dict[str, Any]]):
    """Frames by boto3 and OpenJPEG: one request an item, a client a worker.

    Parameters
    ----------
    store : DataStore
        Says where the service is; its code is not used to read.
    index : DatasetIndex
        Says which frames there are and how they are rescaled.
    """

    def __init__(self, store: ahi_ml.DataStore, index: ahi_ml.DatasetIndex) -> None:
        self._environment = store.environment()
        self._datastore_id = store.datastore_id
        self._frames = [
            (
                source.image_set_id,
                source.frame_id,
                source.profile.modality.slope,
                source.profile.modality.intercept,
            )
            for source in index.sources()
        ]
        self._client: Any = None

    def __len__(self) -> int:
        return len(self._frames)

    def __getitem__(self, item: int) -> dict[str, Any]:
        if self._client is None:  # in the worker: clients do not survive being sent there
            self._client = self._make_client()
        image_set_id, frame_id, slope, intercept = self._frames[item]
        answer = self._client.get_image_frame(
            datastoreId=self._datastore_id,
            imageSetId=image_set_id,
            imageFrameInformation={"imageFrameId": frame_id},
        )
        stored = openjpeg.decode(answer["imageFrameBlob"].read())
        image = stored.astype(np.float32)
        image *= slope
        image += intercept
        return {"image": torch.from_numpy(image)[None], "key": frame_id}

    def _make_client(self) -> Any:
        said = self._environment
        return boto3.client(
            "medical-imaging",
            endpoint_url=said["AWS_ENDPOINT_URL_MEDICAL_IMAGING"],
            aws_access_key_id=said["AWS_ACCESS_KEY_ID"],
            aws_secret_access_key=said["AWS_SECRET_ACCESS_KEY"],
            region_name=said["AWS_REGION"],
            config=Config(max_pool_connections=32, inject_host_prefix=False),
        )


def _measure(make: Callable[[], Any], repeat: int) -> Epochs:
    cpu = cpu_s()
    start = time.perf_counter()
    loader = make()
    frames, first_batch, checksum = 0, 0.0, 0
    for batch in loader:
        if not frames:
            first_batch = time.perf_counter() - start
            checksum = crc32(batch["image"][0].numpy())
        frames += len(batch["image"])
    first = time.perf_counter() - start
    if not repeat:
        return Epochs(first_batch, first, first, frames, (cpu_s() - cpu) / frames * 1e3, checksum)
    # The store's server is not among them: it is somebody else's child.
    workers = psutil.Process().children(recursive=True)
    cpu = cpu_s(workers)
    start = time.perf_counter()
    for _ in range(repeat):
        seen = sum(len(batch["image"]) for batch in loader)
        if seen != frames:
            raise RuntimeError(f"an epoch of {frames} frames and one of {seen}")
    second = (time.perf_counter() - start) / repeat
    return Epochs(first_batch, first, second, frames, (cpu_s(workers) - cpu) / (frames * repeat) * 1e3, checksum)
