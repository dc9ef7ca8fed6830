"""`DatasetIndex`: looking, selecting, the expression language, splits, files and pickles."""

from __future__ import annotations

import contextlib
import hashlib
import multiprocessing
import os
import pickle
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import psutil
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ahi_ml.errors import ConfigError, MetadataError, SplitLeakError
from ahi_ml.index import DatasetIndex, Gatherer
from ahi_ml.index.split import assign_groups, connected_groups
from ahi_ml.metadata import (
    INSTANCE_COLUMNS,
    PROFILE_COLUMNS,
    SERIES_COLUMNS,
    FrameRecord,
    InstanceRecord,
    SeriesRecord,
)

RATIOS = {"train": 0.7, "val": 0.2, "test": 0.1}
LEADING = ["image_set_id", "version_id", "series_instance_uid", "sop_instance_uid", "frame_number", "frame_id"]


def digest(*parts: object) -> str:
    return hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=16).hexdigest()


def one_profile(**values: Any) -> tuple[Any, ...]:
    given = {"Rows": 64, "Columns": 64, "BitsAllocated": 16, "PixelRepresentation": 0, **values}
    return (*(given.get(name) for name in PROFILE_COLUMNS), None)


def series_record(
    uid: str, *, study: str = "1.1", instances: int = 2, frames: int = 1, attributes: Any = None, **profile: Any
) -> SeriesRecord:
    """A series whose ids follow from its UID."""
    made = []
    for number in range(1, instances + 1):
        sop = f"{uid}.{number}"
        instance = {**dict.fromkeys(INSTANCE_COLUMNS), "InstanceNumber": number}
        made.append(
            InstanceRecord(
                sop,
                instance,
                [
                    FrameRecord(
                        frame_id=digest(sop, frame),
                        number=frame,
                        checksum=frame,
                        size=100,
                        minimum=-frame,
                        maximum=1000 + number,
                        position=(0.0, 0.0, 2.5 * number) if number % 5 else None,
                        profile=one_profile(**profile),
                    )
                    for frame in range(1, frames + 1)
                ],
            )
        )
    values = {**dict.fromkeys(SERIES_COLUMNS), "Modality": "CT", **(attributes or {})}
    return SeriesRecord(digest("set", uid), "d" * 32, study, uid, (None, None), values, made, 0)


def build(records: list[tuple[SeriesRecord, str | None]], **options: Any) -> DatasetIndex:
    """An index of records with their patient keys."""
    gatherer = Gatherer()
    for record, patient in records:
        gatherer.add(record, version_id=options.get("version", "1"), is_primary=True, patient_key=patient)
    return DatasetIndex(gatherer.tables(), patient_secret=options.get("secret"))


def many(patients: int, *, seed: int = 0, prefix: str = "p") -> list[tuple[SeriesRecord, str | None]]:
    """Series of patients by chance: one to three studies each, of one to three series, all sorts of attributes."""
    random = np.random.default_rng(seed)
    made: list[tuple[SeriesRecord, str | None]] = []
    for patient in range(patients):
        for study in range(random.integers(1, 4)):
            for series in range(random.integers(1, 4)):
                uid = f"1.{seed}.{patient}.{study}.{series}"
                record = series_record(
                    f"2.{prefix}{uid}",
                    study=f"1.{prefix}.{seed}.{patient}.{study}",
                    instances=int(random.integers(1, 7)),
                    frames=int(random.integers(1, 3)),
                    attributes={
                        "Modality": str(random.choice(["CT", "MR", "PT"])),
                        "BodyPartExamined": random.choice(["HEAD", "CHEST", None]),
                        "PatientWeight": float(random.integers(40, 120)) if random.random() < 0.8 else None,
                        "SeriesNumber": int(random.integers(0, 5)),
                    },
                    Rows=int(random.choice([64, 128, 512])),
                    PixelSpacing=(0.5, float(random.choice([0.5, 0.75]))) if random.random() < 0.8 else None,
                    ImageType=("ORIGINAL", "PRIMARY") if random.random() < 0.5 else ("DERIVED",),
                    RescaleSlope=float(random.choice([1.0, 2.5])),
                )
                made.append((record, f"{prefix}{seed}-{patient}"))
    return made


@pytest.fixture(scope="module")
def index() -> DatasetIndex:
    return build(many(30))


@pytest.fixture(scope="module")
def frames(index: DatasetIndex) -> pd.DataFrame:
    return index.frames


