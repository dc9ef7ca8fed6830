"""Images for ``ahi-ml demo``: DICOM files made from data that PyPI packages carry, top floor.

It holds where the images come from, how they become DICOM files, and how their masks are read back.
It does not import them into a data store and does not train. What is real and what is derived is part
of the result (`SampleData.provenance`), because a demo's reader should not take one for the other.
Heavy imports stay inside the functions: a command line that only prints its help must not pay for them.
"""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ahi_ml.cli.sample_dicom import GREY_MATTER, WHITE_MATTER, Grid, Profile, write_patient, write_whole
from ahi_ml.errors import ConfigError, DataError
from ahi_ml.types import AnyArray, FloatArray

if TYPE_CHECKING:
    pass

__all__ = [
    "BACKGROUND",
    "GREY_MATTER",
    "WHITE_MATTER",
    "SampleData",
    "masks_by_instance",
    "write_sample_dicom",
]

BACKGROUND = 0
"""Values of a mask. Grey and white are also the segment numbers in the DICOM Segmentations."""

DERIVED_SUBJECTS = 5


_PACKAGES = ("nilearn", "nibabel", "scipy", "highdicom")
_TEMPLATE_FILE = "mni_icbm152_{}_tal_nlin_sym_09a_converted.nii.gz"
_TEMPLATE_SHAPE = (197, 233, 189)
_TEMPLATE_AFFINE = ((1.0, 0, 0, -98.0), (0, 1.0, 0, -134.0), (0, 0, 1.0, -72.0), (0, 0, 0, 1.0))

_PYDICOM_FILES = (
    "CT_small.dcm",  # CT, 16-bit signed, explicit little endian
    "MR_small.dcm",  # MR, 16-bit signed, explicit little endian
    "JPEG2000.dcm",  # nuclear medicine, 16-bit, JPEG 2000 lossy
    "examples_jpeg2k.dcm",  # ultrasound, colour, JPEG 2000 lossless
    "examples_rgb_color.dcm",  # ultrasound, RGB, explicit little endian
    "examples_ybr_color.dcm",  # ultrasound, 30 frames, JPEG baseline
    "SC_rgb_rle_2frame.dcm",  # secondary capture, 2 frames, RLE
)
_PYDICOM_DATA_FILES = (
    "emri_small_jpeg_2k_lossless.dcm",  # enhanced MR, 10 frames, JPEG 2000 lossless
    "MR2_J2KR.dcm",  # MR, 1024 x 1024, JPEG 2000 lossless
    "RG3_J2KR.dcm",  # radiograph, 1760 x 1760, MONOCHROME1, JPEG 2000 lossless
)


@dataclass(frozen=True)
class SampleData:
    """What `write_sample_dicom` left in a folder.

    Attributes
    ----------
    folder : Path
        Where everything is.
    images : tuple of Path
        MR slices, one file each, ordered by patient and then from foot to head.
    segmentations : tuple of Path
        One DICOM Segmentation a patient: grey and white matter of that patient's slices.
    assorted : tuple of Path
        Unrelated single files in various transfer syntaxes, without masks.
    patient_ids : tuple of str
        Made-up patient ids of `images`, in the order of `segmentations`.
    written : int
        Files this call wrote; 0 when all were there already.
    provenance : tuple of str
        Sentences to print: what is real, what is derived, and whose it is.
    """

    folder: Path
    images: tuple[Path, ...]
    segmentations: tuple[Path, ...]
    assorted: tuple[Path, ...]
    patient_ids: tuple[str, ...]
    written: int
    provenance: tuple[str, ...]

    @property
    def files(self) -> tuple[Path, ...]:
        """All files: images, segmentations, assorted."""
        return self.images + self.segmentations + self.assorted


@dataclass(frozen=True)
class _Template:
    """The three volumes as the package has them, uint8, indexed (x, y, z) in RAS, 1 mm."""

    t1: AnyArray
    grey: AnyArray
    white: AnyArray


