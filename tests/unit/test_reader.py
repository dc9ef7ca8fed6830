"""The reader on transports made up here: order, errors, checksums, cache, cancelling; values against pydicom."""

from __future__ import annotations

import json
import signal
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import pytest
from pydicom.dataset import Dataset
from pydicom.pixels import (
    apply_color_lut,
    apply_modality_lut,
    apply_rescale,
    apply_voi,
    apply_windowing,
    convert_color_space,
)
from pydicom.uid import (
    ComputedRadiographyImageStorage,
    CTImageStorage,
    DigitalIntraOralXRayImageStorageForPresentation,
    DigitalIntraOralXRayImageStorageForProcessing,
    DigitalMammographyXRayImageStorageForPresentation,
    DigitalMammographyXRayImageStorageForProcessing,
    DigitalXRayImageStorageForPresentation,
    DigitalXRayImageStorageForProcessing,
    XRayAngiographicImageStorage,
)

from ahi_ml.cache import FrameCache, recipe
from ahi_ml.codec import EXPLICIT_LE, HTJ2K_LOSSLESS_RPCL, PixelFormat, crc32, decode, jpeg2000, pack_bits, reached
from ahi_ml.errors import (
    ChecksumError,
    ConfigError,
    DataError,
    DecodeError,
    NotFoundError,
    UnsupportedTransferSyntaxError,
)
from ahi_ml.index import FrameProfile, FrameSource
from ahi_ml.metadata import PROFILE_COLUMNS
from ahi_ml.pixels import Normalize, Rescale, Scale, Window, uint8
from ahi_ml.reader import Reader, ReadOptions

STORE = "d" * 32
IMAGE_SET = "5" * 32
STORED = ReadOptions(output="stored")
JPEG_BASELINE = "1.2.840.10008.1.2.4.50"
MPEG4 = "1.2.840.10008.1.2.4.102"
PATIENCE_S = 20.0
RADIOGRAPHS = [
    ComputedRadiographyImageStorage,
    DigitalXRayImageStorageForPresentation,
    DigitalXRayImageStorageForProcessing,
    DigitalMammographyXRayImageStorageForPresentation,
    DigitalMammographyXRayImageStorageForProcessing,
    DigitalIntraOralXRayImageStorageForPresentation,
    DigitalIntraOralXRayImageStorageForProcessing,
]


class Served:
    """A transport over a dict: each frame has the answers it gives one after the other, the last for ever.

    Held, it answers only what `release` names, from a thread of its own.
    """

    def __init__(self, answers: dict[str, Any], *, held: bool = False) -> None:
        self.answers = {name: list(each) if isinstance(each, list) else [each] for name, each in answers.items()}
        self.requests: list[str] = []
        self.parts: dict[str, Any] = {}
        self.held: dict[str, list[Future[bytes]]] | None = {} if held else None
        self.closed = False
        self._thread = ThreadPoolExecutor(1, "served")

    def fetch(self, image_set_id: str, frame_id: str, part: Any = None) -> Future[bytes]:
        assert image_set_id == IMAGE_SET
        self.requests.append(frame_id)
        self.parts[frame_id] = part
        future: Future[bytes] = Future()
        if self.held is None:
            self._thread.submit(self._answer, frame_id, future)
        else:
            self.held.setdefault(frame_id, []).append(future)
        return future

    def release(self, *frame_ids: str) -> None:
        """Answer held requests, in this order."""
        assert self.held is not None
        for frame_id in frame_ids:
            self._thread.submit(self._answer, frame_id, self.held[frame_id].pop(0)).result(PATIENCE_S)

    def _answer(self, frame_id: str, future: Future[bytes]) -> None:
        if not future.set_running_or_notify_cancel():
            return
        queue = self.answers[frame_id]
        answer = queue.pop(0) if len(queue) > 1 else queue[0]
        if isinstance(answer, BaseException):
            future.set_exception(answer)
        else:
            future.set_result(answer)

    def close(self) -> None:
        self.closed = True
        self._thread.shutdown(wait=False, cancel_futures=True)


@pytest.fixture
def reader_of() -> Any:
    """Makes readers of answers, or of a transport; they end with the test."""
    made: list[Reader] = []

    def make(answers: dict[str, Any] | Served) -> Reader:
        reader = Reader(answers if isinstance(answers, Served) else Served(answers), STORE, threads=2)
        made.append(reader)
        return reader

    yield make
    for reader in made:
        reader.close()


@pytest.fixture
def cache(tmp_path: Path) -> FrameCache:
    return FrameCache(tmp_path / "cache")


def profile_of(image: np.ndarray, **attributes: Any) -> FrameProfile:
    """The profile that metadata with these attributes would give."""
    row: dict[str, Any] = dict.fromkeys([*PROFILE_COLUMNS, "lookup_tables"])
    row |= {
        "StoredTransferSyntaxUID": EXPLICIT_LE,
        "Rows": image.shape[0],
        "Columns": image.shape[1],
        "SamplesPerPixel": image.shape[2] if image.ndim == 3 else 1,
        "BitsAllocated": 8 * image.itemsize,
        "PixelRepresentation": int(image.dtype.kind == "i"),
        "PhotometricInterpretation": "RGB" if image.ndim == 3 else "MONOCHROME2",
    }
    return FrameProfile.from_row(row | attributes)


def source_of(name: str, image: np.ndarray, *, checksum: bool = True, **attributes: Any) -> FrameSource:
    return FrameSource(IMAGE_SET, name, crc32(image) if checksum else None, profile_of(image, **attributes))


def random_image(seed: int, dtype: str = "int16", shape: tuple[int, ...] = (12, 17)) -> np.ndarray:
    info = np.iinfo(dtype)
    return np.random.default_rng(seed).integers(info.min, info.max, shape, dtype, endpoint=True)


def raw_frames(count: int, **attributes: Any) -> tuple[dict[str, np.ndarray], list[FrameSource], dict[str, bytes]]:
    """Images, what the index would say of them, and their raw bytes."""
    images = {f"{number:032x}": random_image(number) for number in range(count)}
    sources = [source_of(name, image, **attributes) for name, image in images.items()]
    return images, sources, {name: image.tobytes() for name, image in images.items()}


def one(read: Sequence[np.ndarray]) -> np.ndarray:
    (array,) = read
    return array


