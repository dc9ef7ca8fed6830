"""A reader in a process of its own: every answer it gets must fit the others, whatever is written meanwhile."""

from __future__ import annotations

import gzip
import json
import traceback
import zlib
from typing import Any

Json = dict[str, Any]


def read_until(begin: Any, stop: Any, results: Any, variables: dict[str, str], datastore_id: str, seed: int) -> None:
    """Wait at the barrier `begin`, read a store until `stop` is set, and put what was counted, and an error, into
    `results`."""
    import os
    import random

    os.environ |= variables
    counts = {"rounds": 0, "sets": 0, "frames": 0, "new versions": 0}
    error = None
    try:
        reader = _Reader(datastore_id, random.Random(seed), counts)
        reader.round()
        begin.wait(60)
        while not stop.is_set():
            reader.round()
    except BaseException:
        error = traceback.format_exc()
    results.put((counts, error))


class _Reader:
    def __init__(self, datastore_id: str, rng: Any, counts: dict[str, int]) -> None:
        import boto3

        self.client = boto3.client("medical-imaging")
        self.store, self.rng, self.counts = datastore_id, rng, counts
        self.order: list[str] = []
        self.versions: dict[str, int] = {}
        self.documents: dict[tuple[str, int], int] = {}

    def round(self) -> None:
        """All pages of a search, then some of what they list."""
        self.counts["rounds"] += 1
        pages = self.client.get_paginator("search_image_sets").paginate(
            datastoreId=self.store,
            searchCriteria={"sort": {"sortField": "createdAt", "sortOrder": "ASC"}},
            PaginationConfig={"PageSize": 3},
        )
        found = [summary for page in pages for summary in page["imageSetsMetadataSummaries"]]
        order = [summary["imageSetId"] for summary in found]
        assert len(set(order)) == len(order), "an image set is on two pages"
        assert [each for each in order if each in self.versions] == self.order, "an image set is gone, or has moved"
        self.order = order
        for summary in found:
            self.see(summary["imageSetId"], summary["version"])
        for summary in self.rng.sample(found, min(4, len(found))):
            self.read(summary)

    def see(self, set_id: str, version: int) -> None:
        assert version >= self.versions.get(set_id, 0), f"{set_id} went back to version {version}"
        self.counts["new versions"] += version > self.versions.get(set_id, version)
        self.versions[set_id] = version

    def read(self, summary: Json) -> None:
        """An image set as a summary tells of it, and as it is now."""
        self.counts["sets"] += 1
        where = {"datastoreId": self.store, "imageSetId": summary["imageSetId"]}
        properties = self.client.get_image_set(**where)
        self.see(summary["imageSetId"], int(properties["versionId"]))
        assert properties["isPrimary"] is summary["isPrimary"]
        document = self.document(where, summary["version"])
        # A summary of an image set that is LOCKED has the new version's number and the attributes of the one before.
        before = self.document(where, max(1, summary["version"] - 1))
        assert _shown(summary["DICOMTags"]) in (_said(document), _said(before))
        latest = json.loads(gzip.decompress(self.client.get_image_set_metadata(**where)["imageSetMetadataBlob"].read()))
        for each in (document, latest):
            (series,) = each["Study"]["Series"].values()
            frames = [frame for instance in series["Instances"].values() for frame in instance["ImageFrames"]]
            assert frames, "an image set without frames"
            for frame in self.rng.sample(frames, min(4, len(frames))):
                self.frame(where, frame)

    def document(self, where: Json, version: int) -> Json:
        """The document of a version, which never changes once it is there."""
        answer = self.client.get_image_set_metadata(**where, versionId=str(version))
        body = answer["imageSetMetadataBlob"].read()
        settled = self.client.get_image_set(**where, versionId=str(version))["imageSetState"] == "ACTIVE"
        key = (where["imageSetId"], version)
        if key in self.documents:
            assert zlib.crc32(body) == self.documents[key], f"the document of {key} has changed"
        elif settled:
            again = self.client.get_image_set_metadata(**where, versionId=str(version))["imageSetMetadataBlob"].read()
            self.documents[key], body = zlib.crc32(again), again
        return json.loads(gzip.decompress(body))  # type: ignore[no-any-return]

    def frame(self, where: Json, frame: Json) -> None:
        import imagecodecs
        import numpy as np

        self.counts["frames"] += 1
        answer = self.client.get_image_frame(**where, imageFrameInformation={"imageFrameId": frame["ID"]})
        data = answer["imageFrameBlob"].read()
        assert len(data) == frame["FrameSizeInBytes"]
        pixels = imagecodecs.jpeg2k_decode(data)
        full = frame["PixelDataChecksumFromBaseToFullResolution"][-1]
        assert pixels.shape == (full["Height"], full["Width"])
        assert zlib.crc32(np.ascontiguousarray(pixels, "<u2").tobytes()) == full["Checksum"]


def _shown(tags: Json) -> tuple[Any, ...]:
    return tags["DICOMNumberOfStudyRelatedInstances"], tags["DICOMStudyDescription"], tags["DICOMSeriesInstanceUID"]


def _said(document: Json) -> tuple[Any, ...]:
    ((uid, series),) = document["Study"]["Series"].items()
    return len(series["Instances"]), document["Study"]["DICOM"]["StudyDescription"], uid