# 96 columns and 112 rows hold the brain with a margin, divide by 16 (four halvings in a network), and
# make a bit-packed frame of the segmentation end on a whole byte. Every second voxel of the template
# in each direction falls on this grid, so its values can be taken as they are.
_TEMPLATE_PROFILE = Profile(
    key="mni152-template",
    patient_id="SAMPLE-MNI152",
    patient_name="MNI152^Template",
    description="MNI ICBM152 2009a T1 average",
    derivation="Average of 152 brains; every second voxel of the 1 mm template, values unchanged",
    grid=Grid(shape=(78, 112, 96), origin=(-96.0, -94.0, -72.0), spacing=(2.0, 2.0, 2.0)),
)


def _derived_profile(number: int) -> Profile:
    return Profile(
        key=f"derived-{number}",
        patient_id=f"SAMPLE-DERIVED-{number}",
        patient_name=f"Derived{number}^Template",
        description=f"MNI ICBM152 T1, deformed, no. {number}",
        derivation="MNI ICBM152 template with a seeded deformation, intensity change and noise; no person",
        grid=Grid(shape=(40, 112, 96), origin=(-96.0, -94.0, -68.0), spacing=(4.0, 2.0, 2.0)),
    )


def write_sample_dicom(folder: Path, *, progress: Callable[[str], None] | None = None) -> SampleData:
    """Write the demo's DICOM files, unless they are there already.

    The same packages give the same bytes, in any folder and at any time. Each file appears whole or not
    at all, and a patient of whom a file is missing is written again, so an interrupted call is repaired
    by the next one.

    I/O: reads data files of installed packages; writes about 290 files (9 MB, a few seconds) on the
    first call, none on the next. No network.

    Parameters
    ----------
    folder : Path
        Created if needed. Other files in it are left alone.
    progress : callable, optional
        Called with a short sentence before each patient is written.

    Returns
    -------
    SampleData
        Paths, made-up patient ids, and where the data come from.

    Raises
    ------
    ConfigError
        A package that carries the data or turns them into DICOM is not installed.
    DataError
        The installed nilearn carries another template than this was made for.
    OSError
        The folder cannot be written.
    """
    say = progress or _silent
    profiles = [_TEMPLATE_PROFILE, *(_derived_profile(n) for n in range(1, DERIVED_SUBJECTS + 1))]
    images = tuple(folder / name for profile in profiles for name in profile.image_names())
    segmentations = tuple(folder / profile.segmentation_name() for profile in profiles)

    missing = [
        (number, profile)
        for number, profile in enumerate(profiles)
        if not all((folder / n).is_file() for n in [*profile.image_names(), profile.segmentation_name()])
    ]
    written = 0
    if missing:
        template = _load_template()
        for number, profile in missing:
            say(f"writing {profile.patient_id}: {profile.grid.shape[0]} MR slices and their segmentation")
            image, mask = _derived_volume(template, profile.grid, number) if number else _plain_volume(template)
            written += write_patient(folder, profile, image, mask)

    assorted, copied = _copy_assorted(folder / "assorted", say)
    return SampleData(
        folder=folder,
        images=images,
        segmentations=segmentations,
        assorted=assorted,
        patient_ids=tuple(profile.patient_id for profile in profiles),
        written=written + copied,
        provenance=_provenance(len(assorted)),
    )


def masks_by_instance(segmentation_files: Iterable[Path]) -> dict[str, NDArray[np.uint8]]:
    """Read the masks of segmentation files, by the image instance they belong to.

    Every image a segmentation names in its Referenced Series Sequence gets a mask; where no frame
    refers to it, because frames without tissue are left out of the file, that mask is all background.

    I/O: reads each file whole.

    Parameters
    ----------
    segmentation_files : iterable of Path
        BINARY DICOM Segmentations of single-frame images, on the same pixel grid as their images.

    Returns
    -------
    dict of str to (rows, columns) uint8 ndarray
        By SOP instance UID of the image: 0 background, else the segment number, which in the sample
        data is 1 for grey and 2 for white matter. Where segments overlap the higher number stands.

    Raises
    ------
    DataError
        A file is not a BINARY segmentation, or a frame does not name its image and segment.
    OSError
        A file cannot be read.
    """
    from pydicom import dcmread
    from pydicom.uid import SegmentationStorage

    masks: dict[str, NDArray[np.uint8]] = {}
    for path in segmentation_files:
        dataset = dcmread(path)
        if dataset.get("SOPClassUID") != SegmentationStorage or dataset.get("SegmentationType") != "BINARY":
            raise DataError(f"{path} is not a BINARY DICOM Segmentation; pass the `segmentations` of the sample")
        try:
            shape = (int(dataset.Rows), int(dataset.Columns))
            for series in dataset.ReferencedSeriesSequence:
                for instance in series.ReferencedInstanceSequence:
                    masks.setdefault(str(instance.ReferencedSOPInstanceUID), np.zeros(shape, np.uint8))
            frames = dataset.pixel_array.reshape(-1, *shape)
            for groups, frame in zip(dataset.PerFrameFunctionalGroupsSequence, frames, strict=True):
                segment = int(groups.SegmentIdentificationSequence[0].ReferencedSegmentNumber)
                source = groups.DerivationImageSequence[0].SourceImageSequence[0]
                mask = masks[str(source.ReferencedSOPInstanceUID)]
                np.maximum(mask, frame.astype(np.uint8) * np.uint8(segment), out=mask)
        except (AttributeError, IndexError, KeyError) as error:
            raise DataError(f"{path}: a frame does not name the image and segment it belongs to") from error
    return masks


