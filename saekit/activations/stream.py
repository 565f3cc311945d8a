"""A stream that knows its place, so that a run can stop and go on without reading again what it has used."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import torch

from saekit.activations.batch import ActivationBatch, ActivationSource
from saekit.targets import Site


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """Where the next batch of a shuffled stream begins. Numbers only: what a buffer holds is read again.

    Attributes:
        epoch: passes over the data that were finished when the current buffer began to fill.
        read: reads of the next pass that had been used up by then.
        skip: rows of the read after them that had been used up too.
        buffer: buffers that were filled and emptied before this one.
        given: batches that this one has given out.
    """

    epoch: int = 0
    read: int = 0
    skip: int = 0
    buffer: int = 0
    given: int = 0


START = Place()
# both hang on one seed, and must not be alike
READ_ORDER, BUFFER_ORDER = 0, 1


@runtime_checkable
class PlacedStream(Protocol):
    """An endless iterator of batches that says where it is."""

    @property
    def place(self) -> Place:
        """Where the next batch begins."""
        ...

    def __iter__(self) -> Iterator[Mapping[Site, ActivationBatch]]: ...

    def __next__(self) -> Mapping[Site, ActivationBatch]: ...


@runtime_checkable
class ResumableSource(ActivationSource, Protocol):
    """A source that can go back to a place in its stream: what a run needs to be resumed bit for bit."""

    def facts(self) -> Mapping[str, str | int | float | bool | None]:
        """All that decides the stream besides batch_tokens and seed; a run goes on only where they are equal."""
        ...

    def stream(self, batch_tokens: int, *, seed: int, start: Place = START) -> PlacedStream:
        """The batches that a stream from the beginning would give from `start` on, to the bit."""
        ...


def generator_for(*numbers: int) -> torch.Generator:
    """Random numbers that depend on all of `numbers`, so that no generator need be kept to go on."""
    entropy = [number % 2**64 for number in numbers]
    return torch.Generator().manual_seed(int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0]))
