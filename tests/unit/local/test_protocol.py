"""The protocol against boto3 itself: what it sends is read back, what is answered it understands."""

from __future__ import annotations

import json
import pickle
import re
import time
import uuid
from datetime import UTC, datetime, timedelta, timezone
from typing import Any
from urllib.parse import quote, urlsplit

import boto3
import pytest
from botocore.awsrequest import AWSResponse
from botocore.config import Config
from botocore.exceptions import ClientError
from hypothesis import given, settings
from hypothesis import strategies as st

from ahi_ml.errors import LocalStoreError
from ahi_ml.local import shapes
from ahi_ml.local.protocol import HttpRequest, HttpResponse, Protocol, ServiceFault

DS, IS, FRAME = "0123456789abcdef" * 2, "fedcba9876543210" * 2, "00ff" * 8
ARN = f"arn:aws:medical-imaging:us-east-1:123456789012:datastore/{DS}"
IMAGE_SET_ARN = f"{ARN}/imageset/{IS}"
ROLE = "arn:aws:iam::123456789012:role/import role"
TOKEN = "t+/=&?%25 x"
S3 = {"inputS3Uri": "s3://bucket/in put/", "outputS3Uri": "s3://bucket/out"}
IMAGE_SET = {"datastoreId": DS, "imageSetId": IS}
PAGE = {"nextToken": TOKEN, "maxResults": 50}
FILTERS = [
    {
        "operator": "BETWEEN",
        "values": [
            {"createdAt": datetime(2024, 1, 1, tzinfo=UTC)},
            {"createdAt": datetime(2024, 2, 1, 12, 30, 15, tzinfo=UTC)},
        ],
    },
    {"operator": "EQUAL", "values": [{"DICOMPatientId": 'Zoë "東京" \U0001f642'}]},
]
MAPPING = {"studyInstanceUID": "1.2.3", "seriesInstanceUID": "1.2.4", "metadataFilePath": "a/b c.json"}

MINIMAL: dict[str, dict[str, Any]] = {
    "CopyImageSet": {
        "datastoreId": DS,
        "sourceImageSetId": IS,
        "copyImageSetInformation": {"sourceImageSet": {"latestVersionId": "1"}},
    },
    "CreateDatastore": {},
    "DeleteDatastore": {"datastoreId": DS},
    "DeleteImageSet": IMAGE_SET,
    "GetDICOMImportJob": {"datastoreId": DS, "jobId": "0a"},
    "GetDatastore": {"datastoreId": DS},
    "GetImageFrame": {**IMAGE_SET, "imageFrameInformation": {"imageFrameId": FRAME}},
    "GetImageSet": IMAGE_SET,
    "GetImageSetMetadata": IMAGE_SET,
    "ListDICOMImportJobs": {"datastoreId": DS},
    "ListDatastores": {},
    "ListImageSetVersions": IMAGE_SET,
    "ListTagsForResource": {"resourceArn": ARN},
    "SearchImageSets": {"datastoreId": DS},
    "StartDICOMImportJob": {"datastoreId": DS, "dataAccessRoleArn": ROLE, **S3},
    "TagResource": {"resourceArn": ARN, "tags": {}},
    "UntagResource": {"resourceArn": ARN, "tagKeys": ["a"]},
    "UpdateImageSetMetadata": {
        **IMAGE_SET,
        "latestVersionId": "1",
        "updateImageSetMetadataUpdates": {"revertToVersionId": "1"},
    },
}
FULL: dict[str, dict[str, Any]] = {
    "CopyImageSet": {
        **MINIMAL["CopyImageSet"],
        "copyImageSetInformation": {
            "sourceImageSet": {"latestVersionId": "1", "DICOMCopies": {"copiableAttributes": '{"é": 1}'}},
            "destinationImageSet": {"imageSetId": DS, "latestVersionId": "22"},
        },
        "force": False,
        "promoteToPrimary": True,
    },
    "CreateDatastore": {
        "datastoreName": "a/b#c.d_e-9",
        "clientToken": "token.1",
        "tags": {"a:b/c": "wert Ä", "k": ""},
        "kmsKeyArn": "arn:aws:kms:us-east-1:123456789012:alias/key",
        "lambdaAuthorizerArn": "arn:aws:lambda:us-east-1:123456789012:function:f:$LATEST",
        "losslessStorageFormat": "JPEG_2000_LOSSLESS",
    },
    "DeleteDatastore": MINIMAL["DeleteDatastore"],
    "DeleteImageSet": MINIMAL["DeleteImageSet"],
    "GetDICOMImportJob": MINIMAL["GetDICOMImportJob"],
    "GetDatastore": MINIMAL["GetDatastore"],
    "GetImageFrame": MINIMAL["GetImageFrame"],
    "GetImageSet": {**IMAGE_SET, "versionId": "12"},
    "GetImageSetMetadata": {**IMAGE_SET, "versionId": "12"},
    "ListDICOMImportJobs": {"datastoreId": DS, "jobStatus": "IN_PROGRESS", **PAGE},
    "ListDatastores": {"datastoreStatus": "ACTIVE", **PAGE},
    "ListImageSetVersions": {**IMAGE_SET, **PAGE},
    "ListTagsForResource": {"resourceArn": IMAGE_SET_ARN},
    "SearchImageSets": {
        "datastoreId": DS,
        "searchCriteria": {"filters": FILTERS, "sort": {"sortOrder": "ASC", "sortField": "updatedAt"}},
        **PAGE,
    },
    "StartDICOMImportJob": {
        **MINIMAL["StartDICOMImportJob"],
        "jobName": "job#1",
        "clientToken": "token-2",
        "inputOwnerAccountId": "123456789012",
        "importConfiguration": {"dicomJsonMetadataImportConfiguration": {"dicomMetadataMappings": [MAPPING]}},
    },
    "TagResource": {"resourceArn": IMAGE_SET_ARN, "tags": {"a": "b c", "d/e": "ü"}},
    "UntagResource": {"resourceArn": IMAGE_SET_ARN, "tagKeys": ["a", "b+c=d", "e:/f"]},
    "UpdateImageSetMetadata": {
        **IMAGE_SET,
        "latestVersionId": "3",
        "force": True,
        "includeStudyImageSets": False,
        "updateImageSetMetadataUpdates": {
            "DICOMUpdates": {"removableAttributes": b"\x00\xff", "updatableAttributes": b'{"a": 1}'}
        },
    },
}
OPERATIONS = sorted(FULL)
REFERENCE = Protocol()


