"""The command line as a shell sees it: what is on stdout, what on stderr, and how it ends."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import boto3
import numpy as np
import pandas as pd
import psutil
import pydicom
import pytest

import ahi_ml
from ahi_ml.cli import main
from ahi_ml.index import DatasetIndex
from ahi_ml.store import DataStore

COMMANDS = ("demo", "serve", "import", "search", "index", "split", "show", "fetch", "features", "cache")
SCRIPT = Path(sysconfig.get_path("scripts")) / "ahi-ml"

FEATURES = """
def mean(volume):
    return {"mean": float(volume.mean()), "slices": volume.shape[0]}

def fails(volume):
    raise RuntimeError("no such luck")
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cli")


@pytest.fixture(scope="module")
def environment(root: Path) -> dict[str, str]:
    return {**os.environ, "AHI_ML_CACHE": str(root / "cache"), "PYTHONWARNINGS": "ignore", "COLUMNS": "200"}


@dataclass(frozen=True)
class Done:
    """What a command said."""

    stdout: str
    stderr: str


Run = Callable[..., Done]


@pytest.fixture(scope="module")
def run(root: Path, environment: dict[str, str]) -> Run:
    """Runs the command line in the module's folder, in this process: a new one takes a second to start."""

    def call(*words: object, code: int = 0, **variables: str) -> Done:
        out, said = io.StringIO(), io.StringIO()
        ended: Any = 0
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(root)
            patch.setattr(sys, "argv", ["ahi-ml", *map(str, words)])
            patch.setattr(sys, "stdin", io.StringIO())
            patch.setattr(sys, "path", list(sys.path))
            for name, value in {**environment, **variables}.items():
                patch.setenv(name, value)
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(said):
                try:
                    main()
                except SystemExit as end:
                    ended = end.code or 0
        assert ended == code, (ended, out.getvalue(), said.getvalue())
        return Done(out.getvalue(), said.getvalue())

    return call


def data(done: Done) -> Any:
    """The one JSON value on stdout, as strict readers take it."""

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is not JSON")

    return json.loads(done.stdout, parse_constant=refuse)


@pytest.fixture(scope="module", autouse=True)
def held(root: Path) -> Iterator[DataStore]:
    """Keeps one server for all commands of the module."""
    store = ahi_ml.connect(root / "store", cache=root / "cache")
    _ = store.client
    yield store
    store.close()


@pytest.fixture(scope="module")
def imported(root: Path, run: Run, held: DataStore, pydicom_file: Callable[[str], Path]) -> Done:
    """What ``ahi-ml import`` says of two good series, a report and a text file."""
    files = root / "files"
    files.mkdir()
    for name in ("CT_small.dcm", "MR_small.dcm", "reportsi.dcm"):
        shutil.copy(pydicom_file(name), files)
    for number in range(3):  # a series of three slices
        made = pydicom.dcmread(pydicom_file("CT_small.dcm"))
        made.SeriesInstanceUID, made.SOPInstanceUID = "2.25.1", f"2.25.1.{number}"
        made.file_meta.MediaStorageSOPInstanceUID = made.SOPInstanceUID
        made.PatientID, made.StudyInstanceUID = "another", "2.25.2"
        made.ImagePositionPatient = [0, 0, 5 * number]
        made.save_as(files / f"slice{number}.dcm")
    (files / "notes.txt").write_text("not DICOM")
    (root / "my_features.py").write_text(FEATURES)
    return run("import", "store", "files", "--json", code=3)


@pytest.fixture(scope="module")
def indexed(root: Path, run: Run, imported: object) -> Path:
    run("index", "store", "-o", "all.arrow")
    return root / "all.arrow"


def shell(root: Path, environment: dict[str, str], *words: str) -> subprocess.CompletedProcess[str]:
    """Runs the installed script."""
    return subprocess.run(
        [os.fspath(SCRIPT), *words],
        capture_output=True,
        text=True,
        cwd=root,
        env=environment,
        stdin=subprocess.DEVNULL,
        timeout=60,
        check=False,
    )