class TestLooking:
    def test_one_row_a_frame_with_the_names_others_rely_on(self, index: DatasetIndex, frames: pd.DataFrame) -> None:
        assert (
            len(frames)
            == len(index)
            == sum(len(instance.frames) for record, _ in many(30) for instance in record.instances)
        )
        assert list(frames.columns[:6]) == LEADING
        assert list(frames.columns) == index.columns
        assert {"Rows", "Modality", "PixelSpacing", "InstanceNumber", "patient_key", "study_instance_uid"} <= {*frames}
        assert not {"instance", "profile", "plane", "series", "lookup_tables"} & {*frames}

    def test_rows_are_the_records_in_their_order(self, frames: pd.DataFrame) -> None:
        expected = [
            (record.image_set_id, record.series_instance_uid, instance.sop_instance_uid, frame.number, frame.frame_id)
            for record, _ in many(30)
            for instance in record.instances
            for frame in instance.frames
        ]
        names = ["image_set_id", "series_instance_uid", "sop_instance_uid", "frame_number", "frame_id"]
        assert list(frames[names].itertuples(index=False, name=None)) == expected
        assert frames["frame_number"].min() == 1
        assert frames["frame_id"].str.fullmatch("[0-9a-f]{32}").all()

    def test_positions(self, index: DatasetIndex, frames: pd.DataFrame) -> None:
        expected = [
            list(frame.position) if frame.position else None
            for record, _ in many(30)
            for instance in record.instances
            for frame in instance.frames
        ]
        assert [
            None if place is None else list(place) for place in index.column("ImagePositionPatient").to_pylist()
        ] == expected
        wanted = np.array([place or [np.nan] * 3 for place in expected])
        np.testing.assert_array_equal(index.positions(), wanted)

    def test_the_series_view_counts(self, index: DatasetIndex, frames: pd.DataFrame) -> None:
        series = index.series
        assert series.index.name == "series_instance_uid"
        grouped = frames.groupby("series_instance_uid")
        assert (series["frames"] == grouped.size().reindex(series.index)).all()
        assert (series["instances"] == grouped["sop_instance_uid"].nunique().reindex(series.index)).all()
        assert (series["Rows"] == grouped["Rows"].first().reindex(series.index)).all()
        part = index.where("Modality == 'CT'").series
        assert list(part.index) == [uid for uid in series.index if series["Modality"][uid] == "CT"]

    def test_series_rows(self, index: DatasetIndex, frames: pd.DataFrame) -> None:
        some = index[::3]
        column = frames["series_instance_uid"].to_numpy()[::3]
        seen = []
        for uid, rows in some.series_rows():
            assert (column[rows] == uid).all()
            assert (np.diff(rows) > 0).all()
            seen += rows.tolist()
        assert sorted(seen) == list(range(len(some)))

    def test_image_sets_of_one_series_stand_together(self) -> None:
        first, second = series_record("2.1"), series_record("2.2")
        object.__setattr__(second, "series_instance_uid", "2.1")
        found = dict(build([(first, "k"), (second, "k")]).series_rows())
        assert {uid: rows.tolist() for uid, rows in found.items()} == {"2.1": [0, 1, 2, 3]}

    def test_details_and_sources(self, index: DatasetIndex, frames: pd.DataFrame) -> None:
        rows = [5, 0, 5, len(index) - 1]
        names = [name for name in LEADING if name != "frame_id"]
        assert index.details(rows) == frames.iloc[rows][names].to_dict("records")
        sources = index.sources(rows)
        assert [source.frame_id for source in sources] == list(frames["frame_id"].iloc[rows])
        assert [source.image_set_id for source in sources] == list(frames["image_set_id"].iloc[rows])
        assert [source.profile.pixels.rows for source in sources] == list(frames["Rows"].iloc[rows])
        assert sources[0].profile is sources[2].profile

    def test_frames_that_cannot_be_decoded_can_be_listed_and_not_read(self) -> None:
        made = build([(series_record("2.1", Rows=None), "k")])
        assert made.frames["Rows"].isna().all()
        (source,) = made.sources([0])
        assert "Rows" in str(source.problem)
        with pytest.raises(MetadataError, match="Rows"):
            _ = source.profile

    @pytest.mark.parametrize(
        "tables", ["[]", '{"VOILUTSequence": {"LUTDescriptor": ["x"], "LUTData": "A"}}', '{"Palette": 5}']
    )
    def test_a_broken_look_up_table_is_a_metadata_error(self, tables: str) -> None:
        record = series_record("2.1", instances=1)
        frame = record.instances[0].frames[0]
        object.__setattr__(frame, "profile", (*one_profile(PhotometricInterpretation="PALETTE COLOR")[:-1], tables))
        assert isinstance(build([(record, "k")]).sources()[0].problem, MetadataError)

    def test_the_repr_counts(self, index: DatasetIndex) -> None:
        assert f"{len(index):,} frames, {len(index.series)} series, 30 patients, CT/MR/PT" in repr(index)

    def test_empty(self) -> None:
        empty = build([])
        assert len(empty) == len(empty.frames) == len(empty.series) == 0
        assert list(empty.frames.columns[:6]) == LEADING
        assert list(empty.series_rows()) == empty.sources() == empty.details() == []
        assert len(empty.where("Rows == 5 and ImagePositionPatient is None")) == len(empty.sample(5)) == 0
        assert {name: len(part) for name, part in empty.split({"a": 0.5, "b": 0.5}).items()} == {"a": 0, "b": 0}
        assert "0 frames" in repr(empty)

    def test_a_bad_frame_id_never_enters(self) -> None:
        record = series_record("2.1")
        object.__setattr__(record.instances[0].frames[0], "frame_id", "g" * 32)
        with pytest.raises(MetadataError, match="32 hexadecimal"):
            build([(record, "k")])


