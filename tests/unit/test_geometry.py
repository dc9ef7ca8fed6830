"""Geometry: phantoms whose voxel values are their positions, and real series against another converter."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ahi_ml.errors import (
    ConfigError,
    DuplicateSliceError,
    GapError,
    GeometryError,
    MixedOrientationError,
)
from ahi_ml.geometry import Geometry, Stack, group_frames, reorient, stack_frames

DATA = Path(os.environ.get("AHI_ML_TEST_DATA") or Path(__file__).resolve().parents[3] / "shared" / "data")
AXIAL = (1.0, 0, 0, 0, 1, 0)


def rotation(rng: np.random.Generator) -> np.ndarray:
    """(3, 3) random right-handed rotation."""
    q, r = np.linalg.qr(rng.normal(size=(3, 3)))
    q *= np.sign(np.diag(r))
    return q if np.linalg.det(q) > 0 else -q


class Phantom:
    """Frames whose pixel values are the LPS position of the pixel, by DICOM's own equation (C.7.6.2.1.1)."""

    def __init__(
        self,
        *,
        n: int = 7,
        rows: int = 4,
        columns: int = 6,
        spacing: tuple[float, float] = (0.7, 1.9),
        step: float = 2.5,
        shear: tuple[float, float] = (0.0, 0.0),
        turn: np.ndarray | None = None,
        origin: tuple[float, float, float] = (-120.0, 33.0, 871.5),
        jitter: float = 0.0,
        keep: Any = None,
        seed: int = 0,
    ) -> None:
        rng = np.random.default_rng(seed)
        turn = rotation(rng) if turn is None else turn
        row, column, normal = turn.T
        self.normal = normal
        self.step = step * normal + shear[0] * column + shear[1] * row
        kept = np.arange(n) if keep is None else np.asarray(keep)
        self.number = kept[rng.permutation(len(kept))]  # which slice each frame is
        self.positions = np.asarray(origin) + self.number[:, None] * self.step
        self.positions = self.positions + rng.uniform(-jitter, jitter, self.positions.shape)
        self.spacing, self.rows, self.columns = np.array(spacing), rows, columns
        self.orientation = np.concatenate([row, column])
        self.affine = np.eye(4)
        self.affine[:3] = np.stack([self.step, column * spacing[0], row * spacing[1], origin], axis=1)
        self.affine[:3, 3] += kept[0] * self.step

    def frame(self, f: int) -> np.ndarray:
        """(rows, columns, 3): where each pixel of frame `f` is."""
        between_rows, between_columns = self.spacing
        across = np.arange(self.columns)[None, :, None] * between_columns * self.orientation[:3]
        down = np.arange(self.rows)[:, None, None] * between_rows * self.orientation[3:]
        return self.positions[f] + across + down

    def stack(self, pick: Any = slice(None), **options: Any) -> Stack:
        orientations = np.tile(self.orientation, (len(self.positions), 1))
        spacing = np.tile(self.spacing, (len(self.positions), 1))
        args = self.positions[pick], orientations[pick], spacing[pick], self.rows, self.columns
        return stack_frames(*args, **options)

    def volume(self, stack: Stack) -> np.ndarray:
        return np.stack([self.frame(f) for f in stack.order])


def voxels(geometry: Geometry) -> np.ndarray:
    """(z, y, x, 3): where the affine says each voxel is."""
    index = np.indices(geometry.shape).reshape(3, -1)
    world = geometry.affine[:3, :3] @ index + geometry.affine[:3, 3:]
    return world.T.reshape(*geometry.shape, 3)


phantoms = st.fixed_dictionaries(
    {
        "seed": st.integers(0, 2**32),
        "n": st.integers(2, 12),
        "rows": st.integers(1, 5),
        "columns": st.integers(1, 5),
        "spacing": st.tuples(st.floats(0.1, 5), st.floats(0.1, 5)),
        "step": st.floats(1.0, 9.0),
    }
)


