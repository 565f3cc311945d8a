"""SAEs in the forward pass: the model goes on with what the SAE makes of its activations.

    error  = x - decode(codes)          a constant: no gradient, and no edit, reaches it
    output = decode(edited) + error     computed as x + decode(edited - codes)

so that with the error term a token whose codes nobody edits keeps its activation bit for bit, and an
edit adds exactly what the edited entries write. Without the error term the output is `decode(edited)`.
Tokens that the mask leaves out pass by. Gradients go the way of the formula on the left: through
encoder and decoder, not around them.

A transcoder reads `x` at one Site and writes in the place of `y` at another, later one: `error = y - decode(codes)`
and `output = y + decode(edited - codes)`, with the same promises. Either Site may stand for it, so that it can go
together with an SAE that reads the same tensor.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import reduce
from types import MappingProxyType
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saekit.activations.mask import MaskPolicy
from saekit.codes import SparseCodes
from saekit.errors import SaekitError, ShapeError, UnknownNameError
from saekit.kernels.entries import decode_rows
from saekit.patching.tokens import Grid, TokenMask, grid_of
from saekit.sae import SAE
from saekit.targets import Site, Target
from saekit.targets.passes import Passes
from saekit.targets.target import Edit

SAEs = Sequence[SAE] | Mapping[Site, SAE]
"""SAEs at the Sites that their cfg names, or at Sites given here: where they read, or where a transcoder writes."""


@dataclass(frozen=True, slots=True)
class Seen:
    """What one SAE met at one call of its Site.

    Attributes:
        site: where it reads, with the call that it was.
        x: what the model computed there.
        y: what the model computed where the SAE writes; `x` itself, unless it is a transcoder.
        grid: which tokens these are, and which of them count.
        codes: of the tokens that count, in the order of `grid.kept()`, before any edit.
        added: what the edit added to the codes; None where there was no edit. Its values may be negative.
        output: what the model went on with.
    """

    site: Site
    sae: SAE
    x: Float[Tensor, "*tokens d_model"]
    y: Float[Tensor, "*tokens d_out"]
    grid: Grid
    codes: SparseCodes
    added: SparseCodes | None
    output: Float[Tensor, "*tokens d_out"]


@dataclass(frozen=True, slots=True)
class Encoded:
    """What an edit of codes is told.

    Attributes:
        site: where, with the call that it is.
        rows: activations of the tokens that count, in the order of `grid.kept()`, in the SAE's type.
        codes: theirs; `edit` says what to add to them.
    """

    site: Site
    sae: SAE
    grid: Grid
    rows: Float[Tensor, "n d_model"]
    codes: SparseCodes


CodeEdit = Callable[[Encoded], SparseCodes | None]
"""What to add to the codes, over the same tokens; None for nothing. Values may be negative."""

Hook = Callable[[Site, SAE], Edit]

_NO_EDITS: Mapping[Site, CodeEdit] = MappingProxyType({})


def place_saes(saes: SAEs) -> dict[Site, SAE]:
    """Where each SAE belongs.

    Raises:
        SaekitError: an SAE that does not say where it belongs, or two for one Site.
    """
    if isinstance(saes, Mapping):
        return dict(saes)
    placed: dict[Site, SAE] = {}
    for sae in saes:
        if not sae.cfg.hook_name:
            raise SaekitError(f"{sae} does not record its Site; pass saes={{Site.parse('layers.2'): sae}}")
        site = Site.parse(sae.cfg.hook_name)
        if sae.is_transcoder and any(Site.parse(other.cfg.hook_name) == site for other in saes if other is not sae):
            site = writing_site(sae, site)
        if site in placed:
            raise SaekitError(f"two SAEs were trained at {site}; pass one, or saes={{site: sae}} with two Sites")
        placed[site] = sae
    return placed


@contextmanager
def spliced(
    target: Target,
    saes: SAEs,
    *,
    use_error_term: bool = True,
    mask: MaskPolicy | TokenMask = MaskPolicy(),
    edits: Mapping[Site, CodeEdit] = _NO_EDITS,
    on_seen: Callable[[Seen], None] | None = None,
) -> Iterator[Passes]:
    """SAEs in every forward pass while the context lasts, whoever runs the model: `target`, the user, `generate`.

    Args:
        use_error_term: add what the SAE does not reconstruct, as a constant.
        mask: which tokens the SAEs work on; BOS and padding are told by the ids of the target's tokenizer.
        edits: for some of the Sites, what to add to the codes.
        on_seen: is told what each SAE met at each call.

    Raises:
        UnknownNameError: a Site that the model does not have, or an edit where there is no SAE.
        ShapeError: an SAE of another width than its Site.
        SaekitError: two SAEs for one tensor, a Site that no pass reached, or no pass at all.
    """
    placed = place_saes(saes)
    check_apart(target, placed)
    for site in edits:
        if site not in placed:
            raise UnknownNameError("spliced SAE", str(site), map(str, placed))
    tokens, passes = TokenMask.of(target, mask), Passes()
    met: dict[tuple[Site, int], Met] = {}

    def read_at(site: Site, sae: SAE) -> Edit:
        def read(x: Tensor) -> Tensor:
            grid = grid_of(x, site, passes, tokens)
            met[site, grid.call] = meet(sae, x, grid, site=site, edit=edits.get(site))
            return x

        return read

    def write_at(site: Site, sae: SAE) -> Edit:
        def write(y: Tensor) -> Tensor:
            here = met.pop((site, passes.call), None)
            if here is None or here.grid.number != passes.number:
                raise SaekitError(
                    f"a transcoder reads {site} later than it writes {writing_site(sae, site)}; swap them"
                )
            seen = go_on(sae, here, y, use_error_term=use_error_term)
            if on_seen is not None:
                on_seen(seen)
            return seen.output

        return write

    with target.editing(in_order(target, placed, read_at, write_at), passes=passes):
        yield passes


def writing_site(sae: SAE, site: Site) -> Site:
    """Where an SAE that reads at `site` writes: there, unless it is a transcoder.

    Raises:
        SaekitError: a transcoder that does not record where it writes.
    """
    if not sae.is_transcoder:
        return site
    if not sae.cfg.hook_name_out:
        raise SaekitError(f"the transcoder at {site} does not record where it writes; give its cfg a hook_name_out")
    return replace(Site.parse(sae.cfg.hook_name_out), call=site.call)


def reading_site(target: Target, sae: SAE, site: Site) -> Site:
    """Where an SAE placed at `site` reads: there, unless it is a transcoder that is named by where it writes."""
    if not sae.is_transcoder or not sae.cfg.hook_name or _own(target, site) != _own(target, writing_site(sae, site)):
        return site
    return replace(Site.parse(sae.cfg.hook_name), call=site.call)


@dataclass(frozen=True, slots=True)
class Met:
    """What one SAE has read at one call of its Site, and not yet written; attributes as in `Seen`."""

    site: Site
    x: Tensor
    rows: Tensor
    grid: Grid
    codes: SparseCodes
    added: SparseCodes | None


def meet(sae: SAE, x: Tensor, grid: Grid, *, site: Site, edit: CodeEdit | None) -> Met:
    """Encode one tensor and ask what to change."""
    site = replace(site, call=grid.call)
    check_width(sae, x, site)
    rows = x[grid.keep.reshape(x.shape[:-1])].to(sae.b_dec)
    codes = sae.encode(rows) if len(rows) else _no_codes(sae)
    added = edit(Encoded(site, sae, grid, rows, codes)) if edit is not None and len(rows) else None
    return Met(site, x, rows, grid, codes, added)


def check_width(sae: SAE, x: Tensor, site: Site) -> None:
    """Raises: ShapeError if the SAE does not read what the Site has."""
    if x.shape[-1] != sae.d_model:
        raise ShapeError(
            f"{site} has {x.shape[-1]} numbers per token, but this SAE encodes rows of {sae.d_model} numbers, got "
            f"{tuple(x.shape)}; splice it in at the Site it was trained on"
            f"{f' ({sae.cfg.hook_name})' if sae.cfg.hook_name else ''}"
        )


def go_on(sae: SAE, met: Met, y: Tensor, *, use_error_term: bool) -> Seen:
    """What the model goes on with in the place of `y`; see the module's docstring."""
    if y.shape != (*met.x.shape[:-1], sae.d_out):
        raise ShapeError(
            f"{writing_site(sae, met.site)} has vectors {tuple(y.shape)}, but what was read at {met.site} is written "
            f"as {(*met.x.shape[:-1], sae.d_out)}; splice it in at the Sites it was trained on"
        )
    rows, added = met.rows, met.added
    reconstructed = None if use_error_term and not torch.is_grad_enabled() else sae.decode(met.codes, rows)
    if not len(rows) or (reconstructed is None and added is None):
        return Seen(met.site, sae, met.x, y, met.grid, met.codes, added, y)
    keep = met.grid.keep.reshape(y.shape[:-1])
    kept = y[keep]
    if reconstructed is not None:
        reconstructed = reconstructed.to(y)
        kept = _ValueAlong.apply(kept.detach(), reconstructed) if use_error_term else reconstructed
    if added is not None:
        kept = kept + write(added, sae, rows).to(y)
    output = y.clone()
    output[keep] = kept
    return Seen(met.site, sae, met.x, y, met.grid, met.codes, added, output)