class TestHelp:
    def test_version(self, root: Path, environment: dict[str, str]) -> None:
        done = shell(root, environment, "--version")
        assert (done.returncode, done.stdout, done.stderr) == (0, f"{ahi_ml.__version__}\n", "")

    def test_an_error_is_a_line(self, root: Path, environment: dict[str, str]) -> None:
        done = shell(root, environment, "fetch", "store", "no-such.arrow")
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr == f"ahi-ml: no index at {root / 'no-such.arrow'}\n"

    def test_help_names_every_command(self, run: Run) -> None:
        text = run("--help").stdout
        for command in COMMANDS:
            assert f" {command} " in text

    @pytest.mark.parametrize("command", COMMANDS)
    def test_each_command_has_an_example(self, run: Run, command: str) -> None:
        text = run(command, "--help").stdout
        assert "Example: " in text
        assert f"ahi-ml {command}" in text.partition("Example: ")[2]
        for credential in ("secret", "access-key", "password"):  # never on the command line
            assert credential not in text.lower()

    @pytest.mark.parametrize(
        "words",
        [
            ["nonsense"],
            ["index", "store"],
            ["search"],
            ["search", "store", "--nonsense"],
            ["search", "0123456789abcdef0123456789abcde"],
            ["search", "store", "--region", "us-east-1"],
            ["search", "store", "--study-date", "yesterday"],
            ["import", "store", "no-such-folder"],
            ["split", "no-such.arrow", "train=1"],
            ["fetch", "store", "no-such.arrow"],
            ["features", "store", "no-such.arrow", "my_features:mean"],
            ["serve", "store", "--faults", "no-such.json"],
        ],
    )
    def test_mistakes_in_use_are_2(self, run: Run, words: list[str]) -> None:
        done = run(*words, code=2)
        assert done.stdout == ""
        assert done.stderr

    def test_an_absent_series_is_1(self, run: Run, imported: object) -> None:
        done = run("show", "store", "1.2.3.4", code=1)
        assert done.stdout == ""
        assert done.stderr.startswith("ahi-ml: ")

    def test_a_file_that_cannot_be_written_is_1(self, run: Run, root: Path, imported: object) -> None:
        done = run("index", "store", "-o", "files/notes.txt/index.arrow", code=1)
        assert done.stderr.strip().splitlines()[-1].startswith("ahi-ml: ")