@given(options=phantoms)
@settings(max_examples=60, deadline=None, derandomize=True, database=None)
def test_phantom_comes_back(options: dict[str, Any]) -> None:
    phantom = Phantom(**options)
    stack = phantom.stack(frame_of_reference="1.2.3")
    geometry = stack.geometry
    assert geometry.kind == "regular"
    assert stack.notes == ()
    assert stack.slice_present.all()
    assert phantom.number[stack.order].tolist() == list(range(options["n"]))
    np.testing.assert_allclose(geometry.affine, phantom.affine, atol=1e-9, rtol=0)
    np.testing.assert_allclose(voxels(geometry), phantom.volume(stack), atol=1e-9, rtol=0)
    np.testing.assert_allclose(geometry.spacing, (options["step"], *options["spacing"]), atol=1e-9)
    np.testing.assert_allclose(stack.positions_mm, geometry.coords()["z"], atol=1e-9)
    assert geometry.frame_of_reference == "1.2.3"


@given(options=phantoms)
@settings(max_examples=40, deadline=None, derandomize=True, database=None)
def test_jitter_of_rounding_is_no_reason_to_refuse(options: dict[str, Any]) -> None:
    phantom = Phantom(**options, jitter=0.005)
    stack = phantom.stack()
    assert stack.geometry.kind == "regular"
    assert phantom.number[stack.order].tolist() == list(range(options["n"]))
    off = np.linalg.norm(voxels(stack.geometry) - phantom.volume(stack), axis=-1)
    assert off.max() < 0.03


@given(options=phantoms, order=st.randoms(use_true_random=False))
@settings(max_examples=40, deadline=None, derandomize=True, database=None)
def test_any_order_gives_the_same_bytes(options: dict[str, Any], order: Any) -> None:
    phantom = Phantom(**options, jitter=0.004)
    shuffled = list(range(options["n"]))
    order.shuffle(shuffled)
    noise = np.random.default_rng(options["seed"]).uniform(-1e-4, 1e-4, (options["n"], 6))
    turned, rest = phantom.orientation + noise, (phantom.spacing, phantom.rows, phantom.columns)
    first = stack_frames(phantom.positions, turned, *rest)
    second = stack_frames(phantom.positions[shuffled], turned[shuffled], *rest)
    assert first.geometry == second.geometry
    assert first.geometry.affine.tobytes() == second.geometry.affine.tobytes()
    assert first.positions_mm.tobytes() == second.positions_mm.tobytes()
    assert np.array(shuffled)[second.order].tolist() == first.order.tolist()


def test_pixel_spacing_is_between_rows_first() -> None:
    stack = stack_frames([[0, 0, 0], [0, 0, 3]], AXIAL, (0.5, 2.0), 10, 20)
    np.testing.assert_array_equal(stack.geometry.affine[:3, 1], (0, 0.5, 0))  # next row: towards posterior
    np.testing.assert_array_equal(stack.geometry.affine[:3, 2], (2.0, 0, 0))  # next column: towards left
    assert stack.geometry.spacing == (3.0, 0.5, 2.0)
    assert stack.geometry.shape == (2, 10, 20)


def test_step_is_the_mean_not_the_median_of_coarsely_rounded_positions() -> None:
    z = np.cumsum([0.0, *[6.972, 6.972, 7.07, 6.972, 7.06, 6.972, 6.985]])
    stack = stack_frames([[0, 0, at] for at in z], AXIAL, (1, 1), 2, 2)
    assert stack.geometry.kind == "regular"
    assert stack.geometry.spacing[0] == pytest.approx(z[-1] / 7, abs=1e-12)
    assert stack.geometry.tolerance == pytest.approx(0.02 * z[-1] / 7)


def test_cosines_are_renormalised() -> None:
    stack = stack_frames([[0, 0, 0], [0, 0, 3]], np.outer([1.0004, 0.99], AXIAL), (1, 1), 2, 2)
    np.testing.assert_allclose(stack.geometry.affine, np.diag([1, 1, 1, 1.0])[[2, 1, 0, 3]] * [3, 1, 1, 1])


# --- tilt ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shear", [(0.9, 0.0), (0.0, -0.5), (-0.6, 0.3)])
def test_tilted_stack_keeps_the_true_step(shear: tuple[float, float]) -> None:
    phantom = Phantom(shear=shear, seed=5)
    stack = phantom.stack()
    assert stack.geometry.kind == "tilted"
    np.testing.assert_allclose(stack.geometry.affine, phantom.affine, atol=1e-9)
    np.testing.assert_allclose(voxels(stack.geometry), phantom.volume(stack), atol=1e-9)
    assert stack.geometry.spacing[0] == pytest.approx(2.5)
    volume = abs(np.linalg.det(stack.geometry.affine[:3, :3]))
    assert volume == pytest.approx(np.prod(stack.geometry.spacing))


