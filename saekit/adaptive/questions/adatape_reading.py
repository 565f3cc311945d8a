"""What AdaTape reads and computes on sequences, and the SAEs that all its questions share."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saekit.adaptive.adatape import AdaTape
from saekit.adaptive.adatape_recipe import parity
from saekit.adaptive.deciding import DecidingTarget
from saekit.adaptive.effects import as_many_like, writing_most
from saekit.adaptive.harvest import train_sae_on
from saekit.adaptive.trace import DecisionTrace
from saekit.codes import SparseCodes
from saekit.sae import SAE
from saekit.targets import Site
from saekit.targets.target import Edit

TAPE, VALID, OWN = Site.parse("tape_map:out"), Site.parse("valid:out"), Site.parse("embed:out")


@dataclass(frozen=True, kw_only=True, slots=True)
class Screen:
    """How many features are tried out, and how many others each is held against.

    Attributes:
        inputs: of the training half, the first ones, on which features are tried out one by one.
        candidates: features that are tried, those that write most.
        controls: features of like rate and strength.
        directions: random ones, which the same feature writes in, or which are added in its place.
    """

    inputs: int = 256
    candidates: int = 24
    controls: int = 19
    directions: int = 9


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Reading:
    """What came of some sequences of symbols.

    Attributes:
        labels: the parity of each.
        queries: `(n, steps, d_key)` what each step matches entries with.
        tape: `(n, steps, width)` tape tokens as they enter the blocks, those that are masked too.
        last: `(n, steps, width)` the same as the last block reads them.
        base: `(n, width)` the sequence's own token as it enters the blocks.
        first_pass: how many steps find enough entries that nobody has read.
    """

    inputs: Float[Tensor, "n length"]
    labels: Int[Tensor, " n"]
    trace: DecisionTrace
    queries: Float[Tensor, "n steps d_key"]
    tape: Float[Tensor, "n steps width"]
    last: Float[Tensor, "n steps width"]
    base: Float[Tensor, "n width"]
    first_pass: int

    @property
    def live(self) -> Bool[Tensor, "n steps"]:
        """Which slots are part of the tape."""
        return self.trace.live[..., 0]

    @property
    def length(self) -> Int[Tensor, " n"]:
        return self.live.sum(1)

    @property
    def answers(self) -> Int[Tensor, " n"]:
        return self.trace.more["logits"].argmax(1)

    @property
    def slots(self) -> Int[Tensor, "n steps"]:
        """The number of each slot."""
        return torch.arange(self.live.shape[1]).expand(self.live.shape)

    @property
    def symbols(self) -> Int[Tensor, "n steps k"]:
        """What each step read, best first."""
        entries = self.trace.more["entries"]
        return self.inputs.long().gather(1, entries.flatten(1)).view_as(entries)

    @property
    def ones(self) -> Int[Tensor, "n steps"]:
        """How many of the symbols that each step read are ones."""
        return (self.symbols == 1).sum(2)

    @property
    def fresh(self) -> Bool[Tensor, "n steps"]:
        """Slots of the tape that were read while there was something unread."""
        return self.live & (self.slots < self.first_pass)

    @property
    def boundary(self) -> Bool[Tensor, "n steps"]:
        """Fresh slots that mix ones with other symbols: where ones begin or run out."""
        return self.fresh & (self.ones > 0) & (self.ones < self.symbols.shape[2])

    def part(self, first: int) -> "Reading":
        """The first few sequences."""
        cut = {name: getattr(self, name)[:first] for name in ("inputs", "labels", "queries", "tape", "last", "base")}
        return replace(self, **cut, trace=self.trace.select(slice(first)))


def read_tapes(target: DecidingTarget, model: AdaTape, inputs: Float[Tensor, "n length"]) -> Reading:
    """Run the model; hooks that are in place act on it."""
    rule = model.config.rule
    queries = [Site.parse(f"reader.query:out@{step}") for step in range(rule.longest)]
    last = Site.parse(f"layers.{model.config.layers - 1}.norm1:in")
    found = target.target.read(inputs, [*queries, TAPE, OWN, last])
    return Reading(
        inputs=inputs,
        labels=parity(inputs),
        trace=target.trace(inputs),
        queries=torch.cat([found[query] for query in queries], 1),
        tape=found[TAPE],
        last=found[last][:, -rule.longest :],
        base=found[OWN][:, 0],
        first_pass=min(rule.longest, model.seen.n_entries // rule.at_once),
    )


def train_sae(
    site: Site, vectors: Float[Tensor, "n d_model"], *, n_features: int = 64, k: int = 4, tokens: int, seed: int
) -> SAE:
    """With TopK, on vectors that were read before."""
    sizes = {"n_features": n_features, "k": k, "tokens": tokens, "buffer_tokens": 1 << 14}
    return train_sae_on(site, vectors, seed=seed, name="adatape", **sizes).requires_grad_(False)


def like_it(codes: SparseCodes, feature: int, screen: Screen) -> tuple[int, ...]:
    """The features most like one; fewer than `controls` where no more fire."""
    return as_many_like(codes, feature, most=screen.controls)


def largest(codes: SparseCodes, sae: SAE, screen: Screen) -> list[int]:
    """The features that are tried out."""
    return writing_most(codes, sae, count=screen.candidates)


def share(positive: Bool[Tensor, " n"]) -> float:
    """How many are true; 0 where there is none at all."""
    return float(positive.float().mean()) if len(positive) else 0.0


def mean_of(values: Sequence[float]) -> float:
    """0 where there is none."""
    return sum(values) / max(1, len(values))


def permuted(
    values: Int[Tensor, " n"], generator: torch.Generator, given: Int[Tensor, " n"] | None = None
) -> Int[Tensor, " n"]:
    """The values in another order, drawn anew; only among those that share `given`."""
    order = torch.randperm(len(values), generator=generator)
    if given is None:
        return values[order]
    found = torch.empty_like(values)
    found[given.argsort(stable=True)] = values[order[given[order].argsort(stable=True)]]
    return found


def instead(value: Tensor) -> Edit:
    """Puts a tensor in the place of another."""
    return lambda _: value