class TestSelecting:
    @pytest.mark.parametrize(
        "key", [slice(None), slice(3, 9), slice(None, None, -1), slice(-4, None), slice(5, 2), [0], [4, 4, -1], []]
    )
    def test_slices_and_rows(self, index: DatasetIndex, frames: pd.DataFrame, key: Any) -> None:
        wanted = frames["frame_id"].to_numpy()[np.array(key, int) if isinstance(key, list) else key]
        assert list(index[key].frames["frame_id"]) == list(wanted)

    def test_a_selection_of_a_selection(self, index: DatasetIndex, frames: pd.DataFrame) -> None:
        assert list(index[10:50][::-1][[0, -1, 3]].frames["frame_id"]) == list(frames["frame_id"].iloc[[49, 10, 46]])

    def test_masks(self, index: DatasetIndex, frames: pd.DataFrame) -> None:
        mask = frames["Rows"] == 64
        for key in (mask, mask.to_numpy(bool), list(mask)):
            assert list(index[key].frames["frame_id"]) == list(frames["frame_id"][mask])

    def test_null_in_a_pandas_mask_is_false(self, index: DatasetIndex, frames: pd.DataFrame) -> None:
        mask = frames["PatientWeight"] > 80
        assert mask.isna().any()
        assert list(index[mask].frames["frame_id"]) == list(frames["frame_id"][mask.fillna(False)])

    @pytest.mark.parametrize("key", [[10**6], [-(10**6)], [0, 10**9]])
    def test_rows_out_of_range(self, index: DatasetIndex, key: list[int]) -> None:
        with pytest.raises(IndexError):
            index[key]

    @pytest.mark.parametrize("key", [[True], [[0]], 3, ["a"], [0.5], None])
    def test_keys_that_select_nothing_sensible(self, index: DatasetIndex, key: Any) -> None:
        with pytest.raises(ConfigError):
            index[key]

    def test_head(self, index: DatasetIndex, frames: pd.DataFrame) -> None:
        assert list(index.head(3).frames["frame_id"]) == list(frames["frame_id"][:3])

    def test_a_sample_is_settled_by_its_seed(self, index: DatasetIndex) -> None:
        chosen = [list(index.sample(20, seed=seed).frames["frame_id"]) for seed in (0, 0, 1)]
        assert chosen[0] == chosen[1] != chosen[2]
        assert len(set(chosen[0])) == 20
        order = {frame: row for row, frame in enumerate(index.frames["frame_id"])}
        assert [order[frame] for frame in chosen[0]] == sorted(order[frame] for frame in chosen[0])
        assert len(index.sample(10**9)) == len(index)
        assert len(index.sample(0)) == 0
        with pytest.raises(ConfigError):
            index.sample(-1)