def test_a_step_two_degrees_off_the_normal_is_not_called_tilted() -> None:
    assert Phantom(shear=(2.5 * np.tan(np.radians(2.0)), 0)).stack().geometry.kind == "regular"
    assert Phantom(shear=(2.5 * np.tan(np.radians(3.0)), 0)).stack().geometry.kind == "tilted"


# --- gaps ------------------------------------------------------------------------------------------

GAPPY = [0, 1, 2, 5, 6, 7, 8, 10]


@pytest.mark.parametrize("shear", [(0.0, 0.0), (0.9, 0.1)])
@pytest.mark.parametrize("jitter", [0.0, 0.005])
def test_gaps_are_filled(shear: tuple[float, float], jitter: float) -> None:
    phantom = Phantom(keep=GAPPY, shear=shear, jitter=jitter, seed=3)
    stack = phantom.stack(gaps="fill")
    assert stack.geometry.shape[0] == 11
    assert stack.geometry.kind == ("tilted" if any(shear) else "regular")
    assert np.flatnonzero(stack.slice_present).tolist() == GAPPY
    assert (stack.order[~stack.slice_present] == -1).all()
    assert phantom.number[stack.order[stack.slice_present]].tolist() == GAPPY
    np.testing.assert_allclose(stack.geometry.affine, phantom.affine, atol=max(2 * jitter, 1e-9))
    np.testing.assert_allclose(stack.positions_mm, stack.geometry.coords()["z"], atol=0.03 if jitter else 1e-9)
    assert "3 of 11 slices missing" in stack.notes[0]


def test_gap_error_names_positions_and_counts() -> None:
    z = [-45.0, -43.0, -41.0, -33.0, -31.0, -29.0]
    with pytest.raises(GapError) as caught:
        stack_frames([[5, 5, at] for at in z], AXIAL, (1, 1), 2, 2, label="image set 0aaf")
    for part in ("3 of 9 slices", "z=-41", "z=-33", "step 2 mm", "image set 0aaf", "gaps='fill'", "'keep'"):
        assert part in str(caught.value)


def test_gaps_are_kept_without_an_affine() -> None:
    phantom = Phantom(keep=GAPPY, seed=4)
    stack = phantom.stack(gaps="keep")
    geometry = stack.geometry
    assert geometry.kind == "irregular"
    assert stack.slice_present.all()
    assert phantom.number[stack.order].tolist() == GAPPY
    np.testing.assert_allclose(geometry.coords()["z"], stack.positions_mm, atol=1e-9)
    np.testing.assert_allclose(np.diff(stack.positions_mm), np.diff(GAPPY) * 2.5)
    np.testing.assert_allclose(geometry.slice_origins(), phantom.positions[stack.order])
    with pytest.raises(GeometryError, match="no affine"):
        _ = geometry.affine
    with pytest.raises(GeometryError, match="no affine"):
        geometry.affine_ras()
    assert np.isnan(geometry.spacing[0])
    assert geometry.spacing[1:] == pytest.approx((0.7, 1.9))
    assert "irregular" in repr(geometry)
    part = geometry.sliced(k=slice(2, 5), j=slice(1, None), i=slice(None, None, 2))
    expected = [phantom.frame(f)[1, 0] for f in stack.order[2:5]]
    np.testing.assert_allclose(part.slice_origins(), expected)
    np.testing.assert_allclose(part.coords()["z"], geometry.coords()["z"][2:5])
    assert pickle.loads(pickle.dumps(part)) == part
    assert geometry.reduced(1).spacing[1:] == pytest.approx((1.4, 3.8))


def test_a_wide_gap_is_counted_right_though_the_median_is_rounded() -> None:
    z = np.cumsum([0.0, *[6.972, 6.972, 7.07, 6.972, 7.07] * 3, 150 * 7.01])
    stack = stack_frames([[0, 0, at] for at in z], AXIAL, (1, 1), 2, 2, gaps="fill")
    assert stack.geometry.shape[0] == 16 + 150


def test_one_gap_among_three_slices() -> None:
    stack = stack_frames([[0, 0, at] for at in (0, 5, 15)], AXIAL, (1, 1), 2, 2, gaps="fill")
    assert stack.order.tolist() == [0, 1, -1, 2]


