"""montage and mpr: as many panels as asked for, true proportions, the head up, no window ever opened."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pytest
import xarray as xr

mpl.use("agg")

import matplotlib.pyplot as plt

from ahi_ml.display import montage, mpr
from ahi_ml.errors import ConfigError
from ahi_ml.geometry import Geometry
from ahi_ml.pixels import Window

SPACING = (4.0, 2.0, 1.0)


def volume_of(values: np.ndarray, affine: np.ndarray | None = None, units: str = "HU") -> xr.DataArray:
    """An array with what `open_volume` gives one."""
    if affine is None:
        affine = np.diag([0, 0, 0, 1.0])
        affine[2, 0], affine[1, 1], affine[0, 2] = SPACING
    geometry = Geometry(affine, values.shape[:3])
    return xr.DataArray(
        values,
        dims=("z", "y", "x", "channel")[: values.ndim],
        coords=dict(geometry.coords()),
        attrs={"spacing": geometry.spacing, "orientation": geometry.orientation, "units": units},
    )


def ramp(shape: tuple[int, ...] = (10, 8, 6)) -> np.ndarray:
    """Values from -150 to 250 HU, the whole abdomen window, that rise with z, then y, then x."""
    return np.linspace(-150, 250, int(np.prod(shape)), dtype=np.float32).reshape(shape)


@pytest.fixture(autouse=True)
def _no_windows(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def refuse(*arguments: Any, **options: Any) -> None:
        raise AssertionError("a picture was shown")

    monkeypatch.setattr(plt, "show", refuse)
    yield
    plt.close("all")


def drawn(figure: Any) -> list[Any]:
    """The axes with an image."""
    return [axis for axis in figure.axes if axis.get_images()]


def shown(axis: Any) -> np.ndarray:
    (image,) = axis.get_images()
    return np.asarray(image.get_array())


class TestMontage:
    @pytest.mark.parametrize(("count", "columns", "panels"), [(4, 2, 4), (5, 3, 5), (1, 4, 1), (99, 4, 10)])
    def test_as_many_panels_as_asked(self, count: int, columns: int, panels: int) -> None:
        assert len(drawn(montage(volume_of(ramp()), count=count, columns=columns))) == panels

    def test_slices_are_spread_and_in_order(self) -> None:
        volume = volume_of(ramp())
        axes = drawn(montage(volume, count=4))
        expected = [np.clip((volume.values[k] + 150) / 400, 0, 1) for k in (0, 3, 6, 9)]
        for axis, image, k in zip(axes, expected, (0, 3, 6, 9), strict=True):
            np.testing.assert_allclose(shown(axis), image, atol=1e-6)
            assert f"{4.0 * k:.1f} mm" in axis.get_title()

    def test_pixels_have_their_proportions(self) -> None:
        for axis in drawn(montage(volume_of(ramp()))):
            assert axis.get_aspect() == pytest.approx(2.0)
            assert axis.get_images()[0].origin == "upper"

    @pytest.mark.parametrize("window", ["lung", (-600, 1500), Window(-600, 1500)])
    def test_windows_by_name_and_value(self, window: Any) -> None:
        volume = volume_of(10 * ramp())
        (axis,) = drawn(montage(volume, count=1, window=window))
        np.testing.assert_allclose(shown(axis), np.clip((volume.values[0] + 1350) / 1500, 0, 1), atol=1e-6)

    def test_an_unknown_window_is_refused(self) -> None:
        with pytest.raises(ConfigError, match="lung"):
            montage(volume_of(ramp()), window="lungs")

    def test_other_units_take_percentiles(self) -> None:
        (axis,) = drawn(montage(volume_of(1000 * ramp((1, 20, 30)), units="stored"), count=1))
        image = shown(axis)
        assert image.min() == 0
        assert image.max() == 1
        assert 0.4 < image.mean() < 0.6

    def test_a_constant_volume_and_one_with_holes(self) -> None:
        montage(volume_of(np.zeros((3, 4, 5), np.float32), units="stored"))
        holes = ramp()
        holes[2:5, :3] = np.nan
        montage(volume_of(holes, units="stored")).canvas.draw()

    def test_colour(self) -> None:
        values = np.random.default_rng(0).integers(0, 256, (3, 6, 5, 3)).astype(np.float32)
        axes = drawn(montage(volume_of(values, units="stored")))
        assert len(axes) == 3
        np.testing.assert_allclose(shown(axes[1]), values[1] / 255, atol=1e-6)

    @pytest.mark.parametrize("shape", [(3, 6, 5, 3), (3, 6, 5)])
    @pytest.mark.parametrize(("dtype", "top"), [(np.float32, 1), (np.uint8, 255)])
    def test_display_values_are_shown_as_they_are(self, shape: tuple[int, ...], dtype: Any, top: int) -> None:
        values = (np.random.default_rng(0).random(shape) * 0.5 * top).astype(dtype)
        axes = drawn(montage(volume_of(values, units="1")))
        np.testing.assert_allclose(shown(axes[1]), values[1] / top, atol=1e-6)

    def test_slices_at_uneven_places(self) -> None:
        affine = np.diag([0, 0, 0, 1.0])
        affine[2, 0], affine[1, 1], affine[0, 2] = SPACING
        places = np.array([[0, 0, 0], [0, 0, 4], [0, 0, 12.0]])
        geometry = Geometry(affine, (3, 8, 6), kind="irregular", positions=places)
        volume = volume_of(ramp((3, 8, 6)))
        volume = volume.assign_coords(dict(geometry.coords())).assign_attrs(spacing=geometry.spacing)
        assert len(drawn(montage(volume))) == 3

    def test_only_slices_drawn_are_read(self) -> None:
        read: list[Any] = []

        class Noted(xr.backends.BackendArray):
            shape, dtype = (10, 8, 6), np.dtype(np.float32)

            def __getitem__(self, key: Any) -> np.ndarray:
                return xr.core.indexing.explicit_indexing_adapter(
                    key, self.shape, xr.core.indexing.IndexingSupport.OUTER, self._read
                )

            def _read(self, key: tuple[Any, ...]) -> np.ndarray:
                read.extend(np.atleast_1d(np.arange(10)[key[0]]).tolist())
                return ramp()[np.ix_(*(np.atleast_1d(np.arange(n)[k]) for n, k in zip(self.shape, key, strict=True)))]

        known = volume_of(ramp())
        lazy = xr.DataArray(
            xr.core.indexing.LazilyIndexedArray(Noted()), dims=known.dims, coords=known.coords, attrs=known.attrs
        )
        montage(lazy, count=4)
        assert sorted(read) == [0, 3, 6, 9]


class TestMpr:
    def test_three_planes_in_true_proportions(self) -> None:
        volume = volume_of(ramp())
        axes = drawn(mpr(volume))
        assert len(axes) == 3
        values = np.clip((volume.values + 150) / 400, 0, 1)
        for axis, plane, aspect in zip(axes, (values[5], values[:, 4], values[:, :, 3]), (2.0, 4.0, 2.0), strict=True):
            np.testing.assert_allclose(shown(axis), plane, atol=1e-6)
            assert axis.get_aspect() == pytest.approx(aspect)

    def test_letters_say_where_right_and_down_lead(self) -> None:
        letters = [[text.get_text() for text in axis.texts] for axis in drawn(mpr(volume_of(ramp())))]
        assert letters == [["L", "P"], ["L", "I"], ["P", "I"]]

    @pytest.mark.parametrize("feet_first", [False, True])
    def test_the_head_is_up(self, tmp_path: Path, feet_first: bool) -> None:
        """The upper half of the patient is bright: so must be the upper half of both upright planes."""
        values = np.full((10, 12, 12), -150, np.float32)
        values[:5] = 250
        affine = np.diag([0, 0, 0, 1.0])
        affine[2, 0], affine[1, 1], affine[0, 2] = -3.0, 2.0, 2.0
        if feet_first:
            values, affine[2, 0] = values[::-1], 3.0
        figure = mpr(volume_of(values, affine))
        figure.savefig(tmp_path / "planes.png", facecolor="black", dpi=80)
        picture = plt.imread(tmp_path / "planes.png")[..., :3].mean(axis=2)
        height = len(picture)
        for axis in drawn(figure)[1:]:
            box = axis.get_position()
            middle = int((box.x0 + box.x1) / 2 * picture.shape[1])
            # The columns beside the middle: letters stand at the edges and in the middle below.
            column = picture[:, middle - 30 : middle - 10].mean(axis=1)
            top, bottom = (round((1 - side) * height) for side in (box.y1, box.y0))
            inside = column[top:bottom]
            half = len(inside) // 2
            assert inside[5 : half - 20].mean() > 0.9
            assert inside[half + 20 : -20].mean() < 0.1
            assert axis.texts[1].get_text() == "I"

    def test_colour(self) -> None:
        values = np.random.default_rng(0).integers(0, 256, (3, 6, 5, 3)).astype(np.float32)
        axes = drawn(mpr(volume_of(values, units="stored")))
        np.testing.assert_allclose(shown(axes[2]), values[:, :, 2] / 255, atol=1e-6)

    def test_slices_at_uneven_places_are_refused(self) -> None:
        volume = volume_of(ramp()).assign_attrs(spacing=(np.nan, 2.0, 1.0))
        with pytest.raises(ConfigError, match="montage"):
            mpr(volume)
