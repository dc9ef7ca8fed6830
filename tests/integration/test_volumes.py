"""open_volume: phantoms whose voxel values encode their place come back in place; real series match other readers."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pydicom
import pytest
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.pixels import apply_voi
from pydicom.uid import (
    CTImageStorage,
    DigitalXRayImageStorageForPresentation,
    EnhancedMRImageStorage,
    ExplicitVRLittleEndian,
    MRImageStorage,
    PositronEmissionTomographyImageStorage,
    SecondaryCaptureImageStorage,
    generate_uid,
)

from ahi_ml.cache import FrameCache
from ahi_ml.codec.wavelet import low_pass
from ahi_ml.errors import (
    ConfigError,
    DuplicateSliceError,
    GapError,
    GeometryError,
    MixedOrientationError,
    NotFoundError,
)
from ahi_ml.index import DatasetIndex
from ahi_ml.pixels import Window, uint8
from ahi_ml.store import DataStore, connect
from ahi_ml.volume import open_volume

ROW = np.array([0.8, 0.36, 0.48])
COLUMN = np.array([-0.6, 0.48, 0.64])
NORMAL = np.cross(ROW, COLUMN)
PIXEL = (1.25, 0.75)  # between rows, between columns
STEP = 2.5
FIRST = np.array([-30.0, 12.5, 101.0])
SHAPE = (11, 9, 7)


def encoded(shape: tuple[int, int, int] = SHAPE) -> np.ndarray:
    """Stored values that say where they are: k, j and i as decimal digits."""
    k, j, i = np.indices(shape)
    return (k * 1000 + j * 30 + i - 5000).astype(np.int16)


def dicom(pixels: np.ndarray, series: str, number: int, **attributes: Any) -> Dataset:
    """One instance with the attributes that every image here has."""
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.SOPClassUID = CTImageStorage
    dataset.SOPInstanceUID = generate_uid(entropy_srcs=[series, str(number)])
    dataset.SeriesInstanceUID = uid_of(series)
    dataset.StudyInstanceUID = generate_uid(entropy_srcs=["study", series])
    dataset.FrameOfReferenceUID = generate_uid(entropy_srcs=["frame of reference", series])
    dataset.PatientID = f"phantom-{series}"
    dataset.InstanceNumber = number
    dataset.Modality = "CT"
    dataset.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
    plane = pixels.shape[-2:]
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
    if attributes.get("SamplesPerPixel") == 3:
        plane = pixels.shape[:2]
        dataset.PlanarConfiguration = 0
    dataset.Rows, dataset.Columns = plane
    dataset.BitsAllocated = dataset.BitsStored = 8 * pixels.itemsize
    dataset.HighBit = dataset.BitsStored - 1
    dataset.PixelRepresentation = int(pixels.dtype.kind == "i")
    dataset.PixelData = pixels.tobytes()
    for name, value in attributes.items():
        if value is None:
            if name in dataset:
                delattr(dataset, name)
        else:
            setattr(dataset, name, value)
    dataset.file_meta.MediaStorageSOPClassUID = dataset.SOPClassUID
    dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
    return dataset


def uid_of(series: str) -> str:
    return str(generate_uid(entropy_srcs=["series", series]))


def place(
    position: np.ndarray, row: np.ndarray = ROW, column: np.ndarray = COLUMN, pixel: tuple[float, float] = PIXEL
) -> dict[str, Any]:
    """Plane attributes, in the 16 characters of a decimal string."""
    return {
        "ImagePositionPatient": [f"{value:.10g}" for value in position],
        "ImageOrientationPatient": [f"{value:.10g}" for value in (*row, *column)],
        "PixelSpacing": list(pixel),
    }


def slices(series: str, *, keep: Any = None, seed: int = 7, **attributes: Any) -> Iterator[Dataset]:
    """The encoded phantom, its instance numbers in no order."""
    pixels = encoded()
    numbers = np.random.default_rng(seed).permutation(len(pixels)) + 1
    for k in range(len(pixels)) if keep is None else keep:
        yield dicom(
            pixels[k],
            series,
            int(numbers[k]),
            **{
                **place(FIRST + k * STEP * NORMAL),
                "RescaleSlope": 2,
                "RescaleIntercept": -1024,
                "SliceThickness": 99,
                **attributes,
            },
        )


def axial(series: str, count: int, **attributes: Any) -> Iterator[Dataset]:
    x, y = np.eye(3)[0], np.eye(3)[1]
    for k in range(count):
        pixels = np.full((6, 5), 10 * k, np.int16)
        yield dicom(pixels, series, k + 1, **{**place(np.array([0, 0, 3.0 * k]), x, y), **attributes})


def pet(series: str) -> Iterator[Dataset]:
    for k, dataset in enumerate(axial(series, 5)):
        dataset.SOPClassUID = dataset.file_meta.MediaStorageSOPClassUID = PositronEmissionTomographyImageStorage
        dataset.Modality, dataset.Units = "PT", "BQML"
        dataset.RescaleSlope, dataset.RescaleIntercept = f"{0.125 * (k + 1):g}", 0
        yield dataset


def colour(series: str) -> Iterator[Dataset]:
    for k in range(3):
        pixels = np.random.default_rng(k).integers(0, 256, (6, 5, 3), np.uint8)
        x, y = np.eye(3)[0], np.eye(3)[1]
        yield dicom(
            pixels,
            series,
            k + 1,
            SOPClassUID=SecondaryCaptureImageStorage,
            SamplesPerPixel=3,
            PhotometricInterpretation="RGB",
            Modality="OT",
            **place(np.array([0, 0, 4.0 * k]), x, y),
        )


def voi(k: int) -> Dataset:
    """A VOI LUT for the k-th slice, and a window that it is preferred to."""
    table, both = Dataset(), Dataset()
    table.add_new("LUTDescriptor", "SS", [900, -7 + 99 * k, 16])
    table.add_new("LUTData", "US", (np.arange(900) * (k + 1) % 4096).tolist())
    both.VOILUTSequence, both.WindowCenter, both.WindowWidth = [table], 40, 400
    return both


def enhanced(series: str) -> Dataset:
    """One instance with every slice of the phantom, its frames in reverse order, a rescale for each."""
    pixels = encoded()[::-1]
    groups = []
    for k in reversed(range(len(pixels))):
        group, position, orientation, measures, value = (Dataset() for _ in range(5))
        plane = place(FIRST + k * STEP * NORMAL)
        position.ImagePositionPatient = plane["ImagePositionPatient"]
        orientation.ImageOrientationPatient = plane["ImageOrientationPatient"]
        measures.PixelSpacing, measures.SliceThickness = plane["PixelSpacing"], 1
        value.RescaleSlope, value.RescaleIntercept, value.RescaleType = k + 1, -7, "US"
        group.PlanePositionSequence = [position]
        group.PlaneOrientationSequence = [orientation]
        group.PixelMeasuresSequence = [measures]
        group.PixelValueTransformationSequence = [value]
        group.FrameVOILUTSequence = [voi(k)]
        groups.append(group)
    return dicom(
        pixels,
        series,
        1,
        SOPClassUID=EnhancedMRImageStorage,
        Modality="MR",
        NumberOfFrames=len(pixels),
        PerFrameFunctionalGroupsSequence=groups,
    )


def phantoms() -> Iterator[Dataset]:
    """Every series of the module's store."""
    yield from slices("oblique")
    yield from slices("no image type", ImageType=None)
    yield from slices("padded", PixelPaddingValue=-5000 + 4 * 1000 + 2 * 30 + 3)
    yield from slices("gap", keep=[0, 1, 2, 5, 6, 7, 8, 9, 10])
    yield from slices("single", keep=[4], SliceThickness=3.5)
    doubles = list(slices("doubles"))
    again = dicom(encoded()[3], "doubles", 50, **place(FIRST + 3 * STEP * NORMAL))
    again.RescaleSlope, again.RescaleIntercept = 2, -1024
    yield from [*doubles, again]
    yield from slices("conflict")
    yield dicom(encoded()[3] + 1, "conflict", 50, **place(FIRST + 3 * STEP * NORMAL))
    yield from axial("flat", 6, SOPClassUID=MRImageStorage, Modality="MR")
    yield from axial("with scout", 6)
    coronal = place(np.zeros(3), np.eye(3)[0], -np.eye(3)[2])
    scout = ["ORIGINAL", "PRIMARY", "LOCALIZER"]
    yield dicom(np.zeros((6, 5), np.int16), "with scout", 77, **coronal, ImageType=scout)
    yield from axial("two stacks", 4)
    for k in range(4):
        plane = place(np.array([0, 5.0 * k, 0]), np.eye(3)[0], -np.eye(3)[2])
        yield dicom(np.zeros((6, 5), np.int16), "two stacks", 20 + k, **plane)
    yield from pet("pet")
    yield from colour("colour")
    yield enhanced("enhanced")
    sheared = [FIRST + k * (STEP * NORMAL + 1.0 * COLUMN) for k in range(5)]
    for k, position in enumerate(sheared):
        yield dicom(encoded()[k], "tilted", 5 - k, **place(position))
    nothing = dict.fromkeys(["ImagePositionPatient", "ImageOrientationPatient"])
    for number in (1, 2):
        yield dicom(
            np.zeros((6, 5), np.uint16),
            "projection",
            number,
            SOPClassUID=DigitalXRayImageStorageForPresentation,
            Modality="DX",
            **nothing,
        )