def write(codes: SparseCodes, sae: SAE, rows: Float[Tensor, "n_tokens d_model"]) -> Float[Tensor, "n_tokens d_model"]:
    """What some entries write into activations `rows`, without the bias."""
    return _in_units_of(rows, decode_rows(codes.values, codes.features, codes.row_starts, sae.decoder), sae)


def unit_written(sae: SAE, rows: Float[Tensor, "n_tokens d_model"]) -> Float[Tensor, " n_tokens"]:
    """How much of its decoder row a feature of strength 1 writes into each of the activations."""
    return _in_units_of(rows, rows.new_ones(len(rows), 1), sae)[:, 0]


def _in_units_of(rows: Float[Tensor, "n_tokens d_model"], written: Float[Tensor, "n_tokens _"], sae: SAE) -> Tensor:
    restore = sae.cfg.normalisation.restore  # which shifts what it scales
    return restore(written, rows) - restore(torch.zeros_like(written), rows)


def run_with_saes(
    target: Target,
    batch: Int[Tensor, "batch context"] | Tensor,
    saes: SAEs,
    *,
    use_error_term: bool = True,
    mask: MaskPolicy | TokenMask = MaskPolicy(),
) -> Tensor:
    """What the model gives with SAEs spliced in; arguments and errors as for `spliced`."""
    with spliced(target, saes, use_error_term=use_error_term, mask=mask):
        return target.run(batch)


