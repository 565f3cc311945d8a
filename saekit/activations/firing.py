"""Which features fire where, by a law whose densities are known exactly.

Every event hangs under at most one gate: another event, without which it never happens. An event is a
feature, or a topic: something in the text that is no feature itself but makes features fire together. Given
that its gate is open, an event happens or not independently of everything else, so

    P(i)        = p_i                    whatever the gates are
    P(i | gate) = p_i / P(gate)
    P(i and j)  = p_i p_j / P(A)         A is the nearest gate that both hang under, each counting as its own
    P(i and j)  = p_i p_j                where there is none

Topics give features that co-occur, features as gates give a hierarchy (a child fires only where its
parent does).
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saekit.errors import SaekitError

UNGATED = -1


@dataclass(frozen=True, slots=True, eq=False)
class FiringLaw:
    """Events with their probabilities and gates; the first `n_features` are features, the others topics.

    Attributes:
        probability: `(n_events,)` share of tokens on which each event happens.
        gate: `(n_events,)` the event that each hangs under, or -1.
        n_features: how many of the events are features.
    """

    probability: Float[Tensor, " n_events"]
    gate: Int[Tensor, " n_events"]
    n_features: int

    def __post_init__(self) -> None:
        gated = (self.gate != UNGATED).nonzero()[:, 0]
        most = torch.ones_like(self.probability).index_put((gated,), self.probability[self.gate[gated]])
        wrong = (self.probability > most) | (self.probability < 0) | ((self.probability == 1) & (self.gate == UNGATED))
        if bool(wrong.any()):
            event = int(wrong.nonzero()[0])
            raise SaekitError(
                f"event {event} has probability {float(self.probability[event]):.4g}, and its gate "
                f"{float(most[event]):.4g}; give at least 0, under 1, and no more than the gate's"
            )

    @property
    def density(self) -> Float[Tensor, " n_features"]:
        """Share of tokens on which each feature fires; exact."""
        return self.probability[: self.n_features]

    @property
    def parent(self) -> Int[Tensor, " n_features"]:
        """The feature without which each feature never fires, or -1."""
        gate = self.gate[: self.n_features]
        return gate.masked_fill(gate >= self.n_features, UNGATED)

    def joint(self, i: Int[Tensor, " n_pairs"], j: Int[Tensor, " n_pairs"]) -> Float[Tensor, " n_pairs"]:
        """Share of tokens on which both events of each pair happen; exact."""
        independent = self.probability[i] * self.probability[j]
        above_j = list(self._path(j))
        joint = independent.clone()
        met = torch.zeros_like(i, dtype=torch.bool)
        for mine in self._path(i):
            for theirs in above_j:
                meets = ~met & (mine == theirs) & (mine != UNGATED)
                joint[meets] = independent[meets] / self.probability[mine[meets]]
                met |= meets
        return joint

    def sample(
        self, n_tokens: int, generator: torch.Generator
    ) -> tuple[Int[Tensor, " n_fired"], Int[Tensor, " n_fired"]]:
        """Tokens and features of all firings, in the order (token, feature).

        Needs memory for the firings and for the members of every open gate, not for tokens times features.
        """
        n_events = len(self.probability)
        free = (self.gate == UNGATED).nonzero()[:, 0]
        tokens, places = _independent_events(self.probability[free], n_tokens, generator)
        events = free[places]
        keys = []
        members, starts = _members_of_gates(self.gate)
        while len(events):
            keys.append(tokens * n_events + events)
            counts = starts[events + 1] - starts[events]
            first = (starts[events] - counts.cumsum(0) + counts).repeat_interleave(counts)
            below = members[first + torch.arange(len(first))]
            tokens, gates = tokens.repeat_interleave(counts), events.repeat_interleave(counts)
            chance = self.probability[below] / self.probability[gates]
            happens = torch.rand(len(below), generator=generator, dtype=torch.float64) < chance
            tokens, events = tokens[happens], below[happens]
        key = torch.cat(keys).sort().values if keys else torch.zeros(0, dtype=torch.int64)
        tokens, events = key // n_events, key % n_events
        is_feature = events < self.n_features
        return tokens[is_feature], events[is_feature]

    def _path(self, events: Int[Tensor, " n"]) -> Iterator[Int[Tensor, " n"]]:
        """The events themselves, their gates, the gates of these, and so on; -1 above the top."""
        while bool((events != UNGATED).any()):
            yield events
            events = torch.where(events != UNGATED, self.gate[events], UNGATED)


def zipf_densities(
    n_features: int, *, total: float, exponent: float, offset: float, most: float
) -> Float[Tensor, " n_features"]:
    """Densities that fall as `(rank + offset) ** -exponent`, capped at `most`, with sum exactly `total`.

    What the cap takes from the first ranks is shared among the others in proportion.

    Raises:
        SaekitError: if all features at the cap together are less than `total`.
    """
    if not 0 < total < n_features * most:
        raise SaekitError(
            f"{n_features:,} features of density {most:g} at most cannot be {total:g} active per token; "
            "give fewer active features, or raise the largest density"
        )
    weights = (torch.arange(1, n_features + 1, dtype=torch.float64) + offset) ** -exponent
    n_capped = torch.arange(n_features)
    scale = (total - most * n_capped) / weights.flip(0).cumsum(0).flip(0)  # if so many ranks are capped
    fits = scale * weights <= most
    return (scale[fits.nonzero()[0]] * weights).clamp(max=most)


def _independent_events(
    probability: Float[Tensor, " n_events"], n_tokens: int, generator: torch.Generator
) -> tuple[Int[Tensor, " n_happened"], Int[Tensor, " n_happened"]]:
    """Tokens and events, each event on each token with its probability, independently.

    A Poisson process of rate -log(1 - p) hits a token at least once with probability p, and processes of
    many events are one process whose hits choose their event and token at random: exact, and as
    cheap as the hits are few.
    """
    rates = -torch.log1p(-probability)
    reach = rates.cumsum(0)
    if len(rates) == 0 or float(reach[-1]) == 0:
        return torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.int64)
    n_hits = int(torch.poisson(reach[-1:] * n_tokens, generator=generator))
    where = torch.rand(n_hits, generator=generator, dtype=torch.float64) * reach[-1]
    events = torch.searchsorted(reach, where, right=True).clamp(max=len(rates) - 1)
    tokens = torch.randint(n_tokens, (n_hits,), generator=generator)
    key = (tokens * len(rates) + events).unique()
    return key // len(rates), key % len(rates)


def _members_of_gates(gate: Int[Tensor, " n_events"]) -> tuple[Int[Tensor, " n_gated"], Int[Tensor, " starts"]]:
    """Gated events ordered by gate, and where the members of each event begin."""
    order = gate.argsort(stable=True)
    members = order[gate[order] != UNGATED]
    starts = torch.zeros(len(gate) + 1, dtype=torch.int64)
    torch.cumsum(torch.bincount(gate[members], minlength=len(gate)), 0, out=starts[1:])
    return members, starts
