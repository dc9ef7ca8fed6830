"""`ResumableSampler`: set arithmetic of epochs, ranks, stops and resumes; quality and memory of the orders."""

from __future__ import annotations

import json
import pickle
import tracemalloc
from collections import Counter
from itertools import chain, islice
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import BatchSampler, DataLoader, Subset
from torch.utils.data.distributed import DistributedSampler

from ahi_ml.datasets import ResumableSampler
from ahi_ml.errors import ConfigError, SnapshotDriftError

SHUFFLES = ["global", "block", False]
GOLDEN_GLOBAL = [6, 9, 5, 8, 2, 4, 7, 0, 11, 10, 3, 1]
GOLDEN_BLOCK = [9, 8, 4, 5, 1, 7, 6, 0, 10, 11, 2, 3]


def ranks(length: Any, world: int, **options: Any) -> list[ResumableSampler]:
    return [ResumableSampler(length, num_replicas=world, rank=rank, **options) for rank in range(world)]


def interleave(shares: list[list[int]]) -> list[int]:
    """The global order that ranks' shares are of."""
    longest = max(map(len, shares))
    return [share[step] for step in range(longest) for share in shares if step < len(share)]


def epoch_order(length: int, epoch: int, **options: Any) -> list[int]:
    sampler = ResumableSampler(length, num_replicas=1, rank=0, **options)
    sampler.set_epoch(epoch)
    return list(sampler)


class TestOneRank:
    @pytest.mark.parametrize("shuffle", [*SHUFFLES, True])
    @pytest.mark.parametrize("length", [0, 1, 2, 127, 128, 129, 4096, 4097, 10_000])
    def test_each_epoch_has_each_sample_once(self, length: int, shuffle: Any) -> None:
        sampler = ResumableSampler(length, shuffle=shuffle)
        for _ in range(3):
            rows = list(sampler)
            assert len(sampler) == length
            assert sorted(rows) == list(range(length))
            assert all(type(row) is int for row in rows)

    @pytest.mark.parametrize("shuffle", ["global", "block"])
    def test_the_order_is_of_seed_and_epoch(self, shuffle: Any) -> None:
        sampler = ResumableSampler(5000, seed=3, shuffle=shuffle)
        orders = [list(sampler) for _ in range(3)]
        assert len({tuple(order) for order in orders}) == 3
        assert orders[2] == epoch_order(5000, 2, seed=3, shuffle=shuffle)
        assert orders[0] != epoch_order(5000, 0, seed=4, shuffle=shuffle)

    def test_orders_stay_what_they_are(self) -> None:
        # A state is of no use with another order: these may change with no release, nor with numpy's.
        assert epoch_order(12, 1, seed=5) == GOLDEN_GLOBAL
        assert epoch_order(12, 1, seed=5, shuffle="block", block=2, window=4) == GOLDEN_BLOCK

    def test_without_shuffle_it_is_the_index(self) -> None:
        assert epoch_order(100, 7, shuffle=False) == list(range(100))

    def test_making_iterators_changes_nothing(self) -> None:
        sampler = ResumableSampler(10)
        first = epoch_order(10, 0)
        for _ in range(3):
            iter(sampler)
            iter(BatchSampler(sampler, 2, False))
        assert list(sampler) == first

    def test_an_iteration_that_was_left_is_followed_by_the_next_epoch(self) -> None:
        sampler = ResumableSampler(10)
        next(iter(sampler))
        assert list(sampler) == epoch_order(10, 1)

    def test_set_epoch(self) -> None:
        sampler = ResumableSampler(50)
        for epoch in (4, 4, 2, 0):
            sampler.set_epoch(epoch)
            assert sampler.epoch == epoch
            assert list(sampler) == epoch_order(50, epoch)
            assert sampler.epoch == epoch
        assert list(sampler) == epoch_order(50, 1)