@pytest.fixture(scope="module")
def protocol() -> Protocol:
    return REFERENCE


class Client:
    """A boto3 client whose requests are kept and answered here instead of being sent."""

    def __init__(self, **session: str) -> None:
        keys = {"aws_access_key_id": "AKIDEXAMPLE", "aws_secret_access_key": "wJalrXUtnFEMI/K7MDENG+bPxRfiCY"}
        config = Config(inject_host_prefix=False, retries={"total_max_attempts": 1})
        self.boto = boto3.client(
            "medical-imaging",
            region_name="us-east-1",
            endpoint_url="http://127.0.0.1:8080",
            config=config,
            **(keys | session),
        )
        self.boto.meta.events.register("before-send.medical-imaging", self._answer)
        self.answer = HttpResponse(200, [(b"content-type", b"application/json")], b"{}")
        self.sent: HttpRequest | None = None

    def _answer(self, request: Any, **_: Any) -> AWSResponse:
        url = urlsplit(request.url)
        texts = {n.lower(): v.decode() if isinstance(v, bytes) else v for n, v in request.headers.items()}
        body = request.body or b""
        headers = {"host": url.netloc} | texts
        self.sent = HttpRequest(
            request.method, url.path, url.query, headers, body if isinstance(body, bytes) else body.encode()
        )
        answered = {name.decode(): value.decode() for name, value in self.answer.headers}
        return AWSResponse(request.url, self.answer.status, answered, Raw(bytes(self.answer.body)))

    def call(self, operation: str, params: dict[str, Any]) -> dict[str, Any]:
        result: dict[str, Any] = getattr(self.boto, boto3_name(self.boto, operation))(**params)
        return result

    def request(self, operation: str, params: dict[str, Any]) -> HttpRequest:
        """Return what boto3 sends for a call."""
        self.answer = HttpResponse(200, [(b"content-type", b"application/json")], b"{}")
        self.call(operation, params)
        assert self.sent is not None
        return self.sent


class Raw:
    """The body of a response, as botocore reads it."""

    def __init__(self, body: bytes) -> None:
        self._rest = body

    def stream(self, **_: Any) -> Any:
        yield self.read()

    def read(self, amount: int | None = None) -> bytes:
        size = len(self._rest) if amount is None else amount
        part, self._rest = self._rest[:size], self._rest[size:]
        return part


def boto3_name(client: Any, operation: str) -> str:
    return next(name for name, each in client.meta.method_to_api_mapping.items() if each == operation)


@pytest.fixture(scope="module")
def client() -> Client:
    return Client()


def refuse(protocol: Protocol, request: HttpRequest) -> ServiceFault:
    with pytest.raises(ServiceFault) as caught:
        protocol.parse(request)
    return caught.value


