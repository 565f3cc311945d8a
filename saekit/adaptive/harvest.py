"""What deciders read, with the address of every vector: example, place, step, and whether its token had stopped."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saekit.activations.batch import ActivationBatch
from saekit.activations.harvest import TensorSource
from saekit.activations.mask import MaskPolicy
from saekit.activations.tokens import TokenRows
from saekit.adaptive.deciding import DecidingTarget
from saekit.errors import DataError
from saekit.patching.tokens import TokenMask
from saekit.sae import SAE
from saekit.selection import TopK
from saekit.targets import Site
from saekit.training.config import TrainConfig
from saekit.training.loop import train

BATCH = 64


def harvest(
    target: DecidingTarget, inputs: Tensor, step: int, *, content: bool = False, mask: MaskPolicy = MaskPolicy()
) -> ActivationBatch:
    """The vectors that step `step` decides on, of every place of `inputs`, first dimension examples.

    `document` counts the inputs, `token` is the token id there (0 in images), `step` the step. A place that had
    stopped before this step is there too, with `halted` set: leave it out before an SAE is trained (`live_only`),
    since deep layers then learn from what the model goes on with, which is a biased sample and should be.

    Args:
        content: the same vectors from the content path.
        mask: BOS and padding are left out, where there are token ids.
    """
    site = target.step(step).content if content else target.step(step).reads
    tokens = TokenMask.of(target.target, mask)
    parts = []
    for number, batch in enumerate(inputs.split(BATCH)):
        vectors = target.target.read(batch, [site])[site].float().cpu()
        live = target.trace(batch).live[:, step]
        if live.shape != vectors.shape[:2]:  # who reads is not what is decided about: RIN's slots and patches
            live = torch.ones(vectors.shape[:2], dtype=torch.bool)
        keep, ids = _kept(batch, live, tokens)
        row, place = keep.nonzero(as_tuple=True)
        parts.append(
            ActivationBatch(
                vectors=vectors[row, place],
                document=row + number * BATCH,
                position=place,
                token=ids[row, place],
                step=torch.full_like(row, step),
                halted=~live[row, place],
            ).check_finite(site)
        )
    return ActivationBatch.concatenate(parts)


def live_only(batch: ActivationBatch) -> ActivationBatch:
    """The vectors of tokens that had not stopped.

    Raises:
        DataError: all of them had.
    """
    live = (~batch.halted).nonzero()[:, 0]
    if not len(live):
        raise DataError(f"all {len(batch):,} vectors are of tokens that had stopped; choose an earlier step")
    return batch.select(live)


def train_decision_sae(
    target: DecidingTarget,
    inputs: Tensor,
    step: int,
    *,
    n_features: int = 256,
    k: int = 8,
    tokens: int = 400_000,
    seed: int = 0,
) -> SAE:
    """An SAE with TopK on what a step decides on, live tokens only."""
    vectors = live_only(harvest(target, inputs, step)).vectors
    name = target.target.name
    return train_sae_on(
        target.step(step).reads, vectors, n_features=n_features, k=k, tokens=tokens, seed=seed, name=name
    )


def train_sae_on(
    site: Site,
    vectors: Float[Tensor, "n d_model"],
    *,
    n_features: int,
    k: int,
    tokens: int,
    seed: int,
    name: str,
    buffer_tokens: int = 1 << 18,
) -> SAE:
    """An SAE with TopK on vectors that were read before; `name` is the model's.

    Args:
        buffer_tokens: shuffled at a time; fewer is faster where the vectors are few.
    """
    # what a decider reads varies in few directions, and an encoder that starts short leaves most features silent on it
    config = TrainConfig(site=site, rule=TopK(k), n_features=n_features, tokens=tokens, seed=seed, encoder_start="unit")
    return train([config], TensorSource(site=site, vectors=vectors, buffer_tokens=buffer_tokens), model_name=name)[0]


def _kept(batch: Tensor, live: Tensor, tokens: TokenMask) -> tuple[Tensor, Int[Tensor, "batch places"]]:
    if batch.is_floating_point() or batch.ndim < 2:  # pictures or numbers, which have no ids
        return torch.ones_like(live), torch.zeros(live.shape, dtype=torch.int64)
    rows = TokenRows.from_ids(batch, bos=tokens.bos, pad=tokens.pad)
    return tokens.policy.keep_tokens(rows, batch), batch
