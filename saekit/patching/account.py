"""What interventions did so far in one context: so that none does nothing unnoticed, or undoes another."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saekit.errors import SaekitError
from saekit.patching.intervention import Intervention, OffDistributionWarning
from saekit.patching.tokens import Grid
from saekit.targets import Site
from saekit.targets.passes import Passes

# An edited vector is far off if its norm leaves the range of the unedited ones at its Site by more than
# this factor. Our choice: within it lie nearly all tokens of ordinary text but BOS.
FAR = 2.0


class IdleEditError(SaekitError):
    """An edit that was to change something and did not."""


@dataclass(slots=True)
class Deeds:
    """What one intervention met and did."""

    chosen: int = 0
    changed: int = 0
    positions: set[int] = field(default_factory=set)
    longest: int = 0


@dataclass(slots=True)
class Account:
    """Deeds of every intervention, and the norms seen at every Site; hooks write it."""

    interventions: Sequence[Intervention]
    deeds: list[Deeds] = field(init=False)
    norms: dict[Site, tuple[float, float]] = field(default_factory=dict)
    warned: set[Site] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.deeds = [Deeds() for _ in self.interventions]

    def met(self, number: int, grid: Grid, chosen: Bool[Tensor, "batch context"]) -> None:
        """An intervention chose tokens in one call."""
        deeds, context = self.deeds[number], grid.keep.shape[1]
        deeds.chosen += int(chosen.sum())
        deeds.positions |= self.interventions[number].columns(context, grid.past).keys()
        deeds.longest = max(deeds.longest, grid.past + context)

    def compare_norms(
        self,
        site: Site,
        before: Float[Tensor, "n d_model"],
        after: Float[Tensor, "m d_model"],
    ) -> None:
        """Vectors of all tokens that count, before edits, and of the edited ones afterwards.

        Warns:
            OffDistributionWarning: once per Site; the module says when.
        """
        if not len(before):
            return
        norms = before.norm(dim=-1)
        low, high = self.norms.get(site, (torch.inf, 0.0))
        low, high = min(low, float(norms.min())), max(high, float(norms.max()))
        self.norms[site] = low, high
        if site in self.warned or not len(after):
            return
        moved = after.norm(dim=-1)
        smallest, largest = float(moved.min()), float(moved.max())
        if largest > FAR * high or smallest < low / FAR:
            self.warned.add(site)
            found = largest if largest > FAR * high else smallest
            warnings.warn(
                f"an edit at {site} leaves a vector with norm {found:.4g}, where unedited ones have {low:.4g} to "
                f"{high:.4g}; what follows says little about the model on ordinary text",
                OffDistributionWarning,
                stacklevel=2,
            )

    def check(self, passes: Passes) -> None:
        """At the end.

        Raises:
            SaekitError: an intervention that never found what it names, or never changed anything.
        """
        if passes.completed == 0:
            return
        for intervention, deeds in zip(self.interventions, self.deeds, strict=True):
            late = [step for step in intervention.steps or () if not 0 <= step <= passes.number]
            if late:
                raise SaekitError(
                    f"{intervention}: there were {passes.number + 1} forward passes, so no step {late[0]}; count from 0"
                )
            missed = sorted(set(intervention.positions or ()) - deeds.positions)
            if missed and intervention.steps is None:
                raise SaekitError(
                    f"{intervention}: position {missed[0]} is out of range; the text had {deeds.longest} tokens"
                )
            if deeds.changed == 0 and not intervention.may_idle:
                raise IdleEditError(f"{intervention} changed nothing: {_why(intervention, deeds)}")


def _why(intervention: Intervention, deeds: Deeds) -> str:
    if deeds.chosen == 0 and intervention.tokens is not None:
        return f"the model read none of the tokens {intervention.tokens}; choose tokens of the text"
    if deeds.chosen == 0 and intervention.when is not None:
        return f"feature {intervention.when.feature} was never active there; pass may_idle=True if that is fine"
    if deeds.chosen == 0:
        return "no token that counts was at the places it names; choose other places"
    of = "features were not active" if intervention.features is not None else "numbers were as they would become"
    return f"its {of} at any of the {deeds.chosen} tokens chosen; choose others, or pass may_idle=True"


@dataclass(slots=True)
class Claims:
    """Who edits what in one call of a Site, to refuse two who would overwrite each other."""

    by_token: list[tuple[Intervention, Bool[Tensor, "batch context"]]] = field(default_factory=list)
    by_entry: list[tuple[Intervention, Int[Tensor, " nnz"]]] = field(default_factory=list)

    def claim_entries(
        self, intervention: Intervention, chosen: Bool[Tensor, "batch context"], keys: Int[Tensor, " nnz"]
    ) -> None:
        """(token, feature) pairs, each as one number."""
        for other, theirs in self.by_entry:
            both_add = other.adds and intervention.adds
            if not both_add and bool(torch.isin(keys, theirs).any()):
                _refuse(other, intervention, "the same feature at the same token")
        self.by_entry.append((intervention, keys))
        self.by_token.append((intervention, chosen))

    def claim_vectors(self, intervention: Intervention, chosen: Bool[Tensor, "batch context"]) -> None:
        """Whole vectors, or their components along a direction."""
        for other, theirs in self.by_token:
            if _in_harmony(other, intervention):
                continue
            if bool((chosen & theirs).any()):
                _refuse(other, intervention, "the same vector")
        self.by_token.append((intervention, chosen))


def _in_harmony(other: Intervention, vectors: Intervention) -> bool:
    """Whether an edit of vectors and another edit at the same token do not depend on who comes first."""
    if vectors.adds and (other.adds or other.features is not None):
        return True
    one, two = other.direction, vectors.direction
    if one is None or two is None or getattr(other.operation, "keep_norm", False):
        return False
    if getattr(vectors.operation, "keep_norm", False):
        return False
    return abs(float(torch.nn.functional.cosine_similarity(one.float(), two.float(), dim=0))) < 1e-4


def _refuse(one: Intervention, two: Intervention, what: str) -> None:
    raise SaekitError(f"{one} and {two} both edit {what}, and only additions add up; keep one of them")