def frame_request(body: bytes, path: str = f"/datastore/{DS}/imageSet/{IS}/getImageFrame") -> HttpRequest:
    return HttpRequest("POST", path, "", {}, body)


def search_request(criteria: Any, query: str = "") -> HttpRequest:
    body = criteria if isinstance(criteria, bytes) else json.dumps(criteria).encode()
    return HttpRequest("POST", f"/datastore/{DS}/searchImageSets", query, {}, body)


def create_request(**members: Any) -> HttpRequest:
    return HttpRequest("POST", "/datastore", "", {}, json.dumps(members).encode())


def test_every_operation_is_served(protocol: Protocol) -> None:
    assert sorted(protocol.operations) == OPERATIONS == sorted(MINIMAL)
    assert len(OPERATIONS) == 18


@pytest.mark.parametrize("operation", OPERATIONS)
def test_full_request_of_boto3_is_read_back(protocol: Protocol, client: Client, operation: str) -> None:
    call = protocol.parse(client.request(operation, FULL[operation]))
    assert call.operation == operation
    assert call.params == FULL[operation]


@pytest.mark.parametrize("operation", OPERATIONS)
def test_minimal_request_of_boto3_is_read_back(protocol: Protocol, client: Client, operation: str) -> None:
    params = protocol.parse(client.request(operation, MINIMAL[operation])).params
    expected = dict(MINIMAL[operation])
    if operation in ("CreateDatastore", "StartDICOMImportJob"):  # boto3 fills this in
        expected["clientToken"] = str(uuid.UUID(params["clientToken"]))
    if operation == "SearchImageSets":  # boto3 sends the empty object for it
        expected["searchCriteria"] = {}
    assert params == expected


@pytest.mark.parametrize("member", ["DICOMAccessionNumber", "DICOMStudyId", "DICOMStudyInstanceUID", "isPrimary"])
def test_each_kind_of_filter_arrives(protocol: Protocol, client: Client, member: str) -> None:
    value = {"isPrimary": True, "DICOMStudyInstanceUID": "1.2.840"}.get(member, "x")
    criteria = {"filters": [{"operator": "EQUAL", "values": [{member: value}]}]}
    sent = client.request("SearchImageSets", {"datastoreId": DS, "searchCriteria": criteria})
    assert protocol.parse(sent).params["searchCriteria"] == criteria


@pytest.mark.parametrize("encoded", [quote(IMAGE_SET_ARN, safe=""), quote(IMAGE_SET_ARN, safe="/"), IMAGE_SET_ARN])
def test_arn_in_path_in_any_encoding(protocol: Protocol, encoded: str) -> None:
    call = protocol.parse(HttpRequest("GET", f"/tags/{encoded}", "", {}, b""))
    assert (call.operation, call.params) == ("ListTagsForResource", {"resourceArn": IMAGE_SET_ARN})


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/"),
        ("GET", ""),
        ("GET", "*"),
        ("get", "/datastore"),
        ("PUT", "/datastore"),
        ("GET", "/datastores"),
        ("GET", f"/datastore/{DS}/imageSet"),
        ("GET", f"/datastore/{DS}/"),
        ("GET", f"/datastore/{DS}\n"),
        ("POST", f"/datastore/{DS}/imageSet/{IS}/getImageFrame/x"),
        ("POST", f"/datastore/{DS}/imageset/{IS}/getImageFrame"),
        ("POST", f"//datastore/{DS}/searchImageSets"),
        ("GET", "/tags"),
    ],
)
def test_unknown_route(protocol: Protocol, method: str, path: str) -> None:
    fault = refuse(protocol, HttpRequest(method, path, "", {}, b""))
    assert fault.status == 404 or fault.code == "ValidationException"  # a line break in an id is malformed
    assert fault.code == "UnknownOperationException" or "\n" in path


def test_tokens_left_out_are_made_up(protocol: Protocol) -> None:
    first, second = (protocol.parse(create_request()).params["clientToken"] for _ in range(2))
    assert uuid.UUID(first) != uuid.UUID(second)
    assert uuid.UUID(protocol.parse(HttpRequest("POST", "/datastore", "", {}, b"")).params["clientToken"])


def test_null_is_absent_and_unknown_is_ignored(protocol: Protocol) -> None:
    call = protocol.parse(create_request(clientToken="t", datastoreName=None, tags=None, future={"a": [1]}))
    assert call.params == {"clientToken": "t"}
    call = protocol.parse(HttpRequest("GET", "/datastore", "future=1&maxResults=2", {}, b""))
    assert call.params == {"maxResults": 2}


