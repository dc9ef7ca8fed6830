"""The notebooks run from top to bottom, and the committed copies show what they show when run.

Ids and times differ from run to run, so outputs are compared by their kinds, cell by cell.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pydicom
import pytest

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")

FOLDER = Path(__file__).resolve().parents[1] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
MOST_BYTES = 1_000_000
CELL_TIMEOUT_S = 120
MACHINE_PATH = re.compile(r"(?:^|[\s'\"(=:])(?:/(?:tmp|root|home|work|Users|private|var|opt)\b|[A-Z]:\\)", re.MULTILINE)
PATIENT_ATTRIBUTES = re.compile(r"Patient'?s?\s?(?:Name|BirthDate|Birth Date|ID)\b", re.IGNORECASE)

each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def _code_cells(notebook: Any) -> list[Any]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def _kinds(cell: Any) -> list[str]:
    """What a cell shows: names of streams, media types of results and pictures."""
    kinds = set()
    for output in cell.outputs:
        kinds |= {output.name} if output.output_type == "stream" else set(output.get("data", {"error": ""}))
    return sorted(kinds)


def _texts(notebook: Any) -> Iterator[str]:
    """Everything to be read in a notebook: sources, and outputs but for the bytes of pictures."""
    for cell in notebook.cells:
        yield cell.source
        for output in cell.get("outputs", []):
            yield output.get("text", "")
            yield "\n".join(output.get("traceback", []))
            yield from (text for media, text in output.get("data", {}).items() if not media.startswith("image/p"))


@pytest.fixture(scope="module")
def executed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Runs a notebook in a folder of its own, once: ``executed(path) -> (notebook, folder)``."""
    done: dict[Path, tuple[Any, Path]] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MPLBACKEND", raising=False)  # another backend than the notebook's draws nothing
        patch.setenv("IPYTHONDIR", str(tmp_path_factory.mktemp("ipython")))  # no start-up files of the user's
        patch.setenv("PYTHONWARNINGS", "ignore:IProgress not found")  # progress bars are off, ipywidgets optional

        def run(path: Path) -> tuple[Any, Path]:
            if path not in done:
                folder = tmp_path_factory.mktemp(path.stem)
                patch.setenv("AHI_ML_CACHE", str(folder / "cache"))
                notebook = nbformat.read(path, as_version=4)
                client = nbclient.NotebookClient(
                    notebook,
                    timeout=CELL_TIMEOUT_S,
                    kernel_name="python3",
                    resources={"metadata": {"path": str(folder)}},
                )
                client.execute()  # clears each cell's outputs before it runs
                done[path] = notebook, folder
            return done[path]

        yield run


def test_there_are_notebooks() -> None:
    assert NOTEBOOKS


@each_notebook
def test_the_committed_copy_is_small_and_was_run_in_order(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert path.stat().st_size < MOST_BYTES
    cells = _code_cells(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1)), "run it in a fresh kernel"


@each_notebook
def test_it_runs_and_the_committed_copy_shows_the_same(path: Path, executed: Any) -> None:
    fresh, _ = executed(path)
    committed = nbformat.read(path, as_version=4)
    for old, new in zip(_code_cells(committed), _code_cells(fresh), strict=True):
        assert _kinds(old) == _kinds(new), f"run the notebook again and commit its outputs; cell:\n{old.source}"
        assert not {"error", "stderr"} & set(_kinds(old)), f"an error or a warning is committed; cell:\n{old.source}"


@each_notebook
def test_nothing_tells_of_a_machine_or_a_patient(path: Path, executed: Any) -> None:
    fresh, folder = executed(path)
    names = set()
    for file in folder.rglob("*.dcm"):
        name = str(pydicom.dcmread(file, specific_tags=["PatientName"], stop_before_pixels=True).get("PatientName", ""))
        names |= {name, name.replace("^", " ").strip()} if len(name) > 3 else set()
    assert names, "no DICOM files beside the notebook: nothing was looked for"
    for notebook in (nbformat.read(path, as_version=4), fresh):
        for text in _texts(notebook):
            assert not (found := MACHINE_PATH.search(text)), f"a path of a machine: {text[found.start() :][:80]!r}"
            assert str(folder) not in text
            assert not (found := PATIENT_ATTRIBUTES.search(text)), f"an attribute of patients: {found[0]!r}"
            for name in names:
                assert name.casefold() not in text.casefold(), f"the name of a patient: {name!r}"