class TestMainJob:
    def test_import(self, imported: Done) -> None:
        report = data(imported)
        assert (report["status"], report["scanned"], report["imported"]) == ("COMPLETED", 7, 6)
        assert len(report["image_sets"]) == 4
        (failure,) = report["failed"]
        assert failure["input_file"].endswith("notes.txt")
        assert f"{failure['input_file']}: {failure['reason']}" in imported.stderr

    def test_import_quietly(self, run: Run, root: Path, imported: object) -> None:
        (root / "good").mkdir()
        shutil.copy(root / "files" / "MR_small.dcm", root / "good")
        done = run("import", "store", "good", "--quiet")
        assert "1 of 1 files" in done.stdout
        assert done.stderr == ""

    def test_search(self, run: Run, imported: object) -> None:
        found = data(run("search", "store", "--json", "--quiet"))
        assert {each["modality"] for each in found} == {"CT", "MR", "SR"}
        assert all(isinstance(each["series_number"], int | None) for each in found)
        only = data(run("search", "store", "--modality", "CT", "--modality", "MR", "--json"))
        assert len(only) == 3
        assert data(run("search", "store", "--study-date", "20040826", "--json"))[0]["modality"] == "MR"
        assert len(data(run("search", "store", "--study-date", "20040101:20041231", "--json"))) == 3
        assert data(run("search", "store", "--patient-id", "nobody", "--json")) == []
        assert len(data(run("search", "store", "--series-uid", "2.25.1", "--all", "--json"))) == 1
        table = run("search", "store").stdout
        assert table.split()[:2] == ["image_set_id", "version_id"]

    def test_index(self, run: Run, indexed: Path) -> None:
        summary = data(run("index", "store", "-o", "ct.arrow", "--modality", "CT", "--json", "--quiet"))
        assert (summary["frames"], summary["series"]) == (4, 2)
        index = DatasetIndex.load(indexed.with_name("ct.arrow"))
        assert index.snapshot_id == summary["snapshot_id"]
        assert indexed.with_name("ct.arrow.key").exists()
        assert run("index", "store", "-o", "none.arrow", "--modality", "XA").stdout.count("empty") == 1

    def test_indexing_again_keeps_the_patient_keys(self, run: Run, indexed: Path) -> None:
        before = DatasetIndex.load(indexed).series["patient_key"]
        run("index", "store", "-o", "all.arrow")
        assert (DatasetIndex.load(indexed).series["patient_key"] == before).all()

    def test_split(self, run: Run, indexed: Path) -> None:
        parts = data(run("split", "all.arrow", "train=0.5", "val=0.5", "--seed", "1", "--json"))
        assert [each["part"] for each in parts] == ["train", "val"]
        loaded = [DatasetIndex.load(each["path"]) for each in parts]
        assert [len(part) for part in loaded] == [each["frames"] for each in parts]
        assert sum(map(len, loaded)) == len(DatasetIndex.load(indexed))
        assert [Path(each["path"]).name for each in parts] == ["all.train.arrow", "all.val.arrow"]
        text = run("split", "all.arrow", "one=1", "--by", "study").stdout
        assert text.startswith("one: ")

    @pytest.mark.parametrize(
        "words", [["train"], ["train=x"], ["train=2"], ["train=0.7", "val=0.7"], ["train=1", "--by", "frame"]]
    )
    def test_splits_that_cannot_be(self, run: Run, indexed: Path, words: list[str]) -> None:
        assert run("split", "all.arrow", *words, code=2).stdout == ""

    def test_fetch_and_cache(self, run: Run, root: Path, indexed: Path) -> None:
        cache = {"AHI_ML_CACHE": str(root / "own-cache")}
        first = data(run("fetch", "store", "all.arrow", "--json", "--quiet", **cache))
        frames = len(DatasetIndex.load(indexed))
        assert (first["fetched"], first["verified"], first["errors"]) == (frames, frames, 0)
        again = data(run("fetch", "store", "all.arrow", "--json", **cache))
        assert (again["fetched"], again["cached"]) == (0, frames)
        count = data(run("cache", "--json", **cache))
        assert (count["folder"], count["frames"]) == (str(root / "own-cache"), frames)
        run("cache", "--clear", code=1, **cache)  # nobody there to say yes
        assert data(run("cache", "--json", **cache))["frames"] == frames
        assert data(run("cache", "--clear", "--yes", "--json", **cache))["frames"] == 0

    def test_show(self, run: Run, root: Path, imported: object) -> None:
        done = run("show", "store", "2.25.1", "-o", "series.png", "--window", "lung")
        assert done.stdout == "series.png\n"
        assert (root / "series.png").read_bytes().startswith(b"\x89PNG")
        run("show", "store", "2.25.1", "-o", "half.png", "--reduce", "1")
        assert (root / "half.png").read_bytes().startswith(b"\x89PNG")
        assert "reduce" in run("show", "store", "2.25.1", "--reduce", "9", code=2).stderr

    def test_features(self, run: Run, root: Path, indexed: Path) -> None:
        run("index", "store", "-o", "ct.arrow", "--modality", "CT")
        done = data(run("features", "store", "ct.arrow", "my_features:mean", "-o", "mean.parquet", "--json", "--quiet"))
        assert done == {"path": "mean.parquet", "rows": 2, "failed": 0}
        table = pd.read_parquet(root / "mean.parquet").set_index("series_instance_uid")
        assert table["slices"]["2.25.1"] == 3
        assert np.isfinite(table["mean"]).all()
        failed = data(run("features", "store", "ct.arrow", "my_features:fails", "-o", "f.parquet", "--json", code=3))
        assert failed["failed"] == 2
        for name in ("my_features:absent", "no_module:mean", "my_features", ":"):
            run("features", "store", "ct.arrow", name, code=2)


