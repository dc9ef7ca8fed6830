"""Fixtures every test may use: an embedded store of the module's own, real files, and no network.

The store's fixtures live as long as a module: starting a server takes half a second. A test that
must not see what others imported makes a data store of its own (`new_datastore`), and one that
stops or kills servers a folder of its own.
"""

from __future__ import annotations

import ipaddress
import json
import os
import socket
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import boto3
import pydicom
import pytest
from botocore.config import Config

from ahi_ml.local.process import Lease, attach
from ahi_ml.local.uris import MACHINE_BUCKET

ROLE = "arn:aws:iam::123456789012:role/import"
"""A role that import jobs name; the embedded store takes any."""

_MOTO = """
import sys
from moto.server import ThreadedMotoServer

server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
server.start()
print(server.get_host_and_port()[1], flush=True)
sys.stdin.read()  # until the tests are over, however they end
server.stop()
"""


@dataclass(frozen=True)
class Imported:
    """What an import job left behind.

    Parameters
    ----------
    job : dict
        ``jobProperties`` at its end.
    manifest : dict
        ``jobSummary`` of its manifest.
    successes, failures, warnings : list of dict
        The lines of its three reports.
    """

    job: dict[str, Any]
    manifest: dict[str, Any]
    successes: list[dict[str, Any]]
    failures: list[dict[str, Any]]
    warnings: list[dict[str, Any]]

    def image_set_of(self, name: str) -> str:
        """The image set that a file went into, by its name."""
        (line,) = (line for line in self.successes if Path(line["inputFile"]).name == name)
        return str(line["importResponse"]["imageSetId"])

    def failure_of(self, name: str) -> str:
        """Why a file failed, by its name."""
        (line,) = (line for line in self.failures if Path(line["inputFile"]).name == name)
        return str(line["exception"]["message"])


ImportFolder = Callable[..., Imported]


@pytest.fixture(autouse=True, scope="session")
def _loopback_only() -> Iterator[None]:
    """Refuse connections to other machines, and keep the user's AWS settings out of the tests."""
    if os.environ.get("AHI_ML_TEST_DATASTORE"):  # tests marked `aws` need both
        yield
        return

    def is_loopback(host: str) -> bool:
        try:
            return ipaddress.ip_address(host.partition("%")[0]).is_loopback
        except ValueError:
            return host == "localhost"

    def guarded(connect: Callable[..., Any]) -> Callable[..., Any]:
        def checked(self: socket.socket, address: Any) -> Any:
            internet = self.family in (socket.AF_INET, socket.AF_INET6)
            if internet and self.type & socket.SOCK_STREAM and not is_loopback(str(address[0])):
                raise RuntimeError(f"a test connects to {address[0]}: tests talk to this machine only")
            return connect(self, address)

        return checked

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", guarded(socket.socket.connect))
        patch.setattr(socket.socket, "connect_ex", guarded(socket.socket.connect_ex))
        for name in [name for name in os.environ if name.startswith("AWS_")]:
            patch.delenv(name)
        patch.setenv("AWS_CONFIG_FILE", os.devnull)
        patch.setenv("AWS_SHARED_CREDENTIALS_FILE", os.devnull)
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        yield


def _client_of(lease: Lease, **options: Any) -> Any:
    return boto3.client(
        "medical-imaging",
        region_name=lease.endpoint.region,
        endpoint_url=lease.endpoint.url,
        aws_access_key_id=options.pop("access_key_id", lease.keys.access_key_id),
        aws_secret_access_key=options.pop("secret_access_key", lease.keys.secret_access_key),
        config=Config(inject_host_prefix=False, retries={"total_max_attempts": 1}, **options),
    )


@pytest.fixture(scope="module")
def store_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the module's embedded store."""
    return tmp_path_factory.mktemp("embedded") / "store"


@pytest.fixture(scope="module")
def lease(store_folder: Path) -> Iterator[Lease]:
    """A hold on the server of `store_folder`."""
    held = attach(store_folder)
    yield held
    held.close()


@pytest.fixture(scope="module")
def client(lease: Lease) -> Any:
    """A boto3 client of the module's embedded store."""
    return _client_of(lease)


@pytest.fixture(scope="module")
def new_datastore(client: Any) -> Callable[..., str]:
    """Makes a data store and returns its id: ``new_datastore(name, **options)``."""

    def make(name: str = "another", **options: Any) -> str:
        token = os.urandom(8).hex()
        return str(client.create_datastore(datastoreName=name, clientToken=token, **options)["datastoreId"])

    return make


@pytest.fixture(scope="module")
def datastore_id(new_datastore: Callable[..., str]) -> str:
    """The data store named ``default``."""
    return new_datastore("default")