class TestOrderAndErrors:
    def test_order_is_that_of_the_request_not_of_the_answers(self, reader_of: Callable[..., Reader]) -> None:
        images, sources, blobs = raw_frames(8)
        served = Served(blobs, held=True)
        wanted = [sources[n] for n in (5, 0, 3, 3, 7, 1)]
        batch = reader_of(served).submit(wanted, STORED)
        for timeout_s in (0, -1):  # a deadline that has passed is no reason to wait
            with pytest.raises(TimeoutError, match="6 of 6"):
                batch.outcomes(timeout_s)
        served.release(*(source.frame_id for source in reversed(wanted)))
        for source, array in zip(wanted, batch.wait(PATIENCE_S), strict=True):
            np.testing.assert_array_equal(array, images[source.frame_id])
        assert served.requests == [source.frame_id for source in wanted]

    def test_nothing_asked_nothing_given(self, reader_of: Callable[..., Reader]) -> None:
        assert reader_of({}).read([]) == []

    def test_an_error_stands_in_its_place(self, reader_of: Callable[..., Reader]) -> None:
        images, sources, blobs = raw_frames(5)
        missing = NotFoundError("no such frame", operation="GetImageFrame")
        batch = reader_of({**blobs, sources[2].frame_id: missing}).submit(sources, STORED)
        outcomes = batch.outcomes(PATIENCE_S)
        assert outcomes[2] is missing
        for place in (0, 1, 3, 4):
            np.testing.assert_array_equal(outcomes[place], images[sources[place].frame_id])
        with pytest.raises(NotFoundError):
            batch.wait()

    def test_an_error_of_the_service_is_not_asked_for_again(self, reader_of: Callable[..., Reader]) -> None:
        _, (source,), _ = raw_frames(1)
        served = Served({source.frame_id: NotFoundError("no such frame")})
        assert isinstance(reader_of(served).submit([source], STORED).outcomes(PATIENCE_S)[0], NotFoundError)
        assert served.requests == [source.frame_id]

    def test_unknown_syntaxes_are_named(self, reader_of: Callable[..., Reader]) -> None:
        image = random_image(0)
        source = source_of("f" * 32, image, checksum=False, StoredTransferSyntaxUID=MPEG4)
        with pytest.raises(UnsupportedTransferSyntaxError, match=r"f{32} of image set 5{32}: .*MPEG-4"):
            reader_of({source.frame_id: b"video"}).read([source])

    def test_bytes_that_cannot_be_decoded_name_the_frame(self, reader_of: Callable[..., Reader]) -> None:
        source = source_of("f" * 32, random_image(0), StoredTransferSyntaxUID=HTJ2K_LOSSLESS_RPCL)
        with pytest.raises(DecodeError, match=r"f{32}") as caught:
            reader_of({source.frame_id: b"not a codestream"}).read([source])
        assert (caught.value.frame_id, caught.value.image_set_id) == (source.frame_id, IMAGE_SET)

    def test_many_threads_may_share_a_reader(self, reader_of: Callable[..., Reader]) -> None:
        images, sources, blobs = raw_frames(40)
        reader = reader_of(blobs)
        with ThreadPoolExecutor(6) as pool:
            orders = [np.random.default_rng(seed).permutation(40) for seed in range(12)]
            results = list(pool.map(lambda order: reader.read([sources[n] for n in order], STORED), orders))
        for order, arrays in zip(orders, results, strict=True):
            for n, array in zip(order, arrays, strict=True):
                np.testing.assert_array_equal(array, images[sources[n].frame_id])
        assert reader.stats()["fetched"] == reader.stats()["verified"] == 480


class TestVerification:
    def damaged(self, blob: bytes) -> bytes:
        return blob[:7] + bytes([blob[7] ^ 4]) + blob[8:]

    def test_damaged_once_is_healed_and_counted(self, reader_of: Callable[..., Reader]) -> None:
        images, (source,), blobs = raw_frames(1)
        blob = blobs[source.frame_id]
        served = Served({source.frame_id: [self.damaged(blob), blob]})
        reader = reader_of(served)
        np.testing.assert_array_equal(one(reader.read([source], STORED)), images[source.frame_id])
        assert served.requests == [source.frame_id] * 2
        stats = reader.stats()
        assert (stats["refetched"], stats["fetched"], stats["verified"], stats["unverified"]) == (1, 1, 1, 0)

    def test_damaged_twice_raises(self, reader_of: Callable[..., Reader], cache: FrameCache) -> None:
        _, (source,), blobs = raw_frames(1)
        served = Served({source.frame_id: self.damaged(blobs[source.frame_id])})
        reader = reader_of(served)
        with pytest.raises(ChecksumError, match=rf"{source.frame_id} of image set {IMAGE_SET}.*twice") as caught:
            reader.read([source], STORED, cache=cache)
        assert (caught.value.frame_id, caught.value.image_set_id) == (source.frame_id, IMAGE_SET)
        assert served.requests == [source.frame_id] * 2
        assert reader.stats()["fetched"] == reader.stats()["verified"] == 0
        assert cache.size() == (0, 0)

    def test_no_checksum_is_unverified_never_verified(self, reader_of: Callable[..., Reader]) -> None:
        _, (source,), blobs = raw_frames(1, checksum=False)
        reader = reader_of(blobs)
        reader.read([source], STORED)
        assert (reader.stats()["verified"], reader.stats()["unverified"]) == (0, 1)

    def test_an_unknown_kind_of_checksum_is_unverified(self, reader_of: Callable[..., Reader]) -> None:
        _, (source,), blobs = raw_frames(1, ChecksumType="SOMETHING_NEW")
        reader = reader_of(blobs)
        reader.read([source], STORED)
        assert (reader.stats()["verified"], reader.stats()["unverified"]) == (0, 1)

    @pytest.mark.parametrize("attributes", [{}, {"ChecksumType": "SOMETHING_NEW"}])
    @pytest.mark.parametrize("options", [STORED, ReadOptions(), ReadOptions(padding="mask", reduce=1)])
    def test_without_a_checksum_the_extremes_are_compared(
        self, reader_of: Callable[..., Reader], cache: FrameCache, attributes: dict[str, Any], options: ReadOptions
    ) -> None:
        image = np.random.default_rng(0).integers(-1000, 1000, (12, 17), np.int16)
        low, high = int(image.min()), int(image.max())
        wrong = image.copy()
        wrong[3, 3] = 1000
        source = source_of("1" * 32, image, checksum=bool(attributes), **attributes, PixelPaddingValue=low)
        source = source._replace(minimum=low, maximum=high)
        served = Served({source.frame_id: [wrong.tobytes(), image.tobytes()]})
        reader = reader_of(served)
        right = one(reader_of({source.frame_id: image.tobytes()}).read([source], replace(options, verify=False)))
        np.testing.assert_array_equal(one(reader.read([source], options, cache=cache)), right)
        assert served.requests == [source.frame_id] * 2
        stats = reader.stats()
        assert (stats["refetched"], stats["verified"], stats["unverified"]) == (1, 0, 1)
        entry = cache.get(STORE, source.frame_id)
        assert entry is not None
        assert not entry.verified
        with pytest.raises(ChecksumError, match=r"lowest and highest value, twice"):
            reader_of({source.frame_id: wrong.tobytes()}).read([source], options)
        for silent in (source._replace(minimum=None), source._replace(maximum=None)):
            reader_of({source.frame_id: wrong.tobytes()}).read([silent], options)
        reader_of({source.frame_id: wrong.tobytes()}).read([source], replace(options, verify=False))

    def test_extremes_count_for_nothing_beside_a_checksum_and_of_lower_resolutions(
        self, reader_of: Callable[..., Reader]
    ) -> None:
        images, (source,), blobs = raw_frames(1)
        source = source._replace(minimum=0, maximum=1)
        reader = reader_of(blobs)
        np.testing.assert_array_equal(one(reader.read([source], STORED)), images[source.frame_id])
        assert reader.stats()["verified"] == 1
        reader.read([source._replace(checksum=None)], replace(STORED, reduce=1))

    def test_what_was_cached_without_a_checksum_is_looked_at(
        self, reader_of: Callable[..., Reader], cache: FrameCache
    ) -> None:
        images, (source,), blobs = raw_frames(1, checksum=False)
        image = images[source.frame_id]
        source = source._replace(minimum=int(image.min()), maximum=int(image.max()))
        wrong = np.zeros_like(image)
        reader = reader_of({source.frame_id: [wrong.tobytes(), blobs[source.frame_id]]})
        np.testing.assert_array_equal(one(reader.read([source], replace(STORED, verify=False), cache=cache)), wrong)
        np.testing.assert_array_equal(one(reader.read([source], STORED, cache=cache)), image)

    def test_verify_false_reads_damage_and_says_unverified(self, reader_of: Callable[..., Reader]) -> None:
        images, (source,), blobs = raw_frames(1)
        reader = reader_of({source.frame_id: self.damaged(blobs[source.frame_id])})
        read = one(reader.read([source], replace(STORED, verify=False)))
        assert (read != images[source.frame_id]).sum() == 1
        assert (reader.stats()["verified"], reader.stats()["unverified"]) == (0, 1)

    def test_kept_syntaxes_are_verified_by_their_bytes(self, reader_of: Callable[..., Reader]) -> None:
        image = random_image(3, "uint8")
        blob = imagecodecs.jpeg8_encode(image, level=90)
        profile = profile_of(image, StoredTransferSyntaxUID=JPEG_BASELINE, ChecksumType="COMPRESSED")
        source = FrameSource(IMAGE_SET, "1" * 32, crc32(blob), profile)
        served = Served({source.frame_id: [blob + b"\0", blob]})
        reader = reader_of(served)
        np.testing.assert_array_equal(one(reader.read([source], STORED)), imagecodecs.jpeg8_decode(blob))
        assert (reader.stats()["refetched"], reader.stats()["verified"]) == (1, 1)
        with pytest.raises(ChecksumError, match=r"encoded bytes.*twice"):
            reader.read([source._replace(checksum=1)], STORED)

    @pytest.mark.parametrize("kept", [0.5, 0.9, -3])
    def test_a_cut_codestream_is_caught(self, reader_of: Callable[..., Reader], kept: float) -> None:
        image = np.cumsum(random_image(4, "int8", (64, 64)), axis=1, dtype=np.int16)
        blob = imagecodecs.htj2k_encode(image, reversible=True, tlm=True, tilepart=1)
        source = source_of("1" * 32, image, StoredTransferSyntaxUID=HTJ2K_LOSSLESS_RPCL)
        cut = blob[: int(len(blob) * kept) if kept > 0 else int(kept)]
        np.testing.assert_array_equal(one(reader_of({source.frame_id: [cut, blob]}).read([source], STORED)), image)
        with pytest.raises((ChecksumError, DecodeError), match=source.frame_id):
            reader_of({source.frame_id: cut}).read([source], STORED)


