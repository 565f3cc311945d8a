"""Exact effects: change one thing, run the model again, and see how a metric changes.

An effect is `metric(edited) - metric(unedited)`: of an ablation negative where the feature works for the
metric. One forward pass per row of a batch; candidates for edits are spread over the rows, whatever
prompts they belong to.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saekit.activations.mask import MaskPolicy
from saekit.codes import SparseCodes
from saekit.errors import SaekitError, ShapeError
from saekit.patching.coordinates import strength_of
from saekit.patching.metric import Metric
from saekit.patching.splice import Encoded, check_width, reading_site, spliced, writing_site
from saekit.patching.tokens import Grid, TokenMask, grid_of
from saekit.sae import SAE
from saekit.targets import Site, Target
from saekit.targets.passes import Given, Passes

EVERYWHERE = -1
"""As a position of a candidate: the feature is edited at every token that counts."""


@dataclass(frozen=True, slots=True)
class Candidates:
    """Edits to be tried, each alone.

    Attributes:
        prompt: `(n,)` row of the prompts.
        position: `(n,)` place in it, or `EVERYWHERE`.
        feature: `(n,)`.
    """

    prompt: Int[Tensor, " n"]
    position: Int[Tensor, " n"]
    feature: Int[Tensor, " n"]

    def __len__(self) -> int:
        return len(self.prompt)

    def everywhere(self) -> "Candidates":
        """Each feature of each prompt once, at all its positions."""
        pairs = torch.stack([self.prompt, self.feature], 1).unique(dim=0)
        return Candidates(pairs[:, 0], torch.full_like(pairs[:, 0], EVERYWHERE), pairs[:, 1])


@dataclass(frozen=True, slots=True)
class Prompts:
    """Prompts as the SAE at a Site sees them.

    Attributes:
        vectors: `(prompts, context, d_out)` activations where the SAE writes, which is where it reads unless it is a
            transcoder.
        grid: which tokens count.
        codes: of every token, in the order of the flattened prompts; none where a token does not count.
    """

    vectors: Float[Tensor, "prompts context d_out"]
    grid: Grid
    codes: SparseCodes

    def active(self) -> Candidates:
        """Every active feature at every position."""
        entries = (self.codes.values != 0).nonzero()[:, 0]
        token = self.codes.token_of_entry()[entries]
        context = self.grid.keep.shape[1]
        return Candidates((token // context).cpu(), (token % context).cpu(), self.codes.features[entries].cpu())


@torch.no_grad()
def read_prompts(
    target: Target,
    sae: SAE,
    site: Site,
    ids: Int[Tensor, "prompts context"],
    *,
    mask: MaskPolicy | TokenMask = MaskPolicy(),
    batch_rows: int = 32,
) -> Prompts:
    """Run the model on prompts and encode what it computes at a Site.

    Raises:
        SaekitError: a Site of every call (`@*`); effects are of one tensor. Token ids that the model does not know.
        ShapeError: prompts longer than the model reads, or an SAE of another width than its Site.
    """
    check_prompts(target, ids)
    check_one_call(site)
    site, written = reading_site(target, sae, site), writing_site(sae, site)
    read = [target.read(part, list({site, written})) for part in ids.split(batch_rows)]
    vectors, out = (torch.cat([part[at] for part in read]) for at in (site, written))
    grid = grid_of(vectors, site, Passes(0, given=Given(ids.to(vectors.device))), TokenMask.of(target, mask))
    kept = grid.keep.flatten().nonzero()[:, 0]
    check_width(sae, vectors, site)
    rows = vectors.flatten(0, 1)[kept].to(sae.b_dec)
    codes = sae.encode(rows)
    spread = SparseCodes.from_pairs(
        kept[codes.token_of_entry()].to(codes.device),
        codes.features,
        codes.values,
        n_tokens=ids.numel(),
        n_features=sae.n_features,
    )
    return Prompts(out, grid, spread)


@torch.no_grad()
def exact_effects(
    target: Target,
    sae: SAE,
    site: Site,
    ids: Int[Tensor, "prompts context"],
    metric: Metric,
    candidates: Candidates,
    *,
    other: Prompts | None = None,
    mask: MaskPolicy | TokenMask = MaskPolicy(),
    batch_rows: int = 64,
    after: Float[Tensor, " done"] | None = None,
    on_batch: Callable[[Tensor], None] = lambda effects: None,
) -> Float[Tensor, " n"]:
    """Effect of each candidate on the metric of its prompt, in float64.

    Args:
        ids: the prompts, of one length; a shorter one is padded on the right.
        other: the same prompts corrupted (or clean, if `ids` are the corrupted ones): an edit gives the
            feature the strength that it has there. Without it the edit is to 0, the feature's ablation.
        after: effects of the first candidates from a call that was stopped, to go on from.
        on_batch: is given the effects so far after every batch.

    Raises:
        SaekitError: a candidate that the prompts or the dictionary do not have, or at a masked token.
        ShapeError: `other` of other sizes than `ids`.
    """
    tokens = TokenMask.of(target, mask)
    _check_candidates(candidates, sae, ids, read_prompts(target, sae, site, ids, mask=tokens).grid)
    if other is not None:
        check_same_places(ids, other.grid.keep)
    base = metric_of(target, ids, metric, batch_rows=batch_rows)
    effects = torch.zeros(0, dtype=torch.float64) if after is None else after
    for part in torch.arange(len(effects), len(candidates)).split(batch_rows):
        if not len(part):  # nothing is one empty part
            break
        chosen = Candidates(candidates.prompt[part], candidates.position[part], candidates.feature[part])
        edit = _edit_each_row(chosen, other)
        with spliced(target, {site: sae}, mask=tokens, edits={site: edit}):
            logits = target.run(ids[chosen.prompt])
        effects = torch.cat([effects, metric(logits, chosen.prompt).double().cpu() - base[chosen.prompt]])
        on_batch(effects)
    return effects


@torch.no_grad()
def site_effects(
    target: Target,
    sites: Sequence[Site],
    ids: Int[Tensor, "prompts context"],
    other_ids: Int[Tensor, "_ _"],
    metric: Metric,
    *,
    batch_rows: int = 64,
) -> Float[Tensor, "sites prompts context"]:
    """Exact effect of giving one Site, at one position, the whole vector that it has on the other prompts.

    Meng et al., arXiv 2202.05262, call this causal tracing. No SAE and no mask takes part.
    """
    check_same_places(ids, other_ids)
    base = metric_of(target, ids, metric, batch_rows=batch_rows)
    n_prompts, context = ids.shape
    places = torch.cartesian_prod(torch.arange(n_prompts), torch.arange(context))  # (prompts * context, 2)
    effects: list[Tensor] = []
    for site in sites:
        check_one_call(site)
        there = torch.cat([target.read(part, [site])[site] for part in other_ids.split(batch_rows)])
        for part in places.split(batch_rows):
            prompt, position = part.T

            def patch(x: Tensor, prompt: Tensor = prompt, position: Tensor = position, there: Tensor = there) -> Tensor:
                return x.index_put((torch.arange(len(x)), position), there[prompt, position])

            logits = target.run(ids[prompt], edits={site: patch})
            effects.append(metric(logits, prompt).double().cpu() - base[prompt])
    return torch.cat(effects).view(len(sites), n_prompts, context)


@torch.no_grad()
def metric_of(target: Target, ids: Int[Tensor, "prompts context"], metric: Metric, *, batch_rows: int = 64) -> Tensor:
    """The metric of every prompt on the untouched model, `(prompts,)` in float64; errors as for `read_prompts`."""
    check_prompts(target, ids)
    parts = torch.arange(len(ids)).split(batch_rows)
    return torch.cat([metric(target.run(ids[part]), part).double().cpu() for part in parts])


def check_prompts(target: Target, ids: Tensor) -> None:
    """Raises: SaekitError if these are no rows of token ids that the model can read."""
    if ids.ndim != 2 or not ids.numel():
        raise ShapeError(f"the prompts are {tuple(ids.shape)}; give token ids (prompts, context), at least one of each")
    if target.context is not None and ids.shape[1] > target.context:
        raise ShapeError(
            f"the prompts have {ids.shape[1]} tokens, more than the {target.context} that {target.name} reads; "
            "give shorter ones"
        )
    if target.vocabulary is not None and not 0 <= int(ids.min()) <= int(ids.max()) < target.vocabulary:
        raise SaekitError(
            f"the prompts hold token ids from {int(ids.min())} to {int(ids.max())}, but {target.name} knows "
            f"{target.vocabulary}; encode them with its own tokenizer"
        )


def check_same_places(own: Tensor, other: Tensor) -> None:
    """Raises: ShapeError if two sets of prompts are not of the same number and length."""
    if own.shape[:2] != other.shape[:2]:
        raise ShapeError(
            f"the other prompts are {tuple(other.shape[:2])}, these {tuple(own.shape[:2])}; patching goes by place, "
            "so give prompts of the same sizes"
        )


def _edit_each_row(chosen: Candidates, other: Prompts | None) -> Callable[[Encoded], SparseCodes]:
    """Row `i` of the batch is edited as candidate `i` says."""

    def edit(encoded: Encoded) -> SparseCodes:
        codes = encoded.codes
        row, column = (place.to(codes.device) for place in encoded.grid.kept())
        feature, position = chosen.feature.to(codes.device)[row], chosen.position.to(codes.device)[row]
        token = ((position == column) | (position == EVERYWHERE)).nonzero()[:, 0]
        change = -strength_of(codes, feature)[token]
        if other is not None:
            place = chosen.prompt.to(codes.device)[row] * encoded.grid.keep.shape[1] + column
            change = change + strength_of(other.codes.select(place[token]), feature[token])
        n_tokens, n_features = codes.n_tokens, codes.n_features
        return SparseCodes.from_pairs(token, feature[token], change, n_tokens=n_tokens, n_features=n_features)

    return edit


def check_one_call(site: Site) -> None:
    """Raises: SaekitError for a Site of every call."""
    if site.call is None:
        raise SaekitError(f"{site} stands for every call of its submodule, and effects are of one; choose @0, @1, ...")


def _check_candidates(candidates: Candidates, sae: SAE, ids: Tensor, grid: Grid) -> None:
    n_prompts, context = ids.shape
    for what, values, low, high in (
        ("prompt", candidates.prompt, 0, n_prompts),
        ("position", candidates.position, EVERYWHERE, context),
        ("feature", candidates.feature, 0, sae.n_features),
    ):
        if len(values) and not low <= int(values.min()) <= int(values.max()) < high:
            raise SaekitError(
                f"candidates name {what}s from {int(values.min())} to {int(values.max())}, but there are {high}; "
                "count from 0"
            )
    at = candidates.position != EVERYWHERE
    masked = ~grid.keep.cpu()[candidates.prompt[at].cpu(), candidates.position[at].cpu()]
    if bool(masked.any()):
        first = int(masked.nonzero()[0])
        raise SaekitError(
            f"candidate {int(at.nonzero()[first])} is at position {int(candidates.position[at][first])} of prompt "
            f"{int(candidates.prompt[at][first])}, which is masked and passes by; take candidates from Prompts.active()"
        )
