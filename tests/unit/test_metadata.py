"""Metadata documents as records: every quirk of their values, and nothing but MetadataError for the rest."""

from __future__ import annotations

import copy
import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ahi_ml.codec import HTJ2K_LOSSLESS_RPCL
from ahi_ml.errors import MetadataError
from ahi_ml.index import DatasetIndex, Gatherer
from ahi_ml.metadata import (
    PROFILE_COLUMNS,
    FrameRecord,
    SeriesRecord,
    document_text,
    frame_ids,
    parse_document,
    table_data,
    value_of,
)

FRAME = "0123456789abcdef0123456789abcdef"


def frame(number: int = 0, **changes: Any) -> dict[str, Any]:
    return {
        "ID": f"{number:032x}",
        "PixelDataChecksumFromBaseToFullResolution": [{"Width": 4, "Height": 4, "Checksum": 7 + number}],
        "MinPixelValue": -5,
        "MaxPixelValue": 9,
        "FrameSizeInBytes": 32,
    } | changes


def document(
    instances: dict[str, Any] | None = None, *, series: dict[str, Any] | None = None, **dicom: Any
) -> dict[str, Any]:
    """A document of one classic CT instance, or of what is given."""
    attributes = {"InstanceNumber": "1", "Rows": 4, "Columns": 4, "BitsAllocated": 16, **dicom}
    one = {"9.1": {"DICOM": attributes, "DICOMVRs": {}, "ImageFrames": [frame()]}}
    return {
        "SchemaVersion": "1.1",
        "DatastoreID": "d" * 32,
        "ImageSetID": "a" * 32,
        "Patient": {"DICOM": {"PatientID": "P1 ", "IssuerOfPatientID": "HOSPITAL", "PatientSex": "F "}},
        "Study": {
            "DICOM": {"StudyInstanceUID": "1.1", "PatientWeight": "70.5 "},
            "Series": series or {"2.1": {"DICOM": {"Modality": "CT"}, "Instances": instances or one}},
        },
    }


def parse(value: Any) -> list[SeriesRecord]:
    return list(parse_document(json.dumps(value).encode()))


def only(value: Any) -> FrameRecord:
    (series,) = parse(value)
    return series.instances[0].frames[0]


def profile(record: FrameRecord) -> dict[str, Any]:
    return dict(zip(PROFILE_COLUMNS, record.profile, strict=False))


class TestValueOf:
    @pytest.mark.parametrize(
        ("raw", "kind", "value"),
        [
            ("-2.625000 ", "float", -2.625),
            ("1 ", "int", 1),
            (" 1", "int", 1),
            (512, "int", 512),
            ("12.0", "int", 12),
            (["1.5 ", "2"], "floats", (1.5, 2.0)),
            ("1.5\\2", "floats", (1.5, 2.0)),
            ("1.5", "floats", (1.5,)),
            (["1.5"], "floats", (1.5,)),
            (3, "floats", (3.0,)),
            (["7", "8"], "int", 7),
            (["40", "400"], "float", 40.0),
            (["1", "", None, "2"], "floats", (1.0, 2.0)),
            ("CT ", "text", "CT"),
            (["CT"], "text", "CT"),
            (["A ", "B"], "text", "A\\B"),
            (["ORIGINAL", "PRIMARY "], "texts", ("ORIGINAL", "PRIMARY")),
            ("ORIGINAL\\PRIMARY", "texts", ("ORIGINAL", "PRIMARY")),
            ("ORIGINAL", "texts", ("ORIGINAL",)),
            (["DERIVED", None, "AXIAL"], "texts", ("DERIVED", "", "AXIAL")),  # value 3 stays value 3
            (5, "text", "5"),
            ("caf\ud83d", "text", "caf?"),
        ],
    )
    def test_values_as_documents_spell_them(self, raw: Any, kind: str, value: Any) -> None:
        found = value_of(raw, kind)
        assert found == value
        assert type(found) is type(value)

    @pytest.mark.parametrize("kind", ["text", "texts", "int", "float", "floats"])
    @pytest.mark.parametrize("raw", [None, "", "  ", [], [None], ["", " "], {}, {"Value": 1}, [{"a": "b"}], [["x"]]])
    def test_empty_and_nested_values_are_absent(self, raw: Any, kind: str) -> None:
        assert value_of(raw, kind) is None

    @pytest.mark.parametrize("kind", ["int", "float", "floats"])
    @pytest.mark.parametrize(
        "raw", ["1A", "none", "1_000", "NaN", "Infinity", "-inf", float("nan"), float("inf"), ["1", "two"], 10**400]
    )
    def test_no_number_where_one_belongs_is_absent(self, raw: Any, kind: str) -> None:
        assert value_of(raw, kind) is None

    def test_an_integer_beyond_64_bits_is_absent(self) -> None:
        assert value_of("1e30", "int") is None
        assert value_of("1e30", "float") == 1e30

    @given(st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(), st.lists, max_leaves=8))
    def test_any_json_value_has_a_type_or_is_absent(self, raw: Any) -> None:
        for kind, types in (("text", str), ("texts", tuple), ("int", int), ("float", float), ("floats", tuple)):
            found = value_of(raw, kind)
            assert found is None or type(found) is types
            if kind in ("float", "floats") and found is not None:
                assert np.isfinite(found).all()

    def test_table_data(self) -> None:
        assert table_data(None) is None
        assert table_data("AAE=") == b"\0\1"
        assert table_data(["1 ", 2]) == [1, 2]
        assert table_data(3) == [3]