class TestDestinations:
    def test_outs_are_written_in_place_and_returned(self, reader_of: Callable[..., Reader]) -> None:
        images, sources, blobs = raw_frames(6)
        for options in (STORED, ReadOptions(), ReadOptions(dtype="float64")):
            dtype = options.result_dtype(sources[0].profile)
            block = np.full((6, 12, 17), -77, dtype)
            outs = list(block)
            read = reader_of(blobs).submit(sources, options, outs=outs).wait(PATIENCE_S)
            assert all(array is out for array, out in zip(read, outs, strict=True))
            np.testing.assert_array_equal(block, np.stack(list(images.values())))

    def test_outs_may_be_strided(self, reader_of: Callable[..., Reader]) -> None:
        image = random_image(1, "uint8", (9, 8, 3))
        source = source_of("1" * 32, image)
        for options in (STORED, ReadOptions()):
            first = np.zeros((3, 9, 8), options.result_dtype(source.profile))
            reader_of({source.frame_id: image.tobytes()}).submit(
                [source], options, outs=[first.transpose(1, 2, 0)]
            ).wait(PATIENCE_S)
            np.testing.assert_array_equal(first, image.transpose(2, 0, 1))

    @pytest.mark.parametrize(("shape", "dtype"), [((12, 16), "int16"), ((12, 17, 1), "int16"), ((12, 17), "float32")])
    def test_wrong_outs_are_refused(self, reader_of: Callable[..., Reader], shape: Any, dtype: str) -> None:
        _, (source,), blobs = raw_frames(1)
        with pytest.raises(ConfigError, match=r"12, 17"):
            reader_of(blobs).submit([source], STORED, outs=[np.zeros(shape, dtype)]).wait(PATIENCE_S)

    def test_shapes_and_types_may_be_mixed(self, reader_of: Callable[..., Reader]) -> None:
        images = {
            f"{n:032x}": random_image(n, dtype, shape)
            for n, (dtype, shape) in enumerate(
                [("int16", (4, 5)), ("uint8", (7, 3)), ("uint16", (4, 5)), ("uint8", (5, 5, 3)), ("int16", (9, 2))] * 6
            )
        }
        sources = [source_of(name, image) for name, image in images.items()]
        blobs = {name: image.tobytes() for name, image in images.items()}
        for read, image in zip(reader_of(blobs).read(sources, STORED), images.values(), strict=True):
            assert read.dtype == image.dtype
            np.testing.assert_array_equal(read, image)
        for read, image in zip(reader_of(blobs).read(sources), images.values(), strict=True):
            assert read.dtype == np.float32
            np.testing.assert_array_equal(read, image)

    def test_results_do_not_share_memory(self, reader_of: Callable[..., Reader]) -> None:
        images, sources, blobs = raw_frames(4)
        reader = reader_of(blobs)
        first = reader.read(sources, replace(STORED, dtype="int32"))
        reader.read(sources[::-1], replace(STORED, dtype="int32"))
        for array, image in zip(first, images.values(), strict=True):
            np.testing.assert_array_equal(array, image)


class TestCancelling:
    def test_cancelled_frames_are_not_decoded(self, reader_of: Callable[..., Reader], cache: FrameCache) -> None:
        _, sources, blobs = raw_frames(4)
        served = Served(blobs, held=True)
        reader = reader_of(served)
        block = np.full((4, 12, 17), -77, np.int16)
        batch = reader.submit(sources, STORED, outs=list(block))
        batch.cancel()
        served.release(*(source.frame_id for source in sources))
        outcomes = batch.outcomes(PATIENCE_S)
        assert all(isinstance(outcome, Exception) for outcome in outcomes)
        assert (block == -77).all()
        assert reader.stats()["fetched"] == 0
        assert cache.size() == (0, 0)

    @pytest.mark.skipif(not hasattr(signal, "pthread_kill"), reason="no thread can be interrupted from here")
    def test_an_interrupt_cancels_what_is_waited_for(self, reader_of: Callable[..., Reader]) -> None:
        _, sources, blobs = raw_frames(4)
        served = Served(blobs, held=True)
        batch = reader_of(served).submit(sources, STORED)
        interrupt = threading.Timer(0.2, signal.pthread_kill, (threading.main_thread().ident, signal.SIGINT))
        interrupt.start()
        with pytest.raises(KeyboardInterrupt):
            batch.outcomes(PATIENCE_S)
        interrupt.join()
        assert served.held is not None
        assert all(future.cancelled() for held in served.held.values() for future in held)
        assert all(isinstance(outcome, DataError) for outcome in batch.outcomes(PATIENCE_S))

    def test_threads_end_when_closed(self) -> None:
        _, sources, blobs = raw_frames(4)
        before = set(threading.enumerate())
        served = Served(blobs)
        reader = Reader(served, STORE, threads=2)
        reader.read(sources)
        reader.close()
        assert served.closed
        for thread in set(threading.enumerate()) - before:
            thread.join(PATIENCE_S)
            assert not thread.is_alive()