@pytest.mark.parametrize("z", [(0, 5, 10, 17.3, 22), (0, 5, 5.4, 10, 15)])
def test_uneven_positions_can_only_be_kept(z: tuple[float, ...]) -> None:
    positions = [[0, 0, at] for at in z]
    for gaps in ("error", "fill"):
        with pytest.raises(GapError, match=r"unevenly spaced in image set 0a.*keep"):
            stack_frames(positions, AXIAL, (1, 1), 2, 2, gaps=gaps, label="image set 0a")
    kept = stack_frames(positions, AXIAL, (1, 1), 2, 2, gaps="keep")
    assert kept.geometry.coords()["z"].tolist() == list(z)


def test_frames_that_wander_sideways_are_not_a_straight_stack() -> None:
    positions = [[0, 0, 0], [0, 0, 2], [3, 0, 4], [0, 0, 6], [0, 0, 8]]
    with pytest.raises(GapError, match="sideways"):
        stack_frames(positions, AXIAL, (1, 1), 2, 2)
    assert stack_frames(positions, AXIAL, (1, 1), 2, 2, gaps="keep").geometry.kind == "irregular"


def test_unknown_gap_rule() -> None:
    with pytest.raises(ConfigError, match="gaps"):
        stack_frames([[0, 0, 0]], AXIAL, (1, 1), 2, 2, gaps="split")  # type: ignore[arg-type]


# --- duplicates and single slices ------------------------------------------------------------------


def test_identical_duplicates_keep_the_first_whatever_the_order() -> None:
    phantom = Phantom(n=4, seed=2)
    base = np.argsort(phantom.number)
    pick = np.array([base[2], base[0], base[1], base[3], base[2], base[2]])
    numbers = [9, 1, 2, 4, 3, 3]
    keys = ["a", "b", "c", "d", "z", "y"]
    sums = [7, 5, 6, 8, 7, 7]
    for order in ([0, 1, 2, 3, 4, 5], [5, 4, 3, 2, 1, 0], [4, 5, 0, 3, 2, 1]):
        stack = phantom.stack(
            pick[order],
            instance_numbers=[numbers[f] for f in order],
            keys=[keys[f] for f in order],
            checksums=[sums[f] for f in order],
        )
        assert [keys[order[f]] for f in stack.order] == ["b", "c", "y", "d"]
        np.testing.assert_allclose(stack.geometry.affine, phantom.affine, atol=1e-9)
        assert stack.notes == ("2 of 6 frames dropped: duplicates with identical checksums",)


def test_the_first_of_duplicates_goes_by_number_not_by_rounding() -> None:
    positions = [[0, 0, 0], [0, 0, 5], [0, 0, 5.001], [0, 0, 10]]
    stack = stack_frames(positions, AXIAL, (1, 1), 2, 2, instance_numbers=[1, 9, 2, 4], checksums=[1, 2, 2, 3])
    assert stack.order.tolist() == [0, 2, 3]


@pytest.mark.parametrize("checksums", [None, [1, 2, 3, 4], [1, None, 2, None]])
def test_duplicates_that_are_not_known_to_be_identical(checksums: Any) -> None:
    positions = [[0, 0, 0], [0, 0, 5], [0, 0, 10], [0, 0, 5.001]]
    with pytest.raises(DuplicateSliceError, match=r"z=5 in image set 0a \(instance numbers 2, 4\).* 1 of 3"):
        stack_frames(
            positions,
            AXIAL,
            (1, 1),
            2,
            2,
            instance_numbers=np.arange(1, 5),
            checksums=checksums,
            label="image set 0a",
        )


def test_a_time_series_at_one_position_is_duplicates_not_a_thin_stack() -> None:
    with pytest.raises(DuplicateSliceError):
        stack_frames([[0, 0, 0.002 * n] for n in range(4)], AXIAL, (1, 1), 2, 2)


def test_thin_slices_are_not_taken_for_duplicates() -> None:
    stack = stack_frames([[0, 0, 0.004 * n] for n in range(50)], AXIAL, (0.01, 0.01), 2, 2)
    assert stack.geometry.spacing[0] == pytest.approx(0.004)


def test_tiles_side_by_side_are_no_stack() -> None:
    with pytest.raises(GeometryError, match="side by side"):
        stack_frames([[0, 0, 0], [50, 0, 0], [0, 0, 2], [50, 0, 2]], AXIAL, (1, 1), 2, 2)