class TestWhere:
    @pytest.mark.parametrize(
        ("condition", "mask"),
        [
            ("Rows == 64", lambda f: f["Rows"] == 64),
            ("Rows != 64", lambda f: f["Rows"] != 64),
            ("Rows < 128", lambda f: f["Rows"] < 128),
            ("Rows <= 128", lambda f: f["Rows"] <= 128),
            ("Rows > 128", lambda f: f["Rows"] > 128),
            ("128 <= Rows", lambda f: f["Rows"] >= 128),
            ("64 < Rows <= 512", lambda f: f["Rows"].between(65, 512)),
            (
                "1 < frame_number < InstanceNumber < 5",
                lambda f: (
                    (f["frame_number"] > 1) & (f["frame_number"] < f["InstanceNumber"]) & (f["InstanceNumber"] < 5)
                ),
            ),
            ("Modality == 'CT' and Rows == 64", lambda f: (f["Modality"] == "CT") & (f["Rows"] == 64)),
            (
                "Modality == 'CT' or Rows == 64 or frame_number == 2",
                lambda f: (f["Modality"] == "CT") | (f["Rows"] == 64) | (f["frame_number"] == 2),
            ),
            ("not Modality == 'CT'", lambda f: f["Modality"] != "CT"),
            ("not (Modality == 'CT' or Modality == 'MR')", lambda f: f["Modality"] == "PT"),
            ("Modality in ('CT', 'MR')", lambda f: f["Modality"].isin(["CT", "MR"])),
            ("Modality not in ['CT', 'MR']", lambda f: f["Modality"] == "PT"),
            ("Modality in {'XX'}", lambda f: f["Rows"] < 0),
            ("Modality in ()", lambda f: f["Rows"] < 0),
            ("frame_number in (-1, 2, 2.5)", lambda f: f["frame_number"] == 2),
            ("frame_number > -1", lambda f: f["Rows"] > 0),
            ("Rows in (64, 128.5)", lambda f: f["Rows"] == 64),
            ("BodyPartExamined is None", lambda f: f["BodyPartExamined"].isna()),
            ("BodyPartExamined is not None", lambda f: f["BodyPartExamined"].notna()),
            ("BodyPartExamined != 'HEAD'", lambda f: f["BodyPartExamined"] == "CHEST"),
            ("BodyPartExamined not in ('HEAD',)", lambda f: f["BodyPartExamined"] == "CHEST"),
            (
                "PixelSpacing[1] > 0.6",
                lambda f: f["PixelSpacing"].map(lambda v: v is not pd.NA and v is not None and v[1] > 0.6),
            ),
            ("ImageType[1] == 'PRIMARY'", lambda f: f["ImageType"].map(lambda v: list(v)[1:] == ["PRIMARY"])),
            ("ImageType[1] is None", lambda f: f["ImageType"].map(len) < 2),
            ("ImageType[7] == 'X'", lambda f: f["Rows"] < 0),
            ("ImageType[123456789012] == 'X'", lambda f: f["Rows"] < 0),
            ("ImagePositionPatient[2] >= 5", lambda f: f["InstanceNumber"].isin([2, 3, 4, 6])),
            ("Rows / 3 > 42.5", lambda f: f["Rows"] / 3 > 42.5),
            ("Rows * 2 - 28 == 100", lambda f: f["Rows"] == 64),
            ("Rows + minimum == 63", lambda f: f["Rows"] + f["minimum"] == 63),
            ("Rows == 2 * 32", lambda f: f["Rows"] == 64),
            ("minimum < -1", lambda f: f["minimum"] < -1),
            ("is_primary", lambda f: f["Rows"] > 0),
            ("not is_primary", lambda f: f["Rows"] < 0),
            ("  Rows == 64\n", lambda f: f["Rows"] == 64),
        ],
    )
    def test_expressions(
        self, index: DatasetIndex, frames: pd.DataFrame, condition: str, mask: Callable[[pd.DataFrame], Any]
    ) -> None:
        wanted = np.asarray(mask(frames).fillna(False), bool)
        assert list(index.where(condition).frames["frame_id"]) == list(frames["frame_id"][wanted])

    @pytest.mark.parametrize(
        "condition",
        [
            "",
            "Rows",
            "Rows ==",
            "Rows = 64",
            "5",
            "True",
            "None",
            "'CT'",
            "1 == 1",
            "5 in (1, 5)",
            "5 is None",
            "not 5",
            "1 and Rows == 64",
            "Rows and is_primary",
            "Rows == 'a'",
            "Rows in ('a',)",
            "Modality in ('CT', 5)",
            "Modality == 5",
            "Modality == None",
            "Modality[0] == 'C'",
            "PixelSpacing == 5",
            "PixelSpacing[-1] == 5",
            "PixelSpacing[0:1] == 5",
            "PixelSpacing['a'] == 5",
            "Modality in 'CT'",
            "Modality in Modality",
            "Rows is 64",
            "Rows == 99999999999999999999999999",
            "Rows + 9223372036854775807 > 0",
            "Modality == '\\ud800'",
            "Rows ** 2 == 4",
            "Rows % 2 == 0",
            "Rows // 2 == 32",
            "Rows & 1 == 0",
            "-Rows < 0",
            "not " * 3000 + "is_primary",
            "Rows" + " + 1" * 3000 + " > 0",
            "(" * 500 + "Rows" + ")" * 500,
            "Rows == 64\0",
            "Rows == 64; Rows == 64",
            "Rows == 64\nimport os",
            # attempts to reach further than columns
            "__import__('os').system('true')",
            "exec('1')",
            "Rows.__class__",
            "Rows.__class__ == 5",
            "Modality.format(Rows) == 'x'",
            "().__class__.__bases__[0].__subclasses__()",
            "[x for x in (1, 2)]",
            "{x: x for x in (1,)}",
            "(lambda: is_primary)()",
            "(x := 5) == Rows",
            "f'{Rows}' == 'x'",
            "Rows if is_primary else Rows",
            "__builtins__",
            "__builtins__['open']",
            "await Rows",
            "*Rows",
            "b'CT' == Modality",
            "1j == Rows",
            "... == Rows",
        ],
    )
    def test_what_is_no_condition_is_refused(self, index: DatasetIndex, condition: str) -> None:
        with pytest.raises(ConfigError):
            index.where(condition)

    def test_an_unknown_column_names_close_ones(self, index: DatasetIndex) -> None:
        for ask in (
            lambda: index.where("Modalty == 'CT'"),
            lambda: index.where(Modalty="CT"),
            lambda: index.column("Modalty"),
        ):
            with pytest.raises(ConfigError, match="did you mean Modality"):
                ask()
        with pytest.raises(ConfigError, match=r"the columns are .*Rows"):
            index.where(zzzzzz=1)

    @pytest.mark.parametrize("name", ["instance", "profile", "plane", "series", "lookup_tables"])
    def test_references_are_no_columns(self, index: DatasetIndex, name: str) -> None:
        with pytest.raises(ConfigError, match="no column"):
            index.where(f"{name} == 0")

    def test_keywords(self, index: DatasetIndex, frames: pd.DataFrame) -> None:
        def ids(part: DatasetIndex) -> list[str]:
            return list(part.frames["frame_id"])

        assert ids(index.where(Modality="CT")) == ids(index.where("Modality == 'CT'"))
        assert ids(index.where(Modality=["CT", "MR"], Rows=64)) == ids(
            index.where("Modality in ('CT', 'MR') and Rows == 64")
        )
        assert ids(index.where("Rows == 64", Modality={"CT"})) == ids(index.where("Rows == 64 and Modality == 'CT'"))
        assert ids(index.where(BodyPartExamined=None)) == ids(index.where("BodyPartExamined is None"))
        assert ids(index.where(Rows=np.int64(64))) == ids(index.where("Rows == 64"))
        assert ids(index.where(frame_id=frames["frame_id"][3])) == [frames["frame_id"][3]]
        assert ids(index.where()) == ids(index)
        assert len(index.where(frame_number=-1)) == len(index.where(Rows=64.5)) == len(index.where(Modality=[])) == 0

    @pytest.mark.parametrize(
        "equals",
        [
            {"Rows": "64"},
            {"Modality": 5},
            {"Rows": 2**70},
            {"PixelSpacing": [0.5, 0.5]},
            {"ImageType": "X"},
            {"Rows": object()},
            {"Modality": "\ud800"},
        ],
    )
    def test_keywords_of_another_type(self, index: DatasetIndex, equals: dict[str, Any]) -> None:
        with pytest.raises(ConfigError, match="cannot compare"):
            index.where(**equals)

    @settings(max_examples=100, deadline=None)
    @given(st.data())
    def test_the_same_as_pandas(self, index: DatasetIndex, frames: pd.DataFrame, data: st.DataObject) -> None:
        """Conditions by chance, evaluated by pandas with null as false."""
        text, mask = data.draw(conditions(frames))
        assert list(index.where(text).frames["frame_id"]) == list(frames["frame_id"][mask])

    @pytest.mark.filterwarnings("ignore::SyntaxWarning")
    @settings(max_examples=100, deadline=None)
    @given(st.text(max_size=40) | st.text("RowsMdalityCT()[]'\"=<>!+-*/ .,_and orint0123456789", max_size=60))
    def test_any_text_is_a_condition_or_refused(self, index: DatasetIndex, text: str) -> None:
        with contextlib.suppress(ConfigError):
            index.where(text)