@pytest.fixture(scope="session")
def client_of() -> Callable[..., Any]:
    """Makes a boto3 client of any lease's store: ``client_of(lease, access_key_id=..., **config)``."""
    return _client_of


@pytest.fixture(scope="session")
def import_folder(tmp_path_factory: pytest.TempPathFactory) -> ImportFolder:
    """Imports a folder to its end: ``import_folder(client, datastore_id, folder) -> Imported``."""

    def run(client: Any, datastore_id: str, folder: Path) -> Imported:
        job_id = client.start_dicom_import_job(
            datastoreId=datastore_id,
            dataAccessRoleArn=ROLE,
            clientToken=os.urandom(8).hex(),
            inputS3Uri=f"s3://{MACHINE_BUCKET}{folder}/",
            outputS3Uri=f"s3://{MACHINE_BUCKET}{tmp_path_factory.mktemp('reports')}/",
        )["jobId"]
        deadline = time.monotonic() + 60
        while True:
            job = client.get_dicom_import_job(datastoreId=datastore_id, jobId=job_id)["jobProperties"]
            if job["jobStatus"] in ("COMPLETED", "FAILED"):
                break
            assert time.monotonic() < deadline, f"the import job is still {job['jobStatus']}"
            time.sleep(0.01)
        output = Path(job["outputS3Uri"].removeprefix(f"s3://{MACHINE_BUCKET}"))
        manifest: dict[str, Any] = {}
        if job["jobStatus"] == "COMPLETED":
            manifest = json.loads((output / "job-output-manifest.json").read_text())["jobSummary"]

        def lines(name: str) -> list[dict[str, Any]]:
            file = output / name.upper() / f"{name}.ndjson"
            return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

        return Imported(job, manifest, lines("success"), lines("failure"), lines("warning"))

    return run


@pytest.fixture(scope="module")
def moto_s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of an empty S3 on loopback; boto3 and s3fs go there, with made-up credentials, meanwhile.

    In a process of its own: moto puts its hands into botocore when it is imported.
    """
    pytest.importorskip("flask_cors", reason="the server of moto needs flask and flask-cors: see the extra 'test'")
    import s3fs

    log = tmp_path_factory.mktemp("moto") / "log"  # a line for every request: a pipe that nobody reads would fill
    with log.open("w") as messages:
        started = subprocess.Popen(
            [sys.executable, "-c", _MOTO], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=messages, text=True
        )
    assert started.stdin is not None
    assert started.stdout is not None
    port = started.stdout.readline().strip()
    if not port.isdigit():
        started.kill()
        raise RuntimeError(f"moto does not start: {log.read_text()[-2000:]}")
    url = f"http://127.0.0.1:{port}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ACCESS_KEY_ID", "made-up")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "made-up")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        patch.setenv("AWS_ENDPOINT_URL_S3", url)
        patch.setattr(boto3, "DEFAULT_SESSION", None)  # it keeps credentials; so do the instances of s3fs
        s3fs.S3FileSystem.clear_instance_cache()
        yield url
    s3fs.S3FileSystem.clear_instance_cache()
    started.stdin.close()
    started.wait(30)
    started.stdout.close()


@pytest.fixture(scope="session")
def entry_points_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that shows, once it is on ``sys.path``, the entry points an installation of this checkout has."""
    project = tomllib.loads((Path(__file__).resolve().parents[1] / "pyproject.toml").read_text())["project"]
    lines = []
    for group, entries in project["entry-points"].items():
        lines += [f"[{group}]", *(f"{name} = {value}" for name, value in entries.items())]
    folder = tmp_path_factory.mktemp("installed")
    info = folder / "ahi_ml_of_this_checkout-0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: ahi-ml-of-this-checkout\nVersion: 0\n")
    (info / "entry_points.txt").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture(scope="session")
def pydicom_files() -> list[Path]:
    """The DICOM files that pydicom's own package brings; nothing is downloaded."""
    folder = Path(pydicom.__file__).parent / "data"
    return sorted(folder.glob("test_files/*.dcm")) + sorted(folder.glob("charset_files/*.dcm"))


@pytest.fixture(scope="session")
def pydicom_file(pydicom_files: list[Path]) -> Callable[[str], Path]:
    """Finds one of them by its name."""
    return {path.name: path for path in pydicom_files}.__getitem__


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real series and odd files, or a skip when it is not there.

    ``AHI_ML_TEST_DATA`` names it; otherwise it is ``shared/data`` beside the repository.
    """
    beside = Path(__file__).resolve().parents[2] / "shared" / "data"
    folder = Path(os.environ.get("AHI_ML_TEST_DATA") or beside)
    if not (folder / "INVENTORY.csv").is_file():
        pytest.skip("no folder of real files: set AHI_ML_TEST_DATA")
    return folder