@pytest.mark.parametrize(
    ("between", "thickness", "depth"),
    [(4.0, 3.0, 4.0), (None, 3.0, 3.0), (0.0, 3.0, 3.0), (-4.0, None, 4.0), (None, None, 1.0)],
)
def test_single_slice_assumes_its_depth(between: Any, thickness: Any, depth: float) -> None:
    phantom = Phantom(n=1, step=depth, seed=8)
    stack = phantom.stack(slice_thickness=thickness, spacing_between_slices=between)
    assert (stack.geometry.kind, stack.geometry.spacing_assumed) == ("single", True)
    assert len(stack.notes) == 1
    np.testing.assert_allclose(stack.geometry.affine, phantom.affine, atol=1e-9)


def test_thickness_is_never_the_step_of_a_stack() -> None:
    stack = Phantom(seed=8).stack(slice_thickness=9.0, spacing_between_slices=8.0)
    assert stack.geometry.spacing[0] == pytest.approx(2.5)
    assert not stack.geometry.spacing_assumed


# --- refusals --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"orientations": (1, 0, 0, 0.01, 1, 0)}, GeometryError),
        ({"orientations": (0, 0, 0, 0, 1, 0)}, GeometryError),
        ({"orientations": (np.nan,) * 6}, GeometryError),
        ({"orientations": [AXIAL, (1, 0, 0, 0, np.cos(0.01), np.sin(0.01))]}, MixedOrientationError),
        ({"positions": [[0, 0, 0], [0, 0, np.nan]]}, GeometryError),
        ({"positions": []}, GeometryError),
        ({"orientations": [AXIAL] * 3}, GeometryError),
        ({"checksums": [1]}, GeometryError),
        ({"pixel_spacing": (0, 1)}, GeometryError),
        ({"pixel_spacing": (np.nan, 1)}, GeometryError),
        ({"pixel_spacing": [(1, 1), (1, 1.01)]}, MixedOrientationError),
    ],
)
def test_refusals(change: dict[str, Any], error: type[Exception]) -> None:
    options = {"positions": [[0, 0, 0], [0, 0, 3]], "orientations": AXIAL, "pixel_spacing": (1, 1)}
    with pytest.raises(error, match="in set q"):
        stack_frames(**{**options, **change}, rows=2, columns=2, label="set q")


# --- the geometry value ----------------------------------------------------------------------------


def test_plain_axial_stack_has_lps_coordinates() -> None:
    geometry = stack_frames([[-10, 20, 3 * k] for k in range(4)], AXIAL, (0.5, 2.0), 3, 5).geometry
    coords = geometry.coords()
    assert coords["z"].tolist() == [0, 3, 6, 9]
    assert coords["y"].tolist() == [20, 20.5, 21]
    assert coords["x"].tolist() == [-10, -8, -6, -4, -2]
    assert geometry.orientation == "SPL"
    assert geometry.origin.tolist() == [-10, 20, 0]
    np.testing.assert_array_equal(geometry.directions, np.eye(3)[::-1])
    assert repr(geometry) == "<Geometry regular, 4 x 3 x 5 voxels, 3 x 0.5 x 2 mm, SPL>"
    np.testing.assert_array_equal(geometry.affine_ras() @ (1, 2, 3, 1), (4, -21, 3, 1))


def test_geometry_is_a_value() -> None:
    geometry = Phantom(seed=6).stack(frame_of_reference="1.2").geometry
    again = pickle.loads(pickle.dumps(geometry))
    assert again == geometry
    assert hash(again) == hash(geometry)
    assert geometry != geometry.reduced(1)
    assert geometry != 1
    for array in (again.affine, again.axes, again.origin):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 0
    with pytest.raises(AttributeError):
        geometry.kind = "tilted"  # type: ignore[misc]


@pytest.mark.parametrize("seed", range(8))
def test_slices_agree_with_the_array_and_its_coordinates(seed: int) -> None:
    rng = np.random.default_rng(seed)
    phantom = Phantom(seed=seed, shear=(0.4, 0.2) if seed % 2 else (0, 0))
    stack = phantom.stack()
    volume, coords = phantom.volume(stack), stack.geometry.coords()
    cuts = []
    for n in volume.shape[:3]:
        start, stop = sorted(rng.choice(n + 1, 2, replace=False))
        cut = slice(int(start), int(stop), int(rng.integers(1, 3)))
        cuts.append(slice(None, None, -int(rng.integers(1, 3))) if rng.random() < 0.4 else cut)
    part = stack.geometry.sliced(*cuts)
    np.testing.assert_allclose(voxels(part), volume[tuple(cuts)], atol=1e-9)
    assert part.shape == volume[tuple(cuts)].shape[:3]
    if seed % 2 == 0:  # in a sheared stack y and x labels follow the first slice taken
        for name, cut in zip("zyx", cuts, strict=True):
            np.testing.assert_allclose(part.coords()[name], coords[name][cut], atol=1e-9)