NUMBERS = ("Rows", "PatientWeight", "SeriesNumber", "frame_number", "minimum", "RescaleSlope")
TEXTS = ("Modality", "BodyPartExamined")
SIGNS: dict[str, Callable[[Any, Any], Any]] = {
    "==": lambda a, b: a == b,
    "!=": lambda a, b: a != b,
    "<": lambda a, b: a < b,
    "<=": lambda a, b: a <= b,
    ">": lambda a, b: a > b,
    ">=": lambda a, b: a >= b,
}


def conditions(frames: pd.DataFrame) -> st.SearchStrategy[tuple[str, Any]]:
    """Texts of conditions with the masks pandas gives."""

    def plain(mask: Any) -> Any:
        return np.asarray(pd.Series(mask).fillna(False), bool)

    numbers = st.sampled_from([-2, 0, 1, 2, 3, 64, 65.5, 80.0, 128, 512])
    words = st.sampled_from(["CT", "MR", "HEAD", "CHEST", "none of them"])
    comparison = st.one_of(
        st.builds(
            lambda name, sign, value: (f"{name} {sign} {value!r}", plain(SIGNS[sign](frames[name], value))),
            st.sampled_from(NUMBERS),
            st.sampled_from(sorted(SIGNS)),
            numbers,
        ),
        st.builds(
            lambda name, sign, value: (f"{value!r} {sign} {name}", plain(SIGNS[sign](value, frames[name]))),
            st.sampled_from(TEXTS),
            st.sampled_from(["==", "!="]),
            words,
        ),
        st.builds(
            lambda name, other, sign: (f"{name} {sign} {other}", plain(SIGNS[sign](frames[name], frames[other]))),
            st.sampled_from(NUMBERS),
            st.sampled_from(NUMBERS),
            st.sampled_from(sorted(SIGNS)),
        ),
        st.builds(
            lambda name, values: (f"{name} in {values!r}", plain(frames[name].isin(values))),
            st.sampled_from(TEXTS),
            st.lists(words, max_size=3),
        ),
        st.builds(lambda name: (f"{name} is None", plain(frames[name].isna())), st.sampled_from(NUMBERS + TEXTS)),
    )
    return st.recursive(
        comparison,
        lambda inner: st.one_of(
            st.builds(lambda a, b: (f"({a[0]}) and ({b[0]})", a[1] & b[1]), inner, inner),
            st.builds(lambda a, b: (f"({a[0]}) or ({b[0]})", a[1] | b[1]), inner, inner),
            st.builds(lambda a: (f"not ({a[0]})", ~a[1]), inner),
        ),
        max_leaves=5,
    )


def patients_of(part: DatasetIndex) -> set[str]:
    return set(part.frames["patient_key"])


@pytest.fixture(scope="module")
def large() -> DatasetIndex:
    return build(many(200, seed=1))


