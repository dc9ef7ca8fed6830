"""The demo's DICOM files: same bytes each time, right place in space, masks on their tissue."""

from __future__ import annotations

import builtins
import dataclasses
import hashlib
import importlib.util
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydicom import Dataset, dcmread
from pydicom.data import get_testdata_file

from ahi_ml.cli import sample_data, sample_dicom
from ahi_ml.cli.sample_data import (
    BACKGROUND,
    GREY_MATTER,
    WHITE_MATTER,
    SampleData,
    masks_by_instance,
    write_sample_dicom,
)
from ahi_ml.errors import ConfigError, DataError

nibabel = pytest.importorskip("nibabel", reason="the demo extra is not installed")
pytest.importorskip("highdicom", reason="the demo extra is not installed")
if importlib.util.find_spec("nilearn") is None:
    pytest.skip("the demo extra is not installed", allow_module_level=True)

TEMPLATE = "SAMPLE-MNI152"


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> SampleData:
    return write_sample_dicom(tmp_path_factory.mktemp("sample"))


@pytest.fixture(scope="module")
def masks(sample: SampleData) -> dict[str, np.ndarray]:
    return masks_by_instance(sample.segmentations)


@pytest.fixture(scope="module")
def slices(sample: SampleData) -> dict[str, list[Dataset]]:
    """MR slices by patient, in the order of `sample.images`."""
    by_patient: dict[str, list[Dataset]] = {}
    for path in sample.images:
        dataset = dcmread(path)
        by_patient.setdefault(dataset.PatientID, []).append(dataset)
    return by_patient


def nifti(kind: str) -> Any:
    root = importlib.util.find_spec("nilearn").submodule_search_locations[0]
    return nibabel.load(Path(root, "datasets", "data", f"mni_icbm152_{kind}_tal_nlin_sym_09a_converted.nii.gz"))


def affine_lps(slices: list[Dataset]) -> np.ndarray:
    """(z, row, column) to LPS mm by the standard's equation, from the headers alone."""
    first, last = slices[0], slices[-1]
    along_row = np.array(first.ImageOrientationPatient[:3], float)
    along_column = np.array(first.ImageOrientationPatient[3:], float)
    between_rows, between_columns = map(float, first.PixelSpacing)
    origin = np.array(first.ImagePositionPatient, float)
    affine = np.eye(4)
    affine[:3, 0] = (np.array(last.ImagePositionPatient, float) - origin) / (len(slices) - 1)
    affine[:3, 1] = along_column * between_rows
    affine[:3, 2] = along_row * between_columns
    affine[:3, 3] = origin
    return affine


