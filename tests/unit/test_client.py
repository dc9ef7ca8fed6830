"""Botocore's errors as the tree's, errors that travel, and what each process makes for itself."""

from __future__ import annotations

import inspect
import multiprocessing
import os
import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import botocore.exceptions
import botocore.loaders
import pytest
from botocore.config import Config
from botocore.parsers import ResponseParserError

import ahi_ml
from ahi_ml import errors
from ahi_ml.client import AccessKeys, Service, sessions, translated
from ahi_ml.client.transport import lean_endpoint
from ahi_ml.errors import (
    AccessDeniedError,
    AhiError,
    ConfigError,
    ConflictError,
    ConnectionFailedError,
    NotFoundError,
    ServiceError,
    ThrottledError,
)
from ahi_ml.perprocess import PerProcess
from ahi_ml.store import DataStore, connect

ERRORS = [getattr(errors, name) for name in errors.__all__]
PLAIN = {"ValidationException", "BadRequestException", "NotAcceptableException", "InternalServerException"}


def model() -> dict[str, Any]:
    return dict(botocore.loaders.Loader().load_service_model("medical-imaging", "service-2"))


def error_shapes() -> list[tuple[str, int]]:
    shapes = model()["shapes"]
    return [
        (name, shape.get("error", {}).get("httpStatusCode", 500))
        for name, shape in sorted(shapes.items())
        if shape.get("exception")
    ]


def raised(error: Exception, operation: str = "GetImageSet", where: str = "image set 0aaf") -> AhiError:
    with pytest.raises(AhiError) as caught, translated(operation, where):
        raise error
    assert caught.value.__cause__ is error
    return caught.value


def answer(code: str, status: int, message: str = "no") -> botocore.exceptions.ClientError:
    return botocore.exceptions.ClientError(
        {
            "Error": {"Code": code, "Message": message},
            "ResponseMetadata": {"HTTPStatusCode": status, "RequestId": "request-1"},
        },
        "GetImageSet",
    )


class TestAnswers:
    @pytest.mark.parametrize(("code", "status"), error_shapes())
    def test_every_error_of_the_model_has_a_class(self, code: str, status: int) -> None:
        found = raised(answer(code, status))
        assert isinstance(found, ServiceError)
        assert (type(found) is ServiceError) == (code in PLAIN)
        assert (found.operation, found.code, found.status, found.request_id) == (
            "GetImageSet",
            code,
            status,
            "request-1",
        )
        for part in ("GetImageSet", "image set 0aaf", code, "no", "request-1"):
            assert part in str(found)

    @pytest.mark.parametrize(
        ("code", "status", "kind"),
        [
            ("ResourceNotFoundException", 404, NotFoundError),
            ("AccessDeniedException", 403, AccessDeniedError),
            ("ExpiredTokenException", 403, AccessDeniedError),
            ("UnrecognizedClientException", 403, AccessDeniedError),
            ("InvalidSignatureException", 403, AccessDeniedError),
            ("ConflictException", 409, ConflictError),
            ("ThrottlingException", 429, ThrottledError),
            ("ServiceQuotaExceededException", 402, ThrottledError),
            # answers of something between here and the service
            ("404", 404, NotFoundError),
            ("Forbidden", 403, AccessDeniedError),
            ("Unknown", 401, AccessDeniedError),
            ("SomethingNew", 409, ConflictError),
            ("429", 429, ThrottledError),
            ("SomethingNew", 418, ServiceError),
        ],
    )
    def test_kinds(self, code: str, status: int, kind: type[ServiceError]) -> None:
        assert type(raised(answer(code, status))) is kind

    @pytest.mark.parametrize(
        ("code", "status", "retryable"),
        [
            ("ThrottlingException", 429, True),
            ("429", 429, True),
            ("InternalServerException", 500, True),
            ("Unknown", 503, True),
            ("ValidationException", 400, False),
            ("AccessDeniedException", 403, False),
            ("ResourceNotFoundException", 404, False),
        ],
    )
    def test_what_may_succeed_later(self, code: str, status: int, retryable: bool) -> None:
        found = raised(answer(code, status))
        assert isinstance(found, ServiceError)
        assert found.retryable is retryable

    def test_an_answer_without_anything(self) -> None:
        found = raised(botocore.exceptions.ClientError({}, "GetImageSet"))
        assert type(found) is ServiceError
        assert found.status == 0


