"""The main job from end to end, on real DICOM, in one folder: what ``ahi-ml demo`` runs."""

from __future__ import annotations

import hashlib
import json
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ahi_ml.cli.sample_data import masks_by_instance, write_sample_dicom
from ahi_ml.errors import ConfigError, GeometryError
from ahi_ml.index import DatasetIndex
from ahi_ml.index.split import assign_groups, connected_groups
from ahi_ml.store import DataStore, connect

__all__ = ["DemoReport", "intensity_features", "run_demo"]

_SEEDS = range(100)
_RATIOS = {"train": 0.7, "val": 0.3}


@dataclass
class DemoReport:
    """What the demo did; every figure is of this run.

    Parameters
    ----------
    provenance : list of str
        What is real in the data and what derived.
    timings_s : dict
        Seconds of each step.
    """

    folder: str
    provenance: list[str] = field(default_factory=list)
    imported_files: int = 0
    failed_files: int = 0
    image_sets: int = 0
    frames: int = 0
    series: int = 0
    patients: int = 0
    snapshot_id: str = ""
    split_frames: dict[str, int] = field(default_factory=dict)
    split_patients: dict[str, int] = field(default_factory=dict)
    cold_frames_per_s: float = 0.0
    warm_frames_per_s: float = 0.0
    verified_frames: int = 0
    unverified_frames: int = 0
    training: dict[str, Any] = field(default_factory=dict)
    volume: dict[str, Any] = field(default_factory=dict)
    feature_rows: int = 0
    feature_errors: int = 0
    outputs: dict[str, str] = field(default_factory=dict)
    timings_s: dict[str, float] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return asdict(self)


def run_demo(
    folder: Path,
    *,
    data: Path | None = None,
    steps: int = 80,
    say: Callable[[str], None] = lambda text: None,
    progress: bool | None = None,
) -> DemoReport:
    """Import, search, index, split, train, open a volume, extract features.

    I/O: everything lies in `folder`: sample DICOM, embedded store, cache, outputs. A second run in
    the same folder imports nothing twice.

    Parameters
    ----------
    folder : Path
        Made when absent.
    data : Path, optional
        A folder of DICOM to use instead of the sample.
    steps : int
        Training steps.
    say : callable
        Told what happens, a line at a time.
    progress : bool, optional
        Show progress bars; None shows them in terminals.

    Raises
    ------
    AhiError
        A step failed; the message says why.
    """
    folder = folder.expanduser().absolute()
    folder.mkdir(parents=True, exist_ok=True)
    report = DemoReport(folder=str(folder))
    clock = _Clock(report.timings_s)
    masks: dict[str, Any] = {}
    if data is None:
        with clock("sample data"):
            sample = write_sample_dicom(folder / "dicom", progress=say)
            masks = masks_by_instance(sample.segmentations)
        data, report.provenance = folder / "dicom", list(sample.provenance)
    elif not data.is_dir():
        raise ConfigError(f"no folder {str(data)!r}")
    else:
        report.provenance = [f"DICOM files of {data}, as they are"]
    with connect(folder / "store", cache=folder / "cache") as store:
        store.progress = progress
        with clock("import"):
            _import_once(store, data, folder / "imported.json", report, say)
        with clock("search and index"):
            index = _index(store, folder / "index.arrow", report, say)
        frames = _trainable(index, masks)
        with clock("split"):
            parts = _split(frames, report, say)
        with clock("cold and warm epoch"):
            _epochs(store, frames, report, say)
        with clock("training"):
            _train(store, parts, masks, steps, report, say, progress)
        with clock("volume"):
            _volume(store, index, folder / "volume.png", report, say)
        with clock("features"):
            _features(store, index, folder / "features.parquet", report, say)
    report.outputs |= {"index": str(folder / "index.arrow"), "store": str(folder / "store")}
    (folder / "report.json").write_text(json.dumps(report.as_dict(), indent=2), encoding="utf-8")
    report.outputs["report"] = str(folder / "report.json")
    return report