def _silent(text: str) -> None:
    """Stand in for a progress callback that was not given."""


def _load_template() -> _Template:
    absent = [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
    if absent:
        raise ConfigError(f'the sample images need {", ".join(absent)}: pip install "ahi_ml[demo]"')
    import nibabel

    # The package is located, not imported: that would pull in scikit-learn, and only the files matter.
    package = importlib.util.find_spec("nilearn")
    roots: Sequence[str] = (package.submodule_search_locations or []) if package else []

    volumes = []
    for kind in ("t1", "gm", "wm"):
        relative = Path("datasets", "data", _TEMPLATE_FILE.format(kind))
        path = next((Path(root) / relative for root in roots if (Path(root) / relative).is_file()), None)
        if path is None:
            raise DataError(f"the installed nilearn has no {relative.as_posix()}; try nilearn 0.11 to 0.14")
        image = nibabel.load(path)
        volume = np.asarray(image.dataobj)
        if volume.shape != _TEMPLATE_SHAPE or not np.array_equal(image.affine, np.array(_TEMPLATE_AFFINE)):
            raise DataError(
                f"{relative.name} of the installed nilearn has shape {volume.shape}, or an affine, other than"
                " the one expected; try nilearn 0.11 to 0.14"
            )
        volumes.append(volume)
    return _Template(*volumes)


def _plain_volume(template: _Template) -> tuple[AnyArray, AnyArray]:
    """Template values at its own voxels: no interpolation, so the stored values are the template's."""
    z, y, x = _TEMPLATE_PROFILE.grid.axes_ras()
    origin = np.array(_TEMPLATE_AFFINE)[:3, 3]
    take = np.ix_(*((axis - start).astype(np.intp) for axis, start in zip((x, y, z), origin, strict=True)))
    t1, grey, white = (volume[take].transpose(2, 1, 0) for volume in (template.t1, template.grey, template.white))
    return t1.astype(np.uint16), _labels(grey, white)


def _derived_volume(template: _Template, grid: Grid, seed: int) -> tuple[AnyArray, AnyArray]:
    """Another brain shape and scanner setting: image and tissue maps warped as one, then the image changed.

    The size of the effects (rotation to 6 degrees, size to 7 %, warp of some millimetres) stays within
    what one finds between people, and far below where a smooth warp would fold.
    """
    from scipy import ndimage  # type: ignore[import-untyped, unused-ignore]

    rng = np.random.default_rng([2009, seed])
    axes = grid.axes_ras()
    points = np.stack(np.meshgrid(*axes, indexing="ij"))[::-1]  # (x, y, z) RAS, each (slices, rows, columns)
    centre = np.array([axis.mean() for axis in axes])[::-1]

    angles = rng.uniform(-0.1, 0.1, 3)
    inverse = _rotation(angles) @ np.diag(rng.uniform(0.93, 1.07, 3))
    shift = rng.uniform(-4.0, 4.0, 3)
    place = np.tensordot(inverse, points - centre[:, None, None, None], axes=1)
    place += (centre + shift - np.array(_TEMPLATE_AFFINE)[:3, 3])[:, None, None, None]
    for component in place:
        component += 3.0 * _smooth_field(rng, grid.shape)

    t1, grey, white = (
        ndimage.map_coordinates(volume, place, output=np.float32, order=1, mode="constant", cval=0.0)
        for volume in (template.t1, template.grey, template.white)
    )
    contrast, gain = rng.uniform(0.85, 1.2), rng.uniform(0.8, 1.25)
    bias = np.exp(0.08 * _smooth_field(rng, grid.shape))
    signal = 255.0 * gain * bias * (t1 / 255.0) ** contrast
    # The template's background is exactly zero, because the skull was removed; noise is for tissue only.
    noisy = np.where(t1 > 0, signal + rng.normal(0.0, 5.0, grid.shape), 0.0)
    return np.rint(np.clip(noisy, 0, 4095)).astype(np.uint16), _labels(grey, white)


def _rotation(angles: FloatArray) -> FloatArray:
    (ca, cb, cc), (sa, sb, sc) = np.cos(angles), np.sin(angles)
    about_x = np.array([[1, 0, 0], [0, ca, -sa], [0, sa, ca]])
    about_y = np.array([[cb, 0, sb], [0, 1, 0], [-sb, 0, cb]])
    about_z = np.array([[cc, -sc, 0], [sc, cc, 0], [0, 0, 1]])
    return np.asarray(about_z @ about_y @ about_x, dtype=np.float64)


def _smooth_field(rng: np.random.Generator, shape: tuple[int, int, int]) -> FloatArray:
    """Random field of unit size that changes over some 45 mm: a coarse lattice, cubically interpolated."""
    from scipy import ndimage  # type: ignore[import-untyped, unused-ignore]

    lattice = np.clip(rng.standard_normal((5, 6, 5)), -2, 2)
    factors = [n / m for n, m in zip(shape, lattice.shape, strict=True)]
    return np.asarray(ndimage.zoom(lattice, factors, order=3), dtype=np.float64)


def _labels(grey: AnyArray, white: AnyArray) -> AnyArray:
    """Mask from tissue maps (0 to 255 stands for probability 0 to 1): the tissue above one half."""
    mask = np.full(grey.shape, BACKGROUND, dtype=np.uint8)
    mask[grey > 127.5] = GREY_MATTER
    mask[white > 127.5] = WHITE_MATTER
    return mask


def _copy_assorted(folder: Path, say: Callable[[str], None]) -> tuple[tuple[Path, ...], int]:
    """Copy pydicom's own files, and larger ones of pydicom-data; return all, and how many are new."""
    from pydicom.data import get_testdata_file

    present, new = [], 0
    for name in (*_PYDICOM_FILES, *_PYDICOM_DATA_FILES):
        path = folder / name
        if not path.is_file():
            source = get_testdata_file(name, download=False)
            if not isinstance(source, str):
                if name in _PYDICOM_DATA_FILES:
                    continue
                raise DataError(f"the installed pydicom has no test file {name}; try pydicom 3.0")
            if not new:
                say("copying single files of other kinds")
            write_whole(path, partial(shutil.copyfile, source))
            new += 1
        present.append(path)
    return tuple(present), new


def _provenance(assorted: int) -> tuple[str, ...]:
    plain, derived = (profile.grid.shape[0] for profile in (_TEMPLATE_PROFILE, _derived_profile(1)))
    return (
        f"Real: {_TEMPLATE_PROFILE.patient_id} is the MNI ICBM152 2009a symmetric T1 brain template, an "
        "average of 152 people, as the nilearn package carries it: every second voxel in each direction, "
        f"{plain} slices, values unchanged, written as DICOM.",
        "Real: its masks are the grey and white matter maps that come with it, cut at probability 0.5.",
        f"Derived: SAMPLE-DERIVED-1 to {DERIVED_SUBJECTS} are not people. Each is the same template turned, "
        f"stretched and smoothly warped by a seeded random field, resampled to {derived} slices, with "
        "changed contrast, uneven brightness and added noise. The masks are warped with the image.",
        "So a score on these patients shows that the machinery works; it says nothing about real patients.",
        f"Real: {assorted} single files of other kinds are pydicom's public test files, copied unchanged.",
        "Template: copyright (C) 1993-2004 Louis Collins, McConnell Brain Imaging Centre, Montreal "
        "Neurological Institute, McGill University; free to use, copy, modify and distribute with this "
        "notice. Fonov et al., NeuroImage 54 (2011) 313-327.",
    )
