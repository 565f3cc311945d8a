"""Interventions on decisions: frozen values, carried out through hooks on the Sites of a `DecidingTarget`.

They compose with the interventions of `saekit.patching`: those edit what a decider reads, these overrule what it says.

    with deciding(target, [Replay(clean)]):                  # decisions as they were in the clean run,
        run_with_interventions(target.target, batch, ...)    # whatever happens to the content

An image's depth map given to another, maps shuffled among images, a route held fixed while activations are patched:
all are `Replay` of another trace.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from saekit.adaptive.deciding import DecidingTarget
from saekit.adaptive.trace import DecisionTrace
from saekit.errors import SaekitError, ShapeError
from saekit.targets import Site
from saekit.targets.target import Edit


@runtime_checkable
class DecisionEdit(Protocol):
    """Says which tensors it replaces on a target, and by what."""

    def edits(self, target: DecidingTarget) -> Mapping[Site, Edit]: ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Where:
    """Some decisions. Everything that is None means everywhere; numbers count from 0."""

    steps: tuple[int, ...] | None = None
    examples: tuple[int, ...] | None = None
    places: tuple[int, ...] | None = None

    def chosen(self, decision: Tensor) -> Bool[Tensor, "batch places"]:
        """True at the meant ones of `(batch, places)`.

        Raises:
            SaekitError: an example or place that is not there.
        """
        chosen = torch.ones(decision.shape[:2], dtype=torch.bool, device=decision.device)
        for what, wanted, dimension in (("example", self.examples, 0), ("place", self.places, 1)):
            if wanted is None:
                continue
            size = decision.shape[dimension]
            outside = [number for number in wanted if not 0 <= number < size]
            if outside or not wanted:
                raise SaekitError(f"no {what} {outside or wanted} among {size}; count from 0, and name at least one")
            named = torch.zeros(size, dtype=torch.bool, device=decision.device)
            named[list(wanted)] = True
            chosen = chosen & (named[:, None] if dimension == 0 else named)
        return chosen

    def steps_of(self, target: DecidingTarget) -> Sequence[int]:
        return range(len(target.steps)) if self.steps is None else self.steps


EVERYWHERE = Where()


@dataclass(frozen=True, slots=True)
class Force:
    """One option, whatever the decider says: halt, go on, big."""

    option: str
    where: Where = EVERYWHERE

    def edits(self, target: DecidingTarget) -> Mapping[Site, Edit]:
        number = target.option(self.option)

        def edit(decision: Tensor) -> Tensor:
            return decision.masked_fill(self.where.chosen(decision), number)

        return {target.overruled(step, "decision"): edit for step in self.where.steps_of(target)}


@dataclass(frozen=True, slots=True)
class Flip:
    """Option 1 where it would be option 0, and the reverse; a third option stays."""

    where: Where

    def edits(self, target: DecidingTarget) -> Mapping[Site, Edit]:
        def edit(decision: Tensor) -> Tensor:
            number = decision.long()
            flipped = torch.where(number < 2, 1 - number, number).to(decision.dtype)
            return torch.where(self.where.chosen(decision), flipped, decision)

        return {target.overruled(step, "decision"): edit for step in self.where.steps_of(target)}


@dataclass(frozen=True, slots=True)
class Shift:
    """`amount` more on the score of option 1: a dial of compute that needs no retraining."""

    amount: float
    where: Where = EVERYWHERE

    def edits(self, target: DecidingTarget) -> Mapping[Site, Edit]:
        if self.amount == 0:
            raise SaekitError("Shift(0) changes nothing; give another amount")
        return {target.overruled(step, "score"): self._edit(target, step) for step in self.where.steps_of(target)}

    def _edit(self, target: DecidingTarget, step: int) -> Edit:
        column = target.step(step).margin_of

        def edit(score: Tensor) -> Tensor:
            more = self.where.chosen(score) * self.amount
            if column is None:
                return score + more
            return torch.cat(
                [score[..., :column], score[..., column, None] + more[..., None], score[..., column + 1 :]], -1
            )

        return edit


@dataclass(frozen=True, slots=True, eq=False)
class Replay:
    """The decisions of another run, place by place. A trace of one example serves every row."""

    trace: DecisionTrace

    def edits(self, target: DecidingTarget) -> Mapping[Site, Edit]:
        return {target.overruled(number, "decision"): self._edit(number) for number in range(len(target.steps))}

    def _edit(self, number: int) -> Edit:
        recorded = self.trace.decision[:, number]

        def edit(decision: Tensor) -> Tensor:
            if len(recorded) not in (1, len(decision)) or recorded.shape[1] != decision.shape[1]:
                raise ShapeError(
                    f"decisions of {len(recorded)} examples on {recorded.shape[1]} places do not fit a batch of "
                    f"{len(decision)} on {decision.shape[1]}; trace as many, or one for all"
                )
            return recorded.expand(decision.shape).to(decision)

        return edit


def transplanted(trace: DecisionTrace, donors: Int[Tensor, " examples"]) -> DecisionTrace:
    """The decisions of example `donors[i]` in the place of those of example i, for `Replay`."""
    return replace(trace, decision=trace.decision[donors], live=trace.live[donors])


def shuffled(trace: DecisionTrace, *, seed: int = 0) -> DecisionTrace:
    """Every example with the decisions of another: as much compute in all, but not where it was wanted."""
    n = len(trace)
    if n < 2:
        raise SaekitError(f"a trace of {n} cannot be shuffled; give at least 2 examples")
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    donors = torch.empty_like(order)
    donors[order] = order.roll(1)
    return transplanted(trace, donors)


@contextmanager
def deciding(target: DecidingTarget, interventions: Sequence[DecisionEdit]) -> Iterator[None]:
    """The interventions in every forward pass while the context lasts, in their order.

    Raises:
        SaekitError: none at all; a step, example or place that is not there; an option that the model lacks.
        ShapeError: recorded decisions that do not fit the batch.
    """
    if not interventions:
        raise SaekitError("there are no interventions on decisions; give at least one")
    gathered: dict[Site, list[Edit]] = {}
    for intervention in interventions:
        for site, edit in intervention.edits(target).items():
            gathered.setdefault(site, []).append(edit)
    with target.target.editing({site: _in_turn(edits) for site, edits in gathered.items()}):
        yield


def trace_with(target: DecidingTarget, batch: Tensor, interventions: Sequence[DecisionEdit]) -> DecisionTrace:
    """The decisions, and what followed from them, under interventions."""
    with deciding(target, interventions):
        return target.trace(batch)


def _in_turn(edits: Sequence[Edit]) -> Edit:
    def edit(tensor: Tensor) -> Tensor:
        for one in edits:
            tensor = one(tensor)
        return tensor

    return edit