class _ValueAlong(torch.autograd.Function):
    """The value of one tensor with the gradient of another: `value`, as if computed as `path + constant`."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, path: Tensor):
        return value.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor):  # type: ignore[override]
        return None, grad


def check_apart(target: Target, placed: Mapping[Site, SAE]) -> None:
    """An SAE may read what a transcoder has written, but two of a kind would overwrite each other.

    Raises:
        SaekitError: naming two that would.
    """
    taken: dict[tuple[str, Any, bool], Site] = {}
    for site, sae in placed.items():
        written = writing_site(sae, site)
        own = _own(target, written)
        other = taken.setdefault((own.module, own.side, sae.is_transcoder), written)
        if other is not written and (other.call is None or written.call is None or other.call == written.call):
            raise SaekitError(
                f"{other} and {written} are the same tensor of {target.name}; splice in one SAE that writes there"
            )


def _own(target: Target, site: Site) -> Site:
    return site.resolve(target.model)


def in_order(target: Target, placed: Mapping[Site, SAE], read_at: Hook, write_at: Hook) -> dict[Site, Edit]:
    """All that is done at each tensor; what transcoders write there, SAEs read, and what those write, transcoders."""
    hooks: dict[Site, list[Edit]] = {}
    transcoders = {site: sae for site, sae in placed.items() if sae.is_transcoder}
    for site, sae in transcoders.items():
        hooks.setdefault(_own(target, writing_site(sae, site)), []).append(write_at(site, sae))
    for site, sae in placed.items():
        if not sae.is_transcoder:
            hooks.setdefault(_own(target, site), []).extend([read_at(site, sae), write_at(site, sae)])
    for site, sae in transcoders.items():
        hooks.setdefault(_own(target, reading_site(target, sae, site)), []).append(read_at(site, sae))

    def in_turn(several: Sequence[Edit]) -> Edit:
        return lambda x: reduce(lambda x, one: one(x), several, x)

    return {site: in_turn(several) for site, several in hooks.items()}


def _no_codes(sae: SAE) -> SparseCodes:
    nothing = torch.zeros(0, dtype=torch.int64, device=sae.b_dec.device)
    return SparseCodes(sae.b_dec.new_zeros(0), nothing, nothing.new_zeros(1), sae.n_features)
