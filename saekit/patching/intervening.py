"""Carrying out interventions in every forward pass of a context.

Features are edited through the SAEs that are spliced in, first; then directions and whole vectors at the
same Site.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from saekit.activations.mask import MaskPolicy
from saekit.codes import SparseCodes
from saekit.errors import SaekitError, ShapeError
from saekit.patching.account import Account, Claims
from saekit.patching.coordinates import columns_of, pairs_of, unit
from saekit.patching.intervention import AllBut, Intervention, When
from saekit.patching.operation import Add, Chosen
from saekit.patching.splice import (
    CodeEdit,
    Encoded,
    SAEs,
    Seen,
    place_saes,
    spliced,
    unit_written,
    writing_site,
)
from saekit.patching.tokens import Grid, TokenMask, grid_of
from saekit.sae import SAE
from saekit.targets import Site, Target
from saekit.targets.names import Place
from saekit.targets.passes import Passes


@contextmanager
def intervening(
    target: Target,
    interventions: Sequence[Intervention],
    saes: SAEs = (),
    *,
    use_error_term: bool = True,
    mask: MaskPolicy | TokenMask = MaskPolicy(),
) -> Iterator[Passes]:
    """Interventions, and SAEs for those on features, in every forward pass while the context lasts.

    Args:
        saes: for the Sites where features are edited or read by a condition; others are spliced in as well.

    Raises:
        UnknownNameError: a Site that the model does not have.
        ShapeError: an SAE or a direction of another width than its Site.
        SaekitError: features, positions, rows, steps or calls out of range; a masked token named; edits
            that contradict each other; and, at the end, an edit that changed nothing.

    Warns:
        OffDistributionWarning: once per Site, if an edit takes a vector far off what came before.
    """
    if not interventions:
        raise SaekitError("there are no interventions; give at least one, or use `spliced` for SAEs alone")
    run = _Run(target, tuple(interventions), place_saes(saes), TokenMask.of(target, mask))
    edits, whole, placed = run.code_edits(), run.vector_edits(), run.placed()
    with ExitStack() as stack:
        if placed:
            stack.enter_context(
                spliced(target, placed, use_error_term=use_error_term, mask=run.mask, edits=edits, on_seen=run.remember)
            )
        stack.enter_context(target.editing(whole, passes=run.passes))
        yield run.passes
    run.account.check(run.passes)


def run_with_interventions(
    target: Target,
    batch: Tensor,
    interventions: Sequence[Intervention],
    saes: SAEs = (),
    *,
    use_error_term: bool = True,
    mask: MaskPolicy | TokenMask = MaskPolicy(),
) -> Tensor:
    """What the model gives with interventions in place; arguments and errors as for `intervening`."""
    with intervening(target, interventions, saes, use_error_term=use_error_term, mask=mask):
        return target.run(batch)


@dataclass(slots=True)
class _Run:
    """One context: what is asked for, and what the passes have shown so far."""

    target: Target
    interventions: tuple[Intervention, ...]
    saes: dict[Site, SAE]
    mask: TokenMask
    passes: Passes = field(default_factory=Passes)
    account: Account = field(init=False)
    latest: dict[Place, Seen] = field(default_factory=dict)
    claims: dict[tuple[Place, int], tuple[int, Claims]] = field(default_factory=dict)
    pools: dict[int, Tensor] = field(default_factory=dict)
    places: dict[Site, Place] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.account = Account(self.interventions)
        for intervention in self.interventions:
            if intervention.features is not None:
                _check_features(intervention, intervention.features, self.sae_at(intervention.site))
            if intervention.when is not None:
                when = intervention.when
                _check_features(intervention, (when.feature,), self.sae_at(when.site or intervention.site))

    def place(self, site: Site) -> Place:
        if site not in self.places:  # looked up in every pass, and finding a name means reading all of them
            own = site.resolve(self.target.model)
            self.places[site] = own.module, own.side
        return self.places[site]

    def sae_at(self, site: Site) -> SAE:
        found = [sae for place, sae in self.saes.items() if self.place(place) == self.place(site)]
        if not found:
            known = f"there are SAEs at {', '.join(map(str, self.saes))}" if self.saes else "no SAE is spliced in"
            raise SaekitError(f"features are edited or read at {site}, but {known}; pass saes={{site: sae}}")
        return found[0]

    def placed(self) -> dict[Site, SAE]:
        """Every SAE where it was put, and at the other calls of that submodule where features are edited or read."""
        placed = dict(self.saes)
        for intervention in self.interventions:
            sites = [intervention.site] if intervention.features is not None else []
            if intervention.when is not None:
                sites.append(intervention.when.site or intervention.site)
            for site in sites:
                here = [other for other in placed if self.place(other) == self.place(site)]
                if {None, site.call} & {other.call for other in here}:
                    continue
                sae = self.sae_at(site)
                if site.call is None:
                    if any(placed[other] is not sae for other in here):
                        continue  # each is edited where it is
                    placed = {other: one for other, one in placed.items() if other not in here}
                placed[site] = sae
        return placed

    def code_edits(self) -> dict[Site, CodeEdit]:
        by_place: dict[Place, list[int]] = {}
        for number, intervention in enumerate(self.interventions):
            if intervention.features is not None:
                by_place.setdefault(self.place(intervention.site), []).append(number)
        return {
            site: self.code_edit(by_place[self.place(site)]) for site in self.placed() if self.place(site) in by_place
        }

    def code_edit(self, numbers: list[int]) -> CodeEdit:
        def edit(encoded: Encoded) -> SparseCodes | None:
            parts = [change for n in numbers if (change := self.change_codes(n, encoded)) is not None]
            if not parts:
                return None
            tokens, features, values = (torch.cat(part) for part in zip(*parts, strict=True))
            n_tokens, n_features = encoded.codes.n_tokens, encoded.codes.n_features
            return SparseCodes.from_pairs(tokens, features, values, n_tokens=n_tokens, n_features=n_features)

        return edit

    def change_codes(self, number: int, encoded: Encoded) -> tuple[Tensor, Tensor, Tensor] | None:
        """(token, feature, change) of one intervention; None if it changes nothing here."""
        intervention, grid = self.interventions[number], encoded.grid
        if intervention.site.call not in (None, grid.call):
            return None
        wanted = self.choose(number, grid, here=encoded)
        if not bool(wanted.any()):
            return None
        among_kept = wanted[grid.keep].to(encoded.rows.device)
        pairs = pairs_of(intervention, encoded, among_kept)
        if not len(pairs.old):
            return None
        row, column = (place.to(encoded.rows.device)[pairs.token] for place in grid.kept())
        norm = (encoded.rows.norm(dim=1) / unit_written(encoded.sae, encoded.rows))[pairs.token]
        read = self.reader(number, encoded.rows, encoded.sae, pairs.features)
        chosen = Chosen(row, column + grid.past, norm, grid.draw, read)
        change = (intervention.operation(pairs.old, chosen) - pairs.old).reshape(-1)
        token, feature = pairs.address()
        keys = token * encoded.sae.n_features + feature
        written = writing_site(encoded.sae, intervention.site)
        self.claims_at(grid, written).claim_entries(intervention, wanted, keys)
        changed = (change != 0).nonzero()[:, 0]
        token, feature, change = token[changed], feature[changed], change[changed]
        self.account.deeds[number].changed += len(changed)
        return token, feature, change

    def reader(self, number: int, rows: Tensor, sae: SAE | None, features: Tensor | None) -> Callable[[Tensor], Tensor]:
        """Coordinates of activations from elsewhere; a pool that the operation keeps is read once.

        Args:
            rows: what is edited, which says how wide activations are and on which device.
        """
        intervention, width = self.interventions[number], rows.shape[1]

        def read(vectors: Tensor) -> Tensor:
            if vectors.shape[-1] != width:
                raise ShapeError(
                    f"{intervention}: it was given vectors of {vectors.shape[-1]} numbers, the Site has {width}; read "
                    "them at that Site"
                )
            is_pool = vectors is getattr(intervention.operation, "vectors", None)
            if is_pool and number in self.pools:
                return self.pools[number]
            vectors = vectors.to(rows.device)
            if sae is not None and features is not None:
                found = columns_of(sae.encode(vectors.to(sae.b_dec)), features)
            elif intervention.direction is not None:
                found = vectors.float() @ unit(intervention.direction, vectors)[:, None]
            else:
                found = vectors.float()
            if is_pool:
                self.pools[number] = found
            return found

        return read

    def vector_edits(self) -> dict[Site, Callable[[Tensor], Tensor]]:
        by_site: dict[Site, list[int]] = {}
        for number, intervention in enumerate(self.interventions):
            if intervention.features is None:
                by_site.setdefault(intervention.site.resolve(self.target.model), []).append(number)
        return {site: self.vector_edit(site, numbers) for site, numbers in by_site.items()}

    def vector_edit(self, site: Site, numbers: list[int]) -> Callable[[Tensor], Tensor]:
        def edit(x: Tensor) -> Tensor:
            grid = grid_of(x, site, self.passes, self.mask)
            rows = x.reshape(*grid.keep.shape, x.shape[-1])
            edited = torch.zeros_like(grid.keep)
            seen = self.seen_now(self.place(site), grid)
            # before features were edited
            came = x if seen is None or seen.grid.call != grid.call else seen.x
            before = came.detach().reshape(rows.shape)
            for number in numbers:
                wanted = self.choose(number, grid, here=None)
                if bool(wanted.any()):
                    norm = before[wanted].float().norm(dim=1)
                    changed = self.changed_vectors(number, rows[wanted], norm, wanted, grid)
                    rows = rows.index_put((wanted,), changed.to(x))
                    edited = edited | wanted
            self.compare(site, came, rows, edited, grid)
            return rows.view_as(x)

        return edit

    def changed_vectors(
        self,
        number: int,
        rows: Float[Tensor, "n d_model"],
        norm: Float[Tensor, " n"],
        wanted: Bool[Tensor, "batch context"],
        grid: Grid,
    ) -> Float[Tensor, "n d_model"]:
        intervention = self.interventions[number]
        direction = intervention.direction
        if direction is not None and len(direction) != rows.shape[1]:
            raise ShapeError(
                f"{intervention}: the direction has {len(direction)} numbers, the Site {rows.shape[1]}; "
                "pass one of the Site's width"
            )
        self.claims_at(grid, intervention.site).claim_vectors(intervention, wanted)
        row, column = wanted.nonzero(as_tuple=True)
        exact = rows.float()
        chosen = Chosen(row, column + grid.past, norm, grid.draw, self.reader(number, rows, None, None))
        if direction is None:
            changed = intervention.operation(exact, chosen)
        else:
            along = unit(direction, rows)
            old = exact @ along[:, None]
            changed = exact + (intervention.operation(old, chosen) - old) * along
        if isinstance(intervention.operation, Add) and intervention.operation.keep_norm:
            changed = changed * (norm / changed.norm(dim=1).clamp(min=1e-12))[:, None]
        self.account.deeds[number].changed += int((changed.to(rows) != rows).sum())
        return changed

    def choose(self, number: int, grid: Grid, here: Encoded | None) -> Bool[Tensor, "batch context"]:
        intervention = self.interventions[number]
        wanted = intervention.choose(grid)
        if intervention.when is not None and bool(wanted.any()):
            wanted = wanted & self.condition(intervention, intervention.when, grid, here)
        self.account.met(number, grid, wanted)
        return wanted

    def condition(
        self, intervention: Intervention, when: When, grid: Grid, here: Encoded | None
    ) -> Bool[Tensor, "batch context"]:
        place = self.place(when.site or intervention.site)
        if here is not None and place == self.place(intervention.site):
            keep, codes = grid.keep, here.codes
        else:
            seen = self.seen_now(place, grid)
            if seen is None:
                raise SaekitError(
                    f"{intervention} depends on feature {when.feature} at {when.site}, which this pass has not reached "
                    "yet; a condition must come before the edit"
                )
            keep, codes = seen.grid.keep, seen.codes
        strength = columns_of(codes, torch.tensor([when.feature], device=codes.device))[:, 0]
        active = torch.zeros_like(grid.keep)
        active[keep] = (strength > when.above).to(active.device)
        return active

    def seen_now(self, place: Place, grid: Grid) -> Seen | None:
        """What the SAE at a place met last, if that was in this pass."""
        seen = self.latest.get(place)
        return seen if seen is not None and seen.grid.number == grid.number else None

    def remember(self, seen: Seen) -> None:
        self.latest[self.place(seen.site)] = seen
        if seen.added is not None:
            edited = torch.zeros_like(seen.grid.keep)
            edited[seen.grid.keep] = (seen.added.row_starts.diff() > 0).to(edited.device)
            self.compare(writing_site(seen.sae, seen.site), seen.y, seen.output, edited, seen.grid)

    def compare(self, site: Site, before: Tensor, after: Tensor, edited: Tensor, grid: Grid) -> None:
        before, after = (x.detach().float().reshape(*grid.keep.shape, x.shape[-1]) for x in (before, after))
        self.account.compare_norms(site, before[grid.keep], after[edited])

    def claims_at(self, grid: Grid, site: Site) -> Claims:
        key = (self.place(site), grid.call)
        number, claims = self.claims.get(key, (-1, None))
        if claims is None or number != grid.number:
            claims = Claims()
            self.claims[key] = grid.number, claims
        return claims


def _check_features(intervention: Intervention, features: AllBut | tuple[int, ...], sae: SAE) -> None:
    named = features.features if isinstance(features, AllBut) else features
    outside = [feature for feature in named if not 0 <= feature < sae.n_features]
    if outside:
        raise SaekitError(
            f"{intervention}: feature {outside[0]} is out of range; this SAE has {sae.n_features}, from 0 to "
            f"{sae.n_features - 1}"
        )