class TestRealDocument:
    @pytest.fixture
    def body(self, shared_data: Path) -> bytes:
        path = shared_data / "ahi-metadata" / "imageset-ct-588-instances.json"
        if not path.is_file():
            pytest.skip("the document is not there")
        return path.read_bytes()

    def test_all_is_read(self, body: bytes) -> None:
        (series,) = parse_document(body)
        assert len(series.instances) == 588
        assert series.without_frames == 0
        assert series.attributes["Modality"] == "CT"
        numbers = [instance.attributes["InstanceNumber"] for instance in series.instances]
        assert numbers == sorted(numbers)
        assert all(frame.number == 1 for instance in series.instances for frame in instance.frames)
        kinds = [profile(frame) for instance in series.instances for frame in instance.frames]
        for windows in ("WindowCenter", "WindowWidth"):  # the scanner chose them slice by slice
            assert len({kind.pop(windows) for kind in kinds}) > 1
        assert all(kind == kinds[0] for kind in kinds)

    def test_the_checksum_is_of_the_full_resolution(self, body: bytes) -> None:
        raw = json.loads(body)
        (content,) = raw["Study"]["Series"].values()
        wanted = {uid: each["ImageFrames"][0] for uid, each in content["Instances"].items()}
        (series,) = parse_document(body)
        for instance in series.instances:
            checksums = wanted[instance.sop_instance_uid]["PixelDataChecksumFromBaseToFullResolution"]
            assert checksums[-1]["Width"] == 512
            assert instance.frames[0].checksum == checksums[-1]["Checksum"]

    def test_positions_are_a_millimetre_apart(self, body: bytes) -> None:
        (series,) = parse_document(gzip.compress(body))
        z = np.sort([instance.frames[0].position[2] for instance in series.instances])  # type: ignore[index]
        np.testing.assert_allclose(np.diff(z), 1.0)

    def test_it_makes_an_index(self, body: bytes) -> None:
        gatherer = Gatherer()
        for series in parse_document(body):
            gatherer.add(series, version_id="1", is_primary=True, patient_key="k")
        index = DatasetIndex(gatherer.tables())
        assert len(index) == 588
        assert list(index.frames["PixelSpacing"].iloc[0]) == [0.685546875, 0.685546875]