class TestRanks:
    @pytest.mark.parametrize("shuffle", SHUFFLES)
    def test_the_global_order_is_the_same_for_any_world(self, shuffle: Any) -> None:
        whole = epoch_order(6000, 0, seed=1, shuffle=shuffle)
        for world in (2, 3, 7):
            shares = [list(sampler) for sampler in ranks(6000, world, seed=1, shuffle=shuffle, pad=False)]
            assert interleave(shares) == whole

    def test_global_batches_are_the_same_for_any_world(self) -> None:
        def batches(world: int) -> list[set[int]]:
            each = [list(BatchSampler(sampler, 12 // world, False)) for sampler in ranks(120, world)]
            return [set().union(*parts) for parts in zip(*each, strict=True)]

        assert batches(1) == batches(2) == batches(3) == batches(6)

    @settings(max_examples=100, deadline=None)
    @given(
        length=st.integers(0, 400),
        world=st.integers(1, 9),
        shuffle=st.sampled_from(SHUFFLES),
        drop_last=st.booleans(),
        pad=st.booleans(),
    )
    def test_shares(self, length: int, world: int, shuffle: Any, drop_last: bool, pad: bool) -> None:
        samplers = ranks(length, world, shuffle=shuffle, drop_last=drop_last, pad=pad, block=8, window=32)
        shares = [list(sampler) for sampler in samplers]
        assert [len(share) for share in shares] == [len(sampler) for sampler in samplers]
        counts = Counter(row for share in shares for row in share)
        sizes = {len(share) for share in shares}
        if drop_last:
            assert sizes == {length // world}
            assert set(counts.values()) <= {1}
        elif pad:
            assert sizes == {-(-length // world)}
            assert set(counts) == set(range(length))
            assert sum(counts.values()) - length < world
        else:
            assert max(sizes) - min(sizes) <= 1
            assert counts == Counter(range(length))

    @pytest.mark.parametrize("drop_last", [True, False])
    @pytest.mark.parametrize(("length", "world"), [(10, 3), (12, 3), (2, 5), (11, 4)])
    def test_lengths_and_padding_are_those_of_distributed_sampler(
        self, length: int, world: int, drop_last: bool
    ) -> None:
        for rank, mine in enumerate(ranks(length, world, shuffle=False, drop_last=drop_last)):
            other = DistributedSampler(range(length), world, rank, shuffle=False, drop_last=drop_last)  # type: ignore[arg-type]
            assert list(mine) == list(other)
            assert (len(mine), mine.num_samples, mine.total_size) == (len(other), other.num_samples, other.total_size)

    def test_ranks_come_from_the_environment_when_used(self, monkeypatch: pytest.MonkeyPatch) -> None:
        made_before = ResumableSampler(10)
        assert len(made_before) == 10
        monkeypatch.setenv("WORLD_SIZE", "5")
        assert len(made_before) == 10  # WORLD_SIZE alone says too little
        monkeypatch.setenv("RANK", "3")
        assert len(made_before) == 2
        assert list(made_before) == epoch_order(10, 0)[3::5]
        assert len(ResumableSampler(10, num_replicas=1, rank=0)) == 10

    @pytest.mark.parametrize(
        "options",
        [
            {"num_replicas": 2, "rank": 2},
            {"num_replicas": 2, "rank": -1},
            {"num_replicas": 0, "rank": 0},
            {"rank": 1},
            {"shuffle": "blocks"},
            {"shuffle": None},
            {"seed": -1},
            {"block": 0},
            {"block": 64, "window": 63},
        ],
    )
    def test_options_that_cannot_work_are_refused(self, options: dict[str, Any]) -> None:
        with pytest.raises(ConfigError):
            ResumableSampler(10, **options)
        with pytest.raises(ConfigError):
            ResumableSampler(-1)


class TestResuming:
    """A run is a list of segments (world, batches a rank): stopped, its state saved by JSON, another world resumed."""

    def run(
        self, length: int, segments: list[tuple[int, int]], batch: int, by_taken: bool, **options: Any
    ) -> tuple[list[list[int]], dict[str, Any]]:
        """Rows of all ranks step by step, segment after segment, and the last state."""
        state: dict[str, Any] | None = None
        rows: list[list[int]] = []
        for world, batches in segments:
            samplers = ranks(length, world, **options)
            for sampler in samplers:
                if state is not None:
                    sampler.load_state_dict(state)
            # With `taken` the loader draws far ahead of the loop; without, exactly as much.
            ahead = 3 if by_taken else 0
            drawn = [list(islice(sampler, (batches + ahead) * batch)) for sampler in samplers]
            got = [share[: batches * batch] for share in drawn]
            rows.append(interleave(got))
            states = [sampler.state_dict(taken=batches * batch if by_taken else None) for sampler in samplers]
            assert all(each == states[0] for each in states) or not options.get("pad", True)
            state = json.loads(json.dumps(states[0]))
            assert len(json.dumps(state)) < 1000
        assert state is not None
        return rows, state

    @pytest.mark.parametrize("by_taken", [True, False])
    @pytest.mark.parametrize("shuffle", SHUFFLES)
    def test_one_two_three_one(self, shuffle: Any, by_taken: bool) -> None:
        rows, state = self.run(6000, [(1, 30), (2, 50), (3, 41), (1, 7)], 16, by_taken, seed=2, shuffle=shuffle)
        done = list(chain.from_iterable(rows))
        consumed = 16 * (30 + 2 * 50 + 3 * 41 + 7)
        assert (state["seed"], state["epoch"], state["consumed"]) == (2, 0, consumed)
        assert done == epoch_order(6000, 0, seed=2, shuffle=shuffle)[:consumed]
        rest = ranks(6000, 4, seed=2, shuffle=shuffle)
        for sampler in rest:
            sampler.load_state_dict(state)
        assert Counter(done + interleave([list(each) for each in rest])) == Counter(range(6000))
        for epoch in (1, 2):  # later ones are whole
            assert interleave([list(each) for each in rest]) == epoch_order(6000, epoch, seed=2, shuffle=shuffle)

    @settings(max_examples=150, deadline=None)
    @given(
        length=st.integers(1, 300),
        segments=st.lists(st.tuples(st.integers(1, 5), st.integers(0, 12)), min_size=1, max_size=5),
        batch=st.integers(1, 9),
        last=st.integers(1, 5),
        by_taken=st.booleans(),
        shuffle=st.sampled_from(SHUFFLES),
        tail=st.sampled_from(["drop", "pad", "exact"]),
    )
    def test_nothing_is_lost_or_repeated(
        self,
        length: int,
        segments: list[tuple[int, int]],
        batch: int,
        last: int,
        by_taken: bool,
        shuffle: Any,
        tail: str,
    ) -> None:
        options: dict[str, Any] = {
            "shuffle": shuffle,
            "drop_last": tail == "drop",
            "pad": tail == "pad",
            "block": 4,
            "window": 16,
        }
        # As many segments as lie before the end of the epoch, each whole.
        kept, left = [], length
        for world, batches in segments:
            if left - world * batches * batch < (world if tail == "drop" else 1):
                break
            kept.append((world, batches))
            left -= world * batches * batch
        rows, state = self.run(length, kept or [(1, 0)], batch, by_taken, **options)
        done = list(chain.from_iterable(rows))
        order = epoch_order(length, 0, **options)
        assert done == order[: length - left]
        samplers = ranks(length, last, **options)
        for sampler in samplers:
            sampler.load_state_dict(state)
        rest = interleave([list(each) for each in samplers])
        expected = order[length - left :]
        if tail == "drop":
            assert rest == expected[: left // last * last]
        elif tail == "exact":
            assert rest == expected
        else:
            assert rest[:left] == expected
            assert rest[left:] == (order * last)[: -left % last]
        for sampler in samplers:
            assert sampler.epoch == 0
            assert len(list(sampler)) == len(sampler)
            assert sampler.epoch == 1

    def test_every_stop(self) -> None:
        order = epoch_order(23, 0)
        for stop in range(24):
            sampler = ResumableSampler(23)
            got = list(islice(sampler, stop))
            again = ResumableSampler(23, seed=9)  # the state's seed counts
            again.load_state_dict(sampler.state_dict())
            again.set_epoch(0)
            assert got + list(again) == order
            assert list(again) == epoch_order(23, 1)

    def test_a_state_before_the_first_row(self) -> None:
        sampler = ResumableSampler(10)
        sampler.set_epoch(3)
        state = sampler.state_dict()
        assert (state["epoch"], state["consumed"]) == (3, 0)
        again = ResumableSampler(10)
        again.load_state_dict(state)
        assert again.state_dict() == state
        assert list(again) == epoch_order(10, 3)

    @pytest.mark.parametrize("drop_last", [False, True])
    def test_after_a_finished_epoch_comes_the_next(self, drop_last: bool) -> None:
        samplers = ranks(10, 3, drop_last=drop_last)
        for each in samplers:
            list(each)
        states = [each.state_dict() for each in samplers]
        assert all(state == states[0] for state in states)
        assert states[0]["consumed"] == 10
        again = ResumableSampler(10, drop_last=drop_last)
        again.load_state_dict(states[0])
        assert list(again) == epoch_order(10, 1)
        again.load_state_dict(states[0])
        again.set_epoch(0)
        assert list(again) == []
        again.set_epoch(1)
        assert list(again) == epoch_order(10, 1)

    def test_set_epoch_of_another_epoch_is_a_whole_one(self) -> None:
        sampler = ResumableSampler(10)
        list(islice(sampler, 4))
        state = sampler.state_dict()
        sampler.load_state_dict(state)
        sampler.set_epoch(5)
        assert list(sampler) == epoch_order(10, 5)
        sampler.load_state_dict(state)
        sampler.set_epoch(5)  # trainers name an epoch when they start, and the right one later
        sampler.set_epoch(0)
        assert list(sampler) == epoch_order(10, 0)[4:]
        sampler.set_epoch(0)
        assert list(sampler) == epoch_order(10, 0)

    def test_saving_changes_nothing(self) -> None:
        sampler = ResumableSampler(10)
        rows = []
        for row in sampler:
            rows.append(row)
            assert sampler.state_dict()["consumed"] == len(rows)
            assert sampler.state_dict(taken=2)["consumed"] == 2
        assert rows == epoch_order(10, 0)

    def test_more_taken_than_there_is_means_all(self) -> None:
        sampler = ResumableSampler(10)
        list(sampler)
        assert sampler.state_dict(taken=12)["consumed"] == 10  # batches times batch size, the last one smaller

    def test_what_cannot_be_taken(self) -> None:
        sampler = ResumableSampler(10)
        with pytest.raises(ConfigError, match="no iteration"):
            sampler.state_dict(taken=3)
        next(iter(sampler))
        with pytest.raises(ConfigError):
            sampler.state_dict(taken=-1)

    def test_the_largest_state_is_small_and_plain(self) -> None:
        sampler = ResumableSampler(10**12, seed=2**63, shuffle=False)
        sampler.set_epoch(10**9)
        next(iter(sampler))
        state = sampler.state_dict()
        assert len(json.dumps(state)) < 1000
        assert len(pickle.dumps(state)) < 1000
        assert torch.equal(torch.tensor(state["consumed"]), torch.tensor(1))

    def test_states_that_do_not_fit_are_refused(self) -> None:
        state = ResumableSampler(10).state_dict()
        with pytest.raises(SnapshotDriftError, match="11"):
            ResumableSampler(11).load_state_dict(state)
        with pytest.raises(ConfigError, match="block"):
            ResumableSampler(10, shuffle="block").load_state_dict(state)
        with pytest.raises(ConfigError, match="64"):
            ResumableSampler(10, shuffle="block", block=64).load_state_dict(
                ResumableSampler(10, shuffle="block").state_dict()
            )
        for wrong in ({}, {"epoch": 1}, {**state, "consumed": 11}, {**state, "epoch": -1}, {**state, "seed": "x"}):
            with pytest.raises(ConfigError):
                ResumableSampler(10).load_state_dict(wrong)


class TestTellingTheDataset:
    class Told(list[int]):
        epoch = -1

        def set_epoch(self, epoch: int) -> None:
            self.epoch = epoch

    def test_it_is_told_when_an_iteration_begins(self) -> None:
        dataset = self.Told(range(6))
        sampler = ResumableSampler(dataset)
        iter(sampler)
        assert dataset.epoch == -1
        for epoch in range(3):
            next(iter(sampler))
            assert dataset.epoch == epoch
        state = sampler.state_dict()
        dataset.epoch = -1
        again = ResumableSampler(dataset)
        again.load_state_dict(state)
        next(iter(again))
        assert dataset.epoch == 2

    def test_through_a_subset(self) -> None:
        dataset = self.Told(range(6))
        part = Subset(dataset, [1, 3])  # type: ignore[arg-type]
        sampler = ResumableSampler(part)
        sampler.set_epoch(4)
        assert sorted(DataLoader(part, sampler=sampler, batch_size=None)) == [1, 3]
        assert dataset.epoch == 4


def realistic_layout(frames: int, seed: int = 0) -> np.ndarray:
    """Image set of each row: CT of hundreds of frames, MR of tens, radiographs of one to four."""
    rng = np.random.default_rng(seed)
    sizes: list[int] = []
    while sum(sizes) < frames:
        low, high = [(60, 700), (18, 200), (1, 5)][rng.choice(3, p=[0.4, 0.4, 0.2])]
        sizes.append(int(rng.integers(low, high)))
    return np.repeat(np.arange(len(sizes)), sizes)[:frames]


def positions_of(order: np.ndarray) -> np.ndarray:
    positions = np.empty(len(order), np.int64)
    positions[order] = np.arange(len(order))
    return positions


class TestBlockShuffle:
    @pytest.mark.parametrize("length", [10_000, 50_000, 200_000])
    def test_the_order_does_not_follow_the_index(self, length: int) -> None:
        """The rank correlation of default settings, and of each tenth of the epoch; chance alone gives 1/sqrt(n)."""
        for seed in range(10):
            order = np.array(epoch_order(length, seed, seed=seed, shuffle="block"))
            assert abs(np.corrcoef(np.arange(length), order)[0, 1]) < 0.05
            means = [part.mean() / length for part in np.array_split(order, 10)]
            assert max(abs(mean - 0.5) for mean in means) < 0.05

    def test_batches_hold_many_image_sets(self) -> None:
        sets = realistic_layout(200_000)
        order = np.array(epoch_order(200_000, 0, shuffle="block"))
        kinds = np.array([len(np.unique(batch)) for batch in sets[order[:199_968]].reshape(-1, 32)])
        chance = np.random.default_rng(0).permutation(sets)[:199_968].reshape(-1, 32)
        assert kinds.mean() > 0.6 * np.mean([len(np.unique(batch)) for batch in chance])
        assert kinds.min() >= 10

    def test_neighbours_stay_within_the_window(self) -> None:
        for length, block, window in ((200_000, 128, 4096), (3000, 16, 100), (999, 10, 10)):
            order = np.array(epoch_order(length, 0, shuffle="block", block=block, window=window))
            positions = positions_of(order)
            shift = next(
                shift
                for shift in range(block)
                if all(
                    np.ptp(positions[max(start, 0) : start + block]) < window for start in range(-shift, length, block)
                )
            )
            assert 0 <= shift < block
            near = np.abs(np.diff(positions)) < window
            assert near.mean() > 1 - 1.5 / block
        everywhere = positions_of(np.array(epoch_order(200_000, 0)))
        assert (np.abs(np.diff(everywhere)) < 4096).mean() < 0.1

    def test_blocks_begin_elsewhere_each_epoch(self) -> None:
        """No two rows are neighbours in all epochs, and none are kept apart for good."""
        together = np.zeros(1999, int)
        for epoch in range(60):
            positions = positions_of(np.array(epoch_order(2000, epoch, shuffle="block", block=10, window=50)))
            together += np.abs(np.diff(positions)) < 50
        assert together.max() <= 60
        assert together.min() > 30

    def test_every_place_is_likely_for_every_row(self) -> None:
        sums = np.zeros(1000)
        for epoch in range(400):
            sums += positions_of(np.array(epoch_order(1000, epoch, shuffle="block", block=10, window=100)))
        means = sums / 400  # uniform: 499.5, standard error 14.4
        assert np.abs(means - 499.5).max() < 6 * 14.4


class TestMemory:
    @pytest.mark.parametrize(("shuffle", "bytes_a_row"), [("global", 4.2), ("block", 0.5), (False, 0.1)])
    def test_ten_million_rows_are_never_a_list(self, shuffle: Any, bytes_a_row: float) -> None:
        length = 10_000_000
        np.random.default_rng([0, 0])  # what numpy makes once
        tracemalloc.start()
        try:
            sampler = ResumableSampler(length, shuffle=shuffle)
            rows = list(islice(sampler, 10_000))
            assert len(set(rows)) == 10_000
            sampler.load_state_dict({**sampler.state_dict(), "consumed": 9_999_000})
            assert sum(1 for _ in sampler) == 1000
            peak = tracemalloc.get_traced_memory()[1]
            left = tracemalloc.get_traced_memory()[0]
        finally:
            tracemalloc.stop()
        assert peak < bytes_a_row * length + 2e6
        assert left < 2e6
