"""Running a model over token rows and keeping what it computes at some Sites."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from zlib import crc32

import torch
from jaxtyping import Int
from torch import Tensor

from saekit.activations.batch import ActivationBatch
from saekit.activations.buffer import Shuffled, SiteBatches
from saekit.activations.clock import spent_on
from saekit.activations.mask import MaskPolicy, on_grid
from saekit.activations.stream import READ_ORDER, START, Place, generator_for
from saekit.activations.tokens import TokenRows
from saekit.errors import DataError
from saekit.targets import Site, Target

# numbers of each weight that go into a model's checksum: training moves them all, and a large model has billions
_CHECKED_WEIGHTS = 1024
_READ_TOKENS = 4096


@dataclass(frozen=True, kw_only=True)
class Harvest:
    """The activations of `target` at `sites` over `rows`: a `ResumableSource`, and in order for analysis.

    All Sites come from one forward pass, which stops after the deepest of them.

    Attributes:
        batch_rows: token rows per forward pass.
        buffer_tokens: vectors held for shuffling; rows are read in random order besides.
        prefetch: run the model in a thread for the next buffer while this one is used. Worth the memory of a second
            buffer where the model has a device of its own or cores to spare; the stream is the same.

    Raises:
        DataError: rows with padding before their end.
    """

    target: Target
    rows: TokenRows
    sites: tuple[Site, ...]
    mask: MaskPolicy = MaskPolicy()
    batch_rows: int = 16
    buffer_tokens: int = 1 << 18
    prefetch: bool = False

    def __post_init__(self) -> None:
        self.rows.padded_at_end()

    @property
    def widths(self) -> dict[Site, int]:
        return {site: self.target.width(site) for site in self.sites}

    def in_order(self, rows: Int[Tensor, " chosen"] | None = None) -> Iterator[SiteBatches]:
        """Batches in the order of the rows (or of the chosen ones), unshuffled; `document` indexes `self.rows`."""
        chosen = torch.arange(len(self.rows)) if rows is None else rows
        for part in chosen.split(self.batch_rows):
            yield self._read(part)

    def facts(self) -> dict[str, str | int | float | bool | None]:
        """What decides the stream; model and text by checksum."""
        weights = 0
        for weight in self.target.model.parameters():
            weights = checksum(weight.detach().flatten()[:_CHECKED_WEIGHTS].float(), weights)
        return {
            "sites": " ".join(map(str, self.sites)),
            "model": self.target.name,
            "model_checksum": weights,
            "rows": len(self.rows),
            "context": self.rows.context,
            "text_checksum": checksum(self.rows.ids),
            "batch_rows": self.batch_rows,
            "buffer_tokens": self.buffer_tokens,
            **self.mask.as_dict(),
        }

    def stream(self, batch_tokens: int, *, seed: int, start: Place = START) -> Shuffled:
        """Shuffled batches for ever; every pass over the rows has its own order."""

        def reads(epoch: int, first: int) -> Iterator[SiteBatches]:
            order = torch.randperm(len(self.rows), generator=generator_for(seed, READ_ORDER, epoch))
            n_vectors = 0
            for batches in self.in_order(order[first * self.batch_rows :]):
                n_vectors += sum(map(len, batches.values()))
                yield batches
            if n_vectors == 0 and first == 0:  # or the buffer would wait for ever
                raise DataError(
                    f"the mask leaves out every token of all {len(self.rows):,} rows; give another text or another mask"
                )

        return Shuffled(
            reads,
            batch_tokens=batch_tokens,
            buffer_tokens=self.buffer_tokens,
            seed=seed,
            start=start,
            prefetch=self.prefetch,
        )

    def _read(self, chosen: Int[Tensor, " chosen"]) -> SiteBatches:
        with spent_on("harvest"):
            ids = self.rows.ids[chosen]
            tensors = self.target.read(ids, list(self.sites))
            return {site: _addressed(site, tensors[site], chosen, ids, self.rows, self.mask) for site in self.sites}


def _addressed(
    site: Site, vectors: Tensor, chosen: Tensor, ids: Tensor, rows: TokenRows, mask: MaskPolicy
) -> ActivationBatch:
    """One row per token that counts, and per call where the Site stands for every call."""
    vectors = vectors.float().cpu()
    calls = torch.stack([on_grid(call, ids, site) for call in (vectors if site.call is None else [vectors])])
    step, row, position = mask.keep(rows, ids, calls).nonzero(as_tuple=True)
    return ActivationBatch(
        vectors=calls[step, row, position],
        document=chosen[row],
        position=position,
        token=ids[row, position],
        step=step,
        halted=torch.zeros(len(step), dtype=torch.bool),
    ).check_finite(site)


@dataclass(frozen=True, kw_only=True)
class TensorSource:
    """Vectors that are already there, of any type: a `ResumableSource` for synthetic data and other people's caches."""

    site: Site
    vectors: Tensor
    buffer_tokens: int = 1 << 18

    @property
    def widths(self) -> dict[Site, int]:
        return {self.site: self.vectors.shape[1]}

    def facts(self) -> dict[str, str | int | float | bool | None]:
        return {
            "sites": str(self.site),
            "vectors": len(self.vectors),
            "vectors_checksum": checksum(self.vectors),
            "buffer_tokens": self.buffer_tokens,
        }

    def stream(self, batch_tokens: int, *, seed: int, start: Place = START) -> Shuffled:
        if len(self.vectors) == 0:
            raise DataError(f"there are no vectors at {self.site}; give at least one batch of them")
        batch = ActivationBatch.from_vectors(self.vectors.float()).check_finite(self.site)

        def reads(epoch: int, first: int) -> Iterator[SiteBatches]:
            order = torch.randperm(len(batch), generator=generator_for(seed, READ_ORDER, epoch))
            for part in order.split(_READ_TOKENS)[first:]:
                yield {self.site: batch.select(part)}

        return Shuffled(reads, batch_tokens=batch_tokens, buffer_tokens=self.buffer_tokens, seed=seed, start=start)


def checksum(tensor: Tensor, before: int = 0) -> int:
    """Differs where the numbers differ; `before` continues that of another tensor."""
    # by bytes, since numpy does not know every type of torch
    return crc32(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data, before)


def take(source: Iterator[Mapping[Site, ActivationBatch]], n_tokens: int, site: Site) -> ActivationBatch:
    """At least `n_tokens` rows off the front of a stream, cut to exactly that many."""
    parts: list[ActivationBatch] = []
    while sum(map(len, parts)) < n_tokens:
        parts.append(next(source)[site])
    return ActivationBatch.concatenate(parts).select(slice(n_tokens))
