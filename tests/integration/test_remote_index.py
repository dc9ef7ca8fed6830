"""Indexes and features at fsspec URLs: memory:// and an S3 on loopback."""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import shutil
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any

import boto3
import fsspec
import numpy as np
import pandas as pd
import pydicom
import pytest
from pydicom.dataset import FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian

import ahi_ml
from ahi_ml.config import index_folder
from ahi_ml.errors import CacheError, ConfigError
from ahi_ml.index import DatasetIndex
from ahi_ml.remote import RemoteFile, local_or_remote
from ahi_ml.store import DataStore

SECRET = "the secret of the patients"


def tiny(series: int) -> pydicom.Dataset:
    made = pydicom.Dataset()
    made.file_meta = FileMetaDataset()
    made.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    made.SOPClassUID = CTImageStorage
    made.SeriesInstanceUID, made.SOPInstanceUID = f"2.25.{series}", f"2.25.{series}.1"
    made.StudyInstanceUID, made.StudyID, made.StudyDate = f"1.2.{series}", "S", "20240101"
    made.PatientID, made.PatientName, made.Modality = f"P{series}", "P", "CT"
    made.SeriesNumber, made.InstanceNumber = 1, 1
    made.Rows = made.Columns = 8
    made.SamplesPerPixel, made.PhotometricInterpretation = 1, "MONOCHROME2"
    made.BitsAllocated, made.BitsStored, made.HighBit, made.PixelRepresentation = 16, 16, 15, 1
    made.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
    made.ImagePositionPatient, made.ImageOrientationPatient = [0, 0, 0], [1, 0, 0, 0, 1, 0]
    made.PixelSpacing, made.RescaleSlope, made.RescaleIntercept = [1, 1], 1, 0
    made.PixelData = np.full((8, 8), series, np.int16).tobytes()
    return made


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DataStore]:
    """A store of six patients with one slice each."""
    root = tmp_path_factory.mktemp("remote")
    (root / "dicom").mkdir()
    for number in range(6):
        tiny(number).save_as(root / "dicom" / f"{number}.dcm", enforce_file_format=True)
    with ahi_ml.connect(root / "store", cache=root / "cache") as opened:
        opened.progress = False
        assert opened.import_dicom(root / "dicom").imported == 6
        yield opened