def test_an_empty_slice_has_an_empty_geometry() -> None:
    geometry = Phantom().stack().geometry.sliced(j=slice(2, 2))
    assert geometry.shape == (7, 0, 6)
    assert geometry.coords()["y"].shape == (0,)


@pytest.mark.parametrize("level", [0, 1, 2, 3])
def test_reduced_samples_sit_on_full_resolution_samples(level: int) -> None:
    phantom = Phantom(rows=13, columns=9, seed=1)
    stack = phantom.stack()
    reduced = stack.geometry.reduced(level)
    taken = phantom.volume(stack)[:, :: 2**level, :: 2**level]
    assert reduced.shape == taken.shape[:3]
    np.testing.assert_allclose(voxels(reduced), taken, atol=1e-9)


def test_reduced_refuses_a_negative_level() -> None:
    with pytest.raises(ConfigError):
        Phantom().stack().geometry.reduced(-1)


@pytest.mark.parametrize(
    "arguments",
    [
        {"affine": np.eye(3)},
        {"affine": np.full((4, 4), np.nan)},
        {"affine": np.diag([0, 1, 1, 1])},
        {"affine": np.ones((4, 4))},
        {"shape": (1, 2)},
        {"shape": (1, -2, 3)},
        {"kind": "irregular"},
        {"kind": "bent"},
        {"positions": np.zeros((2, 3))},
        {"kind": "irregular", "positions": np.zeros((4, 3))},
        {"kind": "irregular", "positions": np.full((2, 3), np.inf)},
    ],
)
def test_geometry_refuses_nonsense(arguments: dict[str, Any]) -> None:
    with pytest.raises(GeometryError):
        Geometry(**{"affine": np.eye(4), "shape": (2, 3, 4), **arguments})


# --- groups ----------------------------------------------------------------------------------------


def series(*parts: tuple[int, dict[str, Any]]) -> dict[str, list[Any]]:
    """Tags of a series of so many frames of each kind."""
    plain = {
        "orientations": AXIAL,
        "pixel_spacing": (0.8, 0.8),
        "rows": 8,
        "columns": 8,
        "samples": 1,
        "frames_of_reference": "1.2",
        "image_types": ("ORIGINAL", "PRIMARY", "AXIAL"),
        "stack_ids": "1",
    }
    return {tag: [{**plain, **change}[tag] for n, change in parts for _ in range(n)] for tag in plain}


CORONAL = (1.0, 0, 0, 0, 0, -1)
SPLITS = [
    ({"frames_of_reference": "1.3", "rows": 9}, "FrameOfReferenceUID"),
    ({"rows": 9, "orientations": CORONAL}, "Rows"),
    ({"columns": 9}, "Columns"),
    ({"orientations": CORONAL, "pixel_spacing": (1, 1)}, "ImageOrientationPatient"),
    ({"orientations": (1, 0, 0, 0, np.cos(0.003), np.sin(0.003))}, "ImageOrientationPatient"),
    ({"pixel_spacing": (0.8, 0.802)}, "PixelSpacing"),
    ({"stack_ids": "2"}, "StackID"),
    ({"samples": 3}, "SamplesPerPixel"),
]


@pytest.mark.parametrize(("change", "reason"), SPLITS)
def test_groups_name_the_tag_that_split_them(change: dict[str, Any], reason: str) -> None:
    tags = series((4, change), (6, {}))
    first, second = group_frames(**tags)
    assert (first.reason, first.kind, first.indices.tolist()) == ("", "stack", [4, 5, 6, 7, 8, 9])
    assert (second.reason, second.kind, second.indices.tolist()) == (reason, "stack", [0, 1, 2, 3])


def test_jitter_does_not_split_a_series() -> None:
    rng = np.random.default_rng(1)
    tags = series((30, {}))
    tags["orientations"] = list(np.outer(rng.uniform(0.99, 1.01, 30), AXIAL) + rng.uniform(-4e-4, 4e-4, (30, 6)))
    tags["pixel_spacing"] = list(0.8 * (1 + rng.uniform(-4e-4, 4e-4, (30, 2))))
    assert len(group_frames(**tags)) == 1


