"""Freed memory: kept, so that it need not be fetched again."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

PROGRAM = """
import resource
from ahi_ml.local import memory

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

{keep}
for round in range(20):
    if round == 10:
        before = faults()
    several = [b"x" * (6 * 2**20) for _ in range(4)]
    del several
print(faults() - before)
{give_back}
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc is told")
def test_an_import_does_not_fetch_the_same_memory_again_and_again() -> None:
    def faults(keep: str, give_back: str = "") -> int:
        program = PROGRAM.format(keep=keep, give_back=give_back)
        return int(subprocess.run([sys.executable, "-c", program], capture_output=True, check=True, text=True).stdout)

    assert faults("memory.keep()", "memory.give_back()") < 1_000 < faults("")