def botocore_error(kind: type[Exception]) -> Exception:
    """An error of botocore with something for every name its message uses."""
    fmt = getattr(kind, "fmt", "")
    names = {name.split("[")[0].split(".")[0].split("!")[0] for name in _names(fmt)}
    return kind(**{name: Exception("x") if name == "error" else "x" for name in names | {"error"} if name})


def _names(fmt: str) -> list[str]:
    import string

    return [name for _, name, _, _ in string.Formatter().parse(fmt) if name]


CONNECTION = [
    botocore.exceptions.ConnectionError,
    botocore.exceptions.EndpointConnectionError,
    botocore.exceptions.ConnectTimeoutError,
    botocore.exceptions.ReadTimeoutError,
    botocore.exceptions.ConnectionClosedError,
    botocore.exceptions.ProxyConnectionError,
    botocore.exceptions.SSLError,
    botocore.exceptions.HTTPClientError,
    botocore.exceptions.ResponseStreamingError,
    botocore.exceptions.IncompleteReadError,
]
ACCESS = [
    botocore.exceptions.NoCredentialsError,
    botocore.exceptions.PartialCredentialsError,
    botocore.exceptions.CredentialRetrievalError,
    botocore.exceptions.TokenRetrievalError,
    botocore.exceptions.SSOTokenLoadError,
    botocore.exceptions.UnauthorizedSSOTokenError,
    botocore.exceptions.NoAuthTokenError,
]
CONFIG = [
    botocore.exceptions.NoRegionError,
    botocore.exceptions.ProfileNotFound,
    botocore.exceptions.ParamValidationError,
    botocore.exceptions.InvalidRegionError,
    botocore.exceptions.ConfigParseError,
]


class TestBotocore:
    @pytest.mark.parametrize("kind", CONNECTION)
    def test_no_answer(self, kind: type[Exception]) -> None:
        found = raised(botocore_error(kind))
        assert type(found) is ConnectionFailedError
        assert found.retryable
        assert "GetImageSet for image set 0aaf" in str(found)

    def test_an_answer_nobody_can_read(self) -> None:
        assert type(raised(ResponseParserError("not JSON"))) is ConnectionFailedError

    @pytest.mark.parametrize("kind", ACCESS)
    def test_no_credentials(self, kind: type[Exception]) -> None:
        found = raised(botocore_error(kind))
        assert type(found) is AccessDeniedError
        assert "AWS_PROFILE" in str(found)

    @pytest.mark.parametrize("kind", CONFIG)
    def test_configuration(self, kind: type[Exception]) -> None:
        assert type(raised(botocore_error(kind))) is ConfigError

    def test_no_error_of_botocore_escapes(self) -> None:
        for kind in vars(botocore.exceptions).values():
            if not inspect.isclass(kind) or kind is botocore.exceptions.WaiterError:  # nothing here waits by botocore
                continue
            if issubclass(kind, botocore.exceptions.BotoCoreError):
                assert isinstance(raised(botocore_error(kind)), AhiError), kind

    def test_other_errors_pass(self) -> None:
        with pytest.raises(ZeroDivisionError), translated("GetImageSet"):
            raise ZeroDivisionError
        with pytest.raises(ConfigError, match=r"^ours$"), translated("GetImageSet"):
            raise ConfigError("ours")


