"""The public surface: what is exported, documented, light to import, and safe to send to a worker."""

from __future__ import annotations

import inspect
import pickle
import subprocess
import sys

import pytest

import ahi_ml
from ahi_ml import errors

FUNCTIONS = ["connect", "open_volume", "extract_features"]
CLASSES = ["DataStore", "DatasetIndex", "FrameDataset", "FrameLoader", "Geometry", "ResumableSampler"]
ERRORS = [getattr(errors, name) for name in errors.__all__]


def test_every_exported_name_loads() -> None:
    for name in ahi_ml.__all__:
        assert getattr(ahi_ml, name) is not None
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = ahi_ml.no_such_name


@pytest.mark.parametrize("name", FUNCTIONS + CLASSES)
def test_public_docstrings_say_what_is_read_and_raised(name: str) -> None:
    text = inspect.getdoc(getattr(ahi_ml, name)) or ""
    assert "I/O:" in text or name in ("DataStore",), f"{name} does not say what I/O it does"
    if name in FUNCTIONS:
        for section in ("Parameters", "Returns", "Raises"):
            assert f"\n{section}\n---" in text, f"{name} has no {section} section"


@pytest.mark.parametrize("kind", ERRORS, ids=lambda kind: kind.__name__)
def test_errors_are_built_from_one_message_and_survive_pickle(kind: type[errors.AhiError]) -> None:
    made = kind("what, where, why")
    again = pickle.loads(pickle.dumps(made))
    assert type(again) is kind
    assert str(again) == "what, where, why"
    assert isinstance(made, errors.AhiError)
    assert not hasattr(made, "message")


def test_errors_keep_their_context_through_pickle() -> None:
    made = errors.ThrottledError("slow down", operation="GetImageFrame", status=429, retryable=True)
    again = pickle.loads(pickle.dumps(made))
    assert (again.operation, again.status, again.retryable) == ("GetImageFrame", 429, True)


def test_the_tree_is_drawn_in_the_docstring() -> None:
    for name in errors.__all__:
        assert name in (errors.__doc__ or "")


def test_importing_the_package_imports_nothing_heavy() -> None:
    heavy = ["numpy", "boto3", "botocore", "torch", "xarray", "pandas", "pyarrow", "pydicom", "matplotlib", "joblib"]
    code = f"import sys, ahi_ml; print([name for name in {heavy} if name in sys.modules])"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "[]"


def test_the_index_and_store_do_not_import_torch() -> None:
    code = "import sys, ahi_ml.store, ahi_ml.index; print('torch' in sys.modules, 'xarray' in sys.modules)"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout.split() == ["False", "False"]