@pytest.mark.parametrize("body", [b"", b"null"])
def test_absent_body_is_allowed_where_nothing_in_it_is_required(protocol: Protocol, body: bytes) -> None:
    assert protocol.parse(search_request(body)).params == {"datastoreId": DS}
    fault = refuse(protocol, frame_request(body))
    assert fault.text == (
        "1 validation error detected: Value at 'imageFrameInformation' failed to satisfy constraint: "
        "Member must not be null"
    )


def test_body_of_operation_without_one_is_ignored(protocol: Protocol) -> None:
    request = HttpRequest("GET", f"/datastore/{DS}", "", {}, b"\xff{")
    assert protocol.parse(request).params == {"datastoreId": DS}


@pytest.mark.parametrize(
    ("sent", "expected"),
    [
        ("1706745600.5", datetime(2024, 2, 1, 0, 0, 0, 500_000, UTC)),
        ("-1", datetime(1969, 12, 31, 23, 59, 59, tzinfo=UTC)),
        ("1.7067456E9", datetime(2024, 2, 1, tzinfo=UTC)),
        ('"2024-02-01T00:00:00Z"', datetime(2024, 2, 1, tzinfo=UTC)),
        ('"2024-02-01T02:00:00+02:00"', datetime(2024, 2, 1, tzinfo=UTC)),
        ('"2024-02-01T00:00:00"', datetime(2024, 2, 1, tzinfo=UTC)),
    ],
)
def test_timestamps(protocol: Protocol, sent: str, expected: datetime) -> None:
    body = b'{"filters": [{"operator": "EQUAL", "values": [{"createdAt": %s}]}]}' % sent.encode()
    params = protocol.parse(search_request(body)).params
    found = params["searchCriteria"]["filters"][0]["values"][0]["createdAt"]
    assert found == expected
    assert found.utcoffset() == timedelta(0)


PATTERN_32 = "Member must satisfy regular expression pattern: [0-9a-z]{32}"
UNION = "Member must have exactly one member of the set"


@pytest.mark.parametrize("bad", ["x", DS[:-1], DS + "0", DS.upper(), DS[:-1] + "%0A", DS[:-2] + "%C3%A9", "%FF" * 32])
def test_malformed_id(protocol: Protocol, bad: str) -> None:
    fault = refuse(protocol, HttpRequest("GET", f"/datastore/{bad}", "", {}, b""))
    assert fault.code == "ValidationException"
    assert (fault.status, protocol.error_status(fault.code)) == (400, 400)
    assert fault.text == (
        f"1 validation error detected: Value at 'datastoreId' failed to satisfy constraint: {PATTERN_32}"
    )


@pytest.mark.parametrize(
    ("sent", "constraint"),
    [
        ("51", "Member must have value less than or equal to 50"),
        ("0", "Member must have value greater than or equal to 1"),
        ("-1", "Member must have value greater than or equal to 1"),
        *((text, "Member must be an integer") for text in ("abc", "", "1.0", "1_0", "%201", "+1", "٣", "9" * 5000)),
    ],
)
def test_max_results(protocol: Protocol, sent: str, constraint: str) -> None:
    fault = refuse(protocol, HttpRequest("GET", "/datastore", f"maxResults={sent}", {}, b""))
    assert fault.text == (
        f"1 validation error detected: Value at 'maxResults' failed to satisfy constraint: {constraint}"
    )


@pytest.mark.parametrize("sent", ["True", "1", "", "yes"])
def test_boolean_in_query(protocol: Protocol, client: Client, sent: str) -> None:
    request = client.request("CopyImageSet", MINIMAL["CopyImageSet"])
    fault = refuse(protocol, HttpRequest("POST", request.raw_path, f"force={sent}", {}, request.body))
    assert "'force' failed to satisfy constraint: Member must be a boolean" in fault.text


@pytest.mark.parametrize(
    ("criteria", "where", "constraint"),
    [
        ({"filters": []}, "filters", "Member must have length greater than or equal to 1"),
        ({"filters": [{}] * 3}, "filters", "Member must have length less than or equal to 2"),
        ({"filters": {}}, "filters", "Member must be a list"),
        ({"filters": ["x"]}, "filters.1.member", "Member must be a structure"),
        ({"filters": [None]}, "filters.1.member", "Member must not be null"),
        (
            {"sort": {"sortOrder": "UP", "sortField": "createdAt"}},
            "sort.sortOrder",
            "enum value set: [ASC, DESC]",
        ),
        ({"sort": {"sortOrder": 1, "sortField": "createdAt"}}, "sort.sortOrder", "Member must be a string"),
        ({"sort": {"sortOrder": "ASC"}}, "sort.sortField", "Member must not be null"),
    ],
)
def test_search_criteria(protocol: Protocol, criteria: Any, where: str, constraint: str) -> None:
    fault = refuse(protocol, search_request(criteria))
    assert f"Value at 'searchCriteria.{where}' failed" in fault.text
    assert constraint in fault.text


