"""A stream whose next buffer is filled in a thread is the same stream."""

import threading
import time

import pytest
import torch

from saekit.activations import prefetch
from saekit.activations.batch import ActivationBatch
from saekit.activations.buffer import Shuffled
from saekit.activations.clock import seconds_by_stage, spent_on
from saekit.activations.stream import START
from saekit.errors import DataError
from saekit.targets import Site

SITE = Site("toy")
VECTORS = torch.arange(40.0)[:, None]


class Reads:
    """Ten reads of four rows, which remember what has been read and by whom; read number `bad` fails."""

    def __init__(self, bad: int | None = None):
        self.done, self.threads, self.bad = 0, set(), bad

    def __call__(self, epoch: int, first: int):
        for number in range(first, 10):
            if number == self.bad:
                raise DataError("not a number")
            self.done += 1
            self.threads.add(threading.current_thread().name)
            with spent_on("harvest"):
                rows = ActivationBatch.from_vectors(VECTORS[4 * number : 4 * number + 4])
            yield {SITE: rows}


def stream(reads: Reads, *, prefetch: bool, start=START) -> Shuffled:
    return Shuffled(reads, batch_tokens=3, buffer_tokens=14, seed=1, start=start, prefetch=prefetch)


def test_batches_and_places_are_the_same_and_a_run_goes_on_from_any():
    plain, ahead = stream(Reads(), prefetch=False), stream(Reads(), prefetch=True)
    for _ in range(30):
        again = stream(Reads(), prefetch=True, start=ahead.place)
        want, got = next(plain)[SITE].vectors, next(ahead)[SITE].vectors
        assert torch.equal(got, want) and ahead.place == plain.place
        assert torch.equal(next(again)[SITE].vectors, want)


def test_the_next_buffer_is_filled_by_another_thread_while_this_one_is_used():
    reads = Reads()
    batches = stream(reads, prefetch=True)
    next(batches)
    deadline = time.monotonic() + 30
    while reads.done < 6 and time.monotonic() < deadline:  # 12 rows take three reads, the next 12 three more
        time.sleep(0.001)
    assert reads.done == 6 and not any(name.startswith("Main") for name in reads.threads)


def test_when_nobody_wants_more_the_thread_ends_before_its_buffer_is_full(monkeypatch):
    gate = threading.Event()

    class Stop(threading.Event):
        def set(self) -> None:
            super().set()
            gate.set()

    monkeypatch.setattr(prefetch, "Event", Stop)
    reads = Reads()

    def held_up(epoch: int, first: int):
        for batches in reads(epoch, first):
            yield batches
            assert reads.done < 9 or gate.wait(60)

    batches = Shuffled(held_up, batch_tokens=3, buffer_tokens=30, seed=1, prefetch=True)
    next(batches)
    del batches
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("saekit-prefetch")]
    assert reads.done <= 11  # of the 15 that two buffers take


def test_what_goes_wrong_in_the_thread_is_raised_where_its_batch_would_be():
    batches = stream(Reads(bad=4), prefetch=True)
    for _ in range(4):  # the first buffer is whole
        next(batches)
    with pytest.raises(DataError, match="not a number"):
        next(batches)


def test_stages_add_up_and_what_is_within_another_counts_once(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def takes(seconds: float) -> None:
        now[0] += seconds

    with spent_on("nobody asked"):
        takes(100)
    with seconds_by_stage() as seconds:
        with spent_on("buffer"):
            takes(1)
            with spent_on("harvest"):
                takes(10)
            takes(2)
            with spent_on("harvest"):
                takes(20)
        takes(1000)
        with spent_on("step"):
            takes(5)
    with spent_on("over"):
        takes(100)
    assert seconds == {"harvest": 30, "buffer": 3, "step": 5}


def test_what_a_thread_does_is_measured_but_not_taken_off_the_caller():
    with seconds_by_stage() as seconds:
        batches = stream(Reads(), prefetch=True)
        for _ in range(8):
            next(batches)
    assert seconds["harvest"] >= 0 and seconds["buffer"] > 0