@contextmanager
def counted(store: DataStore) -> Iterator[list[int]]:
    """Gives a list, into which goes how many frames the data store was asked for in the with block."""
    found: list[int] = []
    before = store.reader.stats()["fetched"]
    yield found
    found.append(store.reader.stats()["fetched"] - before)


@pytest.fixture(scope="module")
def store(store_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[DataStore]:
    folder = tmp_path_factory.mktemp("dicom")
    datasets = list(phantoms())
    for number in np.random.default_rng(0).permutation(len(datasets)):
        datasets[number].save_as(folder / f"{number:04}.dcm", enforce_file_format=True)
    with connect(store_folder, cache=tmp_path_factory.mktemp("cache")) as made:
        made.progress = False
        report = made.import_dicom(folder)
        assert (report.imported, len(report.failed)) == (len(datasets), 0)
        yield made


@pytest.fixture(scope="module")
def index(store: DataStore) -> DatasetIndex:
    return store.search().index()


@pytest.fixture
def volume_of(store: DataStore, index: DatasetIndex) -> Callable[..., xr.DataArray]:
    """Opens a phantom by its name, without a cache."""

    def make(series: str, **options: Any) -> xr.DataArray:
        return open_volume(store, index.where(series_instance_uid=uid_of(series)), **{"cache": None, **options})

    return make


Open = Callable[..., xr.DataArray]


class TestPhantom:
    def test_the_phantom_comes_back_in_order_in_hu(self, volume_of: Open) -> None:
        volume = volume_of("oblique")
        assert volume.dims == ("z", "y", "x")
        assert volume.shape == SHAPE
        assert volume.dtype == np.float32
        assert (volume.name, volume.attrs["units"]) == ("CT", "HU")
        np.testing.assert_array_equal(volume.values, 2 * encoded().astype(np.float32) - 1024)

    @pytest.mark.parametrize("window", ["abdomen", (50, 400), Window(50, 400)])
    def test_a_window_for_display(self, volume_of: Open, window: Any) -> None:
        expected = 2 * encoded().astype(np.float32) - 1024
        Window(50, 400).apply(expected)
        np.testing.assert_array_equal(volume_of("oblique", output="display", window=window).values, expected)

    def test_display_in_bytes(self, volume_of: Open) -> None:
        shown = volume_of("oblique", output="display", window="abdomen").values
        volume = volume_of("oblique", output="display", window="abdomen", dtype="uint8")
        assert volume.dtype == np.uint8
        np.testing.assert_array_equal(volume.values, uint8(shown))

    def test_options_are_looked_at_before_anything_is_asked(self, store: DataStore) -> None:
        with pytest.raises(ConfigError, match="lungs"):  # and no NotFoundError
            open_volume(store, "1.2.3", output="display", window="lungs")

    def test_affine_and_coordinates_place_every_voxel(self, volume_of: Open) -> None:
        volume = volume_of("oblique")
        k, j, i = np.indices(SHAPE)
        truth = FIRST + k[..., None] * STEP * NORMAL + j[..., None] * PIXEL[0] * COLUMN + i[..., None] * PIXEL[1] * ROW
        index = np.stack([k, j, i, np.ones_like(k)], axis=-1)
        placed = index @ volume.attrs["affine"].T
        np.testing.assert_allclose(placed[..., :3], truth, atol=1e-5)
        axes = {"z": NORMAL, "y": COLUMN, "x": ROW}
        for axis, (name, direction) in enumerate(axes.items()):
            along = np.moveaxis(truth @ direction, axis, 0).reshape(SHAPE[axis], -1)
            np.testing.assert_allclose(along, volume[name].values[:, None] * np.ones_like(along), atol=1e-5)
            assert volume[name].attrs["units"] == "mm"
        np.testing.assert_allclose(volume.attrs["spacing"], (STEP, *PIXEL), atol=1e-6)
        assert volume.attrs["kind"] == "regular"
        assert volume.attrs["affine"].dtype == np.float64

    @pytest.mark.parametrize("reduce", [0, 1, 2, 3, 8])
    def test_lower_resolutions_stay_in_place(self, volume_of: Open, reduce: int) -> None:
        full, small = volume_of("oblique"), volume_of("oblique", reduce=reduce)
        step = 2**reduce
        assert small.shape == (SHAPE[0], -(-SHAPE[1] // step), -(-SHAPE[2] // step))
        assert small.attrs["reduce"] == reduce
        assert small.attrs["affine"].dtype == np.float64
        np.testing.assert_allclose(small.attrs["spacing"], (STEP, PIXEL[0] * step, PIXEL[1] * step), atol=1e-6)
        index = np.moveaxis(np.indices(small.shape), 0, -1)
        placed = np.concatenate([index, np.ones_like(index[..., :1])], axis=-1) @ small.attrs["affine"].T
        sampled = np.concatenate([index * (1, step, step), np.ones_like(index[..., :1])], axis=-1)
        np.testing.assert_allclose(placed, sampled @ full.attrs["affine"].T, atol=1e-6)
        for name, every in (("z", 1), ("y", step), ("x", step)):
            np.testing.assert_allclose(small[name].values, full[name].values[::every], atol=1e-6)

    @pytest.mark.parametrize("reduce", [1, 2])
    def test_values_that_say_their_place_say_it_when_reduced(self, volume_of: Open, reduce: int) -> None:
        step = 2**reduce
        small = volume_of("oblique", output="stored", dtype="float64", reduce=reduce).values
        sampled = encoded()[:, ::step, ::step]
        # The low-pass of a slope is the slope; only the mirror image at a far border bends it, here by less than 1.
        assert np.abs(small - sampled).max() <= 1

    def test_slabs_and_missing_slices_at_lower_resolution(self, volume_of: Open) -> None:
        small = volume_of("oblique", reduce=1)
        np.testing.assert_array_equal(small[3:6, 1, ::-1].values, small.values[3:6, 1, ::-1])
        filled = volume_of("gap", gaps="fill", reduce=1)
        assert filled.shape == small.shape
        assert (filled.values[3:5] == -1024).all()
        np.testing.assert_array_equal(filled.values[5:], small.values[5:])
        kept = volume_of("gap", gaps="keep", reduce=1)
        assert "affine" not in kept.attrs
        np.testing.assert_allclose(kept["x"].values, small["x"].values)

    @pytest.mark.parametrize("series", ["pet", "enhanced"])
    def test_every_frame_has_its_own_rescale_at_lower_resolution(
        self, store: DataStore, index: DatasetIndex, volume_of: Open, series: str
    ) -> None:
        small, stored = (volume_of(series, output=output, reduce=1) for output in ("modality", "stored"))
        part, order = index.where(series_instance_uid=uid_of(series)), stored.shape[0]
        rescales = [part.profile(row).modality for row in range(len(part))]
        by_slice = rescales if series == "pet" else rescales[::-1]
        if series == "pet":
            numbers = part.column("InstanceNumber").to_pylist()
            by_slice = [rescales[numbers.index(k + 1)] for k in range(order)]
        for values, raw, rescale in zip(small.values, stored.values, by_slice, strict=True):
            np.testing.assert_allclose(values, raw * rescale.slope + rescale.intercept, rtol=1e-6)
        assert len({rescale.slope for rescale in by_slice}) == order

    def test_sel_finds_by_millimetres(self, volume_of: Open) -> None:
        volume = volume_of("oblique")
        near = float(volume.z[4]) + 0.4 * STEP
        np.testing.assert_array_equal(volume.sel(z=near, method="nearest").values, volume.values[4])
        low, high = float(volume.z[3]) - 0.1, float(volume.z[6]) + 0.1
        assert volume.sel(z=slice(low, high)).sizes["z"] == 4

    def test_a_uid_is_as_good_as_an_index(self, store: DataStore, volume_of: Open) -> None:
        by_uid = open_volume(store, uid_of("oblique"), cache=None)
        xr.testing.assert_identical(by_uid.load(), volume_of("oblique").load())

    def test_attributes_name_the_source_and_no_patient(self, volume_of: Open, index: DatasetIndex) -> None:
        volume = volume_of("oblique")
        row = index.series.loc[uid_of("oblique")]
        assert volume.attrs["image_set_id"] == row["image_set_id"]
        assert volume.attrs["version_id"] == row["version_id"]
        assert volume.attrs["lossy"] is False
        assert volume.attrs["frame_of_reference"] == row["FrameOfReferenceUID"]
        assert "phantom" not in repr(volume.attrs) + repr(volume) + volume._repr_html_()

    def test_a_missing_image_type_is_no_hindrance(self, volume_of: Open) -> None:
        np.testing.assert_array_equal(volume_of("no image type").values, volume_of("oblique").values)

    @pytest.mark.parametrize("output", ["stored", "modality", "display"])
    def test_outputs(self, volume_of: Open, output: str) -> None:
        volume = volume_of("oblique", output=output)
        stored = encoded()
        if output == "stored":
            assert volume.dtype == np.int16
            assert volume.attrs["units"] == "stored"
            np.testing.assert_array_equal(volume.values, stored)
        elif output == "display":
            assert volume.attrs["units"] == "1"
            np.testing.assert_allclose(volume.values, (stored + 2.0**15) / (2**16 - 1), atol=1e-6)

    def test_dtype_is_the_callers(self, volume_of: Open) -> None:
        volume = volume_of("oblique", dtype="float64")
        assert volume.dtype == volume.values.dtype == np.float64

    def test_padding(self, volume_of: Open) -> None:
        plain = volume_of("padded").values
        masked = volume_of("padded", padding="mask").values
        place_of = np.argwhere(np.isnan(masked))
        np.testing.assert_array_equal(place_of, [[4, 2, 3]])
        assert volume_of("padded", padding=-3.0).values[4, 2, 3] == -3
        masked[4, 2, 3] = plain[4, 2, 3]
        np.testing.assert_array_equal(masked, plain)


class TestLaziness:
    def test_looking_sends_nothing(self, store: DataStore, volume_of: Open) -> None:
        with counted(store) as found:
            volume = volume_of("oblique")
            repr(volume)
            volume._repr_html_()
            part = volume.sel(z=slice(float(volume.z[2]), None)).isel(x=0).transpose("y", "z")
            again = pickle.loads(pickle.dumps(part))
            assert again.shape == (9, 9)
            assert volume.nbytes == 4 * np.prod(SHAPE)
        assert found == [0]

    @pytest.mark.parametrize(
        ("key", "requests"),
        [
            (np.s_[5:8], 3),
            (np.s_[3], 1),
            (np.s_[[9, 2]], 2),
            (np.s_[::5], 3),
            (np.s_[8:2:-3], 2),
            (np.s_[:, 2, 3], 11),
            (np.s_[4, 2, 3], 1),
            (np.s_[5:5], 0),
            (np.s_[-1], 1),
            (np.s_[5:5:-1], 0),
        ],
        ids=str,
    )
    def test_a_slab_fetches_its_slices_only(self, store: DataStore, volume_of: Open, key: Any, requests: int) -> None:
        volume = volume_of("oblique")
        with counted(store) as found:
            values = volume[key].values
        assert found == [requests]
        np.testing.assert_array_equal(values, (2 * encoded().astype(np.float32) - 1024)[key])

    def test_slicing_twice_fetches_the_rest_of_both(self, store: DataStore, volume_of: Open) -> None:
        part = volume_of("oblique")[2:9][1:3]
        with counted(store) as found:
            np.testing.assert_array_equal(part.values, (2 * encoded().astype(np.float32) - 1024)[3:5])
        assert found == [2]

    def test_a_loaded_volume_is_not_read_again(self, store: DataStore, volume_of: Open) -> None:
        volume = volume_of("oblique")
        with counted(store) as found:
            volume.load()
            volume.load()
            volume.values.sum()
        assert found == [11]

    def test_the_cache_serves_the_second_time(self, store: DataStore, volume_of: Open, tmp_path: Path) -> None:
        volume = volume_of("oblique", cache=FrameCache(tmp_path / "cache"))
        with counted(store) as found:
            first = volume[2:6].values
            second = volume[3:5].values
        assert found == [4]
        np.testing.assert_array_equal(first[1:3], second)

    def test_a_pickled_volume_reads(self, volume_of: Open) -> None:
        again = pickle.loads(pickle.dumps(volume_of("oblique")))
        xr.testing.assert_identical(again.load(), volume_of("oblique").load())

    def test_reductions_are_as_of_the_array(self, volume_of: Open) -> None:
        volume = volume_of("oblique")
        np.testing.assert_allclose(volume.max(("y", "x")).values, volume.values.max((1, 2)))


AXIS = {
    "integer": lambda n: st.integers(-n, n - 1),
    "slice": lambda n: st.slices(n),
    "list": lambda n: st.lists(st.integers(-n, n - 1), min_size=0, max_size=5),
    "mask": lambda n: st.lists(st.booleans(), min_size=n, max_size=n),
}


@pytest.fixture(scope="module")
def pair(store: DataStore, index: DatasetIndex) -> tuple[xr.DataArray, np.ndarray]:
    volume = open_volume(store, index.where(series_instance_uid=uid_of("oblique")))
    return volume, volume.values


class TestIndexing:
    @given(data=st.data())
    @settings(max_examples=120, deadline=None)
    def test_isel_equals_numpy(self, pair: tuple[xr.DataArray, np.ndarray], data: st.DataObject) -> None:
        volume, values = pair
        indexers: dict[str, Any] = {}
        expected = values
        for axis, name in reversed(list(enumerate("zyx"))):
            kind = data.draw(st.sampled_from([*AXIS, "none"]), label=name)
            if kind == "none":
                continue
            key = data.draw(AXIS[kind](SHAPE[axis]), label=name)
            if kind == "list":
                key = np.array(key, int)
            elif kind == "mask":
                key = np.array(key, bool)
            indexers[name] = key
            expected = expected[(slice(None),) * axis + (key,)]
        np.testing.assert_array_equal(volume.isel(indexers).values, expected)

    def test_pointwise_indexing(self, pair: tuple[xr.DataArray, np.ndarray]) -> None:
        volume, values = pair
        points = [xr.DataArray(each, dims="point") for each in ([1, 5, 10, 1], [0, 8, 3, 0], [6, 2, 0, 6])]
        found = volume.isel(z=points[0], y=points[1], x=points[2])
        np.testing.assert_array_equal(found.values, values[[1, 5, 10, 1], [0, 8, 3, 0], [6, 2, 0, 6]])

    def test_beyond_the_volume(self, pair: tuple[xr.DataArray, np.ndarray]) -> None:
        with pytest.raises(IndexError):
            _ = pair[0][11].values


class TestIrregular:
    def test_gaps_are_refused_with_their_places(self, volume_of: Open, index: DatasetIndex) -> None:
        with pytest.raises(GapError, match=r"2 of 11 slices missing.*gaps='fill'") as caught:
            volume_of("gap")
        assert index.series.loc[uid_of("gap")]["image_set_id"] in str(caught.value)

    def test_gaps_filled(self, store: DataStore, volume_of: Open) -> None:
        volume = volume_of("gap", gaps="fill")
        present = np.array([True] * 3 + [False] * 2 + [True] * 6)
        np.testing.assert_array_equal(volume.slice_present.values, present)
        expected = 2 * encoded().astype(np.float32) - 1024
        np.testing.assert_array_equal(volume.values[present], expected[present])
        assert (volume.values[~present] == -1024).all()
        with counted(store) as found:
            assert (volume[3:5].values == -1024).all()
        assert found == [0]
        np.testing.assert_allclose(volume.attrs["affine"] @ [10, 0, 0, 1], [*(FIRST + 10 * STEP * NORMAL), 1])
        assert (volume_of("gap", gaps="fill", padding=5.0).values[3:5] == 5).all()
        masked = volume_of("gap", gaps="fill", padding="mask").values
        assert np.isnan(masked[3:5]).all()
        assert not np.isnan(masked[present]).any()
        assert (volume_of("gap", gaps="fill", output="stored").values[3:5] == 0).all()
        for padding in (-2000.0, "mask"):
            shown = volume_of("gap", gaps="fill", output="display", dtype="uint8", padding=padding)
            assert (shown.values[3:5] == 0).all()

    def test_gaps_kept(self, volume_of: Open) -> None:
        volume = volume_of("gap", gaps="keep")
        keep = [0, 1, 2, 5, 6, 7, 8, 9, 10]
        assert "affine" not in volume.attrs
        assert volume.attrs["kind"] == "irregular"
        np.testing.assert_allclose(volume.z.values, (FIRST + np.outer(keep, STEP * NORMAL)) @ NORMAL, atol=1e-6)
        np.testing.assert_array_equal(volume.values, (2 * encoded().astype(np.float32) - 1024)[keep])

    def test_identical_duplicates_are_dropped_and_told(self, volume_of: Open) -> None:
        volume = volume_of("doubles")
        assert volume.shape == SHAPE
        assert any("1 of 12 frames dropped" in note for note in volume.attrs["notes"])
        np.testing.assert_array_equal(volume.values, 2 * encoded().astype(np.float32) - 1024)

    def test_different_frames_at_one_place_are_refused(self, volume_of: Open) -> None:
        with pytest.raises(DuplicateSliceError, match="1 of 11 positions"):
            volume_of("conflict")

    def test_a_single_slice(self, volume_of: Open) -> None:
        volume = volume_of("single")
        assert volume.shape == (1, 9, 7)
        assert (volume.attrs["kind"], volume.attrs["spacing_assumed"]) == ("single", True)
        assert volume.attrs["spacing"][0] == pytest.approx(3.5)

    def test_projections_are_no_volumes(self, volume_of: Open) -> None:
        with pytest.raises(GeometryError, match="FrameDataset"):
            volume_of("projection")

    def test_a_localizer_is_set_aside(self, volume_of: Open) -> None:
        volume = volume_of("with scout")
        np.testing.assert_array_equal(volume.values[:, 0, 0], 10.0 * np.arange(6))

    def test_two_stacks_are_refused(self, volume_of: Open) -> None:
        with pytest.raises(MixedOrientationError, match=r"2 stacks.*4 frames.*ImageOrientationPatient"):
            volume_of("two stacks")

    def test_a_tilted_stack_keeps_its_true_step(self, volume_of: Open) -> None:
        volume = volume_of("tilted")
        assert volume.attrs["kind"] == "tilted"
        np.testing.assert_allclose(volume.attrs["affine"][:3, 0], STEP * NORMAL + COLUMN, atol=1e-6)
        assert volume.attrs["spacing"][0] == pytest.approx(STEP)
        np.testing.assert_array_equal(volume.values, encoded()[:5])

    def test_one_series_at_a_time(self, store: DataStore, index: DatasetIndex) -> None:
        with pytest.raises(ConfigError, match="one series"):
            open_volume(store, index)
        with pytest.raises(ConfigError):
            open_volume(store, index[:0])
        with pytest.raises(NotFoundError):
            open_volume(store, "1.2.3.4")
        with pytest.raises(ConfigError):
            open_volume(store, index.where(series_instance_uid=uid_of("oblique")), gaps="ignore")


class TestKinds:
    def test_pet_has_a_slope_a_slice(self, volume_of: Open) -> None:
        volume = volume_of("pet")
        assert volume.name == "PT"
        np.testing.assert_array_equal(volume.values[:, 2, 2], [10 * k * 0.125 * (k + 1) for k in range(5)])

    def test_colour_has_a_channel(self, store: DataStore, volume_of: Open) -> None:
        volume = volume_of("colour")
        assert volume.dims == ("z", "y", "x", "channel")
        assert volume.shape == (3, 6, 5, 3)
        expected = np.stack([np.random.default_rng(k).integers(0, 256, (6, 5, 3), np.uint8) for k in range(3)])
        np.testing.assert_array_equal(volume.values, expected)
        np.testing.assert_array_equal(volume.sel(channel="G").values, expected[..., 1])
        np.testing.assert_array_equal(volume[1, ::2, [4, 0], 1:].values, expected[1, ::2][:, [4, 0], 1:])
        with counted(store) as found:
            np.testing.assert_array_equal(volume.isel(channel=2)[1].values, expected[1, ..., 2])
        assert found == [1]

    def test_an_enhanced_instance_shows_each_frame_by_its_own_lut(self, volume_of: Open) -> None:
        values = volume_of("enhanced").values.astype(np.int32)
        shown = volume_of("enhanced", output="display").values
        for k, image in enumerate(values):
            dataset = voi(k)
            dataset.BitsStored, dataset.PixelRepresentation, dataset.PhotometricInterpretation = 16, 1, "MONOCHROME2"
            np.testing.assert_allclose(shown[k], apply_voi(image, dataset) / 65535, atol=1e-6)

    def test_an_enhanced_instance(self, volume_of: Open) -> None:
        volume = volume_of("enhanced")
        slopes = np.arange(1, SHAPE[0] + 1)[:, None, None]
        np.testing.assert_array_equal(volume.values, encoded().astype(np.float32) * slopes - 7)
        np.testing.assert_allclose(volume.attrs["affine"][:3, 3], FIRST, atol=1e-6)
        np.testing.assert_allclose(volume.attrs["affine"][:3, 0], STEP * NORMAL, atol=1e-6)
        np.testing.assert_allclose(volume.attrs["spacing"], (STEP, *PIXEL), atol=1e-6)

    def test_a_plain_axial_stack_has_lps_coordinates(self, volume_of: Open) -> None:
        volume = volume_of("flat")
        np.testing.assert_allclose(volume.z, 3.0 * np.arange(6))
        np.testing.assert_allclose(volume.y, PIXEL[0] * np.arange(6))
        np.testing.assert_allclose(volume.x, PIXEL[1] * np.arange(5))
        assert volume.attrs["orientation"] == "SPL"


def lps_of_nifti(affine: np.ndarray) -> np.ndarray:
    """NIfTI's affine, (i, j, k, 1) to RAS, in LPS."""
    return np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine


def corners(shape: tuple[int, ...]) -> np.ndarray:
    ends = np.array(np.meshgrid(*[[0, size - 1] for size in shape], indexing="ij")).reshape(3, -1)
    return np.vstack([ends, np.ones(ends.shape[1])])


def sorted_rows(points: np.ndarray) -> np.ndarray:
    return points[np.lexsort(np.round(points, 2).T)]


@pytest.fixture(scope="module")
def real(shared_data: Path, store_folder: Path) -> Iterator[Callable[[str], xr.DataArray]]:
    """Imports a folder of the shared data into a data store of its own and opens its one volume."""
    with connect(store_folder, datastore="real", cache=store_folder.parent / "real-cache") as store:
        store.progress = False

        def make(name: str, **options: Any) -> xr.DataArray:
            report = store.import_dicom(shared_data / name)
            assert report.imported
            uids = {
                str(pydicom.dcmread(path, stop_before_pixels=True).SeriesInstanceUID)
                for path in (shared_data / name).glob("*.dcm")
            }
            (uid,) = uids
            # One of them contradicts its study and is no primary image set.
            return open_volume(store, store.search(series_instance_uid=uid, primary=None).index(), **options)

        yield make


@pytest.fixture(scope="module")
def known(shared_data: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((shared_data / "GEOMETRY.json").read_text())
    return loaded


class TestRealSeries:
    def test_ct_abdomen_is_where_a_converter_puts_it(self, real: Open, known: dict[str, Any]) -> None:
        volume = real("ct-abdomen-41")
        (other,) = known["ct-abdomen-41"]["dcm2niix"]
        assert volume.shape == tuple(reversed(other["shape"]))
        # The converter flips rows and rounds: the corners of the box are the same points.
        mine = (volume.attrs["affine"] @ corners(volume.shape))[:3].T
        theirs = (lps_of_nifti(np.array(other["affine"])) @ corners(tuple(other["shape"])))[:3].T
        np.testing.assert_allclose(sorted_rows(mine), sorted_rows(theirs), atol=0.01)
        assert [float(volume.min()), float(volume.max())] == other["range"]
        assert volume.attrs["spacing"] == pytest.approx((5.0, 0.796875, 0.796875))
        assert volume.attrs["units"] == "HU"

    @pytest.mark.parametrize("name", ["ct-abdomen-41", "ct-head-phantom-tilt-20", "ct-pet-mr-rt-sts002/MR_T1"])
    def test_lower_resolution_is_the_low_pass_of_each_slice(self, real: Open, shared_data: Path, name: str) -> None:
        full, small = (real(name, output="stored", reduce=level) for level in (0, 1))
        first = pydicom.dcmread(next((shared_data / name).glob("*.dcm")), stop_before_pixels=True)
        signed, bits = first.PixelRepresentation, first.BitsStored
        limits = (-(1 << bits - 1), (1 << bits - 1) - 1) if signed else (0, (1 << bits) - 1)
        for whole, half in zip(full.values, small.values, strict=True):
            np.testing.assert_array_equal(half, low_pass(whole, 1).clip(*limits))
        np.testing.assert_allclose(small.attrs["affine"], full.attrs["affine"] @ np.diag([1, 2, 2, 1]))

    def test_a_tilted_gantry(self, real: Open) -> None:
        volume = real("ct-head-phantom-tilt-20")
        assert volume.shape == (20, 512, 512)
        assert volume.attrs["kind"] == "tilted"
        step = volume.attrs["affine"][:3, 0]
        normal = np.cross(volume.attrs["affine"][:3, 2], volume.attrs["affine"][:3, 1])
        cosine = step @ normal / np.linalg.norm(step) / np.linalg.norm(normal)
        assert np.degrees(np.arccos(cosine)) == pytest.approx(18.5, abs=0.05)
        assert volume.attrs["spacing"][0] == pytest.approx(2.37, abs=2e-3)

    @pytest.mark.parametrize("name", ["hitachi-oblique-4", "nonsquare-oblique-4"])
    def test_oblique_series_are_where_nifti_says(self, real: Open, shared_data: Path, name: str) -> None:
        volume = real(f"geometry/{name}")
        image: Any = nibabel.load(shared_data / "geometry" / name / "ground_truth.nii.gz")
        values = np.asarray(image.dataobj)
        mine = np.linalg.inv(volume.attrs["affine"]) @ lps_of_nifti(image.affine)
        # Where each voxel of the NIfTI lies in the volume's index space: whole numbers, every voxel once.
        index = np.stack([*np.indices(values.shape), np.ones(values.shape)]).reshape(4, -1)
        places = (mine @ index)[:3]
        np.testing.assert_allclose(
            volume.attrs["affine"][:3, :3] @ (places - np.rint(places)), 0, atol=1e-3 * max(volume.shape)
        )
        k, j, i = np.rint(places).astype(int)
        np.testing.assert_allclose(volume.values[k, j, i], values.reshape(-1), rtol=1e-6)

    def test_an_uneven_ct(self, real: Open) -> None:
        with pytest.raises(GapError):
            real("geometry/ct-uneven-spacing-4")
        filled = real("geometry/ct-uneven-spacing-4", gaps="fill")
        assert filled.sizes["z"] == 5
        assert int((~filled.slice_present).sum()) == 1
        assert real("geometry/ct-uneven-spacing-4", gaps="keep").sizes["z"] == 4

    @pytest.mark.parametrize("name", ["PET", "MR_T1"])
    def test_every_slice_has_its_own_slope(
        self, real: Open, shared_data: Path, known: dict[str, Any], name: str
    ) -> None:
        volume = real(f"ct-pet-mr-rt-sts002/{name}")
        (other,) = known[f"ct-pet-mr-rt-sts002/{name}"]["dcm2niix"]
        assert volume.shape == tuple(reversed(other["shape"]))
        read = [pydicom.dcmread(path) for path in (shared_data / "ct-pet-mr-rt-sts002" / name).glob("*.dcm")]
        read.sort(key=lambda each: float(each.ImagePositionPatient[2]))
        for values, dataset in zip(volume.values, read, strict=True):
            slope, intercept = (float(dataset.get(tag, default)) for tag, default in RESCALE)
            np.testing.assert_allclose(values, dataset.pixel_array * slope + intercept, rtol=1e-6)

    def test_three_times_in_one_series(self, real: Open) -> None:
        with pytest.raises(DuplicateSliceError, match="20 of 20 positions"):
            real("mr-breast-sagittal-4d-60")


RESCALE = (("RescaleSlope", 1), ("RescaleIntercept", 0))