class _Clock:
    """Notes how long each step took."""

    def __init__(self, timings: dict[str, float]) -> None:
        self._timings = timings

    def __call__(self, step: str) -> _Clock:
        self._step = step
        return self

    def __enter__(self) -> None:
        self._start = time.perf_counter()

    def __exit__(self, *exception: object) -> None:
        self._timings[self._step] = round(time.perf_counter() - self._start, 2)


def _fingerprint(data: Path) -> str:
    """What lies in a folder, by names, sizes and times: enough to know an import would repeat."""
    digest = hashlib.blake2b(str(data.absolute()).encode(), digest_size=16)
    for path in sorted(path for path in data.rglob("*") if path.is_file()):
        status = path.stat()
        digest.update(f"{path.relative_to(data)}\0{status.st_size}\0{status.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def _import_once(store: DataStore, data: Path, note: Path, report: DemoReport, say: Callable[[str], None]) -> None:
    known: dict[str, Any] = json.loads(note.read_text(encoding="utf-8")) if note.exists() else {}
    mark = _fingerprint(data)
    if mark in known and store.search(primary=None).count():
        say("import: nothing to do, these files are in the store")
    else:
        done = store.import_dicom(data)
        for failure in done.failed[:5]:
            say(f"  not imported: {Path(failure.input_file).name}: {failure.reason}")
        known[mark] = {"imported": done.imported, "failed": len(done.failed)}
        note.write_text(json.dumps(known), encoding="utf-8")
        say(f"import: {done.imported} of {done.scanned} files into {len(done.image_sets)} image sets")
    report.imported_files, report.failed_files = known[mark]["imported"], known[mark]["failed"]


def _index(store: DataStore, path: Path, report: DemoReport, say: Callable[[str], None]) -> DatasetIndex:
    found = store.search()
    say(f"search: {found.count()} primary image sets, {found.where(modality=['MR', 'CT']).count()} of them MR or CT")
    key = path.with_name(f"{path.name}.key")
    index = found.index(patient_key=key.read_bytes() if key.exists() else None)
    if len(index) == 0:
        raise ConfigError("the store holds no images: name a folder of DICOM images with --data")
    index.save(path)
    series = index.series
    report.image_sets, report.series, report.frames = len(series), len(series), len(index)
    report.patients, report.snapshot_id = int(series["patient_key"].nunique()), index.snapshot_id
    say(f"index: {len(index):,} frames of {len(series)} series, {report.patients} patients")
    return index


def _split(index: DatasetIndex, report: DemoReport, say: Callable[[str], None]) -> dict[str, DatasetIndex]:
    known = index.where("patient_key is not None")
    if len(known) < len(index):
        say(f"split: {len(index) - len(known)} frames have no patient id and stay out")
    index = known if len(known) else index
    series = index.series
    by: Literal["patient", "study"] = "patient" if len(known) else "study"
    members = series["patient_key" if by == "patient" else "study_instance_uid"].tolist()
    groups = connected_groups(members, series["study_instance_uid"].tolist())
    if len(set(groups)) < 2:
        say("split: all frames are of one patient, so there is nothing to hold back: training on all of them")
        report.split_frames, report.split_patients = {"train": len(index), "val": 0}, {"train": 1, "val": 0}
        return {"train": index, "val": index[:0]}
    # Of a handful of patients a part can come out empty: take the first seed where none does.
    seed = next((s for s in _SEEDS if set(assign_groups(groups, members, _RATIOS, seed=s)) == set(_RATIOS)), 0)
    parts = index.split(_RATIOS, by=by, seed=seed)
    keys = {name: set(part.series["patient_key"]) for name, part in parts.items() if len(part)}
    report.split_frames = {name: len(part) for name, part in parts.items()}
    report.split_patients = {name: len(found) for name, found in keys.items()}
    shared = set.intersection(*keys.values()) if len(keys) == len(parts) else set()
    say(
        f"split by {by}, seed {seed}: {report.split_frames} frames, {report.split_patients} patients, "
        f"{len(shared)} in both"
    )
    return parts


def _trainable(index: DatasetIndex, masks: dict[str, Any]) -> DatasetIndex:
    """Frames of one shape: those with a mask, or the most frequent shape of grey images."""
    if masks:
        known = set(masks)
        uids = index.column("sop_instance_uid").to_pylist()
        return index[np.array([uid in known for uid in uids], bool)]
    grey = index.where("SamplesPerPixel == 1 and Modality not in ('SEG', 'RTDOSE')")
    if len(grey) == 0:
        return index
    shapes = Counter(zip(grey.column("Rows").to_pylist(), grey.column("Columns").to_pylist(), strict=True))
    (rows, columns), _ = shapes.most_common(1)[0]
    return grey.where(Rows=rows, Columns=columns)


def _epochs(store: DataStore, frames: DatasetIndex, report: DemoReport, say: Callable[[str], None]) -> None:
    from ahi_ml.datasets import FrameDataset, FrameLoader

    store.cache.clear()
    before = store.reader.stats()
    for name in ("cold", "warm"):
        start = time.perf_counter()
        read = sum(len(batch["key"]) for batch in FrameLoader(FrameDataset(store, frames), batch_size=32))
        rate = read / (time.perf_counter() - start)
        setattr(report, f"{name}_frames_per_s", round(rate, 1))
        say(f"{name} epoch: {read:,} frames, {rate:,.0f} frames/s")
    after = store.reader.stats()
    report.verified_frames = after["verified"] - before["verified"]
    report.unverified_frames = after["unverified"] - before["unverified"]


def _train(
    store: DataStore,
    parts: dict[str, DatasetIndex],
    masks: dict[str, Any],
    steps: int,
    report: DemoReport,
    say: Callable[[str], None],
    progress: bool | None,
) -> None:
    from ahi_ml.cli.training import train_denoiser, train_segmenter

    if not len(parts["train"]):
        say("training: no frames to train on")
        return
    if masks:
        report.training = train_segmenter(store, parts["train"], parts["val"], masks, steps=steps, progress=progress)
    else:
        report.training = train_denoiser(store, parts["train"], parts["val"], steps=steps, progress=progress)
    say("training: " + ", ".join(f"{name} {value}" for name, value in report.training.items()))


def _volume(
    store: DataStore, index: DatasetIndex, picture: Path, report: DemoReport, say: Callable[[str], None]
) -> None:
    from ahi_ml.display import montage
    from ahi_ml.volume import open_volume

    for uid in index.series.sort_values("frames", ascending=False, kind="stable").index:
        try:
            volume = open_volume(store, index.where(series_instance_uid=uid))
        except (GeometryError, ConfigError):
            continue  # not every series is a volume; the largest that is one will do
        if volume.sizes["z"] < 2 or "channel" in volume.dims:
            continue
        montage(volume).savefig(picture, dpi=110, facecolor="black")
        report.volume = {
            "modality": volume.name,
            "shape": list(volume.shape),
            "spacing_mm": [round(value, 4) for value in volume.attrs["spacing"]],
            "kind": volume.attrs["kind"],
        }
        report.outputs["volume picture"] = str(picture)
        say(f"volume: {volume.name} {volume.shape}, spacing {report.volume['spacing_mm']} mm")
        return
    say("volume: no series of this data stacks")


def intensity_features(volume: Any) -> dict[str, float]:
    """Features of a volume: extremes, mean, and the size of what is brighter than the mean.

    I/O: reads the whole volume.
    """
    values = volume.values
    voxel_ml = float(np.prod(volume.attrs["spacing"])) / 1000
    mean = float(values.mean())
    return {
        "minimum": float(values.min()),
        "maximum": float(values.max()),
        "mean": mean,
        "bright_volume_ml": float((values > mean).sum()) * voxel_ml,
    }


def _features(
    store: DataStore, index: DatasetIndex, path: Path, report: DemoReport, say: Callable[[str], None]
) -> None:
    from ahi_ml.features import extract_features

    table = extract_features(store, index, intensity_features, out=path, n_jobs=1)
    report.feature_rows, report.feature_errors = len(table), int(table["error"].notna().sum())
    report.outputs["features"] = str(path)
    say(
        f"features: {report.feature_rows} series, {report.feature_errors} that are no volume "
        "(their reasons are in the table)"
    )