class TestDocuments:
    def test_gzipped_or_plain(self) -> None:
        text = json.dumps(document()).encode()
        assert list(parse_document(text)) == list(parse_document(gzip.compress(text)))
        assert list(parse_document(bytearray(text))) == list(parse_document(memoryview(gzip.compress(text))))

    def test_levels_are_merged(self) -> None:
        (series,) = parse(document(FrameOfReferenceUID="3.3"))
        assert (series.image_set_id, series.datastore_id) == ("a" * 32, "d" * 32)
        assert (series.study_instance_uid, series.series_instance_uid) == ("1.1", "2.1")
        assert series.patient == ("P1", "HOSPITAL")
        assert series.attributes["PatientWeight"] == 70.5
        assert series.attributes["PatientSex"] == "F"

    def test_names_stay_outside(self) -> None:
        value = document()
        value["Patient"]["DICOM"] |= {"PatientName": "CANARY", "PatientBirthDate": "19010101"}
        value["Study"]["DICOM"] |= {"AccessionNumber": "CANARY", "StudyDescription": "CANARY"}
        assert "CANARY" not in repr(parse(value))
        (series,) = parse_document(json.dumps(value).encode(), extra={"AccessionNumber": "text"})
        assert series.attributes["AccessionNumber"] == "CANARY"

    def test_a_missing_syntax_is_the_data_stores_own(self) -> None:
        value = document()
        assert profile(only(value))["StoredTransferSyntaxUID"] == HTJ2K_LOSSLESS_RPCL
        instance = value["Study"]["Series"]["2.1"]["Instances"]["9.1"]
        instance["StoredTransferSyntaxUID"] = None
        assert profile(only(value))["StoredTransferSyntaxUID"] == HTJ2K_LOSSLESS_RPCL
        instance["StoredTransferSyntaxUID"] = "1.2.840.10008.1.2.4.50"
        assert profile(only(value))["StoredTransferSyntaxUID"] == "1.2.840.10008.1.2.4.50"

    @pytest.mark.parametrize("frames", [None, [], "absent"])
    def test_instances_without_frames_are_counted(self, frames: Any) -> None:
        report: dict[str, Any] = {"DICOM": {}, "ImageFrames": frames}
        if frames == "absent":
            del report["ImageFrames"]
        image = {"DICOM": {"InstanceNumber": None}, "ImageFrames": [frame()]}
        (series,) = parse(document({"9.2": report, "9.1": image}))
        assert series.without_frames == 1
        assert [each.sop_instance_uid for each in series.instances] == ["9.1"]

    def test_several_series(self) -> None:
        one = document()["Study"]["Series"]["2.1"]
        found = parse(document(series={"2.1": one, "2.2": one, "2.3": {"DICOM": {}, "Instances": {}}}))
        assert [each.series_instance_uid for each in found] == ["2.1", "2.2", "2.3"]
        assert found[2].instances == []

    def test_instances_are_ordered_by_number_then_uid(self) -> None:
        def one(number: str | None) -> dict[str, Any]:
            return {"DICOM": {"InstanceNumber": number}, "ImageFrames": [frame()]}

        (series,) = parse(document({"9.3": one("10"), "9.2": one("2"), "9.1": one("2"), "9.4": one(None)}))
        assert [each.sop_instance_uid for each in series.instances] == ["9.4", "9.1", "9.2", "9.3"]

    def test_private_tags_are_no_columns(self) -> None:
        value = document(**{"00091001": "CANARY", "00E11010": [{"00E11020": "x"}]})
        value["Study"]["Series"]["2.1"]["Instances"]["9.1"]["DICOMVRs"] = {"00091001": "LO", "00E11010": "SQ"}
        assert "CANARY" not in repr(parse(value))

    def test_the_largest_width_gives_the_checksum(self) -> None:
        checksums = [{"Width": width, "Height": width, "Checksum": width} for width in (8, 32, 16)]
        value = document(
            {"9.1": {"DICOM": {}, "ImageFrames": [frame(PixelDataChecksumFromBaseToFullResolution=checksums)]}}
        )
        assert only(value).checksum == 32

    @pytest.mark.parametrize("checksums", [None, []])
    def test_no_checksum(self, checksums: Any) -> None:
        value = document(
            {"9.1": {"DICOM": {}, "ImageFrames": [frame(PixelDataChecksumFromBaseToFullResolution=checksums)]}}
        )
        assert only(value).checksum is None

    @pytest.mark.parametrize("place", [None, ["1", "2"], ["1", "2", "x"], ["1", "2", "NaN"], "1"])
    def test_a_position_of_other_than_three_numbers_is_none(self, place: Any) -> None:
        assert only(document(ImagePositionPatient=place)).position is None

    def test_look_up_tables_are_kept_once_and_equal(self) -> None:
        item = {"LUTDescriptor": [2, 0, 16], "LUTData": "AAAB", "LUTExplanation": "CANARY"}
        tables = profile_tables(only(document(ModalityLUTSequence=[item], VOILUTSequence=[item])))
        assert json.loads(tables) == {
            name: {"LUTDescriptor": [2, 0, 16], "LUTData": "AAAB"} for name in ("ModalityLUTSequence", "VOILUTSequence")
        }

    def test_a_palette_matters_to_palette_images_only(self) -> None:
        palette = {"RedPaletteColorLookupTableDescriptor": [2, 0, 8]}
        assert profile_tables(only(document(PhotometricInterpretation="MONOCHROME2", **palette))) is None
        assert "Palette" in profile_tables(only(document(PhotometricInterpretation="PALETTE COLOR ", **palette)))