def test_pixel_spacing_is_compared_in_relation_to_itself() -> None:
    for mm, other, groups in ((4.0, 4.003, 1), (0.1, 0.1005, 2)):
        tags = series((3, {"pixel_spacing": (mm, mm)}), (3, {"pixel_spacing": (mm, other)}))
        assert len(group_frames(**tags)) == groups


def test_groups_do_not_depend_on_the_order_of_frames() -> None:
    tags = series(*[(3 + n % 2, change) for n, (change, _) in enumerate(SPLITS)], (3, {}))
    n = len(tags["rows"])
    shuffled = np.random.default_rng(0).permutation(n)
    other = {tag: [values[f] for f in shuffled] for tag, values in tags.items()}
    first, second = group_frames(**tags), group_frames(**other)
    assert [g.reason for g in first] == [g.reason for g in second]
    for a, b in zip(first, second, strict=True):
        assert a.indices.tolist() == sorted(shuffled[b.indices].tolist())


def test_localizers_are_set_aside() -> None:
    scout = {"image_types": ["ORIGINAL", "PRIMARY", "LOCALIZER"]}
    stack, named, small = group_frames(**series((9, scout), (2, {"orientations": CORONAL}), (5, {})))
    assert (stack.kind, stack.indices.size, stack.reason) == ("stack", 5, "")
    assert (named.kind, named.indices.size, named.reason) == ("localizer", 9, "ImageType")
    assert (small.kind, small.indices.size, small.reason) == ("localizer", 2, "ImageOrientationPatient")


def test_small_groups_alone_are_stacks() -> None:
    groups = group_frames(**series((2, {}), (2, {"orientations": CORONAL})))
    assert [g.kind for g in groups] == ["stack", "stack"]
    assert [g.kind for g in group_frames(**series((2, {}), (1, {"samples": 3})))] == ["stack", "localizer"]


def test_an_orientation_that_turns_slowly_is_one_group_that_does_not_stack() -> None:
    tags = series((20, {}))
    tags["orientations"] = [(np.cos(a), np.sin(a), 0, -np.sin(a), np.cos(a), 0) for a in np.arange(20) * 9e-4]
    (group,) = group_frames(**tags)
    assert group.indices.size == 20
    with pytest.raises(MixedOrientationError):
        stack_frames([[0, 0, k] for k in range(20)], tags["orientations"], (1, 1), 8, 8)


def test_planar_series_is_not_grouped() -> None:
    with pytest.raises(GeometryError, match=r"1 of 4 frames.*projection or planar"):
        group_frames(**series((3, {}), (1, {"orientations": (np.nan,) * 6})))
    with pytest.raises(GeometryError, match="above 0"):
        group_frames(**series((3, {"pixel_spacing": (0, 1)})))
    assert group_frames([], [], [], [], [], []) == []


# --- reorientation ---------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("code", ["RAS", "LPS", "SPL", "IAR", "psr"])
def test_reoriented_voxels_stay_where_they_are(seed: int, code: str) -> None:
    phantom = Phantom(seed=seed, shear=(0.3, 0.0) if seed % 2 else (0, 0))
    stack = phantom.stack()
    axes, flips, affine = reorient(stack.geometry.affine, stack.geometry.shape, code)
    array = np.flip(phantom.volume(stack).transpose(*axes, 3), [n for n in range(3) if flips[n]])
    moved = Geometry(affine, array.shape[:3])
    np.testing.assert_allclose(voxels(moved), array, atol=1e-9)
    assert moved.orientation == code.upper()


def test_reorient_to_its_own_orientation_changes_nothing() -> None:
    geometry = Phantom(seed=9).stack().geometry
    axes, flips, affine = reorient(geometry.affine, geometry.shape, geometry.orientation)
    assert (axes, flips) == ((0, 1, 2), (False, False, False))
    np.testing.assert_array_equal(affine, geometry.affine)


@pytest.mark.parametrize("code", ["", "RA", "RAL", "RASS", "XYZ", "LRS"])
def test_reorient_refuses_other_codes(code: str) -> None:
    with pytest.raises(ConfigError, match="orientation"):
        reorient(np.eye(4), (1, 1, 1), code)


