"""Two small networks the demo trains for a few steps: one with masks, one that needs none."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm.auto import tqdm

from ahi_ml.datasets import FrameDataset, FrameLoader
from ahi_ml.index import DatasetIndex
from ahi_ml.store import DataStore
from ahi_ml.types import AnyArray

__all__ = ["train_denoiser", "train_segmenter"]

_BATCH = 8
_NOISE = 0.3
_CLASSES = 3


class _SmallNet(nn.Module):
    """Two levels of a U-Net."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.fine = _block(1, 8)
        self.coarse = _block(8, 16)
        self.mixed = _block(24, 8)
        self.head = nn.Conv2d(8, outputs, 1)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        fine = self.fine(image)
        coarse = self.coarse(nn.functional.max_pool2d(fine, 2))
        up = nn.functional.interpolate(coarse, size=fine.shape[-2:], mode="nearest")
        return self.head(self.mixed(torch.cat([fine, up], 1)))  # type: ignore[no-any-return]


def _block(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, padding=1),
        nn.BatchNorm2d(outputs),
        nn.ReLU(),
        nn.Conv2d(outputs, outputs, 3, padding=1),
        nn.BatchNorm2d(outputs),
        nn.ReLU(),
    )


def _standardise(image: torch.Tensor) -> torch.Tensor:
    """Each image to mean 0 and deviation 1: scanners and patients differ in scale."""
    mean = image.mean((1, 2, 3), keepdim=True)
    return (image - mean) / image.std((1, 2, 3), keepdim=True).clamp_min(1e-6)


def train_segmenter(
    store: DataStore,
    train: DatasetIndex,
    val: DatasetIndex,
    masks: Mapping[str, AnyArray],
    *,
    steps: int,
    progress: bool | None = None,
) -> dict[str, Any]:
    """Train to segment, with a mask for each SOP instance UID; report losses and Dice on `val`.

    I/O: reads the frames, through the cache.
    """
    targets = {uid: torch.from_numpy(np.asarray(mask, np.int64)) for uid, mask in masks.items()}
    torch.manual_seed(0)
    net = _SmallNet(_CLASSES)
    criterion = nn.CrossEntropyLoss(weight=torch.tensor([0.3, 1.0, 1.0]))

    def loss_of(batch: dict[str, Any]) -> torch.Tensor:
        loss: torch.Tensor = criterion(net(_standardise(batch["image"])), batch["target"])
        return loss

    report = _fit(net, FrameDataset(store, train, target=targets), loss_of, steps, progress)
    overlap, total = torch.zeros(_CLASSES), torch.zeros(_CLASSES)
    net.eval()
    with torch.no_grad():
        for batch in FrameLoader(FrameDataset(store, val, target=targets), _BATCH):
            guess, truth = net(_standardise(batch["image"])).argmax(1), batch["target"]
            for label in range(_CLASSES):
                overlap[label] += 2 * ((guess == label) & (truth == label)).sum()
                total[label] += (guess == label).sum() + (truth == label).sum()
    dice = overlap / total.clamp_min(1)
    return {
        "task": "segmentation",
        **report,
        "val_dice_grey": round(float(dice[1]), 3),
        "val_dice_white": round(float(dice[2]), 3),
    }


def train_denoiser(
    store: DataStore, train: DatasetIndex, val: DatasetIndex, *, steps: int, progress: bool | None = None
) -> dict[str, Any]:
    """Train to take noise away again, which any images will do for; report the errors on `val`.

    I/O: reads the frames, through the cache.
    """
    torch.manual_seed(0)
    net = _SmallNet(1)
    noise = torch.Generator().manual_seed(0)

    def loss_of(batch: dict[str, Any]) -> torch.Tensor:
        clean = _standardise(_shrink(batch["image"]))
        noisy = clean + _NOISE * torch.randn(clean.shape, generator=noise)
        return nn.functional.mse_loss(noisy + net(noisy), clean)

    report = _fit(net, FrameDataset(store, train), loss_of, steps, progress)
    net.eval()
    with torch.no_grad():
        errors = [float(loss_of(batch)) for batch in FrameLoader(FrameDataset(store, val), _BATCH)]
    error = round(float(np.mean(errors)), 4) if errors else None
    return {
        "task": "denoising",
        **report,
        "val_error": error,
        "noise_power": round(_NOISE**2, 4),
    }


def _shrink(image: torch.Tensor) -> torch.Tensor:
    """Large images at about 128 pixels a side, so that the demo stays short on two cores."""
    factor = max(image.shape[-1] // 128, 1)
    return nn.functional.avg_pool2d(image.mean(1, keepdim=True), factor)


def _fit(
    net: nn.Module,
    dataset: FrameDataset,
    loss_of: Callable[[dict[str, Any]], torch.Tensor],
    steps: int,
    progress: bool | None,
) -> dict[str, Any]:
    loader = FrameLoader(dataset, _BATCH, shuffle=True, seed=0)
    optimizer = torch.optim.Adam(net.parameters(), 3e-3)
    losses: list[float] = []
    start = time.perf_counter()
    net.train()
    threads = torch.get_num_threads()
    # The loader's decode threads want the other cores, and OpenMP threads that share a core with
    # anything else spin at every layer: on two busy cores one thread is eight times as fast as two.
    torch.set_num_threads(1)
    try:
        _steps(net, loader, loss_of, optimizer, losses, steps, progress)
    finally:
        torch.set_num_threads(threads)
    return {
        "steps": len(losses),
        "first_loss": round(float(np.mean(losses[:3])), 4),
        "last_loss": round(float(np.mean(losses[-3:])), 4),
        "steps_per_s": round(len(losses) / (time.perf_counter() - start), 1),
    }


def _steps(
    net: nn.Module,
    loader: FrameLoader,
    loss_of: Callable[[dict[str, Any]], torch.Tensor],
    optimizer: torch.optim.Optimizer,
    losses: list[float],
    steps: int,
    progress: bool | None,
) -> None:
    with tqdm(total=steps, desc="train", unit="step", disable=None if progress is None else not progress) as bar:
        while len(losses) < steps:
            for batch in loader:
                loss = loss_of(batch)
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                losses.append(float(loss.detach()))
                bar.set_postfix(loss=f"{losses[-1]:.3f}")
                bar.update()
                if len(losses) >= steps:
                    break
