"""The README is true: its code runs, its commands exist, its table of dependencies is complete."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pydicom
import pytest
from pydicom.data import get_testdata_file
from pydicom.uid import generate_uid

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def _blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.S)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``scans/``: a dozen made-up patients with one small CT slice each."""
    folder = tmp_path_factory.mktemp("readme")
    (folder / "scans").mkdir()
    dataset = pydicom.dcmread(get_testdata_file("CT_small.dcm", download=False))
    for number in range(12):
        dataset.PatientID = dataset.PatientName = f"MADE-UP-{number}"
        for keyword in ("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID"):
            setattr(dataset, keyword, generate_uid(entropy_srcs=["readme", keyword, str(number)]))
        dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
        dataset.save_as(folder / "scans" / f"{number}.dcm")
    return folder


def test_the_python_blocks_run(workplace: Path, entry_points_folder: Path) -> None:
    (workplace / "my_boto3_script.py").write_text(
        "import boto3\n"
        "client = boto3.client('medical-imaging')\n"
        "store = client.list_datastores()['datastoreSummaries'][0]['datastoreId']\n"
        "print(len(client.search_image_sets(datastoreId=store)['imageSetsMetadataSummaries']))\n"
    )
    blocks = _blocks("python")
    assert len(blocks) == 5
    script = "import os\n" + "\n".join(blocks)
    script += "\nassert report.imported == 12 and len(table) == 12 and table['error'].isna().all()"
    script += "\nassert volume.shape[1:] == (128, 128) and len(train) + len(val) == 12\n"
    script = script.replace('["python", ', "[sys.executable, ").replace("import os\n", "import os, sys\n", 1)
    script += "assert loader.stats().frames == len(train)\n"
    script += "assert len(documents) == len(series) == len(index) == 12 and len(frames) == 1\n"
    paths = os.pathsep.join(filter(None, [str(entry_points_folder), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "AHI_ML_CACHE": str(workplace / "cache"), "PYTHONPATH": paths}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=workplace, env=environment, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip().endswith("12")


def test_the_commands_exist_and_say_how_they_are_used() -> None:
    import typer.main

    from ahi_ml.cli import app

    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    named = set(re.findall(r"^ahi-ml ([a-z]+)", "\n".join(_blocks("sh")), re.M))
    assert named <= set(commands)
    assert set(commands) - named <= {"demo"}, "commands the README does not show"
    for name, command in commands.items():
        assert f"Example: ahi-ml {name}" in command.help or "Example: eval" in command.help, name


def test_the_two_commands_stand_in_the_readme() -> None:
    shell = "\n".join(_blocks("sh"))
    assert "pip install -c constraints.txt '.[demo]' && ahi-ml demo" in shell
    assert "pip install -c constraints.txt -e '.[test]' && pytest" in shell


def test_every_dependency_has_a_reason_and_a_pin() -> None:
    table = README.partition("## Dependencies")[2].partition("\n## ")[0]
    pins = (ROOT / "constraints.txt").read_text(encoding="utf-8").lower()
    for requirement in PROJECT["dependencies"]:
        name = re.match(r"[A-Za-z0-9-]+", requirement)[0]  # type: ignore[index]
        assert re.search(rf"\b{name}\b", table), f"{name} is not in the README's table"
        assert re.search(rf"^{name}==", pins, re.M), f"{name} is not pinned"
    assert "torch==2.13.0" in pins
    for extra in PROJECT["optional-dependencies"]:
        assert f"`{extra}`" in README, f"extra {extra} is not in the README"
