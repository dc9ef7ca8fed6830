"""The budget of requests, kept by processes that know nothing of each other, against a server that throttles."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import ahi_ml as ahi
from ahi_ml.client import AccessKeys, Service, make_connection
from ahi_ml.local.process import Lease, attach

PROCESSES = 8
SECONDS = 6.5

# Fetches one frame over and over in each process, six requests at a time, and tells what was counted meanwhile.
FETCH = """
import json, multiprocessing, os, sys, time
from collections import deque
import ahi_ml as ahi
import ahi_ml.store, boto3, pycurl

def run(store_id, image_set_id, frame_id, seconds):
    store = ahi.connect(store_id, rate_limit=100)
    reader = store.reader
    together.wait(100)
    began = time.monotonic()
    under_way, answers = deque(), 0
    while under_way or not answers:
        while len(under_way) < 6 and time.monotonic() < began + seconds:
            under_way.append(reader.request(image_set_id, frame_id))
        answers += len(under_way.popleft().result()) > 0
    report = {"answers": answers, "began": began, "ended": time.monotonic(), **reader.requests()}
    os.write(1, json.dumps(report).encode() + b"\\n")
    store.close()

fork = multiprocessing.get_context("fork")
together = fork.Barrier(int(sys.argv[5]))
processes = [fork.Process(target=run, args=(*sys.argv[1:4], float(sys.argv[4]))) for _ in range(together.parties)]
for process in processes:
    process.start()
for process in processes:
    process.join()
"""


@pytest.fixture(scope="module")
def a_frame(store_folder: Path, tmp_path_factory: pytest.TempPathFactory, pydicom_file: Any) -> tuple[str, str, str]:
    """Ids of a data store, an image set and a frame."""
    scans = tmp_path_factory.mktemp("scans")
    (scans / "ct.dcm").write_bytes(pydicom_file("CT_small.dcm").read_bytes())
    with ahi.connect(store_folder) as store:
        store.import_dicom(scans)
        frame = store.search().index().frames.iloc[0]
        return store.datastore_id, frame["image_set_id"], frame["frame_id"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="POSIX record locks")
def test_eight_processes_use_the_quota_and_are_not_throttled(
    store_folder: Path, lease: Lease, a_frame: tuple[str, str, str], tmp_path: Path
) -> None:
    with ahi.connect(store_folder) as store:
        environment = {**os.environ, **store.environment(), "TMPDIR": str(tmp_path)}
    for name in ("AHI_ML_RATE_LIMIT", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        environment.pop(name, None)
    throttling = attach(store_folder, faults={"throttle": 0.1})  # 100 frames a second, 200 at once
    try:
        command = [sys.executable, "-c", FETCH, *a_frame, str(SECONDS), str(PROCESSES)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100)
    finally:
        throttling.close()
    assert done.returncode == 0, done.stderr
    reports = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(reports) == PROCESSES
    answers, requests, throttled = (
        sum(each[name] for each in reports) for name in ("answers", "requests", "throttled")
    )
    took = max(each["ended"] for each in reports) - min(each["began"] for each in reports)
    assert throttled < 0.01 * requests
    assert requests <= 150 + 100 * took + 1
    assert answers >= 0.95 * (150 + 100 * SECONDS)
    assert min(each["answers"] for each in reports) > 0.5 * 100 * SECONDS / PROCESSES
    assert all(each["delayed_s"] > 1 for each in reports)


def test_a_clients_other_requests_wait_too(
    lease: Lease, a_frame: tuple[str, str, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    keys = AccessKeys(lease.keys.access_key_id, lease.keys.secret_access_key)
    service = Service(lease.endpoint.region, None, lease.endpoint.url, keys)
    connection = make_connection(service, limits={"GetDatastore": (20.0, 1.0)})
    began = time.monotonic()
    for _ in range(6):
        connection.client.get_datastore(datastoreId=a_frame[0])
        connection.client.list_datastores()
    assert time.monotonic() - began > 0.24
    assert not connection.hooked
    stats = connection.governor.stats("GetDatastore")
    assert (stats["requests"], stats["retried"], stats["throttled"]) == (6, 0, 0)
    assert stats["delayed"] >= 4
    assert connection.governor.stats("ListDatastores")["delayed"] == 0
    connection.client.close()
