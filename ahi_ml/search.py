"""Searches: values that have not run yet, and the ladder of results that runs them. Floor 3."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import date, datetime
from typing import TYPE_CHECKING, Any

from tqdm.auto import tqdm

from ahi_ml.client import image_set_document, translated
from ahi_ml.errors import ConfigError, MetadataError
from ahi_ml.index import DatasetIndex, Gatherer
from ahi_ml.index.expression import unknown_column
from ahi_ml.index.schema import TABLES
from ahi_ml.metadata import SERIES_COLUMNS, SeriesRecord, parse_document
from ahi_ml.privacy import PatientHash, patient_hash

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["ImageSetSummary", "Search", "make_search"]

_LOG = logging.getLogger(__name__)
_PAGE = 50
_MOST_FILTERS = 2
_METADATA_THREADS = 16
_EQUAL = {
    "patient_id": "DICOMPatientId",
    "accession_number": "DICOMAccessionNumber",
    "study_id": "DICOMStudyId",
    "study_instance_uid": "DICOMStudyInstanceUID",
    "series_instance_uid": "DICOMSeriesInstanceUID",
}


@dataclass(frozen=True, slots=True)
class ImageSetSummary:
    """What a search tells of an image set, without what identifies a patient.

    Parameters
    ----------
    image_set_id : str
        The service's id.
    version_id : str
        Latest version.
    is_primary : bool
        Whether it belongs to the primary hierarchy of its study.
    created_at, updated_at : datetime
        When.
    storage_tier : str
        FREQUENT_ACCESS or ARCHIVE_INSTANT_ACCESS; reading metadata or frames moves it to the first.
    study_instance_uid, series_instance_uid, modality, body_part, study_date : str or None
        DICOM attributes.
    series_number, instances : int or None
        DICOM attributes.
    """

    image_set_id: str
    version_id: str
    is_primary: bool
    created_at: datetime | None
    updated_at: datetime | None
    storage_tier: str | None
    study_instance_uid: str | None
    series_instance_uid: str | None
    modality: str | None
    body_part: str | None
    study_date: str | None
    series_number: int | None
    instances: int | None

    @classmethod
    def from_answer(cls, answer: Mapping[str, Any]) -> ImageSetSummary:
        """Build from an entry of SearchImageSets. I/O: none."""
        tags = answer.get("DICOMTags") or {}
        return cls(
            image_set_id=answer["imageSetId"],
            version_id=str(answer.get("version", 1)),
            is_primary=answer.get("isPrimary", True),
            created_at=answer.get("createdAt"),
            updated_at=answer.get("updatedAt"),
            storage_tier=answer.get("storageTier"),
            study_instance_uid=tags.get("DICOMStudyInstanceUID"),
            series_instance_uid=tags.get("DICOMSeriesInstanceUID"),
            modality=tags.get("DICOMSeriesModality"),
            body_part=tags.get("DICOMSeriesBodyPart"),
            study_date=tags.get("DICOMStudyDate"),
            series_number=tags.get("DICOMSeriesNumber"),
            instances=tags.get("DICOMNumberOfStudyRelatedInstances"),
        )


_FIELDS = tuple(ImageSetSummary.__dataclass_fields__)
Condition = Callable[[ImageSetSummary], bool]


@dataclass(frozen=True, slots=True)
class _Equals:
    """A condition on a field of a summary, picklable."""

    field: str
    values: tuple[Any, ...]

    def __call__(self, summary: ImageSetSummary) -> bool:
        return getattr(summary, self.field) in self.values


@dataclass(frozen=True, slots=True, eq=False)
class Search:
    """Image sets to be found. Nothing is sent before a result is asked for.

    Iterate it, or call `summaries`, `to_pandas`, `count` or `index`; each runs the search anew.

    Parameters
    ----------
    client : callable
        Gives this process's boto3 client.
    datastore_id : str
        Where to search.
    criteria : dict
        Search criteria of the service.
    primary : bool or None
        Keep primary image sets (True), the others (False), or all (None).
    conditions : tuple of callables
        What `where` added; each takes a summary.
    progress : bool or None
        Whether to show progress bars: None shows them in terminals and notebooks.
    """

    client: Callable[[], Any]
    datastore_id: str
    criteria: dict[str, Any]
    primary: bool | None = True
    conditions: tuple[Condition, ...] = ()
    progress: bool | None = None

    def __repr__(self) -> str:
        names = [next(iter(each["values"][0])) for each in self.criteria.get("filters", [])]
        kind = {True: "primary", False: "non-primary", None: "all"}[self.primary]
        return (
            f"<Search: {kind} image sets of {self.datastore_id}"
            f"{' by ' + ' and '.join(names) if names else ''}, {len(self.conditions)} further conditions; not sent yet>"
        )

    def where(self, condition: Condition | None = None, /, **equals: Any) -> Search:
        """Narrow the result in memory, by what the service cannot search.

        I/O: none.

        Parameters
        ----------
        condition : callable, optional
            Takes an `ImageSetSummary`, says whether to keep it.
        **equals
            Fields of `ImageSetSummary` and the value, or the list of values, they must have, such as
            ``modality="CT"``.

        Raises
        ------
        ConfigError
            No such field.
        """
        if condition is not None and not callable(condition):
            raise ConfigError(
                "a search is narrowed by where(modality='CT') or by a callable; an expression is for index().where()"
            )
        added: list[Condition] = [condition] if condition is not None else []
        for name, wanted in equals.items():
            if name not in _FIELDS:
                raise unknown_column(name, _FIELDS)
            values = tuple(wanted) if isinstance(wanted, list | tuple | set | frozenset) else (wanted,)
            added.append(_Equals(name, values))
        return replace(self, conditions=(*self.conditions, *added))

    def pages(self) -> Iterator[list[ImageSetSummary]]:
        """Yield the service's pages, unfiltered. I/O: one SearchImageSets request a page.

        Raises
        ------
        ServiceError
            The data store said no.
        """
        client = self.client()
        request = {"datastoreId": self.datastore_id, "maxResults": _PAGE, "searchCriteria": self.criteria}
        while True:
            with translated("SearchImageSets", f"data store {self.datastore_id}"):
                answer = client.search_image_sets(**request)
            yield [ImageSetSummary.from_answer(each) for each in answer["imageSetsMetadataSummaries"]]
            if not answer.get("nextToken"):
                return
            request["nextToken"] = answer["nextToken"]

    def summaries(self) -> Iterator[ImageSetSummary]:
        """Yield the image sets found. I/O: as `pages`; no metadata is read, no tier changed."""
        for page in self.pages():
            for summary in page:
                if self._wanted(summary) and self.primary in (None, summary.is_primary):
                    yield summary

    __iter__ = summaries

    def _wanted(self, summary: ImageSetSummary) -> bool:
        return all(condition(summary) for condition in self.conditions)

    def count(self) -> int:
        """How many image sets are found. I/O: as `pages`."""
        return sum(1 for _ in self.summaries())

    def to_pandas(self) -> pd.DataFrame:
        """The image sets found, one row each. I/O: as `pages`."""
        import pandas as pd

        return pd.DataFrame(
            [[getattr(summary, name) for name in _FIELDS] for summary in self.summaries()],
            columns=list(_FIELDS),
        )

    def index(
        self,
        *,
        columns: Sequence[str] = (),
        phi: bool = False,
        patient_key: str | bytes | None = None,
        progress: bool | None = None,
    ) -> DatasetIndex:
        """Read the metadata of every image set found, once, and pin their versions.

        I/O: the search, then one GetImageSetMetadata for each image set, in parallel. On AWS this moves
        archived image sets back to the frequent-access tier.

        Parameters
        ----------
        columns : sequence of str
            Further DICOM keywords to keep for each series. They are outside the list of
            non-identifying attributes, so `phi` must be true.
        phi : bool
            Says aloud that the index may hold protected health information.
        patient_key : str or bytes, optional
            Secret of the patient keys; else ``AHI_ML_PATIENT_KEY``, else a random one that `save`
            writes beside the index, on this machine only.
        progress : bool, optional
            Show a progress bar.

        Returns
        -------
        DatasetIndex
            Empty, with a note that says why, when nothing was found.

        Raises
        ------
        ServiceError
            The data store said no.
        MetadataError
            A document cannot be used; the message names its image set.
        ConfigError
            `columns` outside the list without `phi`.
        """
        outside = [name for name in columns if name not in SERIES_COLUMNS]
        if outside and not phi:
            raise ConfigError(
                f"{', '.join(outside)} may identify patients: pass phi=True to keep them in the index all the same"
            )
        taken = [name for name in outside if any(name in schema.names for schema in TABLES.values())]
        if taken:
            raise ConfigError(f"{', '.join(taken)}: in every index already, at its own level")
        hasher = patient_hash(patient_key)
        found, skipped = [], 0
        for page in self.pages():
            for summary in filter(self._wanted, page):
                if self.primary in (None, summary.is_primary):
                    found.append(summary)
                else:
                    skipped += 1
        found.sort(
            key=lambda each: (
                each.study_instance_uid or "",
                each.series_instance_uid or "",
                each.image_set_id,
            )
        )
        gatherer = Gatherer(dict.fromkeys(outside, "text"))
        without = self._gather(
            found,
            gatherer,
            hasher,
            dict.fromkeys(outside, "text"),
            self.progress if progress is None else progress,
        )
        notes = []
        if skipped:
            kind = "non-primary" if self.primary else "primary"
            notes.append(f"{skipped:,} {kind} image sets were left out (search(primary=None) keeps them)")
        if without:
            notes.append(f"{without:,} instances hold no image and were left out")
        if not found:
            notes.append(
                "empty: no image set was found"
                + (" among those searched for" if self.criteria or self.conditions else "")
            )
        return DatasetIndex(gatherer.tables(), patient_secret=hasher.secret, secret_kept=not hasher.made, notes=notes)

    def _gather(
        self,
        found: list[ImageSetSummary],
        gatherer: Gatherer,
        hasher: PatientHash,
        extra: dict[str, str],
        progress: bool | None,
    ) -> int:
        client = self.client()
        without = 0
        with (
            ThreadPoolExecutor(_METADATA_THREADS, "ahi-ml-metadata") as pool,
            tqdm(
                total=len(found),
                desc="metadata",
                unit="set",
                disable=None if progress is None else not progress,
            ) as bar,
        ):
            for summary, records in zip(
                found, pool.map(lambda each: self._read(client, each, extra), found), strict=True
            ):
                for record in records:
                    gatherer.add(
                        record,
                        version_id=summary.version_id,
                        is_primary=summary.is_primary,
                        patient_key=hasher(*record.patient),
                    )
                    without += record.without_frames
                bar.update()
        return without

    def _read(self, client: Any, summary: ImageSetSummary, extra: dict[str, str]) -> list[SeriesRecord]:
        body = image_set_document(client, self.datastore_id, summary.image_set_id, summary.version_id)
        try:
            return list(parse_document(body, extra=extra))
        except MetadataError as error:
            raise MetadataError(
                f"image set {summary.image_set_id}, version {summary.version_id}: {error}",
                image_set_id=summary.image_set_id,
            ) from error


def make_search(
    client: Callable[[], Any],
    datastore_id: str,
    *,
    study_date: str | date | tuple[Any, Any] | None = None,
    created: tuple[datetime, datetime] | None = None,
    updated: tuple[datetime, datetime] | None = None,
    primary: bool | None = True,
    progress: bool | None = None,
    **equals: str | None,
) -> Search:
    """Build a search from what the service can filter. I/O: none.

    Raises
    ------
    ConfigError
        More than two filters, or a date that is none.
    """
    filters: list[dict[str, Any]] = [
        {"operator": "EQUAL", "values": [{_EQUAL[name]: value}]} for name, value in equals.items() if value is not None
    ]
    for name, value in equals.items():
        if value is not None and not isinstance(value, str):  # botocore's own complaint would quote the value
            raise ConfigError(f"{name} is text, not a {type(value).__name__}")
    if study_date is not None:
        first, last = _span("study_date", study_date if isinstance(study_date, tuple) else (study_date, study_date))
        bounds = [_study_date(first, "000000"), _study_date(last, "235959.999999")]
        filters.append({"operator": "BETWEEN", "values": [{"DICOMStudyDateAndTime": bound} for bound in bounds]})
    for name, span in (("createdAt", created), ("updatedAt", updated)):
        if span is not None:
            filters.append({"operator": "BETWEEN", "values": [{name: moment} for moment in _span(name, span)]})
    if len(filters) > _MOST_FILTERS:
        raise ConfigError(
            f"the service takes {_MOST_FILTERS} filters, not {len(filters)}: search by the most selective two and "
            "narrow the result with .where()"
        )
    criteria = {"filters": filters} if filters else {}
    return Search(client, datastore_id, criteria, primary=primary, progress=progress)


def _span(name: str, span: Any) -> tuple[Any, Any]:
    if not isinstance(span, tuple | list) or len(span) != 2:
        raise ConfigError(f"{name} is a pair: first and last")
    return span[0], span[1]


def _study_date(value: Any, moment: str) -> dict[str, str]:
    text = value.strftime("%Y%m%d") if isinstance(value, date) else str(value).replace("-", "")
    try:
        datetime.strptime(text if len(text) == 8 and text.isascii() else "", "%Y%m%d")
    except ValueError:
        raise ConfigError(f"a study date is YYYYMMDD or a date, not {value!r}") from None
    return {"DICOMStudyDate": text, "DICOMStudyTime": moment}