class TestCache:
    def test_a_miss_fills_and_a_hit_asks_nobody(self, reader_of: Callable[..., Reader], cache: FrameCache) -> None:
        images, sources, blobs = raw_frames(3)
        served = Served(blobs)
        reader = reader_of(served)
        for _ in range(2):
            for array, image in zip(reader.read(sources, STORED, cache=cache), images.values(), strict=True):
                np.testing.assert_array_equal(array, image)
        assert len(served.requests) == 3
        stats = reader.stats()
        assert (stats["fetched"], stats["cached"], stats["verified"], stats["unverified"]) == (3, 3, 6, 0)
        assert stats["bytes_fetched"] == 3 * 12 * 17 * 2
        counts = cache.stats()
        assert [counts[name] for name in ("hits", "misses", "writes", "corrupt")] == [3, 3, 3, 0]

    def test_a_poisoned_unverified_entry_is_replaced(self, reader_of: Callable[..., Reader], cache: FrameCache) -> None:
        images, (source,), blobs = raw_frames(1)
        wrong = random_image(99).tobytes()
        cache.put(STORE, source.frame_id, wrong, verified=False)
        served = Served(blobs)
        reader = reader_of(served)
        read = one(reader.read([source], STORED, cache=cache))
        np.testing.assert_array_equal(read, images[source.frame_id])
        assert served.requests == [source.frame_id]
        entry = cache.get(STORE, source.frame_id)
        assert entry is not None
        assert entry.verified
        assert bytes(entry.data) == blobs[source.frame_id]

    def test_a_cached_entry_too_short_to_decode_is_replaced(
        self, reader_of: Callable[..., Reader], cache: FrameCache
    ) -> None:
        images, (source,), blobs = raw_frames(1)
        cache.put(STORE, source.frame_id, b"short", verified=True)
        np.testing.assert_array_equal(
            one(reader_of(blobs).read([source], STORED, cache=cache)), images[source.frame_id]
        )

    def test_read_without_a_check_is_kept_as_unverified(
        self, reader_of: Callable[..., Reader], cache: FrameCache
    ) -> None:
        _, (source,), blobs = raw_frames(1)
        reader = reader_of(blobs)
        reader.read([source], replace(STORED, verify=False), cache=cache)
        entry = cache.get(STORE, source.frame_id)
        assert entry is not None
        assert not entry.verified
        reader.read([source], STORED, cache=cache)
        stats = reader.stats()
        assert (stats["fetched"], stats["cached"], stats["verified"], stats["unverified"]) == (1, 1, 1, 1)

    def test_a_torn_entry_is_a_miss(self, reader_of: Callable[..., Reader], cache: FrameCache) -> None:
        images, (source,), blobs = raw_frames(1)
        reader = reader_of(blobs)
        reader.read([source], STORED, cache=cache)
        (file,) = (path for path in cache.folder.rglob("*") if path.is_file() and path.name != "locks")
        file.write_bytes(file.read_bytes()[:-5])
        read = one(reader.read([source], STORED, cache=cache))
        np.testing.assert_array_equal(read, images[source.frame_id])
        assert cache.stats()["corrupt"] == 1
        assert reader.stats()["fetched"] == 2


def dataset_of(image: np.ndarray, **attributes: Any) -> Dataset:
    """The same attributes as a pydicom dataset, for pydicom's functions."""
    dataset = Dataset()
    dataset.BitsStored = dataset.BitsAllocated = 8 * image.itemsize
    dataset.PixelRepresentation = int(image.dtype.kind == "i")
    dataset.PhotometricInterpretation = "MONOCHROME2"
    for name, value in attributes.items():
        setattr(dataset, name, value)
    return dataset


def table_item(descriptor: list[int], values: list[int]) -> list[Dataset]:
    """A Modality or VOI LUT Sequence."""
    dataset = Dataset()
    dataset.add_new("LUTDescriptor", "US", descriptor)
    dataset.add_new("LUTData", "US", values)
    return [dataset]


def json_of(tables: dict[str, Any]) -> str:
    """Lookup tables as the index keeps them."""
    return json.dumps(tables, sort_keys=True)


