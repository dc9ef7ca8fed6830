"""The one server of a folder: who starts it, who joins, who keeps it alive, and how it ends."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from filelock import FileLock, Timeout

from ahi_ml.errors import ConfigError
from ahi_ml.local.files import StoreFolder, hostname
from ahi_ml.local.process import Lease, attach, environment
from ahi_ml.local.serve import _LINGER_S

_PATIENCE_S = 30.0  # for a busy machine; what is waited for takes at most a few seconds

# A holder: says which server it got, then obeys one word a line until its input ends.
_HOLDER = """
import json, os, signal, sys
from pathlib import Path
from ahi_ml.local.process import attach

def say(**words):
    print(json.dumps(words), flush=True)

signal.signal(signal.SIGINT, lambda number, frame: say(interrupted=True))
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # whoever runs the tests may ignore it (nohup)
say(up=True)
sys.stdin.readline()
lease = attach(Path(sys.argv[1]))
say(server=lease.endpoint.pid)
while word := sys.stdin.readline().strip():
    if word == "close":
        lease.close()
    if word == "fork":
        child = os.fork()
        if not child:
            lease.close()
            os._exit(0)
        os.waitpid(child, 0)
    say(alive=lease.alive() if lease.connection.fileno() >= 0 else None)
"""


class Holder:
    """Another process that holds a lease, a notebook's kernel for example."""

    def __init__(self, folder: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", _HOLDER, str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
            start_new_session=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        )

    def hear(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        return dict(json.loads(self.process.stdout.readline()))

    def tell(self, word: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{word}\n")

    def ask(self, word: str) -> dict[str, Any]:
        self.tell(word)
        return self.hear()

    def attach(self) -> int:
        """Attach; the process id of the server."""
        assert self.hear() == {"up": True}
        return int(self.ask("go")["server"])

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(10)


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """A store folder of the test's own; its server is gone afterwards."""
    root = tmp_path / "store"
    yield root
    endpoint = StoreFolder(root).endpoint() if root.is_dir() else None
    if endpoint is not None and endpoint.host == hostname() and runs(endpoint.pid):
        os.kill(endpoint.pid, signal.SIGKILL)


@pytest.fixture
def holder(folder: Path) -> Iterator[Callable[[], Holder]]:
    """Makes holders of `folder`, and ends them."""
    made: list[Holder] = []

    def make() -> Holder:
        made.append(Holder(folder))
        return made[-1]

    yield make
    for each in made:
        each.kill()


@pytest.fixture
def held(folder: Path) -> Iterator[Lease]:
    """This process's own lease."""
    lease = attach(folder)
    yield lease
    lease.close()


def runs(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def wait_for(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + _PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, f"waited in vain for {what}"
        time.sleep(0.02)


def wait_for_end(folder: Path, pid: int) -> None:
    """The server ends, takes its endpoint back and leaves the lock free."""
    wait_for(lambda: not runs(pid), "the server's end")
    assert not (folder / "endpoint.json").exists()
    with FileLock(folder / "server.lock", timeout=0):
        pass


def end(lease: Lease, folder: Path) -> None:
    """End a server at once, in order."""
    lease.close()
    os.kill(lease.endpoint.pid, signal.SIGTERM)
    wait_for_end(folder, lease.endpoint.pid)


def server_processes(folder: Path) -> list[int]:
    """Processes that serve `folder`, found without its files."""
    found = []
    for process in psutil.process_iter(["pid", "cmdline", "status"]):
        command = process.info["cmdline"] or []
        if command[-2:] == ["ahi_ml.local", str(folder)] and process.info["status"] != psutil.STATUS_ZOMBIE:
            found.append(process.info["pid"])
    return found


class TestStart:
    def test_the_server_answers_when_attach_returns(self, held: Lease, client_of: Callable[..., Any]) -> None:
        assert client_of(held).list_datastores()["datastoreSummaries"] == []

    def test_answers_do_not_wait_for_acknowledgements(self, held: Lease, client_of: Callable[..., Any]) -> None:
        client = client_of(held)

        def seconds() -> float:
            before = time.perf_counter()
            client.list_datastores()
            return time.perf_counter() - before

        # 40 ms is what a delayed acknowledgement costs; a connection's first ones are not delayed.
        assert sorted(seconds() for _ in range(60))[30] < 0.03

    def test_it_listens_on_loopback_only(self, held: Lease) -> None:
        listening = [
            connection.laddr.ip
            for connection in psutil.Process(held.endpoint.pid).net_connections("inet")
            if connection.status == psutil.CONN_LISTEN
        ]
        assert listening
        assert set(listening) == {"127.0.0.1"}

    def test_a_second_opener_joins(self, folder: Path, held: Lease) -> None:
        second = attach(folder)
        try:
            assert second.endpoint == held.endpoint
            assert second.keys == held.keys
        finally:
            second.close()

    def test_another_process_joins(self, held: Lease, holder: Callable[[], Holder]) -> None:
        assert holder().attach() == held.endpoint.pid

    def test_relative_and_linked_paths_are_the_same_folder(
        self, folder: Path, held: Lease, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (folder.parent / "link").symlink_to(folder)
        monkeypatch.chdir(folder.parent)
        for path in (Path("store"), Path("link"), folder / ".." / "store"):
            lease = attach(path)
            assert lease.endpoint.pid == held.endpoint.pid
            lease.close()

    def test_openers_of_one_moment_end_with_one_server(self, folder: Path, holder: Callable[[], Holder]) -> None:
        holders = [holder() for _ in range(6)]
        for each in holders:
            assert each.hear() == {"up": True}
        for each in holders:
            each.tell("go")
        servers = {each.hear()["server"] for each in holders}
        assert len(servers) == 1
        wait_for(lambda: server_processes(folder) == list(servers), "the end of the other candidates")
        assert all(each.ask("?")["alive"] for each in holders)

    def test_threads_of_one_process_join_too(self, folder: Path) -> None:
        leases: list[Lease] = []
        barrier = threading.Barrier(4)

        def open_one() -> None:
            barrier.wait()
            leases.append(attach(folder))

        threads = [threading.Thread(target=open_one) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len({lease.endpoint.pid for lease in leases}) == 1
        assert len(leases) == 4
        for lease in leases:
            lease.close()

    def test_the_folder_is_private(self, folder: Path, held: Lease) -> None:
        def mode(path: Path) -> int:
            return path.stat().st_mode & 0o777

        assert mode(folder) == 0o700
        for name in ("endpoint.json", "keys.json", "server.lock", "server.log"):
            assert mode(folder / name) == 0o600, name

    def test_secrets_stay_out_of_reprs_and_command_lines(self, held: Lease) -> None:
        secrets = (held.keys.secret_access_key, held.keys.page_secret, held.endpoint.token)
        shown = repr(held) + repr(held.keys) + repr(held.endpoint)
        shown += " ".join(psutil.Process(held.endpoint.pid).cmdline())
        assert not any(secret in shown for secret in secrets)

    @pytest.mark.parametrize("hello", [b'{"proof": "00"}', b"[]", b"GET / HTTP/1.1", b"\xff" * 100, b""])
    def test_a_lease_needs_the_token(self, held: Lease, hello: bytes) -> None:
        with socket.create_connection(("127.0.0.1", held.endpoint.lease_port), timeout=10) as connection:
            connection.sendall(hello + b"\n")
            assert connection.recv(100) == b""
        assert held.alive()

    def test_who_does_not_greet_gives_way(self, held: Lease, folder: Path) -> None:
        address = ("127.0.0.1", held.endpoint.lease_port)
        silent = [socket.create_connection(address, timeout=5) for _ in range(200)]
        assert [each.recv(100) for each in silent[:100]] == [b""] * 100  # well before the server tires of waiting
        assert held.alive()
        attach(folder).close()
        for each in silent:
            each.close()


class TestEnd:
    def test_it_ends_after_the_last_lease(self, folder: Path) -> None:
        first, second = attach(folder), attach(folder)
        pid = first.endpoint.pid
        first.close()
        assert second.alive()
        second.close()
        wait_for_end(folder, pid)

    def test_it_lingers_for_the_next_opener(self, folder: Path) -> None:
        first = attach(folder)
        first.close()
        second = attach(folder)
        assert second.endpoint == first.endpoint
        second.close()

    def test_killed_holders_count_as_gone(self, folder: Path, holder: Callable[[], Holder]) -> None:
        holders = [holder(), holder()]
        pids = {each.attach() for each in holders}
        for each in holders:
            each.kill()
        wait_for_end(folder, *pids)

    def test_another_holder_keeps_it_alive(self, folder: Path, holder: Callable[[], Holder]) -> None:
        first, second = holder(), holder()
        pid = first.attach()
        assert second.attach() == pid
        first.kill()
        time.sleep(_LINGER_S + 0.6)
        assert runs(pid)
        assert second.ask("?") == {"alive": True}

    @pytest.mark.parametrize("name", ["SIGINT", "SIGHUP", "SIGTERM"])
    def test_signals_to_the_holders_group_do_not_reach_it(
        self, folder: Path, holder: Callable[[], Holder], name: str
    ) -> None:
        first = holder()
        pid = first.attach()
        assert first.ask("?") == {"alive": True}
        os.killpg(first.process.pid, signal.Signals[name])
        if name == "SIGINT":  # as in a notebook, the holder itself survives an interrupt
            assert first.hear() == {"interrupted": True}
            assert first.ask("?") == {"alive": True}
        else:
            first.process.wait(10)
        lease = attach(folder)
        assert lease.endpoint.pid == pid
        lease.close()

    def test_a_forked_child_lets_go_of_nothing(self, folder: Path, holder: Callable[[], Holder]) -> None:
        first = holder()
        pid = first.attach()
        assert first.ask("fork") == {"alive": True}
        time.sleep(_LINGER_S + 0.6)
        assert first.ask("?") == {"alive": True}
        assert runs(pid)

    def test_holders_notice_its_death(self, folder: Path, held: Lease) -> None:
        assert held.alive()
        os.kill(held.endpoint.pid, signal.SIGKILL)
        wait_for(lambda: not held.alive(), "the lease's end")

    def test_terminated_it_ends_in_order(self, folder: Path, held: Lease) -> None:
        os.kill(held.endpoint.pid, signal.SIGTERM)
        wait_for_end(folder, held.endpoint.pid)
        assert not list(folder.glob("catalog.sqlite-*"))  # the journal is merged and gone

    def test_imports_outlive_their_holder(
        self,
        folder: Path,
        tmp_path: Path,
        client_of: Callable[..., Any],
        pydicom_file: Callable[[str], Path],
    ) -> None:
        lease = attach(folder)
        # Queued ones too, of which an ending server would drop those it has not begun.
        jobs = [start_long_import(client_of(lease), tmp_path, pydicom_file, number, 30) for number in range(12)]
        pid = lease.endpoint.pid
        lease.close()
        wait_for(lambda: not runs(pid), "the server's end")
        lease = attach(folder)
        assert {job_of(client_of(lease), job)["jobStatus"] for job in jobs} == {"COMPLETED"}
        lease.close()


def start_long_import(
    client: Any, tmp_path: Path, pydicom_file: Callable[[str], Path], number: int = 0, files: int = 300
) -> dict[str, str]:
    """Start an import of many files; 300 take seconds."""
    source = tmp_path / f"many-{number}"
    source.mkdir()
    for each in range(files):
        (source / f"{each}.dcm").symlink_to(pydicom_file("J2K_pixelrep_mismatch.dcm"))
    datastore_id = client.create_datastore(datastoreName="default", clientToken="made-once")["datastoreId"]
    job = client.start_dicom_import_job(
        datastoreId=datastore_id,
        dataAccessRoleArn="arn:aws:iam::123456789012:role/import",
        clientToken=f"started-once-{number}",
        inputS3Uri=f"s3://this-machine{source}/",
        outputS3Uri="s3://reports/",
    )
    return {"datastoreId": datastore_id, "jobId": job["jobId"]}


def job_of(client: Any, job: dict[str, str]) -> dict[str, Any]:
    return dict(client.get_dicom_import_job(**job)["jobProperties"])


class TestRecovery:
    def test_data_outlives_a_killed_server(
        self,
        folder: Path,
        tmp_path: Path,
        client_of: Callable[..., Any],
        import_folder: Callable[..., Any],
        pydicom_file: Callable[[str], Path],
    ) -> None:
        source = tmp_path / "source"
        source.mkdir()
        (source / "ct.dcm").symlink_to(pydicom_file("CT_small.dcm"))
        lease = attach(folder)
        client = client_of(lease)
        made = client.create_datastore(datastoreName="default", clientToken="made-once")
        image_set = import_folder(client, made["datastoreId"], source).image_set_of("ct.dcm")
        known = {"datastoreId": made["datastoreId"], "imageSetId": image_set}
        before = client.get_image_set_metadata(**known)["imageSetMetadataBlob"].read()
        keys = (folder / "keys.json").read_bytes()
        os.kill(lease.endpoint.pid, signal.SIGKILL)
        wait_for(lambda: not runs(lease.endpoint.pid), "the server's death")
        assert (folder / "endpoint.json").exists()

        again = attach(folder)
        try:
            assert again.endpoint.pid != lease.endpoint.pid
            assert (folder / "keys.json").read_bytes() == keys
            client = client_of(again)
            assert client.get_image_set_metadata(**known)["imageSetMetadataBlob"].read() == before
            repeated = client.create_datastore(datastoreName="default", clientToken="made-once")
            assert repeated["datastoreId"] == made["datastoreId"]
        finally:
            again.close()
            lease.close()

    def test_jobs_of_a_killed_server_have_failed(
        self,
        folder: Path,
        tmp_path: Path,
        client_of: Callable[..., Any],
        pydicom_file: Callable[[str], Path],
    ) -> None:
        lease = attach(folder)
        job = start_long_import(client_of(lease), tmp_path, pydicom_file)
        os.kill(lease.endpoint.pid, signal.SIGKILL)
        again = attach(folder)
        client = client_of(again)
        ended = job_of(client, job)
        assert ended["jobStatus"] == "FAILED"
        assert ended["endedAt"] >= ended["submittedAt"]
        assert "server stopped" in ended["message"]
        # Nothing of it is half visible.
        assert client.search_image_sets(datastoreId=job["datastoreId"])["imageSetsMetadataSummaries"] == []
        again.close()
        lease.close()

    def test_the_source_of_a_copy_cut_short_is_as_it_was(
        self,
        folder: Path,
        tmp_path: Path,
        client_of: Callable[..., Any],
        import_folder: Callable[..., Any],
        pydicom_file: Callable[[str], Path],
    ) -> None:
        source = tmp_path / "source"
        source.mkdir()
        (source / "ct.dcm").symlink_to(pydicom_file("CT_small.dcm"))
        quick = attach(folder)
        client = client_of(quick)
        store = client.create_datastore(datastoreName="default", clientToken="made-once")["datastoreId"]
        import_folder(client, store, source)
        image_set = import_folder(client, store, source).image_set_of("ct.dcm")
        known = {"datastoreId": store, "imageSetId": image_set}
        before = client.get_image_set(**known)
        assert before["imageSetWorkflowStatus"] == "IMPORTED"
        slow = attach(folder, faults={"slow_s": 600})
        answer = client.copy_image_set(
            datastoreId=store,
            sourceImageSetId=image_set,
            copyImageSetInformation={"sourceImageSet": {"latestVersionId": "2"}},
        )
        reading = client.get_image_set(**known)
        shown = (reading["imageSetState"], reading["imageSetWorkflowStatus"])
        assert shown == ("LOCKED", "COPYING_WITH_READ_ONLY_ACCESS")
        os.kill(quick.endpoint.pid, signal.SIGKILL)
        wait_for(lambda: not runs(quick.endpoint.pid), "the server's death")

        again = attach(folder)
        client = client_of(again)
        after = client.get_image_set(**known)
        ignored = dict.fromkeys(("ResponseMetadata", "lastAccessedAt"))
        assert after | ignored == before | ignored
        made = answer["destinationImageSetProperties"]["imageSetId"]
        left = client.get_image_set(datastoreId=store, imageSetId=made)
        assert left["imageSetState"] == "DELETED"
        assert "cut short" in left["message"]
        for lease in (quick, slow, again):
            lease.close()

    def test_a_stranger_on_the_lease_port_is_no_server(self, folder: Path) -> None:
        lease = attach(folder)
        lease.close()
        os.kill(lease.endpoint.pid, signal.SIGKILL)
        with socket.create_server(("127.0.0.1", 0)) as stranger:

            def answer() -> None:
                connection, _ = stranger.accept()
                connection.recv(4096)
                connection.sendall(b"220 welcome\n")
                stranger.close()
                connection.close()

            thread = threading.Thread(target=answer, daemon=True)
            thread.start()
            stale = replace(lease.endpoint, lease_port=stranger.getsockname()[1])
            StoreFolder(folder).publish(stale)
            again = attach(folder)
            thread.join(10)
        assert again.endpoint.pid != lease.endpoint.pid
        again.close()

    def test_a_torn_endpoint_file_is_written_anew(self, folder: Path) -> None:
        StoreFolder.open(folder).keys()
        (folder / "endpoint.json").write_text('{"url": "http://127')
        lease = attach(folder)
        assert lease.alive()
        lease.close()


class TestFolder:
    def test_other_files_are_left_alone(self, folder: Path) -> None:
        folder.mkdir(mode=0o755)
        (folder / "thesis.txt").write_text("precious")
        with pytest.raises(ConfigError, match="holds other files"):
            attach(folder)
        assert [path.name for path in folder.iterdir()] == ["thesis.txt"]
        assert folder.stat().st_mode & 0o777 == 0o755

    def test_a_file_is_no_folder(self, folder: Path) -> None:
        folder.write_text("")
        with pytest.raises(ConfigError, match="is a file"):
            attach(folder)

    def test_absent_and_not_to_be_made(self, folder: Path) -> None:
        with pytest.raises(ConfigError, match=r"ahi-ml serve.*AWS"):
            attach(folder, create=False)
        assert not folder.exists()

    def test_a_folder_in_the_making_is_no_stranger(self, folder: Path) -> None:
        # What another opener's first milliseconds look like.
        folder.mkdir()
        (folder / "..keys.json.12.ab.12.cd").write_text("{}")
        (folder / ".keys.json.12.ab").write_text("{}")
        lease = attach(folder)
        assert lease.alive()
        lease.close()

    def test_faults_are_checked_before_anything_is_made(self, folder: Path) -> None:
        for value in (-1, "30", float("nan"), True):
            with pytest.raises(ConfigError, match="latency_ms"):
                attach(folder, faults={"latency_ms": value})
        with pytest.raises(ConfigError, match="unknown faults"):
            attach(folder, faults={"latency": 1})
        assert not folder.exists()


class TestElsewhere:
    def test_a_server_on_another_machine_is_named(self, folder: Path) -> None:
        lease = attach(folder)
        end(lease, folder)
        store = StoreFolder(folder)
        store.publish(replace(lease.endpoint, host="node-17"))
        with (
            FileLock(store.lock, timeout=0),
            pytest.raises(ConfigError, match=r"'node-17'.*ahi-ml serve.*AWS"),
        ):
            attach(folder)
        assert asdict(store.endpoint() or lease.endpoint)["host"] == "node-17"

    def test_what_another_machine_left_behind_does_not_matter(self, folder: Path) -> None:
        lease = attach(folder)
        end(lease, folder)
        StoreFolder(folder).publish(replace(lease.endpoint, host="node-17"))
        again = attach(folder)
        assert again.endpoint.host == hostname()
        again.close()


class TestFaults:
    def test_latency_lasts_as_long_as_its_lease(self, folder: Path, held: Lease, client_of: Callable[..., Any]) -> None:
        client = client_of(held)

        def seconds() -> float:
            before = time.perf_counter()
            client.list_datastores()
            return time.perf_counter() - before

        seconds()
        slow = attach(folder, faults={"latency_ms": 300})
        assert min(seconds() for _ in range(3)) >= 0.3
        slow.close()
        wait_for(lambda: seconds() < 0.3, "the end of the latency")

    def test_the_latest_lease_with_faults_decides(
        self, folder: Path, held: Lease, client_of: Callable[..., Any]
    ) -> None:
        client = client_of(held)
        slow, slower = (attach(folder, faults={"latency_ms": ms}) for ms in (100, 400))
        before = time.perf_counter()
        client.list_datastores()
        assert time.perf_counter() - before >= 0.4
        slower.close()
        slow.close()


class TestOtherClients:
    def test_an_unmodified_boto3_needs_the_variables_only(self, held: Lease) -> None:
        script = (
            "import boto3\n"
            "client = boto3.client('medical-imaging')\n"
            "made = client.create_datastore(datastoreName='default')['datastoreId']\n"
            # An operation whose host botocore would put a prefix before.
            "print(len(client.search_image_sets(datastoreId=made)['imageSetsMetadataSummaries']))\n"
        )
        done = subprocess.run(
            [sys.executable, "-c", script],
            env={"PATH": os.environ["PATH"], **environment(held.endpoint, held.keys)},
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert (done.stdout, done.returncode) == ("0\n", 0), done.stderr

    def test_without_the_keys_it_is_refused(self, held: Lease) -> None:
        variables = environment(held.endpoint, held.keys) | {"AWS_SECRET_ACCESS_KEY": "x" * 40}
        done = subprocess.run(
            [sys.executable, "-c", "import boto3; boto3.client('medical-imaging').list_datastores()"],
            env={"PATH": os.environ["PATH"], **variables},
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert "InvalidSignatureException" in done.stderr

    def test_the_lock_is_the_servers(self, folder: Path, held: Lease) -> None:
        with pytest.raises(Timeout):
            FileLock(folder / "server.lock").acquire(timeout=0)