class TestSplit:
    @pytest.mark.parametrize("by", ["patient", "study", "series"])
    def test_the_parts_are_disjoint_and_complete(self, large: DatasetIndex, by: Any) -> None:
        column = {"patient": "patient_key", "study": "study_instance_uid", "series": "series_instance_uid"}[by]
        parts = large.split(RATIOS, by=by)
        assert list(parts) == list(RATIOS)
        values = [set(part.frames[column]) for part in parts.values()]
        assert not values[0] & values[1] | values[0] & values[2] | values[1] & values[2]
        rows = sorted(frame for part in parts.values() for frame in part.frames["frame_id"])
        assert rows == sorted(large.frames["frame_id"])
        groups = large.frames[column].nunique()
        for name, members in zip(parts, values, strict=True):
            assert abs(len(members) - groups * RATIOS[name]) < 4 * np.sqrt(groups * 0.25)

    def test_each_part_keeps_the_order(self, large: DatasetIndex) -> None:
        order = {frame: row for row, frame in enumerate(large.frames["frame_id"])}
        for part in large.split(RATIOS).values():
            rows = [order[frame] for frame in part.frames["frame_id"]]
            assert rows == sorted(rows)

    def test_new_patients_move_nobody(self, large: DatasetIndex) -> None:
        alone = large.split(RATIOS, seed=3)
        grown = build([*many(50, seed=9, prefix="q"), *many(200, seed=1)]).split(RATIOS, seed=3)
        for name, part in alone.items():
            assert patients_of(part) <= patients_of(grown[name])

    def test_removing_series_moves_nobody(self, large: DatasetIndex) -> None:
        whole = large.split(RATIOS)
        for name, part in large.where("Modality == 'CT'").split(RATIOS).items():
            assert patients_of(part) <= patients_of(whole[name])

    def test_the_seed_decides(self, large: DatasetIndex) -> None:
        first, again, other = (large.split(RATIOS, seed=seed)["train"] for seed in (0, 0, 1))
        assert first.snapshot_id == again.snapshot_id != other.snapshot_id

    def test_what_ratios_leave_over_goes_nowhere(self, large: DatasetIndex) -> None:
        part = large.split({"half": 0.5})["half"]
        assert 0 < len(part) < len(large)
        tenths = large.split({str(number): 0.1 for number in range(10)})
        assert sum(map(len, tenths.values())) == len(large)

    def test_patients_that_share_a_study_stay_together(self) -> None:
        for seed in range(20):
            joined = build(
                [
                    (series_record("2.1", study="1.1"), "a"),
                    (series_record("2.2", study="1.1"), "b"),
                    (series_record("2.3", study="1.2"), "b"),
                    (series_record("2.4", study="1.2"), "c"),
                ]
            )
            parts = joined.split({"one": 0.5, "two": 0.5}, seed=seed)
            assert sorted(len(part) for part in parts.values()) == [0, 8]

    def test_empty_parts_are_fine(self) -> None:
        parts = build([(series_record("2.1"), "a")]).split({"one": 0.5, "two": 0.5})
        assert sorted(map(len, parts.values())) == [0, 2]
        assert all(len(part.series) == len(part.frames.series_instance_uid.unique()) for part in parts.values())

    def test_missing_patient_ids_are_refused(self) -> None:
        made = build([(series_record("2.1"), "a"), (series_record("2.2", study="1.2"), None)])
        with pytest.raises(SplitLeakError, match="1 of 2 series have no patient id"):
            made.split({"one": 1.0})
        assert len(made.split({"one": 1.0}, by="study")["one"]) == len(made)

    @pytest.mark.parametrize(
        ("placeholders", "others", "refused"), [(3, 1, True), (2, 2, False), (3, 0, False), (5, 4, True)]
    )
    def test_a_key_on_most_studies_is_a_placeholder(self, placeholders: int, others: int, refused: bool) -> None:
        made = build(
            [(series_record(f"2.{i}", study=f"1.{i}"), "noid") for i in range(placeholders)]
            + [(series_record(f"3.{i}", study=f"4.{i}"), f"p{i}") for i in range(others)]
        )
        if refused:
            with pytest.raises(SplitLeakError, match=f"{placeholders} of {placeholders + others} studies"):
                made.split({"one": 1.0})
            made.split({"one": 1.0}, by="series")
        else:
            made.split({"one": 1.0})

    @pytest.mark.parametrize(
        "ratios", [{}, {"a": 0}, {"a": -0.1}, {"a": 1.1}, {"a": 0.6, "b": 0.6}, {"a": float("nan")}]
    )
    def test_ratios_that_cannot_be(self, large: DatasetIndex, ratios: dict[str, float]) -> None:
        with pytest.raises(ConfigError, match="ratios"):
            large.split(ratios)

    def test_another_by(self, large: DatasetIndex) -> None:
        with pytest.raises(ConfigError, match="patient, study or series"):
            large.split({"a": 1.0}, by="frame")  # type: ignore[arg-type]

    def test_the_receipt_is_logged(self, large: DatasetIndex, caplog: pytest.LogCaptureFixture) -> None:
        with caplog.at_level("INFO", "ahi_ml"):
            parts = large.split(RATIOS)
        for name, part in parts.items():
            groups = len(patients_of(part))
            assert f"split {name}: {groups} groups, {len(part)} frames" in caplog.text

    @given(st.lists(st.tuples(st.integers(0, 8), st.integers(0, 8)), min_size=1, max_size=30))
    def test_groups_are_connected_components(self, edges: list[tuple[int, int]]) -> None:
        groups = connected_groups([f"p{a}" for a, _ in edges], [f"s{b}" for _, b in edges])
        components: list[tuple[set[int], set[int]]] = []
        for a, b in edges:
            touching = [each for each in components if a in each[0] or b in each[1]]
            merged = ({a}.union(*(each[0] for each in touching)), {b}.union(*(each[1] for each in touching)))
            components = [each for each in components if each not in touching] + [merged]
        for (a, _), group in zip(edges, groups, strict=True):
            for (other, _), number in zip(edges, groups, strict=True):
                together = any({a, other} <= each[0] for each in components)
                assert (group == number) == together

    def test_a_group_goes_by_its_smallest_member(self) -> None:
        ratios = {"one": 0.5, "two": 0.5}
        for seed in range(10):
            alone = assign_groups([0, 1], ["a", "b"], ratios, seed=seed)
            both = assign_groups([0, 0], ["a", "b"], ratios, seed=seed)
            assert both[0] == both[1]
            assert both[0] in alone


