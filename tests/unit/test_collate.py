"""Batches of items that differ in shape."""

from __future__ import annotations

import pickle
from functools import partial
from typing import Any

import pytest
import torch
from torch.utils.data import default_collate

from ahi_ml.datasets import list_collate, pad_collate
from ahi_ml.datasets.collate import collate
from ahi_ml.errors import DataError


def item(key: str, *shape: int, **more: Any) -> dict[str, Any]:
    count = int(torch.tensor(shape).prod())
    image = torch.arange(1, count + 1, dtype=torch.float32).reshape(shape)
    return {"image": image, "key": key, "meta": {"frame_number": count, "sop_instance_uid": f"1.{count}"}, **more}


SAME = [item("a", 1, 4, 5), item("b", 1, 4, 5)]
MIXED = [item("a", 1, 4, 5), item("b", 1, 2, 7), item("c", 1, 4, 5)]


def equal(one: Any, other: Any) -> bool:
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    return all(map(equal, one, other)) if isinstance(one, list) else one == other


class TestCollate:
    def test_equal_shapes_as_torch_does(self) -> None:
        assert equal(collate(SAME), default_collate(SAME))

    def test_what_differs_is_named_with_what_helps(self) -> None:
        items = [item(f"key-{number}", 1, 4, 4 + number % 3) for number in range(6)]
        with pytest.raises(DataError) as caught:
            collate(items)
        said = str(caught.value)
        assert "images of 3 shapes" in said
        assert "key-0: (1, 4, 4), key-1: (1, 4, 5)" in said
        assert "pad_collate or list_collate" in said

    def test_targets_that_differ(self) -> None:
        items = [item("a", 1, 2, 2, target=torch.zeros(3)), item("b", 1, 2, 2, target=torch.zeros(4))]
        with pytest.raises(DataError, match=r"targets of 2 shapes \(a: \(3,\), b: \(4,\)\)"):
            collate(items)

    @pytest.mark.parametrize("items", [[torch.ones(2), torch.ones(2)], [(1, "a"), (2, "b")], [3, 4]])
    def test_items_that_a_transform_made_into_something_else(self, items: list[Any]) -> None:
        assert equal(collate(items), default_collate(items))


class TestPadded:
    def test_each_image_lies_at_the_start(self) -> None:
        batch = pad_collate(MIXED)
        assert batch["image"].shape == (3, 1, 4, 7)
        assert batch["shape"].tolist() == [[1, 4, 5], [1, 2, 7], [1, 4, 5]]
        for image, own, single in zip(batch["image"], batch["shape"].tolist(), MIXED, strict=True):
            _, rows, columns = own
            assert torch.equal(image[:, :rows, :columns], single["image"])
            assert image.sum() == single["image"].sum()  # the rest is 0
        assert batch["key"] == ["a", "b", "c"]
        assert batch["meta"] == {
            "frame_number": batch["meta"]["frame_number"],
            "sop_instance_uid": ["1.20", "1.14", "1.20"],
        }
        assert batch["meta"]["frame_number"].tolist() == [20, 14, 20]

    def test_the_value_is_chosen(self) -> None:
        collated = pickle.loads(pickle.dumps(partial(pad_collate, value=-1024)))(MIXED)
        assert (collated["image"][1, 0, 2:] == -1024).all()
        assert (collated["image"][0, 0, :, 5:] == -1024).all()

    def test_equal_shapes_stay_as_they_are(self) -> None:
        batch = pad_collate(SAME)
        assert batch.pop("shape").tolist() == [[1, 4, 5], [1, 4, 5]]
        assert equal(batch, default_collate(SAME))

    def test_masks_are_padded_like_their_images(self) -> None:
        items = [{**each, "target": torch.ones(each["image"].shape[1:], dtype=torch.uint8)} for each in MIXED]
        batch = pad_collate(items)
        assert batch["target"].shape == (3, 4, 7)
        assert batch["target"].dtype == torch.uint8
        assert batch["target"].flatten(1).sum(1).tolist() == [20, 14, 20]

    def test_volumes(self) -> None:
        batch = pad_collate([item("a", 1, 3, 2, 5), item("b", 1, 2, 4, 4)])
        assert batch["image"].shape == (2, 1, 3, 4, 5)

    def test_items_stay_as_they_were(self) -> None:
        items = [item("a", 1, 2, 2), item("b", 1, 3, 3)]
        pad_collate(items)
        assert [each["image"].shape for each in items] == [(1, 2, 2), (1, 3, 3)]

    @pytest.mark.parametrize(("other", "said"), [((3, 4, 5), "channels"), ((4, 5), "dimensions")])
    def test_what_no_padding_makes_alike(self, other: tuple[int, ...], said: str) -> None:
        with pytest.raises(DataError, match=said) as caught:
            pad_collate([item("a", 1, 4, 5), item("b", *other)])
        assert f"b: {other}" in str(caught.value)


class TestListed:
    def test_tensors_are_lists_whatever_their_shapes(self) -> None:
        for items in (MIXED, SAME):
            batch = list_collate(items)
            assert list(batch) == ["image", "key", "meta"]
            assert isinstance(batch["image"], list)
            for image, single in zip(batch["image"], items, strict=True):
                assert image is single["image"]
            rest = default_collate([{"key": each["key"], "meta": each["meta"]} for each in items])
            assert equal({"key": batch["key"], "meta": batch["meta"]}, rest)

    def test_numbers_are_collated(self) -> None:
        items = [item("a", 1, 2, 2, target=3), item("b", 1, 3, 3, target=4)]
        assert list_collate(items)["target"].tolist() == [3, 4]