@pytest.mark.parametrize(
    ("value", "constraint"),
    [
        ({}, UNION),
        ({"somethingNew": 1}, UNION),
        ({"isPrimary": None}, UNION),
        ({"isPrimary": True, "DICOMStudyId": "x"}, UNION),
        ({"isPrimary": "true"}, "Member must be a boolean"),
        ({"isPrimary": 1}, "Member must be a boolean"),
        ({"DICOMPatientId": 5}, "Member must be a string"),
        ({"DICOMPatientId": "x" * 513}, "Member must have length less than or equal to 512"),
        ({"DICOMPatientId": "\ud800"}, "Member must be valid Unicode text"),
        ({"DICOMStudyInstanceUID": "1.2.x"}, "pattern: [0-9.]+"),
        ({"DICOMStudyInstanceUID": "1.2\n"}, "pattern: [0-9.]+"),
        ({"createdAt": True}, "Member must be a timestamp"),
        ({"createdAt": 1e300}, "Member must be a timestamp"),
        ({"createdAt": "yesterday"}, "Member must be a timestamp"),
        ({"createdAt": "0001-01-01T00:00:00+14:00"}, "Member must be a timestamp"),
        ({"DICOMStudyDateAndTime": {"DICOMStudyTime": "1"}}, "Member must not be null"),
    ],
)
def test_filter_values(protocol: Protocol, value: Any, constraint: str) -> None:
    fault = refuse(protocol, search_request({"filters": [{"operator": "EQUAL", "values": [value]}]}))
    assert fault.code == "ValidationException"
    assert "'searchCriteria.filters.1.member.values.1.member" in fault.text
    assert constraint in fault.text


@pytest.mark.parametrize(
    ("tags", "constraint"),
    [
        ({f"k{n}": "" for n in range(51)}, "Member must have length less than or equal to 50"),
        ({"aws:x": "v"}, "pattern: (?!aws:)[a-zA-Z+-=._:/]+"),
        ({"": "v"}, "Member must have length greater than or equal to 1"),
        ({"k" * 129: "v"}, "Member must have length less than or equal to 128"),
        ({"k": "v" * 257}, "Member must have length less than or equal to 256"),
        ({"k": 1}, "Member must be a string"),
        ({"k": None}, "Member must not be null"),
        (["k"], "Member must be a map"),
    ],
)
def test_tags(protocol: Protocol, tags: Any, constraint: str) -> None:
    assert constraint in refuse(protocol, create_request(tags=tags)).text


def test_fifty_tags_are_fine(protocol: Protocol) -> None:
    tags = {f"k{n}": "v" for n in range(50)}
    assert protocol.parse(create_request(tags=tags)).params["tags"] == tags


@pytest.mark.parametrize("blob", ["", "a", "ü", "YQ==\n", 5, ["YQ=="]])
def test_blobs(protocol: Protocol, blob: Any) -> None:
    body = json.dumps({"DICOMUpdates": {"updatableAttributes": blob}}).encode()
    path = f"/datastore/{DS}/imageSet/{IS}/updateImageSetMetadata"
    fault = refuse(protocol, HttpRequest("POST", path, "latestVersion=1", {}, body))
    assert "'updateImageSetMetadataUpdates.DICOMUpdates.updatableAttributes' failed" in fault.text


def test_update_takes_exactly_one_change(protocol: Protocol) -> None:
    path = f"/datastore/{DS}/imageSet/{IS}/updateImageSetMetadata"
    for body in (b"{}", b'{"DICOMUpdates": {}, "revertToVersionId": "1"}'):
        fault = refuse(protocol, HttpRequest("POST", path, "latestVersion=1", {}, body))
        assert "1 validation error detected: Value at 'updateImageSetMetadataUpdates' failed" in fault.text
    assert "'latestVersionId'" in refuse(protocol, HttpRequest("POST", path, "", {}, b"{}")).text


def test_digits_are_ascii(protocol: Protocol) -> None:
    path = f"/datastore/{DS}/imageSet/{IS}/getImageSet"
    for version in ("%D9%A3", "", "1%0A", "9" * 5000):
        fault = refuse(protocol, HttpRequest("POST", path, f"version={version}", {}, b""))
        assert "1 validation error detected: Value at 'versionId' failed" in fault.text