class TestConnecting:
    """Against the real botocore, without a service."""

    STORE = "0123456789abcdef0123456789abcdef"

    @pytest.fixture(autouse=True)
    def _keys(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIDEXAMPLE")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret-example")

    def test_nobody_listens(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("botocore.endpoint.time", SimpleNamespace(sleep=lambda pause: None))  # between attempts
        store = ahi_ml.connect(self.STORE, region="us-east-1", endpoint_url="http://127.0.0.1:9")
        with pytest.raises(ConnectionFailedError, match="SearchImageSets") as caught:
            store.search().count()
        assert caught.value.retryable
        store.close()

    @pytest.mark.parametrize(
        "options",
        [
            {},
            {"region": "nowhere at all"},
            {"region": "us-east-1", "profile": "absent"},
            {"region": "us-east-1", "endpoint_url": "not a url"},
            {"region": "us-east-1", "endpoint_url": "localhost:8080"},
        ],
    )
    def test_options_that_cannot_work(self, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
        for name in ("AWS_REGION", "AWS_DEFAULT_REGION"):
            monkeypatch.delenv(name, raising=False)
        store = ahi_ml.connect(self.STORE, **options)
        with pytest.raises(ConfigError):
            _ = store.client

    def test_no_credentials(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("AWS_ACCESS_KEY_ID")
        monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
        store = ahi_ml.connect(self.STORE, region="us-east-1", endpoint_url="http://127.0.0.1:9")
        with pytest.raises(AccessDeniedError, match="AWS_PROFILE"):
            store.search().count()

    def test_secrets_stay_out_of_reprs(self) -> None:
        keys = AccessKeys("AKIDEXAMPLE", "secret-example")
        assert "secret" not in repr(keys)
        assert "secret" not in repr(Service(keys=keys))


class TestErrors:
    @pytest.mark.parametrize("kind", ERRORS)
    def test_one_string_makes_one(self, kind: type[AhiError]) -> None:
        assert str(kind("the message")) == "the message"
        assert issubclass(kind, AhiError)
        assert str(kind()) == ""
        assert not hasattr(kind("x"), "message")

    @pytest.mark.parametrize("kind", ERRORS)
    def test_they_pickle_with_what_they_know(self, kind: type[AhiError]) -> None:
        options = [
            name
            for name, parameter in inspect.signature(kind).parameters.items()
            if parameter.kind is inspect.Parameter.KEYWORD_ONLY
        ]
        error = kind("the message", **dict.fromkeys(options, "known"))
        error.__cause__ = ValueError("why")
        again = pickle.loads(pickle.dumps(error))
        assert type(again) is kind
        assert str(again) == "the message"
        assert again.__dict__ == error.__dict__
        assert all(getattr(again, name) == "known" for name in options)
        rebuilt = type(error)(str(error))  # as torch raises a worker's error anew
        assert str(rebuilt) == "the message"

    def test_builtin_kinds(self) -> None:
        assert issubclass(ConfigError, ValueError)
        assert issubclass(NotFoundError, LookupError)
        assert issubclass(errors.DataError, ValueError)


def _child_value(thing: PerProcess[list[int]], queue: Any) -> None:
    queue.put((thing.get(), thing.take(), thing.take(), os.getpid()))


class TestPerProcess:
    def test_made_once_and_on_first_use(self) -> None:
        made: list[int] = []
        thing = PerProcess(lambda: made.append(1) or object())
        assert made == []
        assert thing.get() is thing.get()
        assert made == [1]

    def test_taken_it_is_made_anew(self) -> None:
        thing = PerProcess(object)
        assert thing.take() is None
        first = thing.get()
        assert thing.take() is first
        assert thing.take() is None
        assert thing.get() is not first

    @pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
    def test_a_forked_child_makes_its_own(self) -> None:
        thing = PerProcess(lambda: [os.getpid()])
        mine = thing.get()
        context = multiprocessing.get_context("fork")
        queue = context.Queue()
        process = context.Process(target=_child_value, args=(thing, queue))
        process.start()
        theirs, taken, again, pid = queue.get(timeout=30)
        process.join(30)
        assert theirs == taken == [pid] != mine
        assert again is None
        assert thing.get() is mine

    @pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
    def test_a_child_takes_nothing_of_its_parent(self) -> None:
        thing = PerProcess(lambda: [os.getpid()])
        thing.get()
        pid = os.fork()
        if not pid:
            os._exit(0 if thing.take() is None else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


class TestHandlersOfTheClient:
    """They cannot be carried to another process: whoever sends a store there hears of it."""

    @pytest.fixture
    def hooked(self) -> Iterator[DataStore]:
        sessions._warn_of_handlers.cache_clear()
        with connect("d" * 32, region="us-east-1", endpoint_url="http://127.0.0.1:9") as store:
            store.client.meta.events.register("before-sign.medical-imaging", lambda **_: None)
            yield store

    def test_pickling_warns_once(self, hooked: DataStore, caplog: pytest.LogCaptureFixture) -> None:
        for _ in range(2):
            pickle.dumps(hooked)
        (warned,) = [each for each in caplog.records if each.levelname == "WARNING"]
        assert "event handlers of store.client stay in the process that registered them" in warned.getMessage()
        assert "workers send requests without them" in warned.getMessage()

    @pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
    @pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
    def test_a_forked_child_warns_once(self, hooked: DataStore, caplog: pytest.LogCaptureFixture) -> None:
        pickle.dumps(hooked)  # the parent's own warning does not count
        caplog.clear()
        pid = os.fork()
        if not pid:
            _ = hooked.client, hooked.client
            pickle.dumps(hooked)
            os._exit(len(caplog.records))
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 1
        assert not caplog.records

    def test_without_handlers_nobody_warns(self, caplog: pytest.LogCaptureFixture) -> None:
        sessions._warn_of_handlers.cache_clear()
        with connect("d" * 32, region="us-east-1", endpoint_url="http://127.0.0.1:9") as store:
            pickle.dumps(store)
            _ = store.client
            pickle.dumps(store)
        assert not [each for each in caplog.records if each.levelname == "WARNING"]


def test_importing_the_package_imports_no_boto3() -> None:
    code = "import sys, ahi_ml; sys.exit(any(name in sys.modules for name in ('boto3', 'torch', 'xarray', 'pandas')))"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(ahi_ml.__file__).parents[1])


class TestConfig:
    """What boto3 takes by a Config only reaches the client, the frames, and other processes."""

    CONFIG = Config(client_cert=("/client.pem", "/client.key"), proxies={"https": "http://p:3128"}, read_timeout=7)

    @pytest.fixture(autouse=True)
    def _somebody(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIAIOSFODNN7EXAMPLE")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")

    def test_it_is_the_clients_and_the_frames(self, tmp_path: Path) -> None:
        store = connect("0" * 32, region="us-east-1", config=self.CONFIG, cache=tmp_path)
        for each in (store, pickle.loads(pickle.dumps(store))):
            config = each.client.meta.config
            assert config.client_cert == ("/client.pem", "/client.key")
            assert (config.read_timeout, config.connect_timeout) == (7, 5), "what it leaves open is ours"
            endpoint = lean_endpoint(each._sessions.get().connection)
            assert endpoint is not None
            assert endpoint.client_certificate == ("/client.pem", "/client.key")
            assert endpoint.proxy == "http://p:3128"
            assert endpoint.read_timeout_s == 7

    def test_it_is_none_of_a_folders_options(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="config"):
            connect(tmp_path / "store", config=self.CONFIG)
        assert not (tmp_path / "store").exists()

    def test_it_is_in_no_repr(self, tmp_path: Path) -> None:
        config = Config(proxies={"https": "http://user:secret@p:3128"})
        store = connect("0" * 32, region="us-east-1", config=config, cache=tmp_path)
        assert "secret" not in f"{store!r} {store._target!r} {store._target.service!r}"
