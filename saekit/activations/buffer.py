"""A shuffle buffer: neighbouring tokens go in together and come out far apart.

The buffer is filled with as many whole batches as it has room for, emptied in random order, and filled
again from nothing. So the place of a stream is five numbers, and going back there takes no more than
filling one buffer. The sources read in random order besides: each buffer is a sample of all they have.
All Sites are shuffled alike.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace

import torch

from saekit.activations.batch import ActivationBatch
from saekit.activations.clock import spent_on
from saekit.activations.prefetch import one_ahead
from saekit.activations.stream import BUFFER_ORDER, START, Place, generator_for
from saekit.errors import SaekitError
from saekit.targets import Site

SiteBatches = dict[Site, ActivationBatch]
# reads(epoch, n) reads an epoch from its n-th read on, the same way every time
Reads = Callable[[int, int], Iterable[Mapping[Site, ActivationBatch]]]


class Shuffled(Iterator[SiteBatches]):
    """Batches of exactly `batch_tokens` rows in random order, epoch after epoch: a `PlacedStream`.

    Every row of every epoch is given out once; a buffer may span two epochs.

    Args:
        start: where to go on; the batches are those that a stream from the beginning gives from there on.
        prefetch: fill the next buffer in a thread while this one is emptied; the same batches, for twice the memory.

    Attributes:
        place: where the next batch begins.

    Raises:
        SaekitError: if the buffer is smaller than a batch, or (when they come) Sites differ in their number of rows.
    """

    def __init__(
        self,
        reads: Reads,
        *,
        batch_tokens: int,
        buffer_tokens: int,
        seed: int,
        start: Place = START,
        prefetch: bool = False,
    ):
        if buffer_tokens < batch_tokens:
            raise SaekitError(
                f"a buffer of {buffer_tokens:,} tokens cannot give batches of {batch_tokens:,}; "
                "raise buffer_tokens, or lower batch_tokens"
            )
        self.place = start
        per_buffer = buffer_tokens // batch_tokens

        def buffers(through: Callable[[Iterable], Iterable]) -> Iterator[tuple[SiteBatches, Place]]:
            return _buffers(lambda epoch, n: through(reads(epoch, n)), per_buffer * batch_tokens, start)

        filled = one_ahead(buffers) if prefetch else buffers(iter)
        self._batches = _batches(filled, batch_tokens, per_buffer, seed, start)

    def __next__(self) -> SiteBatches:
        with spent_on("buffer"):
            batches, self.place = next(self._batches)
        return batches


def _batches(
    filled: Iterator[tuple[SiteBatches, Place]], batch_tokens: int, per_buffer: int, seed: int, start: Place
) -> Iterator[tuple[SiteBatches, Place]]:
    """Every batch with the place behind it."""
    here = start
    for held, behind in filled:
        order = torch.randperm(per_buffer * batch_tokens, generator=generator_for(seed, BUFFER_ORDER, here.buffer))
        parts = order.split(batch_tokens)
        for given in range(here.given, per_buffer):
            place = replace(here, given=given + 1) if given + 1 < per_buffer else behind
            yield _select(held, parts[given]), place
        here = behind
        del held  # before the next buffer fills, or memory would hold two


def _buffers(reads: Reads, size: int, start: Place) -> Iterator[tuple[SiteBatches, Place]]:
    """What each buffer holds, exactly `size` rows, and the place where the next one begins."""
    parts: list[SiteBatches] = []
    missing, buffer = size, start.buffer
    epoch, first, used = start.epoch, start.read, start.skip
    while True:
        for number, batches in enumerate(reads(epoch, first), start=first):
            while used < _size(batches):
                part = _select(batches, slice(used, used + missing))
                parts.append(part)
                used, missing = used + _size(part), missing - _size(part)
                if missing == 0:
                    missing, buffer = size, buffer + 1
                    yield _emptied(parts), Place(epoch=epoch, read=number, skip=used, buffer=buffer)
            used = 0
        epoch, first = epoch + 1, 0


def _emptied(parts: list[SiteBatches]) -> SiteBatches:
    """The parts as one, taken out of the list."""
    whole = {site: ActivationBatch.concatenate([part[site] for part in parts]) for site in parts[0]}
    parts.clear()
    return whole


def _select(batches: Mapping[Site, ActivationBatch], rows: torch.Tensor | slice) -> SiteBatches:
    return {site: batch.select(rows) for site, batch in batches.items()}


def _size(batches: Mapping[Site, ActivationBatch]) -> int:
    sizes = {str(site): len(batch) for site, batch in batches.items()}
    if len(set(sizes.values())) > 1:
        raise SaekitError(
            f"Sites give different numbers of rows ({', '.join(f'{s}: {n}' for s, n in sizes.items())}), "
            "so they cannot be shuffled alike; train on them one at a time, or address one call of the looped module"
        )
    return next(iter(sizes.values()), 0)