class TestValues:
    def read(self, reader_of: Any, image: np.ndarray, options: ReadOptions, **attributes: Any) -> np.ndarray:
        source = source_of("1" * 32, image, **attributes)
        return one(reader_of({source.frame_id: image.tobytes()}).read([source], options))

    @pytest.mark.parametrize("dtype", ["uint8", "int8", "uint16", "int16", "uint32", "int32"])
    def test_stored_is_what_the_file_has(self, reader_of: Any, dtype: str) -> None:
        image = random_image(1, dtype)
        read = self.read(reader_of, image, STORED, RescaleSlope=2.0, RescaleIntercept=-5.0)
        assert read.dtype == image.dtype
        np.testing.assert_array_equal(read, image)

    @pytest.mark.parametrize(("slope", "intercept"), [(1.0, -1024.0), (0.37, 11.5), (2.0, 0.0), (-1.0, 7.0)])
    @pytest.mark.parametrize("dtype", ["int16", "uint16", "uint8"])
    def test_modality_is_rescaled_float32(self, reader_of: Any, dtype: str, slope: float, intercept: float) -> None:
        image = random_image(2, dtype)
        tags = {"RescaleSlope": slope, "RescaleIntercept": intercept}
        read = self.read(reader_of, image, ReadOptions(), **tags)
        assert read.dtype == np.float32
        np.testing.assert_array_equal(read, apply_rescale(image, dataset_of(image, **tags)).astype(np.float32))

    @pytest.mark.parametrize("slope", [None, 0.0])
    def test_a_slope_of_nothing_is_one(self, reader_of: Any, slope: float | None) -> None:
        image = random_image(3)
        read = self.read(reader_of, image, ReadOptions(), RescaleSlope=slope, RescaleIntercept=-3.0)
        np.testing.assert_array_equal(read, image.astype(np.float32) - 3)

    def test_modality_lut(self, reader_of: Any) -> None:
        image = random_image(4, "uint8")
        values = np.random.default_rng(4).integers(0, 65536, 200).tolist()
        table = {"LUTDescriptor": [200, 20, 16], "LUTData": values}
        read = self.read(reader_of, image, ReadOptions(), lookup_tables=json_of({"ModalityLUTSequence": table}))
        sequence = table_item([200, 20, 16], values)
        expected = apply_modality_lut(image, dataset_of(image, ModalityLUTSequence=sequence))
        np.testing.assert_array_equal(read, expected.astype(np.float32))

    @pytest.mark.parametrize("function", ["LINEAR", "LINEAR_EXACT", "SIGMOID"])
    @pytest.mark.parametrize("invert", [False, True])
    def test_display_windows_like_pydicom(self, reader_of: Any, function: str, invert: bool) -> None:
        image = random_image(5)
        tags: dict[str, Any] = {"RescaleSlope": 1.0, "RescaleIntercept": -1024.0}
        read = self.read(
            reader_of,
            image,
            ReadOptions(output="display"),
            **tags,
            WindowCenter=[40.0, 500.0],
            WindowWidth=[40_000.0, 900.0],
            VOILUTFunction=function,
            PhotometricInterpretation="MONOCHROME1" if invert else "MONOCHROME2",
        )
        dataset = dataset_of(image, **tags, WindowCenter=40.0, WindowWidth=40_000.0, VOILUTFunction=function)
        shown = apply_windowing(apply_rescale(image, dataset), dataset)
        low, high = -(2**15) - 1024, 2**15 - 1 - 1024  # what pydicom maps the window to
        expected = (shown - low) / (high - low)
        np.testing.assert_allclose(read, 1 - expected if invert else expected, atol=2e-6)
        assert 0 <= read.min() < read.max() <= 1

    def test_display_prefers_the_voi_lut(self, reader_of: Any) -> None:
        image = random_image(6, "uint8")
        values = np.random.default_rng(6).integers(0, 1024, 256).tolist()
        read = self.read(
            reader_of,
            image,
            ReadOptions(output="display"),
            WindowCenter=[10.0],
            WindowWidth=[5.0],
            lookup_tables=json_of({"VOILUTSequence": {"LUTDescriptor": [256, 0, 10], "LUTData": values}}),
        )
        sequence = table_item([256, 0, 10], values)
        expected = apply_voi(image, dataset_of(image, VOILUTSequence=sequence)) / 1023
        np.testing.assert_allclose(read, expected, atol=1e-6)

    @pytest.mark.parametrize("attributes", [{}, {"PhotometricInterpretation": "MONOCHROME1"}, {"SamplesPerPixel": 3}])
    def test_display_in_bytes(self, reader_of: Any, attributes: dict[str, Any]) -> None:
        image = random_image(5, "uint8", (6, 8, 3) if "SamplesPerPixel" in attributes else (12, 17))
        image.flat[3:9] = 7
        tags = {"WindowCenter": [100.0], "WindowWidth": [120.0], "PixelPaddingValue": 7, **attributes}
        for padding in ("keep", "mask"):
            options = ReadOptions(output="display", padding=padding)
            shown = self.read(reader_of, image, options, **tags)
            read = self.read(reader_of, image, replace(options, dtype="uint8"), **tags)
            assert read.dtype == np.uint8
            np.testing.assert_array_equal(read, uint8(shown))
        if image.ndim == 3:
            np.testing.assert_array_equal(read, image)

    def test_display_without_a_window_takes_the_stored_range(self, reader_of: Any) -> None:
        image = random_image(7, "uint16") >> 4
        read = self.read(
            reader_of, image, ReadOptions(output="display"), BitsStored=12, RescaleSlope=2.0, RescaleIntercept=-9.0
        )
        np.testing.assert_allclose(read, image / 4095, atol=1e-6)

    def test_a_window_of_no_width_is_ignored(self, reader_of: Any) -> None:
        image = random_image(7, "uint8")
        read = self.read(
            reader_of, image, ReadOptions(output="display"), WindowCenter=[1.0, 100.0], WindowWidth=[0.0, 51.0]
        )
        expected = np.clip((image - 74.5) / 50, 0, 1)
        np.testing.assert_allclose(read, expected, atol=1e-6)

    def test_an_unknown_function_is_linear(self, reader_of: Any, caplog: pytest.LogCaptureFixture) -> None:
        image = random_image(7, "uint8")
        tags: dict[str, Any] = {"WindowCenter": [100.0], "WindowWidth": [51.0], "VOILUTFunction": "Doe^Jane"}
        with caplog.at_level("INFO", "ahi_ml"):
            read = self.read(reader_of, image, ReadOptions(output="display"), **tags)
        expected = apply_windowing(image, dataset_of(image, **tags | {"VOILUTFunction": "LINEAR"})) / 255
        np.testing.assert_allclose(read, expected, atol=1e-6)
        (said,) = caplog.messages
        assert "VOI LUT function" in said
        assert "LINEAR" in said
        assert "Doe" not in said, "whatever stands in the tag may say whose image it is"

    @pytest.mark.parametrize(
        ("tags", "said"),
        [
            ({"RescaleSlope": 0.0, "RescaleIntercept": 1.0}, "slope of 0"),
            ({"RescaleSlope": 2.0}, "intercept is taken as 0"),
            ({"RescaleIntercept": 2.0}, "slope is taken as 1"),
            ({"WindowCenter": [1.0], "WindowWidth": [0.0]}, "width 0"),
            ({}, None),
            ({"RescaleSlope": 2.0, "RescaleIntercept": 0.0, "WindowCenter": [1.0], "WindowWidth": [9.0]}, None),
        ],
    )
    def test_what_is_ignored_is_said(self, tags: Any, said: str | None, caplog: pytest.LogCaptureFixture) -> None:
        with caplog.at_level("INFO", "ahi_ml"):
            profile_of(random_image(7), **tags)
        assert len(caplog.messages) == (said is not None)
        assert said is None or said in caplog.messages[0]

    def test_a_window_given_wins(self, reader_of: Any) -> None:
        image = random_image(8)
        options = ReadOptions(output="display", window=Window(100, 400, "LINEAR_EXACT"))
        read = self.read(reader_of, image, options, WindowCenter=[1.0], WindowWidth=[2.0])
        np.testing.assert_allclose(read, np.clip((image + 100.0) / 400, 0, 1), atol=1e-6)

    @pytest.mark.parametrize(
        ("window", "center", "width"),
        [
            ("lung", -600, 1500),
            ((50, 400), 50, 400),
            ([50.0, 400.0], 50, 400),
            (np.array([50, 400]), 50, 400),
            (0, 40, 400),
            (np.int64(1), -500, 1400),
        ],
    )
    def test_windows_by_name_by_numbers_and_of_the_file(
        self, reader_of: Any, window: Any, center: float, width: float
    ) -> None:
        image = random_image(8) >> 4
        table = {"LUTDescriptor": [256, 0, 10], "LUTData": list(range(256))}  # preferred when nothing is given
        tags: dict[str, Any] = {"WindowCenter": [9.0, 40.0, -500.0], "WindowWidth": [0.0, 400.0, 1400.0]}
        options = ReadOptions(output="display", window=window)
        read = self.read(reader_of, image, options, **tags, lookup_tables=json_of({"VOILUTSequence": table}))
        dataset = dataset_of(image, WindowCenter=center, WindowWidth=width)
        expected = (apply_windowing(image, dataset) + 2**15) / (2**16 - 1)  # pydicom maps to the range of 16 bits
        np.testing.assert_allclose(read, expected, atol=2e-6)

    def test_a_window_that_the_file_does_not_have_fails_its_frames_alone(self, reader_of: Any) -> None:
        images, (with_two, with_none), blobs = raw_frames(2)
        with_two = with_two._replace(
            kind=profile_of(images[with_two.frame_id], WindowCenter=[1.0, 2.0], WindowWidth=[9.0, 9.0])
        )
        options = ReadOptions(output="display", window=1)
        outcomes = reader_of(blobs).submit([with_two, with_none], options).outcomes(PATIENCE_S)
        assert isinstance(outcomes[0], np.ndarray)
        with pytest.raises(ConfigError, match=rf"{with_none.frame_id}.*window=1.*no usable window"):
            raise outcomes[1]
        with pytest.raises(ConfigError, match=r"window=2 .* 2 usable windows"):
            reader_of(blobs).read([with_two], replace(options, window=2))

    def test_options_with_one_window_are_one(self) -> None:
        given = [ReadOptions(window=each) for each in ("lung", " LUNG", (-600, 1500), Window(-600, 1500))]
        assert len({*given}) == 1
        assert len({*given, ReadOptions(), ReadOptions(window=0), ReadOptions(window=1)}) == 4
        recipes = {recipe(window=ReadOptions(window=each).window) for each in (None, 0, 1, "lung", "bone", (0, 1))}
        assert len(recipes) == 6
        assert None not in recipes

    @pytest.mark.parametrize(
        ("tags", "signed", "is_padding"),
        [
            ({"PixelPaddingValue": -2000}, True, lambda stored: stored == -2000),
            ({"PixelPaddingValue": 63536}, True, lambda stored: stored == -2000),
            ({"PixelPaddingValue": 0, "PixelPaddingRangeLimit": 9}, False, lambda stored: stored < 10),
        ],
    )
    def test_padding_is_found_in_stored_values(
        self, reader_of: Any, tags: dict[str, Any], signed: bool, is_padding: Any
    ) -> None:
        image = random_image(9, "int16" if signed else "uint16")
        image[2:5] = -2000 if signed else 7
        attributes = {**tags, "RescaleSlope": 2.0, "RescaleIntercept": -1.0}
        kept = self.read(reader_of, image, ReadOptions(), **attributes)
        np.testing.assert_array_equal(kept, 2 * image.astype(np.float32) - 1)
        mask = is_padding(image)
        assert mask[2:5].all()
        assert not mask.all()
        masked = self.read(reader_of, image, ReadOptions(padding="mask"), **attributes)
        np.testing.assert_array_equal(masked, np.where(mask, np.nan, kept))
        replaced = self.read(reader_of, image, ReadOptions(padding=-5.0), **attributes)
        np.testing.assert_array_equal(replaced, np.where(mask, -5, kept))

    @pytest.mark.parametrize("kind", RADIOGRAPHS)
    @pytest.mark.parametrize("inverse", ["PhotometricInterpretation", "PresentationLUTShape"])
    def test_radiographs_of_either_polarity_agree(self, reader_of: Any, kind: str, inverse: str) -> None:
        bright = random_image(14, "uint16") >> 4
        bright[:3] = 0  # air, and padding in the other one: found before anything is swapped
        dark = 4095 - bright
        tags: dict[str, Any] = {"SOPClassUID": kind, "BitsStored": 12, "RescaleSlope": 2.0, "RescaleIntercept": -9.0}
        inverted = {**tags, inverse: "MONOCHROME1" if inverse[1] == "h" else "INVERSE", "PixelPaddingValue": 4095}
        options = ReadOptions(normalize_polarity=True)
        expected = bright * np.float32(2) - 9
        np.testing.assert_array_equal(self.read(reader_of, bright, options, **tags), expected)
        np.testing.assert_array_equal(self.read(reader_of, dark, options, **inverted), expected)
        np.testing.assert_array_equal(self.read(reader_of, dark, ReadOptions(), **inverted), dark * np.float32(2) - 9)
        masked = self.read(reader_of, dark, replace(options, padding="mask"), **inverted)
        np.testing.assert_array_equal(masked, np.where(bright == 0, np.nan, expected))
        half = replace(options, reduce=1, padding="mask")
        mask = reached(bright == 0, 1)
        swapped = 4095 - decode(dark.tobytes(), EXPLICIT_LE, profile_of(dark, BitsStored=12).pixels, reduce=1)
        np.testing.assert_array_equal(
            self.read(reader_of, dark, half, **inverted), np.where(mask, np.nan, swapped * np.float32(2) - 9)
        )

    @pytest.mark.parametrize("kind", [CTImageStorage, XRayAngiographicImageStorage, None])
    def test_polarity_of_other_images_is_theirs(self, reader_of: Any, kind: str | None) -> None:
        image = random_image(15)
        tags = {"SOPClassUID": kind, "PhotometricInterpretation": "MONOCHROME1"}
        read = self.read(reader_of, image, ReadOptions(normalize_polarity=True), **tags)
        np.testing.assert_array_equal(read, image)

    def test_polarity_changes_no_display(self, reader_of: Any) -> None:
        image = random_image(16)
        tags = {"SOPClassUID": RADIOGRAPHS[0], "PhotometricInterpretation": "MONOCHROME1"}
        shown = ReadOptions(output="display")
        read = self.read(reader_of, image, replace(shown, normalize_polarity=True), **tags)
        np.testing.assert_array_equal(read, self.read(reader_of, image, shown, **tags))

    def test_steps_run_in_order_after_the_output(self, reader_of: Any) -> None:
        image = random_image(10)
        read = self.read(
            reader_of,
            image,
            ReadOptions(steps=(Scale(-1000, 1000), Normalize(0.5, 0.25))),
            RescaleSlope=1.0,
            RescaleIntercept=-24.0,
        )
        expected = (np.clip((image - 24.0 + 1000) / 2000, 0, 1) - 0.5) / 0.25
        np.testing.assert_allclose(read, expected, atol=1e-5)

    def test_colour_is_rgb(self, reader_of: Any) -> None:
        image = random_image(11, "uint8", (6, 8, 3))
        np.testing.assert_array_equal(self.read(reader_of, image, ReadOptions()), image)
        np.testing.assert_allclose(self.read(reader_of, image, ReadOptions(output="display")), image / 255, atol=1e-6)
        assert self.read(reader_of, image, ReadOptions(dtype="uint8")).dtype == np.uint8

    @pytest.mark.parametrize(("dtype", "bits"), [("uint8", 8), ("uint16", 10), ("uint16", 12), ("int16", 12)])
    def test_colour_is_shown_over_the_range_that_is_stored(self, reader_of: Any, dtype: str, bits: int) -> None:
        image = random_image(11, dtype, (6, 8, 3)) >> 8 * np.dtype(dtype).itemsize - bits
        low = -(1 << bits - 1) if dtype[0] == "i" else 0
        image[0, 0], image[0, 1] = low, low + (1 << bits) - 1
        shown = self.read(reader_of, image, ReadOptions(output="display"), BitsStored=bits)
        expected = (image.astype(np.float64) - low) / ((1 << bits) - 1)
        np.testing.assert_array_equal(shown, expected.astype(np.float32))
        assert (shown[0, 0].tolist(), shown[0, 1].tolist()) == ([0] * 3, [1] * 3)

    @pytest.mark.parametrize("bits", [8, 12, 16])
    def test_palettes_are_shown_over_the_range_of_their_entries(self, reader_of: Any, bits: int) -> None:
        image = random_image(13, "uint8")
        entries = np.random.default_rng(13).integers(0, 1 << bits, 256)
        entries[-1] = (1 << bits) - 1
        palette: dict[str, Any] = {}
        for name in ("Red", "Green", "Blue"):
            palette[f"{name}PaletteColorLookupTableDescriptor"] = [256, 0, bits]
            palette[f"{name}PaletteColorLookupTableData"] = entries.tolist()
        attributes = {"PhotometricInterpretation": "PALETTE COLOR", "lookup_tables": json_of({"Palette": palette})}
        shown = self.read(reader_of, image, ReadOptions(output="display"), **attributes)
        np.testing.assert_allclose(shown[..., 1], entries[image] / ((1 << bits) - 1), atol=1e-6)

    def test_ybr_full_is_rgb_but_for_stored(self, reader_of: Any) -> None:
        image = random_image(12, "uint8", (6, 8, 3))
        tags = {"PhotometricInterpretation": "YBR_FULL"}
        np.testing.assert_array_equal(self.read(reader_of, image, STORED, **tags), image)
        read = self.read(reader_of, image, ReadOptions(), **tags)
        assert np.abs(read - convert_color_space(image, "YBR_FULL", "RGB")).max() <= 1

    @pytest.mark.parametrize(
        ("photometric", "samples"),
        [("HSV", 3), ("YBR_PARTIAL_420", 3), ("YBR_PARTIAL_422", 3), (None, 3), ("ARGB", 4), ("CMYK", 4)],
    )
    def test_colour_spaces_that_nobody_converts_are_not_passed_off_as_rgb(
        self, reader_of: Any, photometric: str | None, samples: int
    ) -> None:
        image = random_image(12, "uint8", (6, 8, samples))
        tags = {"PhotometricInterpretation": photometric}
        np.testing.assert_array_equal(self.read(reader_of, image, STORED, **tags), image)
        for output in ("modality", "display"):
            with pytest.raises(DataError, match=rf"1{{32}}.*{photometric or 'not named'}.*\"stored\"") as caught:
                self.read(reader_of, image, ReadOptions(output=output), **tags)
            assert caught.value.frame_id == "1" * 32

    @pytest.mark.parametrize("photometric", ["RGB", "YBR_RCT", "YBR_ICT"])
    def test_colour_that_a_codec_has_made_rgb_stays(self, reader_of: Any, photometric: str) -> None:
        image = random_image(12, "uint8", (6, 8, 3))
        read = self.read(reader_of, image, ReadOptions(), PhotometricInterpretation=photometric)
        np.testing.assert_array_equal(read, image)

    def test_palettes_are_applied_but_for_stored(self, reader_of: Any) -> None:
        image = random_image(13, "uint8")
        channels = ("Red", "Green", "Blue")
        rng = np.random.default_rng(13)
        data = {name: rng.integers(0, 65536, 256).astype("<u2") for name in channels}
        tags: dict[str, Any] = {}
        palette: dict[str, Any] = {}
        for name in channels:
            palette[f"{name}PaletteColorLookupTableDescriptor"] = [256, 0, 16]
            palette[f"{name}PaletteColorLookupTableData"] = data[name].tolist()
            tags[f"{name}PaletteColorLookupTableDescriptor"] = [256, 0, 16]
            tags[f"{name}PaletteColorLookupTableData"] = data[name].tobytes()
        attributes = {"PhotometricInterpretation": "PALETTE COLOR", "lookup_tables": json_of({"Palette": palette})}
        expected = apply_color_lut(image, dataset_of(image, **tags))
        read = self.read(reader_of, image, ReadOptions(), **attributes)
        assert read.shape == (12, 17, 3)
        np.testing.assert_array_equal(read, expected)
        stored = self.read(reader_of, image, STORED, **attributes)
        np.testing.assert_array_equal(stored, image)
        shown = self.read(reader_of, image, ReadOptions(output="display"), **attributes)
        np.testing.assert_allclose(shown, expected / 65535, atol=1e-6)