def volume_and_mask(slices: list[Dataset], masks: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    return np.stack([ds.pixel_array for ds in slices]), np.stack([masks[ds.SOPInstanceUID] for ds in slices])


def contents(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_what_is_reported_is_what_is_there(sample: SampleData) -> None:
    assert len(sample.patient_ids) == len(sample.segmentations) == 6
    assert 250 <= len(sample.images) <= 400
    assert len(sample.assorted) >= 7
    assert sample.written == len(sample.files)
    assert set(sample.files) == {path for path in sample.folder.rglob("*") if path.is_file()}
    assert pickle.loads(pickle.dumps(sample)) == sample


def test_every_file_reads_and_every_instance_is_its_own(sample: SampleData) -> None:
    uids = []
    for path in sample.files:
        dataset = dcmread(path)
        assert dataset.pixel_array.size
        assert dataset.file_meta.MediaStorageSOPInstanceUID == dataset.SOPInstanceUID
        uids.append(dataset.SOPInstanceUID)
    assert len(set(uids)) == len(uids)


def test_another_folder_gets_the_same_bytes(sample: SampleData, tmp_path: Path) -> None:
    heard: list[str] = []
    other = write_sample_dicom(tmp_path / "new" / "folder", progress=heard.append)
    assert contents(other.folder) == contents(sample.folder)
    assert len(heard) == 7
    assert heard[0].startswith("writing SAMPLE-MNI152: 78 MR slices")


def test_second_call_writes_nothing(sample: SampleData, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {path: path.stat().st_mtime_ns for path in sample.folder.rglob("*")}

    def refuse(name: str, *args: Any, **kwargs: Any) -> Any:
        assert name.partition(".")[0] not in {"nibabel", "highdicom", "scipy", "nilearn"}
        return real_import(name, *args, **kwargs)

    real_import = builtins.__import__
    monkeypatch.setattr(builtins, "__import__", refuse)
    heard: list[str] = []
    again = write_sample_dicom(sample.folder, progress=heard.append)
    monkeypatch.undo()

    assert again == dataclasses.replace(sample, written=0)
    assert heard == []
    assert {path: path.stat().st_mtime_ns for path in sample.folder.rglob("*")} == before


def test_an_interrupted_call_leaves_whole_files_and_is_repaired(
    sample: SampleData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real_replace, calls = sample_dicom.os.replace, 0

    def pull_the_plug(source: str, target: Path) -> None:
        nonlocal calls
        calls += 1
        if calls > 10:
            raise KeyboardInterrupt
        real_replace(source, target)

    monkeypatch.setattr(sample_dicom.os, "replace", pull_the_plug)
    with pytest.raises(KeyboardInterrupt):
        write_sample_dicom(tmp_path)
    monkeypatch.undo()

    expected = contents(sample.folder)
    left = contents(tmp_path)
    assert len(left) == 10
    assert left.items() <= expected.items()

    foreign = tmp_path / "derived-1" / "notes.txt"
    foreign.parent.mkdir()
    foreign.write_text("mine")
    write_sample_dicom(tmp_path)
    assert foreign.read_text() == "mine"
    foreign.unlink()
    assert contents(tmp_path) == expected


def test_template_lies_where_the_nifti_lies(slices: dict[str, list[Dataset]]) -> None:
    series = slices[TEMPLATE]
    image = nifti("t1")
    shape = (len(series), series[0].Rows, series[0].Columns)
    indices = np.stack([*np.indices(shape).reshape(3, -1), np.ones(np.prod(shape))])

    lps = affine_lps(series) @ indices
    voxels = np.linalg.inv(image.affine) @ np.diag([-1.0, -1.0, 1.0, 1.0]) @ lps
    nearest = np.rint(voxels[:3]).astype(int)
    back = np.diag([-1.0, -1.0, 1.0]) @ (image.affine @ np.vstack([nearest, indices[3]]))[:3]
    assert np.abs(back - lps[:3]).max() < 1e-4  # each DICOM voxel centre is a voxel centre of the template

    stored = np.stack([ds.pixel_array for ds in series]).ravel()
    np.testing.assert_array_equal(stored, np.asarray(image.dataobj)[tuple(nearest)])


def test_nothing_of_the_brain_is_cropped_from_the_template(
    slices: dict[str, list[Dataset]], masks: dict[str, np.ndarray]
) -> None:
    volume, mask = volume_and_mask(slices[TEMPLATE], masks)
    whole = np.asarray(nifti("gm").dataobj)[::2, ::2, ::2] > 127.5
    assert (mask == GREY_MATTER).sum() == whole.sum()
    assert not volume[:, [0, -1]].any()
    assert not volume[:, :, [0, -1]].any()


def test_every_series_is_axial_with_the_front_on_top(
    slices: dict[str, list[Dataset]], masks: dict[str, np.ndarray]
) -> None:
    for series in slices.values():
        for dataset in series:
            assert dataset.Modality == "MR"
            assert [float(v) for v in dataset.ImageOrientationPatient] == [1, 0, 0, 0, 1, 0]
            assert (dataset.BitsAllocated, dataset.BitsStored, dataset.PixelRepresentation) == (16, 12, 0)
            assert dataset.pixel_array.max() < 4096
        heights = np.array([float(ds.ImagePositionPatient[2]) for ds in series])
        np.testing.assert_allclose(np.diff(heights), float(series[0].SliceThickness), atol=1e-9)
        assert len({ds.FrameOfReferenceUID for ds in series}) == 1
        # The cerebellum: below the tentorium the tissue lies in the back half of the head.
        volume, mask = volume_and_mask(series, masks)
        rows = np.nonzero(mask[heights < -45])[1]
        assert rows.mean() > volume.shape[1] * 0.55


@pytest.mark.parametrize("patient", [TEMPLATE, *(f"SAMPLE-DERIVED-{n}" for n in range(1, 6))])
def test_masks_lie_on_their_tissue(
    patient: str, slices: dict[str, list[Dataset]], masks: dict[str, np.ndarray]
) -> None:
    volume, mask = volume_and_mask(slices[patient], masks)
    assert mask.dtype == np.uint8
    assert set(np.unique(mask)) == {BACKGROUND, GREY_MATTER, WHITE_MATTER}
    white, grey, background = (volume[mask == tissue].mean() for tissue in (WHITE_MATTER, GREY_MATTER, BACKGROUND))
    assert white > 1.1 * grey
    assert grey > 5 * background
    # Intensity falls off just outside the brain: a mask that were flipped or shifted would sit there.
    assert (volume[mask != BACKGROUND] > 0).all()


def test_template_mask_is_the_tissue_maps_at_one_half(
    slices: dict[str, list[Dataset]], masks: dict[str, np.ndarray]
) -> None:
    _, mask = volume_and_mask(slices[TEMPLATE], masks)
    for kind, value in (("gm", GREY_MATTER), ("wm", WHITE_MATTER)):
        tissue = np.asarray(nifti(kind).dataobj)[4:195:2, 6:229:2, 0:155:2] / 255 > 0.5
        # The DICOM columns run to the left and the rows to the back: both against the NIfTI's axes.
        np.testing.assert_array_equal(mask == value, tissue[::-1, ::-1].transpose(2, 1, 0))


def test_every_slice_has_a_mask_and_every_mask_a_slice(
    slices: dict[str, list[Dataset]], masks: dict[str, np.ndarray]
) -> None:
    uids = {ds.SOPInstanceUID for series in slices.values() for ds in series}
    assert set(masks) == uids


def test_patients_differ_and_share_nothing(sample: SampleData, slices: dict[str, list[Dataset]]) -> None:
    assert tuple(slices) == sample.patient_ids
    for keyword in ("StudyInstanceUID", "SeriesInstanceUID", "FrameOfReferenceUID"):
        assert len({series[0][keyword].value for series in slices.values()}) == len(slices)
    derived = [
        np.stack([ds.pixel_array for ds in series]).astype(float)
        for patient, series in slices.items()
        if patient != TEMPLATE
    ]
    for number, one in enumerate(derived):
        for other in derived[number + 1 :]:
            assert np.abs(one - other).mean() > 5


def test_segmentation_belongs_to_its_series(sample: SampleData, slices: dict[str, list[Dataset]]) -> None:
    for path, patient in zip(sample.segmentations, sample.patient_ids, strict=True):
        segmentation, first = dcmread(path), slices[patient][0]
        for keyword in (
            "PatientID",
            "PatientName",
            "StudyInstanceUID",
            "FrameOfReferenceUID",
            "Rows",
            "Columns",
        ):
            assert segmentation[keyword].value == first[keyword].value
        assert segmentation.SeriesInstanceUID != first.SeriesInstanceUID
        assert segmentation.SegmentationType == "BINARY"
        assert [s.SegmentLabel for s in segmentation.SegmentSequence] == ["Grey matter", "White matter"]
        assert [s.SegmentNumber for s in segmentation.SegmentSequence] == [GREY_MATTER, WHITE_MATTER]


def test_only_made_up_people_and_no_dates(sample: SampleData) -> None:
    allowed = {
        "PatientID": set(sample.patient_ids),
        "PatientName": {"MNI152^Template", *(f"Derived{n}^Template" for n in range(1, 6))},
        "PatientBirthDate": {""},
        "PatientSex": {""},
        "PatientIdentityRemoved": {"YES"},
        "PatientPosition": {"HFS"},
    }
    for path in sample.images + sample.segmentations:
        for element in dcmread(path).iterall():
            if element.keyword.startswith("Patient"):
                assert str(element.value) in allowed[element.keyword], element.keyword
            elif element.VR in {"DA", "DT", "TM"}:
                assert element.value in {"", "20090101", "000000"}, element.keyword
            elif element.VR == "PN":
                assert str(element.value or "") == "", element.keyword


def test_assorted_files_are_copies_and_vary(sample: SampleData) -> None:
    syntaxes, colours, frames = set(), set(), set()
    for path in sample.assorted:
        assert path.read_bytes() == Path(str(get_testdata_file(path.name, download=False))).read_bytes()
        dataset = dcmread(path)
        syntaxes.add(dataset.file_meta.TransferSyntaxUID)
        colours.add(dataset.PhotometricInterpretation)
        frames.add(int(dataset.get("NumberOfFrames", 1)))
    assert len(syntaxes) >= 5
    assert {"MONOCHROME2", "RGB"} < colours
    assert {1, 2, 30} <= frames


def test_without_pydicom_data_the_larger_files_are_left_out(
    sample: SampleData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def only_own(name: str, download: bool = True) -> str | None:
        assert not download
        return None if name in sample_data._PYDICOM_DATA_FILES else str(get_testdata_file(name, download=False))

    monkeypatch.setattr("pydicom.data.get_testdata_file", only_own)
    paths, new = sample_data._copy_assorted(tmp_path, lambda text: None)
    assert [path.name for path in paths] == list(sample_data._PYDICOM_FILES)
    assert new == len(paths)


def test_provenance_says_what_is_real_and_what_is_derived(sample: SampleData) -> None:
    text = "\n".join(sample.provenance)
    assert "Real: SAMPLE-MNI152" in text
    assert "Derived: SAMPLE-DERIVED-1 to 5 are not people." in text
    assert "says nothing about real patients" in text
    assert "copyright (C)" in text


def test_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "nilearn" else real(name, *rest)
    )
    with pytest.raises(ConfigError, match=r"need nilearn: pip install"):
        write_sample_dicom(tmp_path)
    assert list(tmp_path.rglob("*")) == []


def test_another_template_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sample_data, "_TEMPLATE_SHAPE", (91, 109, 91))
    with pytest.raises(DataError, match="affine, other than the one expected"):
        write_sample_dicom(tmp_path)
    assert list(tmp_path.rglob("*")) == []


def test_masks_are_not_read_from_an_image(sample: SampleData) -> None:
    with pytest.raises(DataError, match="not a BINARY DICOM Segmentation"):
        masks_by_instance(sample.images[:1])


def test_masks_need_references_to_their_images(sample: SampleData, tmp_path: Path) -> None:
    dataset = dcmread(sample.segmentations[1])
    del dataset.PerFrameFunctionalGroupsSequence[3].DerivationImageSequence
    dataset.save_as(tmp_path / "loose.dcm")
    with pytest.raises(DataError, match="does not name the image"):
        masks_by_instance([tmp_path / "loose.dcm"])


def test_warp_does_not_fold() -> None:
    """The warp, drawn anew, maps neighbours to neighbours in the right order."""
    grid = sample_data._derived_profile(1).grid
    for seed in range(5):
        rng = np.random.default_rng([7, seed])
        warp = np.stack([3.0 * sample_data._smooth_field(rng, grid.shape) for _ in range(3)])
        jacobian = np.stack([np.stack(np.gradient(part, *grid.spacing)) for part in warp])
        jacobian = np.moveaxis(jacobian, (0, 1), (-2, -1)) + np.eye(3)
        assert np.linalg.det(jacobian).min() > 0.1