class TestIntegrity:
    def test_a_damaged_blob_is_4(self, run: Run, root: Path, pydicom_file: Callable[[str], Path]) -> None:
        (root / "one").mkdir()
        shutil.copy(pydicom_file("CT_small.dcm"), root / "one")
        run("import", "damaged", "one")
        run("index", "damaged", "-o", "damaged.arrow")
        (blob,) = (path for path in (root / "damaged" / "blobs").rglob("*") if path.is_file())
        whole = blob.read_bytes()
        for damaged in (
            whole[: len(whole) // 2],
            b"not a codestream",
        ):
            blob.write_bytes(damaged)
            done = run("fetch", "damaged", "damaged.arrow", "--json", code=4, AHI_ML_CACHE=str(root / "c4"))
            counts = data(done)
            assert (counts["errors"], counts["verified"]) == (1, 0)
            assert "frame " in done.stderr
        blob.write_bytes(whole)
        assert data(run("fetch", "damaged", "damaged.arrow", "--json", AHI_ML_CACHE=str(root / "c4")))["errors"] == 0

    def test_a_missing_blob_is_3(self, run: Run, root: Path, pydicom_file: Callable[[str], Path]) -> None:
        (root / "gone-files").mkdir()
        shutil.copy(pydicom_file("MR_small.dcm"), root / "gone-files")
        run("import", "gone", "gone-files")
        run("index", "gone", "-o", "gone.arrow")
        index = DatasetIndex.load(root / "gone.arrow")
        with ahi_ml.connect(root / "gone") as store:
            name = {"datastoreId": store.datastore_id, "imageSetId": index.frames["image_set_id"].iloc[0]}
            store.client.delete_image_set(**name)
            while store.search().count():  # it is locked at first
                time.sleep(0.02)
            done = run("fetch", "gone", "gone.arrow", "--json", code=3, AHI_ML_CACHE=str(root / "c3"))
        assert data(done)["errors"] == 1


class TestPipes:
    @pytest.mark.parametrize("words", [["search", "store", "--json"], ["search", "store"], ["--help"], ["cache"]])
    def test_a_reader_that_leaves(
        self, root: Path, environment: dict[str, str], imported: object, words: list[str]
    ) -> None:
        process = subprocess.Popen(
            [os.fspath(SCRIPT), *words],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=root,
            env=environment,
            text=True,
        )
        assert process.stdout is not None
        process.stdout.close()
        assert process.stderr is not None
        said = process.stderr.read()
        process.stderr.close()
        process.wait(60)
        assert "Traceback" not in said
        assert "BrokenPipe" not in said
        assert "Exception ignored" not in said

    def test_nothing_is_drawn_into_a_pipe(self, run: Run, indexed: Path) -> None:
        assert run("fetch", "store", "all.arrow").stderr == ""


class Serving:
    """A running ``ahi-ml serve`` and the variables it printed."""

    def __init__(self, root: Path, environment: dict[str, str], *words: str) -> None:
        self.process = subprocess.Popen(
            [os.fspath(SCRIPT), "serve", *words],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=root,
            env=environment,
            start_new_session=True,
        )
        assert self.process.stdout is not None
        self.variables = {}
        for _ in range(6):
            line = self.process.stdout.readline()
            assert line.startswith("export AWS_"), line
            name, _, value = line.removeprefix("export ").strip().partition("=")
            self.variables[name] = value

    def end(self, number: int) -> tuple[int, str, str]:
        os.killpg(self.process.pid, number)
        out, said = self.process.communicate(timeout=30)
        return self.process.returncode, out, said


@pytest.fixture
def serving(root: Path, environment: dict[str, str]) -> Iterator[Callable[..., Serving]]:
    made: list[Serving] = []

    def start(*words: str) -> Serving:
        made.append(Serving(root, environment, *words))
        return made[-1]

    yield start
    for each in made:
        if each.process.poll() is None:
            each.process.kill()
            each.process.communicate()


class TestServe:
    def test_an_unmodified_boto3_with_only_these_variables(self, root: Path, serving: Callable[..., Serving]) -> None:
        server = serving("served")
        code = (
            "import boto3\n"
            "client = boto3.client('medical-imaging')\n"
            "made = client.create_datastore(datastoreName='by-boto3')['datastoreId']\n"
            "print(client.search_image_sets(datastoreId=made, searchCriteria={})['imageSetsMetadataSummaries'])\n"
        )
        plain = {name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "AHI_"))}
        done = subprocess.run(
            [sys.executable, "-c", code],
            env={**plain, **server.variables, "AWS_CONFIG_FILE": os.devnull, "AWS_SHARED_CREDENTIALS_FILE": os.devnull},
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        )
        assert done.stdout == "[]\n"
        with ahi_ml.connect(root / "served") as store:  # whoever opens the folder joins
            assert store.endpoint_url == server.variables["AWS_ENDPOINT_URL_MEDICAL_IMAGING"]
        assert server.process.poll() is None

    def test_by_id_on_the_command_line(
        self, run: Run, root: Path, serving: Callable[..., Serving], imported: object
    ) -> None:
        server = serving("served-by-id")
        with ahi_ml.connect(root / "served-by-id") as store:
            name = store.datastore_id
        url = server.variables.pop("AWS_ENDPOINT_URL_MEDICAL_IMAGING")
        found = data(run("search", name, "--endpoint-url", url, "--json", **server.variables))
        assert isinstance(found, list)
        run("search", name, "--endpoint-url", "nonsense", code=2, **server.variables)
        run("search", "f" * 32, "--endpoint-url", url, code=1, **server.variables)

    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
    def test_it_ends_in_order(self, root: Path, serving: Callable[..., Serving], number: int) -> None:
        folder = f"ending-{number}"
        code, out, said = serving(folder).end(number)
        assert code == (130 if number == signal.SIGINT else 0)
        assert out == ""
        assert "Traceback" not in said
        assert "serving" in said
        assert not (root / folder / "endpoint.json").exists()
        with ahi_ml.connect(root / folder) as store:
            assert store.search().count() == 0

    def test_another_address_only_when_asked_for(self, serving: Callable[..., Serving]) -> None:
        def listening(server: Serving) -> set[str]:
            found = psutil.Process(server.process.pid).net_connections()
            return {each.laddr.ip for each in found if each.status == "LISTEN"}

        assert listening(serving("at-home")) == {"127.0.0.1"}
        abroad = serving("abroad", "--host", "127.0.0.2")
        assert listening(abroad) == {"127.0.0.1", "127.0.0.2"}  # leases stay on this machine
        assert "//127.0.0.2:" in abroad.variables["AWS_ENDPOINT_URL_MEDICAL_IMAGING"]

    def test_an_address_of_version_6(self, serving: Callable[..., Serving]) -> None:
        try:
            socket.create_server(("::1", 0), family=socket.AF_INET6).close()
        except OSError:
            pytest.skip("this machine has no IPv6")
        server = serving("six", "--host", "::1")
        assert server.variables["AWS_ENDPOINT_URL_MEDICAL_IMAGING"].startswith("http://[::1]:")
        client = boto3.client(
            "medical-imaging",
            endpoint_url=server.variables["AWS_ENDPOINT_URL_MEDICAL_IMAGING"],
            aws_access_key_id=server.variables["AWS_ACCESS_KEY_ID"],
            aws_secret_access_key=server.variables["AWS_SECRET_ACCESS_KEY"],
            region_name=server.variables["AWS_REGION"],
        )
        assert "datastoreSummaries" in client.list_datastores()

    def test_a_port_and_faults(self, root: Path, serving: Callable[..., Serving]) -> None:
        (root / "faults.json").write_text('{"latency_ms": 1}')
        first = serving("with-port", "--faults", "faults.json")
        port = first.variables["AWS_ENDPOINT_URL_MEDICAL_IMAGING"].rpartition(":")[2]
        first.end(signal.SIGINT)
        again = serving("with-port", "--port", port)
        assert again.variables == first.variables
        assert psutil.pid_exists(again.process.pid)