def test_problems_are_counted_and_joined(protocol: Protocol) -> None:
    fault = refuse(protocol, frame_request(b'{"imageFrameId": 1}', "/datastore/a/imageSet/b/getImageFrame"))
    assert fault.text == (
        f"3 validation errors detected: Value at 'datastoreId' failed to satisfy constraint: {PATTERN_32}; "
        f"Value at 'imageSetId' failed to satisfy constraint: {PATTERN_32}; "
        "Value at 'imageFrameInformation.imageFrameId' failed to satisfy constraint: Member must be a string"
    )


def test_text_of_many_problems_stays_short(protocol: Protocol) -> None:
    mappings = [{"studyInstanceUID": "x", "seriesInstanceUID": "x", "metadataFilePath": ""}] * 1000
    configuration = {"dicomJsonMetadataImportConfiguration": {"dicomMetadataMappings": mappings}}
    body = json.dumps({"importConfiguration": configuration, "dataAccessRoleArn": ROLE, **S3}).encode()
    fault = refuse(protocol, HttpRequest("POST", f"/startDICOMImportJob/datastore/{DS}", "", {}, body))
    assert fault.text.startswith("3000 validation errors detected: ")
    assert len(fault.text) < 5000


def test_values_are_never_echoed(protocol: Protocol) -> None:
    secret = "Doe^Jane"
    criteria = {
        "filters": [
            {
                "operator": secret,
                "values": [{"DICOMPatientId": secret * 99, "DICOMStudyInstanceUID": secret}],
            },
            {"operator": "EQUAL", "values": [{secret: secret}, {"createdAt": secret}]},
        ]
    }
    faults = [
        refuse(protocol, search_request(criteria, f"maxResults={secret}&nextToken=")),
        refuse(protocol, create_request(tags={secret: secret}, clientToken=secret)),
        refuse(protocol, HttpRequest("GET", f"/datastore/{secret}", "", {}, b"")),
        refuse(protocol, HttpRequest("GET", f"/{secret}", secret, {}, b"")),
        refuse(protocol, frame_request(f'{{"{secret}'.encode())),
    ]
    assert not any("Doe" in str(fault) for fault in faults)
    assert all(fault.__cause__ is None for fault in faults)


@pytest.mark.parametrize(
    "body",
    [
        b"{",
        b"[]",
        b'"x"',
        b"5",
        b"\xff\xfe",
        b'{"a": NaN}',
        b'{"a": ' + b"9" * 5000 + b"}",
        b"{}{}",
        b"\xef\xbb\xbf{}",
    ],
)
def test_malformed_json(protocol: Protocol, body: bytes) -> None:
    fault = refuse(protocol, frame_request(body))
    assert (fault.code, fault.status) == ("SerializationException", 400)


@pytest.mark.parametrize("unit", [b"[", b'{"imageFrameId":', b'{"x":['])
def test_deep_nesting_is_refused_quickly(protocol: Protocol, unit: bytes) -> None:
    start = time.perf_counter()
    assert refuse(protocol, frame_request(unit * 100_000)).code == "SerializationException"
    assert time.perf_counter() - start < 1


def model_shapes() -> list[Any]:
    model = Client().boto.meta.service_model
    return [model.shape_for(name) for name in model.shape_names]


PATTERNED = [shape for shape in model_shapes() if "pattern" in shape.metadata]


@pytest.mark.parametrize("shape", PATTERNED, ids=lambda shape: shape.name)
def test_no_pattern_is_slow(shape: Any) -> None:
    compiled = shapes._compile_pattern(shape.metadata["pattern"])
    assert compiled is not None, "this pattern would go unchecked"
    longest = shape.metadata.get("max", shapes._LONGEST_WITHOUT_MAXIMUM)
    units = ["a", "0", "-", ".", " ", "a ", "a-", "/", "aA0", ":", "-aa", "arn:aws"]
    heads = ["", "a", "s3://aa", "arn:aws", "arn:aws:iam::123456789012:role/", "arn:aws:kms:us"]
    start = time.perf_counter()
    for text in [head + unit * longest for head in heads for unit in units]:
        compiled.fullmatch(text[: longest - 1] + "\x00")
        compiled.fullmatch(text[: longest - 2] + " \n")
    assert time.perf_counter() - start < 1


@given(st.text(alphabet="a~ !\x7f\n", max_size=9))
@settings(max_examples=300, deadline=None)
def test_linear_pattern_accepts_the_same_texts(text: str) -> None:
    for slow, fast in shapes._LINEAR_PATTERNS.items():
        assert bool(re.fullmatch(slow, text)) == bool(re.fullmatch(fast, text))


@pytest.mark.parametrize("pattern", ["(a+)+", "(a|b*)*", "([a-z]{2,})+", "(a+){3,}", r"\p{L}+", "["])
def test_unsafe_or_foreign_patterns_are_not_checked(pattern: str) -> None:
    assert shapes._compile_pattern(pattern) is None