def profile_tables(record: FrameRecord) -> Any:
    return record.profile[len(PROFILE_COLUMNS)]


def place(x: Any) -> dict[str, Any]:
    return {"PlanePositionSequence": [{"ImagePositionPatient": [x, "0", "0"]}]}


def slope(value: Any) -> dict[str, Any]:
    return {"PixelValueTransformationSequence": [{"RescaleSlope": value, "RescaleIntercept": "1"}]}


class TestEnhanced:
    def frames_of(self, count: int, **dicom: Any) -> list[FrameRecord]:
        instance = {"DICOM": dicom, "ImageFrames": [frame(number) for number in range(count)]}
        (series,) = parse(document({"9.1": instance}))
        return series.instances[0].frames

    def test_per_frame_over_shared_over_top_level(self) -> None:
        found = self.frames_of(
            3,
            RescaleSlope="2",
            SliceThickness="9",
            ImagePositionPatient=["7", "7", "7"],
            SharedFunctionalGroupsSequence=[{**slope("3"), "PixelMeasuresSequence": [{"PixelSpacing": ["1", "2"]}]}],
            PerFrameFunctionalGroupsSequence=[{**place("0"), **slope("4")}, place("1"), {}],
        )
        assert [each.number for each in found] == [1, 2, 3]
        assert [each.position for each in found] == [(0, 0, 0), (1, 0, 0), (7, 7, 7)]
        assert [profile(each)["RescaleSlope"] for each in found] == [4, 3, 3]
        assert {profile(each)["PixelSpacing"] for each in found} == {(1, 2)}
        assert {profile(each)["SliceThickness"] for each in found} == {9}

    def test_shared_alone(self) -> None:
        found = self.frames_of(2, SharedFunctionalGroupsSequence=[{**place("5"), **slope("3")}])
        assert [each.position for each in found] == [(5, 0, 0)] * 2

    def test_every_group_is_looked_into(self) -> None:
        (found,) = self.frames_of(
            1,
            PerFrameFunctionalGroupsSequence=[
                {
                    "PlaneOrientationSequence": [{"ImageOrientationPatient": ["1", "0", "0", "0", "1", "0"]}],
                    "FrameVOILUTSequence": [{"WindowCenter": "40", "WindowWidth": ["400"]}],
                    "MRDiffusionSequence": [{"DiffusionBValue": 800}],
                    "PixelMeasuresSequence": [{"SpacingBetweenSlices": "3 "}],
                }
            ],
        )
        assert profile(found)["ImageOrientationPatient"] == (1, 0, 0, 0, 1, 0)
        assert (profile(found)["WindowCenter"], profile(found)["WindowWidth"]) == ((40,), (400,))
        assert (profile(found)["DiffusionBValue"], profile(found)["SpacingBetweenSlices"]) == (800, 3)

    def test_a_voi_lut_of_a_frame_is_its_own(self) -> None:
        def voi(*data: int, **window: Any) -> dict[str, Any]:
            table = [{"LUTDescriptor": [len(data), 0, 16], "LUTData": list(data), "LUTExplanation": "Jane"}]
            return {"FrameVOILUTSequence": [{"VOILUTSequence": table if data else [], **window}]}

        found = self.frames_of(
            4,
            VOILUTSequence=[{"LUTDescriptor": [1, 0, 16], "LUTData": [7]}],
            SharedFunctionalGroupsSequence=[voi(1, 2, 3)],
            PerFrameFunctionalGroupsSequence=[{}, voi(4, 5, WindowCenter="40"), voi(1, 2, 3), voi()],
        )
        tables = [json.loads(profile_tables(each))["VOILUTSequence"]["LUTData"] for each in found]
        assert tables == [[1, 2, 3], [4, 5], [1, 2, 3], [7]]
        assert found[0].profile == found[2].profile
        assert [profile(each)["WindowCenter"] for each in found] == [None, (40,), None, None]
        assert "Jane" not in str(found)

    @pytest.mark.parametrize("groups", [None, [], [place("1")], "odd", [{}, {}]])
    def test_groups_that_do_not_fit_the_frames_are_left_aside(self, groups: Any) -> None:
        found = self.frames_of(2, ImagePositionPatient=["7", "7", "7"], PerFrameFunctionalGroupsSequence=groups)
        assert [each.position for each in found] == [(7, 7, 7)] * 2

    def test_equal_frames_share_a_profile(self) -> None:
        found = self.frames_of(4, PerFrameFunctionalGroupsSequence=[{**place(str(i)), **slope("2")} for i in range(4)])
        assert len({each.profile for each in found}) == 1