@pytest.fixture(scope="module")
def index(store: DataStore) -> DatasetIndex:
    return store.search().index(patient_key=SECRET)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of copies, empty."""
    monkeypatch.setenv("AHI_ML_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "indexes"


@pytest.fixture(params=["memory", "s3"])
def base(request: pytest.FixtureRequest) -> Iterator[str]:
    """A URL under which nothing lies."""
    name = f"ahi-{os.urandom(6).hex()}"
    if request.param == "s3":
        endpoint = request.getfixturevalue("moto_s3")
        boto3.client("s3", endpoint_url=endpoint).create_bucket(Bucket=name)
    yield f"{request.param}://{name}"
    if request.param == "memory":
        memory = fsspec.filesystem("memory")
        if memory.exists(name):
            memory.rm(name, recursive=True)


def files_at(base: str) -> dict[str, bytes]:
    """Everything that lies under a URL, by name."""
    fs, path = fsspec.url_to_fs(base)
    fs.invalidate_cache()
    return {name.rpartition("/")[2]: fs.cat_file(name) for name in fs.find(path)}


@pytest.fixture
def downloads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """URLs of what is copied from elsewhere."""
    found: list[str] = []
    download = RemoteFile.download

    def noted(self: RemoteFile, file: IO[bytes]) -> None:
        found.append(self.url)
        download(self, file)

    monkeypatch.setattr(RemoteFile, "download", noted)
    return found


class TestSaveAndLoad:
    def test_the_same_comes_back(self, index: DatasetIndex, base: str) -> None:
        url = f"{base}/deep/ct.arrow"
        assert index.save(url) == url
        again = DatasetIndex.load(url)
        assert again.frames.equals(index.frames)
        assert again.series.equals(index.series)
        assert again.snapshot_id == index.snapshot_id
        part = index[[4, 1]]
        part.save(f"{base}/part.arrow")
        assert DatasetIndex.load(f"{base}/part.arrow").frames.equals(part.frames)

    def test_it_is_the_file_that_a_local_save_writes(self, index: DatasetIndex, base: str, tmp_path: Path) -> None:
        index[:].save(f"{base}/ct.arrow")
        path = index[:].save(tmp_path / "ct.arrow")
        assert files_at(base) == {"ct.arrow": Path(path).read_bytes()}

    def test_it_is_copied_once_and_mapped(
        self, index: DatasetIndex, base: str, cache: Path, downloads: list[str]
    ) -> None:
        url = index.save(f"{base}/ct.arrow")
        loaded = [DatasetIndex.load(url) for _ in range(3)]
        assert downloads == [url]
        (copy,) = cache.iterdir()
        assert {each._path for each in loaded} == {copy}
        assert stat.S_IMODE(copy.stat().st_mode) == 0o600
        assert stat.S_IMODE(cache.stat().st_mode) == 0o700
        if sys.platform == "linux":
            assert str(copy) in Path("/proc/self/maps").read_text()

    def test_an_index_that_was_overwritten_is_copied_again(
        self, index: DatasetIndex, base: str, cache: Path, downloads: list[str]
    ) -> None:
        url = index.save(f"{base}/ct.arrow")
        old = DatasetIndex.load(url)
        expected = old.frames
        index[[0, 2]].save(url)
        new = DatasetIndex.load(url)
        assert len(new) == 2
        assert len(downloads) == len(list(cache.iterdir())) == 2
        assert old.frames.equals(expected)  # its file is as it was
        assert pickle.loads(pickle.dumps(old)).frames.equals(expected)

    def test_what_was_listed_before_does_not_count(self, index: DatasetIndex, base: str) -> None:
        url = index.save(f"{base}/ct.arrow")
        fs, path = fsspec.url_to_fs(base)
        assert len(fs.ls(path)) == 1  # s3fs keeps this, with the ETag
        assert len(DatasetIndex.load(url)) == len(index)
        fs.ls(path)
        index[[0, 2]].save(url)
        assert len(DatasetIndex.load(url)) == 2

    def test_copies_that_nobody_opened_go(self, index: DatasetIndex, base: str, cache: Path) -> None:
        first, second = (index.save(f"{base}/{name}.arrow") for name in ("first", "second"))
        DatasetIndex.load(first)
        (copy,) = cache.iterdir()
        os.utime(copy, (time.time() - 31 * 86_400,) * 2)
        DatasetIndex.load(first)  # opened: it stays
        DatasetIndex.load(second)
        assert copy.exists()
        os.utime(copy, (time.time() - 31 * 86_400,) * 2)
        index.save(f"{base}/third.arrow")
        DatasetIndex.load(f"{base}/third.arrow")
        assert not copy.exists()
        assert len(list(cache.iterdir())) == 2

    def test_a_file_url_is_local(self, index: DatasetIndex, tmp_path: Path, cache: Path) -> None:
        path = index[:].save(f"file://{tmp_path}/ct.arrow")
        assert path == tmp_path / "ct.arrow"
        assert (tmp_path / "ct.arrow.key").read_text() == SECRET
        assert DatasetIndex.load(f"file://{tmp_path}/ct.arrow")._path == path
        assert not cache.exists()

    def test_a_path_is_local_whatever_it_looks_like(self) -> None:
        assert isinstance(local_or_remote(Path("s3://bucket/x")), Path)
        assert isinstance(local_or_remote("a::b"), Path)
        assert isinstance(local_or_remote("memory://x"), RemoteFile)
        assert isinstance(local_or_remote("simplecache::s3://bucket/x"), RemoteFile)


class TestTheSecret:
    def test_it_goes_nowhere(self, store: DataStore, base: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("AHI_ML_PATIENT_KEY", SECRET)
        for made in (store.search().index(), store.search().index(patient_key=SECRET.encode())):
            made.save(f"{base}/ct.arrow")
            made[:3].save(f"{base}/part.arrow")
        found = files_at(base)
        assert found.keys() == {"ct.arrow", "part.arrow"}
        assert not any(SECRET.encode() in data for data in found.values())

    def test_one_that_lies_nowhere_else_is_not_lost(
        self, store: DataStore, base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        made = store.search().index()
        part = made[:2]
        for each in (made, part, *made.split({"a": 0.5, "b": 0.5}).values()):
            with pytest.raises(ConfigError, match=r"patient_key=.*AHI_ML_PATIENT_KEY") as caught:
                each.save(f"{base}/ct.arrow")
            assert base in str(caught.value)
        assert files_at(base) == {}
        made.save(tmp_path / "ct.arrow")  # now it is kept beside that
        made.save(f"{base}/ct.arrow")
        part.save(f"{base}/part.arrow")
        secret = (tmp_path / "ct.arrow.key").read_bytes()
        found = files_at(base)
        assert found.keys() == {"ct.arrow", "part.arrow"}
        assert not any(secret in data for data in found.values())
        DatasetIndex.load(tmp_path / "ct.arrow").save(f"{base}/again.arrow")

    def test_one_from_elsewhere_has_none(self, index: DatasetIndex, base: str, tmp_path: Path) -> None:
        index.save(f"{base}/ct.arrow")
        fs, path = fsspec.url_to_fs(f"{base}/ct.arrow.key")
        fs.pipe_file(path, b"planted")
        loaded = DatasetIndex.load(f"{base}/ct.arrow")
        loaded.save(f"{base}/again.arrow")
        loaded.save(tmp_path / "here.arrow")
        assert [each.name for each in tmp_path.glob("here*")] == ["here.arrow"]


class TestWholeOrNot:
    def test_what_cannot_be_written_leaves_what_was(
        self, index: DatasetIndex, base: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        index[:2].save(f"{base}/ct.arrow")
        before = files_at(base)

        def torn(source: IO[bytes], target: IO[bytes], size: int = 0) -> None:
            target.write(source.read(100))
            raise ConnectionResetError("in the middle")

        with monkeypatch.context() as patch:
            patch.setattr("ahi_ml.remote.shutil.copyfileobj", torn)
            for name in ("ct.arrow", "new.arrow"):
                with pytest.raises(ConnectionResetError):
                    index.save(f"{base}/{name}")
        assert files_at(base) == before
        with monkeypatch.context() as patch:
            patch.setattr("ahi_ml.index.tables.Tables.write", lambda *rest, **more: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                index.save(f"{base}/ct.arrow")
        assert files_at(base) == before

    def test_a_copy_that_comes_short_is_none(
        self, index: DatasetIndex, base: str, cache: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        url = index.save(f"{base}/ct.arrow")
        with monkeypatch.context() as patch:
            patch.setattr(
                "ahi_ml.remote.shutil.copyfileobj", lambda source, target, size: target.write(source.read(100))
            )
            with pytest.raises(OSError, match="100 came"):
                DatasetIndex.load(url)
        assert list(cache.iterdir()) == []
        assert len(DatasetIndex.load(url)) == len(index)

    def test_a_file_that_changes_while_it_comes(
        self, index: DatasetIndex, base: str, cache: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        url = index.save(f"{base}/ct.arrow")
        download = RemoteFile.download

        def late(self: RemoteFile, file: IO[bytes]) -> None:
            download(self, file)
            index[:2].save(url)

        with monkeypatch.context() as patch:
            patch.setattr(RemoteFile, "download", late)
            with pytest.raises(ConfigError, match="overwritten while it was read"):
                DatasetIndex.load(url)
        assert list(cache.iterdir()) == []
        assert len(DatasetIndex.load(url)) == 2

    def test_threads_save_at_once(self, index: DatasetIndex, base: str) -> None:
        with ThreadPoolExecutor(6) as pool:
            list(pool.map(lambda number: index[: number + 1].save(f"{base}/{number}.arrow"), range(6)))
        for number in range(6):
            assert len(DatasetIndex.load(f"{base}/{number}.arrow")) == number + 1

    def test_a_damaged_copy_is_made_anew(self, index: DatasetIndex, base: str, cache: Path) -> None:
        url = index.save(f"{base}/ct.arrow")
        DatasetIndex.load(url)
        (copy,) = cache.iterdir()
        os.truncate(copy, 50)
        with pytest.raises(ConfigError, match=base):
            DatasetIndex.load(url)
        assert len(DatasetIndex.load(url)) == len(index)


class TestRefused:
    def test_nothing_there(self, base: str, cache: Path) -> None:
        with pytest.raises(ConfigError, match=f"no index at {base}/absent.arrow"):
            DatasetIndex.load(f"{base}/absent.arrow")

    def test_something_else_there(self, base: str) -> None:
        fs, path = fsspec.url_to_fs(f"{base}/other.arrow")
        fs.pipe_file(path, b"something else")
        with pytest.raises(ConfigError, match=f"{base}/other.arrow.*not an index"):
            DatasetIndex.load(f"{base}/other.arrow")

    def test_a_bucket_that_is_not_there_is_not_made(self, index: DatasetIndex, moto_s3: str) -> None:
        with pytest.raises(OSError):
            index.save("s3://nobody-made-this/ct.arrow")
        assert "nobody-made-this" not in str(boto3.client("s3", endpoint_url=moto_s3).list_buckets()["Buckets"])

    def test_protocols(self, index: DatasetIndex) -> None:
        with pytest.raises(ConfigError, match="nonsense://a/b"):
            index.save("nonsense://a/b")
        with pytest.raises(ConfigError, match="nonsense://a/b"):
            DatasetIndex.load("nonsense://a/b")
        fsspec.register_implementation("lacking", "no_such_package.Files", errtxt="Install no_such_package")
        with pytest.raises(ConfigError, match=r"Install no_such_package.*ahi_ml\[s3\]"):
            RemoteFile("lacking://bucket/x").check()

    @pytest.mark.parametrize(
        "url",
        [
            "sftp://user:hunter2@host/ct.arrow",
            "sftp://user:hunter2@host:22/ct.arrow",
            "ftp://user:hunter2@[::1]/ct.arrow",
            "s3://AKIA:hunter2@bucket/ct.arrow",
            "s3://AKIA:hun/t?er2@bucket/ct.arrow",
            "s3://AKIA:1/hunter2@bucket/ct.arrow",
            "s3://AKIA:hun/ter@2@bucket/ct.arrow",
            "simplecache::s3://AKIA:1/hunter2@bucket/ct.arrow",
        ],
    )
    def test_a_password_in_a_url_is_refused(self, url: str) -> None:
        with pytest.raises(ConfigError, match="password") as caught:
            local_or_remote(url)
        assert not any(part in str(caught.value) for part in ("AKIA", "hun", "er2", "2@"))

    @pytest.mark.parametrize(
        "url",
        [
            "s3://bucket/at:12@noon.arrow",
            "s3://user@bucket/ct.arrow",
            "https://host:8443/ct@2.arrow",
            "https://[::1]:8443/ct@2.arrow",
            "abfs://container@account.dfs.core.windows.net/a:b/ct.arrow",
            "https://host/ct.arrow?at=10:30&by=me@example.org",
        ],
    )
    def test_what_only_looks_like_a_password_is_not(self, url: str) -> None:
        assert isinstance(local_or_remote(url), RemoteFile)

    def test_signatures_are_not_shown(self) -> None:
        signed = RemoteFile("https://host/ct.arrow?X-Amz-Signature=abc")
        assert str(signed) == "https://host/ct.arrow"

    def test_a_folder_of_copies_that_others_can_open(
        self, index: DatasetIndex, base: str, cache: Path, downloads: list[str]
    ) -> None:
        url = index.save(f"{base}/ct.arrow")
        cache.mkdir(parents=True)
        cache.chmod(0o755)
        with pytest.raises(CacheError, match="chmod 700"):
            DatasetIndex.load(url)
        assert not downloads

    def test_a_file_system_that_tells_nothing(
        self, index: DatasetIndex, base: str, downloads: list[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        url = index.save(f"{base}/ct.arrow")
        monkeypatch.setattr("ahi_ml.remote._TELLING", ())
        assert RemoteFile(url).fingerprint() is None
        for _ in range(2):
            assert len(DatasetIndex.load(url)) == len(index)
        assert len(downloads) == 2

    def test_a_cache_elsewhere_does_not_hold_copies(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("AHI_ML_CACHE", "s3://bucket/cache")
        assert "s3:" not in str(index_folder())


def lengths(index: DatasetIndex) -> tuple[int, str, str]:
    return len(index), index.snapshot_id, str(index._path)


class TestTravelling:
    @pytest.mark.parametrize("method", ["spawn", "fork"])
    def test_workers_map_the_same_copy(self, index: DatasetIndex, moto_s3: str, method: str, cache: Path) -> None:
        bucket = f"ahi-{os.urandom(6).hex()}"
        boto3.client("s3", endpoint_url=moto_s3).create_bucket(Bucket=bucket)
        loaded = DatasetIndex.load(index.save(f"s3://{bucket}/ct.arrow"))
        assert len(pickle.dumps(loaded)) < 2000
        with multiprocessing.get_context(method).Pool(1) as pool:
            assert pool.apply(lengths, (loaded,)) == lengths(loaded)
            assert pool.apply(lengths, (loaded[1:],))[:2] == (len(index) - 1, index[1:].snapshot_id)
        assert len(list(cache.iterdir())) == 1

    def test_a_worker_without_the_copy_gets_its_own(self, index: DatasetIndex, moto_s3: str, cache: Path) -> None:
        bucket = f"ahi-{os.urandom(6).hex()}"
        boto3.client("s3", endpoint_url=moto_s3).create_bucket(Bucket=bucket)
        url = index.save(f"s3://{bucket}/ct.arrow")
        loaded = DatasetIndex.load(url)
        pickled = pickle.dumps(loaded)
        shutil.rmtree(cache)  # as on another machine
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            assert pool.apply(pickle.loads, (pickled,)).snapshot_id == index.snapshot_id
        assert len(list(cache.iterdir())) == 1
        shutil.rmtree(cache)
        index[:2].save(url)
        with pytest.raises(ConfigError, match=f"{url} was overwritten"):
            pickle.loads(pickled)


def mean(volume: Any) -> dict[str, float]:
    return {"mean": float(volume.values.mean())}


class TestFeatures:
    def test_a_table_elsewhere(self, store: DataStore, index: DatasetIndex, base: str) -> None:
        url = f"{base}/features.parquet"
        table = ahi_ml.extract_features(store, index, mean, out=url, progress=False)
        assert list(files_at(base)) == ["features.parquet"]
        with fsspec.open(url) as file:
            kept = pd.read_parquet(file)
        assert kept["mean"].tolist() == table["mean"].tolist() == [0, 1, 2, 3, 4, 5]

    def test_what_cannot_be_written_is_said_first(self, store: DataStore, index: DatasetIndex) -> None:
        ran: list[int] = []

        def work(volume: Any) -> dict[str, float]:
            ran.append(1)
            return {}

        with pytest.raises(ConfigError, match="nonsense"):
            ahi_ml.extract_features(store, index, work, out="nonsense://a/b", progress=False)
        assert not ran


class TestCommandLine:
    @pytest.fixture
    def run(self, store: DataStore, tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
        (tmp_path / "work.py").write_text("def mean(volume): return {'mean': float(volume.values.mean())}\n")

        def run(*words: str, code: int = 0, **variables: str) -> subprocess.CompletedProcess[str]:
            done = subprocess.run(
                [sys.executable, "-c", "from ahi_ml.cli import main; main()", *words],
                cwd=tmp_path,
                env={**os.environ, "PYTHONPATH": str(Path(ahi_ml.__file__).parents[1]), **variables},
                capture_output=True,
                text=True,
                timeout=120,
            )
            assert done.returncode == code, done.stderr
            return done

        return run

    def test_indexes_in_s3(
        self,
        store: DataStore,
        moto_s3: str,
        run: Callable[..., subprocess.CompletedProcess[str]],
        cache: Path,
    ) -> None:
        bucket = f"ahi-{os.urandom(6).hex()}"
        boto3.client("s3", endpoint_url=moto_s3).create_bucket(Bucket=bucket)
        base, folder = f"s3://{bucket}", str(store._target.folder)
        refused = run("index", folder, "-o", f"{base}/ct.arrow", code=2)
        assert "AHI_ML_PATIENT_KEY" in refused.stderr
        assert "Traceback" not in refused.stderr
        words = ("index", folder, "-o", f"{base}/ct.arrow", "--json", "--quiet")
        summary = json.loads(run(*words, AHI_ML_PATIENT_KEY=SECRET).stdout)
        assert (summary["path"], summary["frames"]) == (f"{base}/ct.arrow", 6)
        parts = json.loads(run("split", f"{base}/ct.arrow", "train=0.5", "val=0.5", "--json").stdout)
        assert [each["path"] for each in parts] == [f"{base}/ct.train.arrow", f"{base}/ct.val.arrow"]
        fetched = json.loads(run("fetch", folder, f"{base}/ct.arrow", "--json", "--quiet").stdout)
        assert fetched["verified"] == 6
        run("features", folder, f"{base}/ct.arrow", "work:mean", "-o", f"{base}/features.parquet", "--quiet")
        assert files_at(base).keys() == {"ct.arrow", "ct.train.arrow", "ct.val.arrow", "features.parquet"}
        assert list(cache.glob("*.arrow"))
        run("cache", "--clear", "--yes")
        assert not list(cache.glob("*.arrow"))
        missing = run("fetch", folder, f"{base}/absent.arrow", code=2)
        assert f"no index at {base}/absent.arrow" in missing.stderr