MOMENT = datetime(2022, 9, 21, 0, 23, 31, 418_000, UTC)
TEXTS = {
    "DatastoreId": DS,
    "ImageSetId": IS,
    "ImageSetExternalVersionId": "7",
    "Arn": IMAGE_SET_ARN,
    "RoleArn": ROLE,
    "S3Uri": "s3://bucket/key",
    "JobId": "0a",
    "KmsKeyArn": FULL["CreateDatastore"]["kmsKeyArn"],
    "LambdaArn": FULL["CreateDatastore"]["lambdaAuthorizerArn"],
    "DICOMStudyInstanceUID": "1.2.3",
    "DICOMSeriesInstanceUID": "1.2.4",
    "DICOMPatientName": "Zoë^東京",
}


def sample(shape: Any, *, full: bool) -> Any:
    """Make up a value of a shape: all members, or the required ones only."""
    match shape.type_name:
        case "structure":
            names = list(shape.members) if full else shape.required_members
            return {name: sample(shape.members[name], full=full) for name in names}
        case "list":
            return [sample(shape.member, full=full)] * 2 if full else []
        case "map":
            return {"key": "Wert Ä", "k2": ""} if full else {}
        case "timestamp":
            return MOMENT
        case "blob":
            return bytes(range(256))
        case kind:
            text = TEXTS.get(shape.name, (shape.metadata.get("enum") or ["text"])[-1])
            return {"boolean": False, "integer": 0}.get(kind, text)


def read_back(client: Client, operation: str, answer: HttpResponse) -> dict[str, Any]:
    client.answer = answer
    result = client.call(operation, MINIMAL[operation])
    metadata = result.pop("ResponseMetadata")
    assert (metadata["HTTPStatusCode"], metadata["RequestId"]) == (answer.status, "id-1")
    for name, value in result.items():
        if hasattr(value, "read"):
            result[name] = value.read()
    return result


@pytest.mark.parametrize("full", [True, False], ids=["full", "minimal"])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_boto3_reads_results_back(protocol: Protocol, client: Client, operation: str, full: bool) -> None:
    result = sample(client.boto.meta.service_model.operation_model(operation).output_shape, full=full)
    assert protocol.check(operation, result) == []
    answer = protocol.serialise(operation, result, "id-1")
    assert answer.status == 200
    assert read_back(client, operation, answer) == result


def test_headers_of_streams(protocol: Protocol) -> None:
    blob = memoryview(bytes(9))
    result = {"imageSetMetadataBlob": blob, "contentType": "application/json", "contentEncoding": "gzip"}
    answer = protocol.serialise("GetImageSetMetadata", result, "r")
    assert answer.body is blob
    assert sorted(answer.headers) == [
        (b"content-encoding", b"gzip"),
        (b"content-type", b"application/json"),
        (b"x-amzn-requestid", b"r"),
    ]
    plain = protocol.serialise("GetImageFrame", {"imageFrameBlob": b"x", "contentType": None}, "r")
    assert plain.headers == [(b"x-amzn-requestid", b"r")]


def test_absent_members_and_times_on_the_wire(protocol: Protocol) -> None:
    east = timezone(timedelta(hours=2))
    properties = {
        "datastoreId": DS,
        "kmsKeyArn": None,
        "createdAt": datetime(2022, 9, 21, 2, 23, 31, 418_499, east),
        "updatedAt": datetime(2022, 9, 21, 0, 23, 31),
    }
    answer = protocol.serialise("GetDatastore", {"datastoreProperties": properties, "other": None}, "r")
    assert json.loads(bytes(answer.body)) == {
        "datastoreProperties": {"datastoreId": DS, "createdAt": 1663719811.418, "updatedAt": 1663719811.0}
    }
    assert (b"content-type", b"application/json") in answer.headers


def test_check_finds_what_is_wrong(protocol: Protocol) -> None:
    assert protocol.check("TagResource", {}) == []
    assert protocol.check("TagResource", {"x": 1}) == [
        "Value at 'x' failed to satisfy constraint: Member must be in the model"
    ]
    assert len(protocol.check("GetDatastore", {})) == 1
    properties = {
        "datastoreId": "X",
        "datastoreName": "n",
        "datastoreStatus": "GONE",
        "createdAt": "soon",
        "y": 1,
    }
    found = "".join(protocol.check("GetDatastore", {"datastoreProperties": properties}))
    assert [found.count(f"datastoreProperties.{name}'") for name in properties] == [1, 0, 1, 1, 1]
    assert protocol.check("GetImageFrame", {"imageFrameBlob": "text"}) != []
    assert protocol.check("GetImageFrame", {"imageFrameBlob": memoryview(b"x")}) == []