# --- real series -----------------------------------------------------------------------------------

needs_data = pytest.mark.skipif(not (DATA / "GEOMETRY.json").exists(), reason="no AHI_ML_TEST_DATA")


def read_stack(folder: str, **options: Any) -> Stack:
    headers = [
        pydicom.dcmread(path, stop_before_pixels=True)
        for path in sorted((DATA / folder).iterdir(), reverse=True)
        if path.suffix != ".gz"
    ]
    tags = ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing")
    arrays = [np.array([header[tag].value for header in headers], np.float64) for tag in tags]
    return stack_frames(*arrays, headers[0].Rows, headers[0].Columns, **options)


def converter_affine(geometry: Geometry) -> np.ndarray:
    """Ours in the converter's terms: RAS, index (column, row, slice), rows counted from the bottom."""
    rows = geometry.shape[1]
    to_ours = np.array([[0, 0, 1, 0], [0, -1, 0, rows - 1], [1, 0, 0, 0], [0, 0, 0, 1]])
    return geometry.affine_ras() @ to_ours


def facts(folder: str) -> tuple[np.ndarray, dict[str, Any]]:
    entry = json.loads((DATA / "GEOMETRY.json").read_text())[folder]
    return np.array(entry["dcm2niix"][0]["affine"]), entry["dicom_stack"][0]


REAL = [
    "ct-abdomen-41",
    "mr-abdomen-adc-36",
    "ct-pet-mr-rt-sts002/CT",
    "ct-pet-mr-rt-sts002/PET",
    "ct-pet-mr-rt-sts002/MR_T1",
    "geometry/hitachi-oblique-4",
    "geometry/nonsquare-oblique-4",
]


@needs_data
@pytest.mark.parametrize("folder", REAL)
def test_real_series_lie_where_another_converter_puts_them(folder: str) -> None:
    geometry = read_stack(folder).geometry
    expected, _ = facts(folder)
    assert geometry.kind == "regular"
    ours = converter_affine(geometry)
    # The stored affines have five decimals, and the converter's step may be that of one pair of slices.
    np.testing.assert_allclose(ours, expected, atol=1e-4, rtol=0)
    last = [n - 1 for n in geometry.shape[::-1]]
    corners = np.array(np.meshgrid(*[(0, n) for n in last], [1])).reshape(4, -1)
    rounding = 5e-6 * sum(last) + 4e-5 * last[2]
    np.testing.assert_allclose(ours @ corners, expected @ corners, atol=1e-3 + rounding, rtol=0)


@needs_data
def test_real_tilted_series() -> None:
    geometry = read_stack("ct-head-phantom-tilt-20").geometry
    expected, header = facts("ct-head-phantom-tilt-20")
    assert geometry.kind == "tilted"
    # The converter's affine cannot hold the shear: its step runs along z with the distance of the planes.
    np.testing.assert_allclose(converter_affine(geometry)[:, [0, 1, 3]], expected[:, [0, 1, 3]], atol=1e-4)
    assert geometry.spacing[0] == pytest.approx(expected[2, 2], abs=1e-5)
    ends = np.array([header["first_ipp"], header["last_ipp"]])
    np.testing.assert_allclose(geometry.affine[:3, 0], (ends[1] - ends[0]) / 19, atol=1e-9)
    np.testing.assert_allclose(geometry.affine[:3, 0], (0, 0, 2.5), atol=1e-6)
    step, normal = geometry.affine[:3, 0], geometry.axes[0]
    angle = np.degrees(np.arccos(step @ normal / np.linalg.norm(step)))
    assert angle == pytest.approx(header["angle_between_stack_and_normal_deg"], abs=0.01)


@needs_data
def test_real_series_with_a_missing_slice() -> None:
    folder = "geometry/ct-uneven-spacing-4"
    with pytest.raises(GapError, match=r"1 of 5 slices missing .*1 between z=28.1075 and z=38.1075"):
        read_stack(folder)
    filled = read_stack(folder, gaps="fill")
    assert filled.slice_present.tolist() == [True, True, True, False, True]
    np.testing.assert_allclose(converter_affine(filled.geometry), facts(folder)[0], atol=1e-4)
    np.testing.assert_allclose(
        read_stack(folder, gaps="keep").geometry.coords()["z"],
        (18.1075, 23.1075, 28.1075, 38.1075),
        atol=1e-4,
    )
