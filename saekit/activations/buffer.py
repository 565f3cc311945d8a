"""A shuffle buffer: neighbouring tokens go in together and come out far apart.

The buffer is filled, emptied by half in random order, and filled again, so that every batch mixes
vectors from `buffer_tokens` of them. All Sites are shuffled alike.
"""

from collections.abc import Iterator, Mapping

import torch

from saekit.activations.batch import ActivationBatch
from saekit.errors import SaekitError
from saekit.targets import Site


def shuffled(
    passes: Iterator[Mapping[Site, ActivationBatch]], *, batch_tokens: int, buffer_tokens: int, seed: int
) -> Iterator[dict[Site, ActivationBatch]]:
    """Batches of exactly `batch_tokens` rows in random order, for as long as `passes` lasts.

    What is left when `passes` ends is given out too, except for a last incomplete batch.

    Raises:
        SaekitError: if the buffer is smaller than a batch, or Sites differ in their number of rows.
    """
    if buffer_tokens < batch_tokens:
        raise SaekitError(
            f"a buffer of {buffer_tokens:,} tokens cannot give batches of {batch_tokens:,}; "
            "raise buffer_tokens, or lower batch_tokens"
        )
    generator = torch.Generator().manual_seed(seed + 1)
    pool: dict[Site, ActivationBatch] = {}
    ended = False
    while True:
        incoming = [pool] if pool else []
        n_held = _size(pool)
        while n_held < buffer_tokens and not ended:
            batches = next(passes, None)
            if batches is None:
                ended = True
                break
            n_held += _size(batches)
            incoming.append(dict(batches))
        if n_held < batch_tokens:
            return
        merged = {site: ActivationBatch.concatenate([part[site] for part in incoming]) for site in incoming[0]}
        order = torch.randperm(n_held, generator=generator)
        give = n_held if ended else max(batch_tokens, n_held // 2)
        give -= give % batch_tokens
        for part in order[:give].split(batch_tokens):
            yield {site: batch.select(part) for site, batch in merged.items()}
        pool = {site: batch.select(order[give:]) for site, batch in merged.items()}


def _size(batches: Mapping[Site, ActivationBatch]) -> int:
    sizes = {str(site): len(batch) for site, batch in batches.items()}
    if len(set(sizes.values())) > 1:
        raise SaekitError(
            f"Sites give different numbers of rows ({', '.join(f'{s}: {n}' for s, n in sizes.items())}), "
            "so they cannot be shuffled alike; train on them one at a time, or address one call of the looped module"
        )
    return next(iter(sizes.values()), 0)
