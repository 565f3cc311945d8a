"""Vectors of several Sites that were read before, as what a crosscoder is trained on."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from saekit.activations.batch import ActivationBatch
from saekit.activations.buffer import Shuffled, SiteBatches
from saekit.activations.stream import READ_ORDER, generator_for
from saekit.targets import Site


@dataclass(frozen=True, slots=True)
class Paired:
    """Vectors of several Sites, row by row, as something that training can draw from."""

    vectors: Mapping[Site, Float[Tensor, "n _"]]

    @property
    def widths(self) -> dict[Site, int]:
        return {site: vectors.shape[1] for site, vectors in self.vectors.items()}

    def stream(self, batch_tokens: int, *, seed: int) -> Iterator[SiteBatches]:
        whole = {site: ActivationBatch.from_vectors(vectors) for site, vectors in self.vectors.items()}
        size = len(next(iter(whole.values())))

        def reads(epoch: int, first: int) -> Iterator[SiteBatches]:
            for part in torch.randperm(size, generator=generator_for(seed, READ_ORDER, epoch)).split(1024)[first:]:
                yield {site: batch.select(part) for site, batch in whole.items()}

        return Shuffled(reads, batch_tokens=batch_tokens, buffer_tokens=16 * batch_tokens, seed=seed)