class TestLowerResolutions:
    """What the wavelet makes is the codec's to prove; here, that every option works on what it made."""

    def read(self, reader_of: Any, image: np.ndarray, options: ReadOptions, **attributes: Any) -> np.ndarray:
        source = source_of("f" * 32, image, **attributes)
        return one(reader_of({source.frame_id: image.tobytes()}).read([source], options))

    @pytest.mark.parametrize("reduce", range(9))
    @pytest.mark.parametrize("dtype", ["int16", "uint16", "uint8"])
    def test_shapes_and_values_of_every_level(self, reader_of: Callable[..., Reader], dtype: str, reduce: int) -> None:
        image = random_image(1, dtype)
        expected = decode(image.tobytes(), EXPLICIT_LE, profile_of(image).pixels, reduce=reduce)
        options = replace(STORED, reduce=reduce)
        read = self.read(reader_of, image, options)
        assert read.shape == (-(-12 // 2**reduce), -(-17 // 2**reduce))
        np.testing.assert_array_equal(read, expected)
        read = self.read(reader_of, image, replace(options, output="modality"), RescaleSlope=2.0, RescaleIntercept=-5.0)
        np.testing.assert_array_equal(read, expected.astype(np.float32) * 2 - 5)

    def test_colour_palettes_and_single_bits(self, reader_of: Callable[..., Reader]) -> None:
        options = ReadOptions(reduce=1)
        rgb = np.full((12, 17, 3), (250, 3, 90), np.uint8)
        np.testing.assert_array_equal(self.read(reader_of, rgb, options), rgb[::2, ::2])
        indices = random_image(2, "uint8")
        palette: dict[str, Any] = {}
        for name in ("Red", "Green", "Blue"):
            palette[f"{name}PaletteColorLookupTableDescriptor"] = [256, 0, 16]
            palette[f"{name}PaletteColorLookupTableData"] = random_image(3, "uint16", (256,)).tolist()
        attributes = {"PhotometricInterpretation": "PALETTE COLOR", "lookup_tables": json_of({"Palette": palette})}
        full = self.read(reader_of, indices, ReadOptions(), **attributes)
        np.testing.assert_array_equal(self.read(reader_of, indices, options, **attributes), full[::2, ::2])
        mask = random_image(4, "uint8") & 1
        blob = pack_bits(mask)
        source = FrameSource(IMAGE_SET, "1" * 32, crc32(blob), profile_of(mask, BitsAllocated=1, BitsStored=1))
        reader = reader_of({source.frame_id: blob})
        np.testing.assert_array_equal(one(reader.read([source], replace(STORED, reduce=2))), mask[::4, ::4])
        assert reader.stats()["verified"] == 1, "the checksum is of the bytes"

    @pytest.mark.parametrize("reduce", [1, 2, 3])
    def test_padding_has_no_part_in_what_is_left(self, reader_of: Callable[..., Reader], reduce: int) -> None:
        image = random_image(6, shape=(80, 77)) >> 4
        rows, columns = np.ogrid[:80, :77]
        image[(rows - 40) ** 2 + (columns - 38) ** 2 > 33**2] = -2000
        tags = {"PixelPaddingValue": -2000, "RescaleSlope": 2.0, "RescaleIntercept": -1.0}
        kept = self.read(reader_of, image, ReadOptions(reduce=reduce), **tags)
        read = self.read(reader_of, image, ReadOptions(padding="mask", reduce=reduce), **tags)
        mask = np.isnan(read)
        assert np.array_equal(mask, reached(image == -2000, reduce))
        assert 0 < mask.mean() < 1
        assert np.array_equal(read[~mask], kept[~mask])
        other = image.copy()
        other[image == -2000] = 2047  # nothing that is left depends on it
        np.testing.assert_array_equal(
            read,
            self.read(
                reader_of, other, ReadOptions(padding="mask", reduce=reduce), **{**tags, "PixelPaddingValue": 2047}
            ),
        )
        replaced = self.read(reader_of, image, ReadOptions(padding=-5.0, reduce=reduce), **tags)
        np.testing.assert_array_equal(replaced, np.where(mask, -5, kept))

    @pytest.mark.parametrize("padding", ["mask", -5.0])
    def test_colour_has_no_padding(self, reader_of: Callable[..., Reader], padding: Any) -> None:
        image = random_image(8, "uint8", (9, 10, 3))
        for reduce in (0, 1):
            kept = self.read(reader_of, image, ReadOptions(reduce=reduce), PixelPaddingValue=7)
            read = self.read(reader_of, image, ReadOptions(padding=padding, reduce=reduce), PixelPaddingValue=7)
            np.testing.assert_array_equal(read, kept)

    def test_padding_of_masks_is_sampled(self, reader_of: Callable[..., Reader]) -> None:
        labels = random_image(7, "uint8") % 4
        tags = {"PixelPaddingValue": 3, "SOPClassUID": "1.2.840.10008.5.1.4.1.1.66.7"}
        read = self.read(reader_of, labels, ReadOptions(padding="mask", reduce=1), **tags)
        np.testing.assert_array_equal(read, np.where(labels == 3, np.nan, labels)[::2, ::2])

    def test_padding_needs_whole_frames_others_do_not(self, reader_of: Any, cache: FrameCache) -> None:
        image = np.random.default_rng(5).integers(0, 3000, (64, 64)).astype(np.int16)
        blob = jpeg2000.encode_htj2k(image)
        tags = {"StoredTransferSyntaxUID": HTJ2K_LOSSLESS_RPCL}
        padded = source_of("a" * 32, image, **tags, PixelPaddingValue=7)
        plain = source_of("b" * 32, image, **tags)
        served = Served({"a" * 32: blob, "b" * 32: blob})
        reader = reader_of(served)
        options = ReadOptions(padding="mask", reduce=1)
        fresh = [array.copy() for array in reader.read([padded, plain], options, cache=cache)]
        assert served.parts["a" * 32] is None
        assert served.parts["b" * 32] is not None
        for _ in range(4):  # read, then mapped
            for array, expected in zip(reader.read([plain, padded], options, cache=cache), fresh[::-1], strict=True):
                np.testing.assert_array_equal(array, expected)
            np.testing.assert_array_equal(one(reader.read([padded], STORED, cache=cache)), image)
            np.testing.assert_array_equal(
                one(reader.read([plain], replace(options, padding="keep"), cache=cache)), fresh[1]
            )
        assert len(served.requests) == 2
        assert reader.stats()["verified"] >= 9

    def test_padding_needs_whole_frames_of_the_remote_tier(self, reader_of: Any, tmp_path: Path) -> None:
        image = np.random.default_rng(5).integers(0, 3000, (64, 64)).astype(np.int16)
        tags = {"StoredTransferSyntaxUID": HTJ2K_LOSSLESS_RPCL, "PixelPaddingValue": int(image[9, 9])}
        source = source_of("a" * 32, image, **tags)
        served = Served({"a" * 32: jpeg2000.encode_htj2k(image)})
        reader = reader_of(served)
        one_folder, other = (FrameCache(tmp_path / name, remote=f"memory://{tmp_path}") for name in ("one", "other"))
        options = ReadOptions(padding="mask", reduce=1)
        expected = one(reader.read([source], options, cache=one_folder)).copy()
        one_folder.flush()
        np.testing.assert_array_equal(one(reader.read([source], options, cache=other)), expected)
        assert len(served.requests) == 1
        assert other.stats()["remote_hits"] == 1

    def test_windows(self, reader_of: Callable[..., Reader]) -> None:
        image = np.full((16, 16), 100, np.int16)
        image[:8] = -2000
        shown = ReadOptions(output="display", window=Window(100, 100), reduce=1)
        read = self.read(reader_of, image, shown)
        assert (read[:3] == 0).all()
        assert read[5:] == pytest.approx(0.5, abs=0.01)

    def test_what_was_never_compared_is_unverified(self, reader_of: Callable[..., Reader], cache: FrameCache) -> None:
        _, (source,), blobs = raw_frames(1)
        half = replace(STORED, reduce=1)
        reader = reader_of(blobs)
        for _ in range(2):  # from the network, then from the cache
            reader.read([source], half, cache=cache)
        stats = reader.stats()
        assert (stats["fetched"], stats["cached"], stats["verified"], stats["unverified"]) == (1, 1, 0, 2)
        entry = cache.get(STORE, source.frame_id)
        assert entry is not None
        assert not entry.verified

    def test_a_full_read_compares_what_a_smaller_one_cached(
        self, reader_of: Callable[..., Reader], cache: FrameCache
    ) -> None:
        images, (source,), blobs = raw_frames(1)
        blob = blobs[source.frame_id]
        reader = reader_of({source.frame_id: [blob[:7] + bytes([blob[7] ^ 4]) + blob[8:], blob]})
        reader.read([source], replace(STORED, reduce=1), cache=cache)
        np.testing.assert_array_equal(one(reader.read([source], STORED, cache=cache)), images[source.frame_id])
        assert reader.stats()["verified"] == 1

    def test_what_was_verified_when_cached_stays_so(self, reader_of: Callable[..., Reader], cache: FrameCache) -> None:
        _, (source,), blobs = raw_frames(1)
        reader = reader_of(blobs)
        reader.read([source], STORED, cache=cache)
        reader.read([source], replace(STORED, reduce=3), cache=cache)
        assert (reader.stats()["verified"], reader.stats()["unverified"]) == (2, 0)

    def test_too_short_is_fetched_again_then_raised(self, reader_of: Callable[..., Reader]) -> None:
        image = random_image(5, shape=(64, 64))
        blob = bytes(imagecodecs.htj2k_encode(image, reversible=True, tlm=True, tilepart=1, resolutions=4))
        source = source_of("f" * 32, image, StoredTransferSyntaxUID=HTJ2K_LOSSLESS_RPCL)
        expected = decode(blob, HTJ2K_LOSSLESS_RPCL, source.profile.pixels, reduce=1)
        half = replace(STORED, reduce=1)
        reader = reader_of({source.frame_id: [blob[:300], blob]})
        np.testing.assert_array_equal(one(reader.read([source], half)), expected)
        assert reader.stats()["refetched"] == 1
        served = Served({source.frame_id: blob[:300]})
        with pytest.raises(DecodeError, match=source.frame_id):
            reader_of(served).read([source], half)
        assert len(served.requests) == 2

    def test_label_maps_are_sampled(self, reader_of: Callable[..., Reader]) -> None:
        image = random_image(6, "uint8")
        label_map = "1.2.840.10008.5.1.4.1.1.66.7"
        read = self.read(reader_of, image, replace(STORED, reduce=1), SOPClassUID=label_map)
        np.testing.assert_array_equal(read, image[::2, ::2])


@pytest.mark.parametrize(
    "options",
    [
        {"output": "hounsfield"},
        {"padding": "drop"},
        {"output": "stored", "padding": 0.0},
        {"output": "stored", "steps": (Scale(0, 1),)},
        {"reduce": -1},
        {"reduce": 9},
        {"reduce": 0.5},
        {"window": "lungs"},
        {"window": (40,)},
        {"window": (40, 0)},
        {"window": (40, float("nan"))},
        {"window": ("a", "b")},
        {"window": 40.0},
        {"window": -1},
        {"window": True},
        {"window": {}},
        {"reduce": True},
        {"output": "stored", "normalize_polarity": True},
        {"dtype": "float33"},
        {"dtype": "U5"},
        {"dtype": object},
        {"dtype": complex},
        {"dtype": "datetime64[s]"},
        {"output": "display", "dtype": "int16"},
        {"output": "display", "dtype": bool},
        {"output": "display", "dtype": "uint8", "steps": (Scale(0, 1),)},
    ],
)
def test_options_that_cannot_work_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        ReadOptions(**options)


def test_options_are_what_they_mean_however_they_are_written() -> None:
    assert ReadOptions(reduce=np.int64(1), dtype="float32") == ReadOptions(reduce=1, dtype=np.float32)
    assert type(ReadOptions(reduce=np.int64(1)).reduce) is int
    assert len({ReadOptions(dtype=each) for each in ("f4", np.float32, np.dtype("float32"))}) == 1


def test_closing_the_reader_gives_every_frame_an_outcome() -> None:
    class Never:
        def __init__(self) -> None:
            self.futures: list[Future[bytes]] = []

        def fetch(self, image_set_id: str, frame_id: str, part: Any = None) -> Future[bytes]:
            self.futures.append(Future())
            return self.futures[-1]

        def close(self) -> None:
            for future in self.futures:
                future.cancel()

    transport = Never()
    reader = Reader(transport, "0" * 32)
    pixels = PixelFormat(4, 4)
    profile = FrameProfile(
        syntax="1.2.840.10008.1.2.4.202",
        pixels=pixels,
        checksum_of="samples",
        modality=Rescale(),
        windows=(),
        voi=None,
        palette=None,
        inverted=False,
        padding=None,
        lossy=False,
        spacing=None,
    )
    batch = reader.submit([FrameSource("1" * 32, f"{n:032x}", 1, profile) for n in range(9)], ReadOptions())
    reader.close()
    assert all(isinstance(outcome, DataError) for outcome in batch.outcomes(5))
    other = Reader(Never(), "0" * 32).submit([FrameSource("1" * 32, "2" * 32, 1, profile)], ReadOptions())
    other.cancel()
    assert isinstance(other.outcomes(5)[0], DataError)


def test_values_that_a_dtype_cannot_hold_are_an_error() -> None:
    from ahi_ml.reader.values import _copy_exactly

    out = np.empty((2, 2), np.int16)
    _copy_exactly(np.full((2, 2), 32_767, np.uint16), out)
    assert (out == 32_767).all()
    with pytest.raises(ConfigError, match="int16"):
        _copy_exactly(np.full((2, 2), 40_000, np.uint16), out)


@pytest.mark.parametrize("reduce", [0, 1])
def test_other_metadata_of_a_frame_that_was_read_before(reader_of: Any, cache: FrameCache, reduce: int) -> None:
    """What was worked out for a frame that is kept in memory is not used for another sign, depth or range of it."""
    image = np.random.default_rng(3).integers(-90, 2000, (64, 64)).astype(np.int16)
    data = jpeg2000.encode_htj2k(image)
    reader = reader_of({"a" * 32: data})
    kinds = [{"BitsStored": 16}, {"BitsStored": 12}, {"PixelRepresentation": 0}]
    sources = [
        source_of("a" * 32, image, checksum=False, StoredTransferSyntaxUID=HTJ2K_LOSSLESS_RPCL, **kind)
        for kind in kinds
    ]
    sources.append(sources[0]._replace(minimum=int(image.min()), maximum=int(image.max())))
    options = ReadOptions(output="stored", reduce=reduce)
    for source in sources * 4:
        expected = decode(data, HTJ2K_LOSSLESS_RPCL, source.profile.pixels, reduce=reduce, extremes=source.extremes)
        (found,) = reader.read([source], options, cache=cache)
        assert found.dtype == expected.dtype
        assert np.array_equal(found, expected)


@pytest.mark.parametrize(
    ("threads", "processes", "left"), [(64, 8, 8), (64, 1, 64), (2, 4, 2), (16, 16, 2), (1, 4, 1), (8, 3, 2)]
)
def test_workers_share_the_cores(threads: int, processes: int, left: int) -> None:
    reader = Reader(Served({}), STORE, threads=threads)
    for _ in range(3):  # each data set of a worker says so
        reader.share_cores(processes)
        assert reader.threads == left
    reader.close()