MODEL_ERRORS = [
    (shape.name, shape.metadata["error"]["httpStatusCode"])
    for shape in model_shapes()
    if shape.metadata.get("exception")
]


@pytest.mark.parametrize(
    ("code", "status"), [*MODEL_ERRORS, ("InvalidSignatureException", 403), ("InternalFailure", 500)]
)
def test_boto3_reads_faults_back(protocol: Protocol, client: Client, code: str, status: int) -> None:
    is_model = (code, status) in MODEL_ERRORS
    fault = ServiceFault(code, "what – went wrong", 0 if is_model else status)
    client.answer = protocol.serialise_fault(fault, "id-2")
    with pytest.raises(ClientError) as caught:
        client.call("GetDatastore", MINIMAL["GetDatastore"])
    answer = caught.value.response
    assert answer["Error"] == {"Code": code, "Message": "what – went wrong"}
    assert answer["ResponseMetadata"]["HTTPStatusCode"] == status
    assert answer["ResponseMetadata"]["RequestId"] == "id-2"
    if is_model:
        assert type(caught.value).__name__ == code
        assert protocol.error_status(code) == status


def test_error_statuses(protocol: Protocol) -> None:
    assert len(MODEL_ERRORS) == 9
    assert protocol.error_status("ServiceQuotaExceededException") == 402
    assert protocol.error_status("NoSuchThing") == 500


def test_fault_survives_pickle() -> None:
    fault = pickle.loads(pickle.dumps(ServiceFault("A", "b", 403)))
    assert (fault.code, fault.text, fault.status, str(fault)) == ("A", "b", 403, "A: b")


def test_unknown_service() -> None:
    with pytest.raises(LocalStoreError):
        Protocol("no-such-service")


NAMES = st.sampled_from(sorted({name for shape in model_shapes() for name in getattr(shape, "members", {})}))
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=40)
    | st.sampled_from([DS, "EQUAL", "YQ=="]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5) | NAMES, inner, max_size=5),
    max_leaves=20,
)
SEGMENTS = st.sampled_from(
    ["datastore", DS, "imageSet", IS, "tags", "getImageFrame", "searchImageSets", ARN, "%", "%FF"]
)
PATHS = st.text(max_size=80) | st.lists(SEGMENTS | st.text(max_size=4), max_size=7).map(lambda p: "/" + "/".join(p))
REAL_PATHS = st.sampled_from([Client().request(name, FULL[name]) for name in OPERATIONS])
QUERIES = st.text(max_size=60) | st.lists(st.tuples(NAMES | st.just("version"), st.text(max_size=9)), max_size=5).map(
    lambda pairs: "&".join(f"{key}={value}" for key, value in pairs)
)
BODIES = st.binary(max_size=200) | JSON.map(lambda value: json.dumps(value).encode())


def parse_or_refuse(protocol: Protocol, request: HttpRequest) -> None:
    try:
        outcome: Any = protocol.parse(request)
    except ServiceFault as fault:
        outcome = fault
    if isinstance(outcome, ServiceFault):
        assert protocol.serialise_fault(outcome, "r").status in (400, 404)
    else:
        assert outcome.operation in OPERATIONS


@given(st.sampled_from(["GET", "POST", "DELETE"]) | st.text(max_size=6), PATHS, QUERIES, BODIES)
@settings(max_examples=400, deadline=None)
def test_anything_is_parsed_or_refused(method: str, path: str, query: str, body: bytes) -> None:
    parse_or_refuse(REFERENCE, HttpRequest(method, path, query, {}, body))


@given(REAL_PATHS, QUERIES, BODIES)
@settings(max_examples=600, deadline=None)
def test_anything_sent_to_a_real_path_is_parsed_or_refused(real: HttpRequest, query: str, body: bytes) -> None:
    parse_or_refuse(REFERENCE, HttpRequest(real.method, real.raw_path, query, {}, body))
    parse_or_refuse(REFERENCE, HttpRequest(real.method, real.raw_path, real.query, {}, body))


@given(REAL_PATHS, st.data())
@settings(max_examples=300, deadline=None)
def test_damaged_bodies_are_parsed_or_refused(real: HttpRequest, data: st.DataObject) -> None:
    body = bytearray(real.body or b"{}")
    place = data.draw(st.integers(0, len(body) - 1))
    body[place] = data.draw(st.integers(0, 255))
    parse_or_refuse(REFERENCE, HttpRequest(real.method, real.raw_path, real.query, {}, bytes(body)))
