"""Dividing an index so that no patient stands on two sides."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import pairwise

from ahi_ml.errors import ConfigError, SplitLeakError

__all__ = ["assign_groups", "check_identifiers", "connected_groups"]


def check_identifiers(patient_keys: Sequence[str | None], studies: Sequence[str]) -> None:
    """Refuse identifiers that cannot tell patients apart. I/O: none.

    Parameters
    ----------
    patient_keys, studies : sequences, one entry a series
        Patient key and study UID.

    Raises
    ------
    SplitLeakError
        A patient key is missing, or one stands on more than half of four or more studies.
    """
    missing = sum(key is None for key in patient_keys)
    if missing:
        raise SplitLeakError(
            f"{missing} of {len(patient_keys)} series have no patient id: a split by patient could put one patient "
            "on both sides. Pass by='study' if studies are known to be of different patients"
        )
    by_study = dict(zip(studies, patient_keys, strict=True))
    if len(by_study) >= 4:
        key, count = Counter(by_study.values()).most_common(1)[0]
        if 2 * count > len(by_study):
            raise SplitLeakError(
                f"one patient key ({key}) stands on {count} of {len(by_study)} studies, as placeholders like NOID do. "
                "Pass by='study' if studies are known to be of different patients"
            )


def connected_groups(*labels: Sequence[str]) -> list[int]:
    """Number the connected components of rows that share a label in any column. I/O: none.

    Parameters
    ----------
    *labels : sequences of equal length
        Such as patient keys and study UIDs.

    Returns
    -------
    list of int
        Component of each row, numbered by first appearance.
    """
    parent = list(range(len(labels[0])))

    def root(row: int) -> int:
        while parent[row] != row:
            parent[row] = parent[parent[row]]
            row = parent[row]
        return row

    for column in labels:
        first: dict[str, int] = {}
        for row, label in enumerate(column):
            parent[root(row)] = root(first.setdefault(label, row))
    numbers: dict[int, int] = {}
    return [numbers.setdefault(root(row), len(numbers)) for row in range(len(parent))]


def assign_groups(
    groups: Sequence[int], members: Sequence[str], ratios: Mapping[str, float], *, seed: int
) -> list[str]:
    """Name the part each row goes to. I/O: none.

    A group goes by the smallest hash of its members, so rows added later that are unrelated to it
    never move it.

    Parameters
    ----------
    groups, members : sequences, one entry a row
        Group number, and the label whose hash decides (patient key, study UID).
    ratios : mapping of name to float
        Shares of the groups, adding up to 1 or less; what is left over goes nowhere ("").
    seed : int
        Another seed, another split.

    Raises
    ------
    ConfigError
        Ratios that cannot be.
    """
    total = sum(ratios.values())
    if not ratios or any(not 0 < ratio <= 1 for ratio in ratios.values()) or total > 1 + 1e-9:
        raise ConfigError(f"split ratios must be above 0 and add up to 1 at most, not {dict(ratios)}")
    bounds = [0.0]
    for ratio in ratios.values():
        bounds.append(bounds[-1] + ratio)
    if abs(bounds[-1] - 1) < 1e-9:
        bounds[-1] = 1.0
    smallest: dict[int, float] = {}
    for group, member in zip(groups, members, strict=True):
        digest = hashlib.blake2b(f"{seed}\0{member}".encode(), digest_size=8).digest()
        place = (int.from_bytes(digest, "big") >> 11) / 2**53  # below 1, which all 64 bits could round up to
        smallest[group] = min(place, smallest.get(group, 1.0))
    part = {
        group: next(
            (name for name, (low, high) in zip(ratios, pairwise(bounds), strict=True) if low <= place < high),
            "",
        )
        for group, place in smallest.items()
    }
    return [part[group] for group in groups]
