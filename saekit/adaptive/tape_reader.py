"""Adaptive Tape Reading: how AdaTape picks a sequence of variable length from a bank of candidate tokens.

Xue et al., ICML 2023 (arXiv 2301.13195); the algorithm is known from the released code. At each step the query's best
K unused entries are read and merged, with softmax weights, into one *tape token*; the weight of the best entry is what
the step adds towards halting, and reading stops when these add up to `tau`. A clear choice makes a short tape. There
is no trained halting head, and no gradient through the length; the loss of a step is the impurity of its weights.

Where the released code is broken this follows what is evidently meant: every example's weights are its own scores
(there, all take those of the batch's first example), and an example's tape does not depend on its batch-mates.

Sites, one call per step (`@0`, `@1`, ...), the batch first:

    reader.query:out      (batch, 1, d_key) what entries are matched with; decides what is read and when it ends
    reader.scores:out     (batch, entries) the match with each
    reader.total:out      (batch, 1) what has been added up towards halting, as this step compares it with tau
    reader.halt:out       (batch, 1) True where the tape ends with this step; may be edited
    reader.token:out      (batch, 1, width) the tape token, as the transformer and the next query read it
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from saekit.errors import SaekitError, ShapeError


@dataclass(frozen=True, kw_only=True, slots=True)
class ReadingRule:
    """How long a tape may be and how it is read.

    Attributes:
        longest: T, most tape tokens.
        tau: reading stops when the best weights add up to this.
        keeps_query: each query is the mean of the last one and the token read (`complex_query`); else the token.
        moves_query: False reads with the first query throughout; a control.
        chooses: False reads entries in a random order that is the same for all inputs, with weights of their own;
            a control.
    """

    longest: int = 8
    tau: float = 2.0
    keeps_query: bool = True
    moves_query: bool = True
    chooses: bool = True

    def __post_init__(self) -> None:
        if not 1 <= self.tau <= self.longest:
            raise SaekitError(f"tau={self.tau} on tapes of at most {self.longest}; give 1 to {self.longest}")

    @property
    def at_once(self) -> int:
        """K, entries read in one step: so many that even equal weights add up to tau in time."""
        return int(self.longest // self.tau)

    @property
    def shortest(self) -> int:
        """No weight exceeds 1."""
        return math.ceil(self.tau)


@dataclass(frozen=True, slots=True, eq=False)
class Tape:
    """What was read. Step t of an example counts where `running`.

    Attributes:
        tokens: `(batch, steps, width)`; beyond an example's length they are there but must be masked.
        running: `(batch, steps)` which steps belong to the tape.
        halted: `(batch, steps)` True at the step that ended it.
        total: `(batch, steps)` added up towards halting, this step included, as it was compared with tau.
        entries: `(batch, steps, K)` which of the bank were read, best first.
        weights: `(batch, steps, K)` of each in the token.
        impurity: `(batch,)` sum over the tape of 1 - sum of squared weights.
    """

    tokens: Float[Tensor, "batch steps width"]
    running: Bool[Tensor, "batch steps"]
    halted: Bool[Tensor, "batch steps"]
    total: Float[Tensor, "batch steps"]
    entries: Int[Tensor, "batch steps k"]
    weights: Float[Tensor, "batch steps k"]
    impurity: Float[Tensor, " batch"]

    @property
    def length(self) -> Int[Tensor, " batch"]:
        return self.running.sum(1)


class TapeReader(nn.Module):
    """One shared norm for query and bank; their first `d_key` channels are matched, whole entries are read."""

    def __init__(self, width: int, d_key: int, rule: ReadingRule):
        super().__init__()
        self.rule, self.d_key = rule, d_key
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.query, self.scores, self.total = nn.Identity(), nn.Identity(), nn.Identity()
        self.halt, self.token = nn.Identity(), nn.Identity()

    def forward(self, start: Float[Tensor, "batch width"], bank: Float[Tensor, "batch entries width"]) -> Tape:
        """Args:
            start: where the first query comes from.

        Raises:
            ShapeError: a bank of fewer entries than one step reads.
        """
        rule, (batch, n_entries, _) = self.rule, bank.shape
        if n_entries < rule.at_once:
            raise ShapeError(f"a bank of {n_entries} entries is less than the {rule.at_once} that one step reads")
        query, values = self.norm(start)[:, : self.d_key], self.norm(bank)
        running = torch.ones(batch, 1, dtype=torch.bool, device=bank.device)
        total, used = bank.new_zeros(batch, 1), bank.new_zeros(batch, n_entries)
        steps: list[tuple[Tensor, ...]] = []
        for number in range(rule.longest):
            query = self.query(query[:, None])[:, 0]
            entries, weights, token = self.read(query, values, used)
            raised = total + weights[:, :1] * running
            compared = self.total(raised)  # an edit moves this comparison, not those that follow
            halted = self.halt((compared >= rule.tau) & running) & running
            if number == rule.longest - 1:
                halted = running
            used = used.scatter_add(1, entries, running.expand_as(entries).to(used))
            steps.append((token, running[:, 0], halted[:, 0], compared[:, 0], entries, weights))
            if rule.moves_query:
                key = token[:, : self.d_key]
                query = (query + key) / 2 if rule.keeps_query else key
            total, running = raised, running & ~halted
        tokens, runs, halts, totals, entries, weights = (torch.stack(parts, 1) for parts in zip(*steps, strict=True))
        impurity = ((1 - weights.square().sum(2)) * runs).sum(1)
        return Tape(tokens, runs, halts, totals, entries, weights, impurity)

    def read(self, query: Tensor, values: Tensor, used: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The best entries that were read least, their weights, and the token they make.

        Once all have been read, those read again are any: 1e9 swallows the scores in float32, as in the released code.
        """
        scores = self.scores((values[..., : self.d_key] @ query[..., None])[..., 0])
        entries = (self.liking(scores) - 1e9 * used).topk(self.rule.at_once, dim=1).indices
        if not self.rule.chooses:  # best first, as everything that comes expects
            entries = entries.gather(1, scores.gather(1, entries).argsort(1, descending=True))
        weights = (scores.gather(1, entries) / self.d_key**0.5).softmax(1)
        picked = values.gather(1, entries[..., None].expand(-1, -1, values.shape[2]))
        return entries, weights, self.token((weights[..., None] * picked).sum(1, keepdim=True))[:, 0]

    def liking(self, scores: Tensor) -> Tensor:
        """By what entries are chosen."""
        if self.rule.chooses:
            return scores
        return torch.rand(scores.shape[1], generator=torch.Generator().manual_seed(0)).to(scores).expand_as(scores)