class TestHostile:
    whole = gzip.compress(json.dumps(document()).encode(), mtime=0)

    @pytest.mark.parametrize(
        "body",
        [
            b"",
            b"\x1f\x8b",
            whole[:40],
            whole[:-4],
            whole[:30] + b"\xff" * 20 + whole[50:],
            b"no json",
            b"{",
            b"null",
            b"[]",
            b"5",
            b"{}",
            b"\xff\xfe\xfd",
            b'{"ImageSetID": "a", "DatastoreID": "b", "Study": null}',
            b'{"ImageSetID": "a", "DatastoreID": "b", "Study": {"Series": []}}',
            b'{"ImageSetID": "a", "DatastoreID": "b", "Study": {"Series": {"1": []}}}',
            b"[" * 100_000,
            b'{"a":' * 100_000,
        ],
        ids=range(17),
    )
    def test_it_is_a_metadata_error(self, body: bytes) -> None:
        with pytest.raises(MetadataError):
            list(parse_document(body))

    def test_any_cut_of_a_gzipped_document(self) -> None:
        for size in range(len(self.whole)):
            with pytest.raises(MetadataError):
                list(parse_document(self.whole[:size]))

    @pytest.mark.parametrize(
        "changes",
        [
            {"ID": None},
            {"ID": 5},
            {"PixelDataChecksumFromBaseToFullResolution": [{"Width": 1}]},
            {"PixelDataChecksumFromBaseToFullResolution": [{"Width": 1, "Checksum": "x"}]},
            {"PixelDataChecksumFromBaseToFullResolution": [{"Width": 1, "Checksum": -1}]},
            {"PixelDataChecksumFromBaseToFullResolution": [{"Width": 1, "Checksum": 2**32}]},
            {"PixelDataChecksumFromBaseToFullResolution": [{"Width": 1, "Checksum": float("inf")}]},
            {"PixelDataChecksumFromBaseToFullResolution": 5},
        ],
    )
    def test_a_frame_that_cannot_be_used_names_its_image_set(self, changes: dict[str, Any]) -> None:
        with pytest.raises(MetadataError, match="a" * 32) as caught:
            parse(document({"9.1": {"DICOM": {}, "ImageFrames": [frame(**changes)]}}))
        assert caught.value.image_set_id == "a" * 32

    @pytest.mark.parametrize("extreme", ["x", None, 1e300, float("nan"), {"a": 1}, [3], "12"])
    def test_odd_extremes_and_sizes_do_no_harm(self, extreme: Any) -> None:
        changes = {"MinPixelValue": extreme, "MaxPixelValue": extreme, "FrameSizeInBytes": extreme}
        index = gathered(parse(document({"9.1": {"DICOM": {}, "ImageFrames": [frame(**changes)]}})))
        assert len(index.frames) == 1

    @pytest.mark.parametrize("identifier", ["", "x" * 32, "A" * 32, FRAME[:-1], FRAME + "0", "  " + FRAME[2:]])
    def test_a_frame_id_of_another_form_is_refused(self, identifier: str) -> None:
        with pytest.raises(MetadataError, match="32 hexadecimal"):
            gathered(parse(document({"9.1": {"DICOM": {}, "ImageFrames": [frame(ID=identifier)]}})))

    @settings(max_examples=200, deadline=None)
    @given(st.data())
    def test_mutated_documents(self, data: st.DataObject) -> None:
        """Whatever stands in the place of a value, an index comes out or a MetadataError."""
        value: Any = copy.deepcopy(
            document(
                ImagePositionPatient=["1", "2", "3"],
                PixelSpacing=["1", "1"],
                ImageType=["ORIGINAL", "PRIMARY"],
                ModalityLUTSequence=[{"LUTDescriptor": [2, 0, 16], "LUTData": "AAAB"}],
                PerFrameFunctionalGroupsSequence=[place("1")],
            )
        )
        where = value
        while True:  # walk to some place, then put something else there
            keys = list(where) if isinstance(where, dict) else range(len(where))
            if not len(keys):
                break
            key = data.draw(st.sampled_from(keys))
            inner = where[key]
            if isinstance(inner, dict | list) and data.draw(st.integers(0, 5)):
                where = inner
                continue
            where[key] = data.draw(JSON)
            break
        try:
            index = gathered(parse(value))
        except MetadataError:
            return
        assert len(index.frames) == len(index)
        repr(index)

    @settings(max_examples=100, deadline=None)
    @given(st.binary(max_size=200), st.booleans())
    def test_any_bytes(self, body: bytes, zipped: bool) -> None:
        with pytest.raises(MetadataError):
            list(parse_document(gzip.compress(body) if zipped else body))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.sampled_from([10**400, "\ud800", "NaN"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


def gathered(records: list[SeriesRecord]) -> DatasetIndex:
    gatherer = Gatherer()
    for record in records:
        gatherer.add(record, version_id="1", is_primary=True, patient_key=None)
    return DatasetIndex(gatherer.tables())


class TestFrameIds:
    def test_each_once_in_the_documents_order_whatever_else_is_wrong(self) -> None:
        instances = {
            "1.2.9": {"DICOM": {"Rows": "not a number"}, "ImageFrames": [{"ID": "b"}, {"ID": "a"}]},
            "1.2.3": {"ImageFrames": None},
            "1.2.1": {"ImageFrames": [{"ID": "c"}, {"ID": "a"}]},
        }
        text = json.dumps({"Study": {"Series": {"1.2": {"Instances": instances}, "1.3": {}}}}).encode()
        assert frame_ids(text) == frame_ids(gzip.compress(text)) == ["b", "a", "c"]
        assert document_text(gzip.compress(text)) == document_text(text) == text

    @pytest.mark.parametrize(
        "body", [b"", b"{}", b'{"Study": {"Series": {"1": {"Instances": {"2": {"ImageFrames": [{}]}}}}}}']
    )
    def test_no_document(self, body: bytes) -> None:
        with pytest.raises(MetadataError, match="not an image set metadata document"):
            frame_ids(body)

    def test_a_damaged_one_cannot_be_unpacked(self) -> None:
        with pytest.raises(MetadataError, match="not an image set metadata document"):
            document_text(gzip.compress(b"{}")[:-6])