class TestFiles:
    def test_a_round_trip(self, index: DatasetIndex, tmp_path: Path) -> None:
        path = build(many(30)).save(tmp_path / "deep" / "index.arrow")
        again = DatasetIndex.load(path)
        pd.testing.assert_frame_equal(again.frames, index.frames)
        pd.testing.assert_frame_equal(again.series, index.series)
        assert again.snapshot_id == index.snapshot_id
        assert again.sources() == index.sources()
        np.testing.assert_array_equal(again.positions(), index.positions())

    def test_a_selection_is_written_alone(self, index: DatasetIndex, tmp_path: Path) -> None:
        whole = index[:].save(tmp_path / "whole.arrow")
        for part in (index.where("Modality == 'CT'"), index[[7, 3, 3]], index[::-5], index[:0], index.head(1)):
            path = part.save(tmp_path / "part.arrow")
            again = DatasetIndex.load(path)
            pd.testing.assert_frame_equal(again.frames, part.frames)
            pd.testing.assert_frame_equal(again.series, part.series)
            assert again.snapshot_id == part.snapshot_id
            tables = again._tables
            assert len(tables.series) == len(part.series)
            assert len(tables.instances) == part.frames["sop_instance_uid"].nunique()
            assert path.stat().st_size < whole.stat().st_size

    def test_modes_and_the_key_beside(self, tmp_path: Path) -> None:
        made = build(many(2), secret=b"secret of the keys")
        old = os.umask(0)
        try:
            path = made.save(tmp_path / "index.arrow")
        finally:
            os.umask(old)
        key = tmp_path / "index.arrow.key"
        assert key.read_bytes() == b"secret of the keys"
        assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE(key.stat().st_mode) == 0o600
        assert sorted(each.name for each in tmp_path.iterdir()) == ["index.arrow", "index.arrow.key"]
        assert b"secret of the keys" not in path.read_bytes()

    def test_a_key_file_others_could_read_becomes_private(self, tmp_path: Path) -> None:
        key = tmp_path / "index.arrow.key"
        key.write_bytes(b"old")
        key.chmod(0o644)
        build(many(2), secret=b"new").save(tmp_path / "index.arrow")
        assert key.read_bytes() == b"new"
        assert stat.S_IMODE(key.stat().st_mode) == 0o600

    def test_the_key_may_be_gone(self, tmp_path: Path) -> None:
        made = build(many(2), secret=b"secret")
        path = made.save(tmp_path / "index.arrow")
        assert DatasetIndex.load(path).save(tmp_path / "copy.arrow").with_name("copy.arrow.key").exists()
        (tmp_path / "index.arrow.key").unlink()
        again = DatasetIndex.load(path)
        assert len(again) == len(made)
        again.save(tmp_path / "other.arrow")
        assert not (tmp_path / "other.arrow.key").exists()

    def test_overwriting_leaves_what_is_mapped(self, index: DatasetIndex, tmp_path: Path) -> None:
        path = index[:].save(tmp_path / "index.arrow")
        mapped = DatasetIndex.load(path)
        build(many(1, seed=8)).save(path)
        pd.testing.assert_frame_equal(mapped.frames, index.frames)
        with pytest.raises(ConfigError, match="overwritten"):
            pickle.loads(pickle.dumps(mapped))

    def test_a_failed_save_leaves_the_old_file(
        self, index: DatasetIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = index[:].save(tmp_path / "index.arrow")
        before = path.read_bytes()

        def full(*names: Any) -> None:
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", full)
            with pytest.raises(OSError, match="No space"):
                index[:5].save(path)
        assert path.read_bytes() == before
        assert [each.name for each in tmp_path.iterdir()] == ["index.arrow"]

    def test_no_file(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="no index at"):
            DatasetIndex.load(tmp_path / "absent.arrow")

    def foreign(self, kind: str, path: Path, index: DatasetIndex) -> None:
        whole = index[:].save(path).read_bytes()
        version = {b"ahi_ml.index": b"1"}
        match kind:
            case "empty":
                path.write_bytes(b"")
            case "text":
                path.write_text("not an index\n" * 100)
            case "cut":
                path.write_bytes(whole[: len(whole) // 2])
            case "tailless":
                path.write_bytes(whole[:-20] + b"\0" * 20)
            case "folder":
                path.unlink()
                path.mkdir()
            case "arrow" | "old" | "columns" | "lists" | "no batch":
                metadata = {"arrow": {}, "old": {b"ahi_ml.index": b"0"}}.get(kind, version)
                names = ["series", "instances", "profiles", "planes", "frames"] if kind == "lists" else ["a"]
                table = pa.table({name: [[{"x": 1}]] for name in names}).replace_schema_metadata(metadata)
                with pa.OSFile(os.fspath(path), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
                    if kind != "no batch":
                        writer.write_table(table)

    @pytest.mark.parametrize(
        "kind",
        ["empty", "text", "cut", "tailless", "folder", "arrow", "old", "columns", "lists", "no batch"],
    )
    def test_files_that_are_no_index(self, index: DatasetIndex, tmp_path: Path, kind: str) -> None:
        path = tmp_path / "index.arrow"
        self.foreign(kind, path, index)
        with pytest.raises(ConfigError, match=r"index\.arrow"):
            DatasetIndex.load(path)

    def test_any_damage_to_the_structure_is_noticed_or_harmless(self, tmp_path: Path) -> None:
        path = build(many(2)).save(tmp_path / "index.arrow")
        whole = bytearray(path.read_bytes())
        random = np.random.default_rng(0)
        for place in random.integers(0, len(whole), 150):
            damaged = bytearray(whole)
            damaged[place] ^= int(random.integers(1, 256))
            path.write_bytes(damaged)
            with contextlib.suppress(ConfigError):
                DatasetIndex.load(path)

    def test_loading_does_not_read_the_file(self, tmp_path: Path) -> None:
        record = series_record("2.1", instances=15_000, frames=4)
        path = build([(record, "k")]).save(tmp_path / "index.arrow")
        size = path.stat().st_size
        assert size > 2_000_000
        before = psutil.Process().io_counters().read_chars
        again = DatasetIndex.load(path)
        assert len(again) == 60_000
        assert psutil.Process().io_counters().read_chars - before < size / 20


def _look(index: DatasetIndex, queue: Any) -> None:
    queue.put((len(index), index.snapshot_id, list(index.head(2).frames["frame_id"])))


class TestPickling:
    def parts(self, index: DatasetIndex) -> list[DatasetIndex]:
        return [index, index[:7], index[::-1], index.where("Modality == 'CT'"), index[:0]]

    def test_round_trips_are_small(self, index: DatasetIndex, tmp_path: Path) -> None:
        large = build([(series_record("2.1", instances=10_000), "k")])
        saved = DatasetIndex.load(large.save(tmp_path / "large.arrow"))
        for part in [*self.parts(index), large, large[5:9_000], saved, saved[3:]]:
            data = pickle.dumps(part)
            assert len(data) < 10_000
            again = pickle.loads(data)
            assert again.snapshot_id == part.snapshot_id
            assert again.details() == part.details()

    def test_the_secret_stays_here(self) -> None:
        made = build(many(2), secret=b"secret of the keys")
        data = pickle.dumps(made)
        assert b"secret of the keys" not in data
        folder = Path(pickle.loads(data)._path).parent
        assert [each.name for each in folder.iterdir()] == ["index.arrow"]
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700

    def test_spilled_files_go_with_the_index(self) -> None:
        made = build(many(2))
        folders = []
        for part in (made, made[:1]):
            pickle.dumps(part)
            folders.append(Path(part._path).parent)  # type: ignore[arg-type]
        assert all(folder.exists() for folder in folders)
        del made, part
        assert not any(folder.exists() for folder in folders)

    def test_a_saved_index_travels_as_its_own_path(self, index: DatasetIndex, tmp_path: Path) -> None:
        path = index[:].save(tmp_path / "index.arrow")
        loaded = DatasetIndex.load(path)
        assert pickle.loads(pickle.dumps(loaded))._path == path

    @pytest.mark.parametrize("method", ["spawn", "fork"])
    def test_another_process(self, index: DatasetIndex, method: str) -> None:
        context = multiprocessing.get_context(method)
        queue = context.Queue()
        expected = [(len(part), part.snapshot_id, list(part.head(2).frames["frame_id"])) for part in (index, index[4:])]
        # The selection has no other owner: it must not take its file along before the child has read it.
        processes = [context.Process(target=_look, args=(index, queue))]
        processes.append(context.Process(target=_look, args=(index[4:], queue)))
        for process in processes:
            process.start()
        found = [queue.get(timeout=60) for _ in processes]
        for process in processes:
            process.join(60)
        assert sorted(found) == sorted(expected)


class TestSnapshot:
    def test_the_order_has_no_part_in_it(self, index: DatasetIndex) -> None:
        assert index[::-1].snapshot_id == index.snapshot_id
        records = many(5)
        assert build(records).snapshot_id == build(records[::-1]).snapshot_id

    def test_the_patient_key_has_no_part_in_it(self) -> None:
        records = many(5)
        assert build(records).snapshot_id == build([(record, "other") for record, _ in records]).snapshot_id

    def test_version_and_frames_have(self) -> None:
        records = many(5)
        made = build(records)
        others = [build(records, version="2"), build(records[:-1]), made[1:], made[[*range(len(made)), 0]], build([])]
        assert len({made.snapshot_id, *(other.snapshot_id for other in others)}) == 1 + len(others)

    def test_it_is_the_same_everywhere(self) -> None:
        assert build([(series_record("2.1"), "k")]).snapshot_id == "2f29a180995e9098e528a09b64ef3de6"
