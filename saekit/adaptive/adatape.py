"""AdaTape: a transformer that decides how many, and which, extra tokens an input gets.

Xue et al., ICML 2023 (arXiv 2301.13195). A tape of tokens is read from a bank (`tape_reader`), passed through a gated
feed-forward, and put behind the input's own tokens before one of the blocks; attention is shared, tape tokens have a
feed-forward of their own.

Known from the released code: reading, insertion, masking of keys, one token for a whole parity sequence, no positions
in its bank. Our choices: a class token is read out (the code averages over tape slots that may be invalid), and the
sizes, which the paper's parity model does not give.
"""

from dataclasses import dataclass
from typing import Literal, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from saekit.adaptive.adatape_inputs import EntryTokens, Pictures, Seen, Symbols
from saekit.adaptive.block import Block, FeedForward, initialise, macs_of_block
from saekit.adaptive.tape_reader import ReadingRule, Tape, TapeReader
from saekit.adaptive.trace import DecisionTrace
from saekit.errors import SaekitError

OPTIONS = ("go on", "halt")
Bank = Literal["input", "learnt"]


@dataclass(frozen=True, kw_only=True, slots=True)
class AdaTapeConfig:
    """Sizes of the model, for sequences of symbols 1, 0 and -1 or for pictures.

    Attributes:
        length: of a sequence, which is also the number of entries of an input-driven bank.
        picture: the height and width of pictures, which are then read in place of sequences.
        coarse, fine: patches of pictures: the model's own tokens, and the entries of an input-driven bank.
        split: a key is this part of an entry (`width // split` channels).
        insert: the tape comes in before this block.
        bank: "input", made of the input's own symbols, or "learnt", the same `entries` for all.
        reads_input: False hides the sequence from the model's own token, so that only the tape carries it;
            a deviation from the paper, to see what the tape alone can do.
        longest, tau, keeps_query, moves_query, chooses: see `ReadingRule`.
    """

    length: int = 16
    picture: int | None = None
    coarse: int = 5
    fine: int = 1
    width: int = 64
    layers: int = 2
    heads: int = 4
    ratio: int = 4
    split: int = 4
    insert: int = 0
    classes: int = 2
    bank: Bank = "input"
    entries: int = 64
    reads_input: bool = True
    longest: int = 8
    tau: float = 2.0
    keeps_query: bool = True
    moves_query: bool = True
    chooses: bool = True

    def __post_init__(self) -> None:
        if not 0 <= self.insert < self.layers:
            raise SaekitError(f"insert={self.insert} is outside {self.layers} blocks; give 0 to {self.layers - 1}")
        self.rule  # noqa: B018  refuses now what it could not be then
        self.seen  # noqa: B018  likewise

    @property
    def rule(self) -> ReadingRule:
        """How the tape is read."""
        return ReadingRule(
            longest=self.longest,
            tau=self.tau,
            keeps_query=self.keeps_query,
            moves_query=self.moves_query,
            chooses=self.chooses,
        )

    @property
    def seen(self) -> Seen:
        """What an input is cut into."""
        return Symbols(self.length) if self.picture is None else Pictures(self.picture, self.coarse, self.fine)


@dataclass(frozen=True, slots=True, eq=False)
class AdaTapeRun:
    """What one forward pass gave."""

    logits: Float[Tensor, "batch classes"]
    tape: Tape


class TapeBlock(Block):
    """A block in which the tokens of the tape have a feed-forward of their own."""

    def __init__(self, width: int, heads: int, inner: int):
        super().__init__(width, heads, inner)
        self.tape_feed = FeedForward(width, inner, gated=True)

    def with_tape(
        self, x: Float[Tensor, "batch tokens width"], own: int, *, may_see: Bool[Tensor, "*#mask"]
    ) -> Float[Tensor, "batch tokens width"]:
        """Args:
        own: how many tokens, the first ones, are the input's.
        """
        x = x + self.attention(self.norm1(x), may_see=may_see)
        normed = self.norm2(x)
        return x + torch.cat([self.feed(normed[:, :own]), self.tape_feed(normed[:, own:])], 1)


class AdaTape(nn.Module):
    """See the module's docstring."""

    def __init__(self, config: AdaTapeConfig, *, seed: int = 0):
        super().__init__()
        self.config = config
        width = config.width
        self.seen = config.seen
        self.embed = nn.Linear(self.seen.own_size, width)
        self.class_token = nn.Parameter(torch.zeros(1, 1, width))
        self.to_bank = nn.Linear(self.seen.entry_size, width)
        self.own_position = self.position_of(self.seen.n_own)
        self.entry_position = self.position_of(self.seen.n_entries)
        self.learnt_bank = nn.Parameter(torch.zeros(config.entries, width)) if config.bank == "learnt" else None
        self.reader = TapeReader(width, width // config.split, config.rule)
        self.tape_map = FeedForward(width, config.ratio * width, gated=True)
        self.valid = nn.Identity()
        inner = config.ratio * width
        self.layers = nn.ModuleList(TapeBlock(width, config.heads, inner) for _ in range(config.layers))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.head = nn.Linear(width, config.classes)
        initialise(self, seed=seed)

    @property
    def stack(self) -> list[TapeBlock]:
        """The blocks, in their order."""
        return cast(list[TapeBlock], list(self.layers))

    def position_of(self, rows: int) -> nn.Parameter | None:
        """Learnt positions, where inputs have any."""
        return nn.Parameter(torch.zeros(1, rows, self.config.width)) if self.seen.placed else None

    def forward(self, inputs: Float[Tensor, "batch *size"]) -> AdaTapeRun:
        """Sequences or pictures, as the config says; refused by `Seen` where they do not fit."""
        own = self.seen.own(inputs)
        tokens = self.embed(own if self.config.reads_input else torch.zeros_like(own))
        tokens = tokens if self.own_position is None else tokens + self.own_position
        x = torch.cat([self.class_token.expand(len(inputs), -1, -1), tokens], 1)
        for block in self.stack[: self.config.insert]:
            x = block(x)
        tape = self.reader(x.mean(1), self.bank_of(inputs))
        n_own = x.shape[1]
        valid = self.valid(tape.running)
        x = torch.cat([x, self.tape_map(tape.tokens)], 1)
        may_see = torch.cat([torch.ones_like(valid[:, :1]).expand(-1, n_own), valid], 1)[:, None, None, :]
        for block in self.stack[self.config.insert :]:
            x = block.with_tape(x, n_own, may_see=may_see)
        return AdaTapeRun(self.head(self.norm(x[:, 0])), tape)

    def bank_of(self, inputs: Float[Tensor, "batch *size"]) -> Float[Tensor, "batch entries width"]:
        """The candidates: of the input, or the learnt ones."""
        if self.learnt_bank is not None:
            return self.learnt_bank.expand(len(inputs), -1, -1)
        bank = self.to_bank(self.seen.entries(inputs))
        return bank if self.entry_position is None else bank + self.entry_position

    def macs(self, lengths: Int[Tensor, " batch"]) -> Float[Tensor, " batch"]:
        """Multiplications of inputs whose tapes are this long; what is masked counts as not computed."""
        config, width, seen = self.config, self.config.width, self.seen
        feed, gated = 2 * config.ratio * width**2, 3 * config.ratio * width**2
        n_entries = seen.n_entries if self.learnt_bank is None else config.entries
        n, own = lengths.float(), 1.0 + seen.n_own
        reading = n * (n_entries * (width // config.split) + config.rule.at_once * width) + n * gated
        with_tape = (own + n) * 4 * width**2 + 2 * width * (own + n).square() + own * feed + n * gated
        without = own * (4 * width**2 + feed) + 2 * width * own**2
        to_bank = seen.n_entries * seen.entry_size * width if self.learnt_bank is None else 0
        blocks = (config.layers - config.insert) * with_tape + config.insert * without
        return blocks + reading + seen.n_own * seen.own_size * width + to_bank + width * config.classes


@torch.no_grad()
def trace_of(model: AdaTape, run: AdaTapeRun) -> DecisionTrace:
    """The decisions of a forward pass: one place, and a step for each tape token.

    `more` holds `entries` and `weights` of every step and the `logits`.
    """
    tape = run.tape
    longest = torch.tensor([model.config.rule.longest])
    return DecisionTrace(
        model="adatape",
        options=OPTIONS,
        decision=tape.halted[..., None].long(),
        margin=tape.total[..., None] - model.config.rule.tau,
        score=tape.total[..., None],
        live=tape.running[..., None],
        macs=model.macs(tape.length),
        full_macs=float(model.macs(longest)),
        more={"entries": tape.entries, "weights": tape.weights, "logits": run.logits},
    )


class PlainTransformer(nn.Module):
    """The control: a token per entry with learnt positions, as many blocks, no tape."""

    def __init__(self, config: AdaTapeConfig, *, seed: int = 0):
        super().__init__()
        self.config = config
        self.tokens = EntryTokens(config.seen, config.width)
        inner = config.ratio * config.width
        self.layers = nn.ModuleList(Block(config.width, config.heads, inner) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width, eps=1e-6)
        self.head = nn.Linear(config.width, config.classes)
        initialise(self, seed=seed)

    def forward(self, inputs: Float[Tensor, "batch *size"]) -> Float[Tensor, "batch classes"]:
        x = self.tokens(inputs)
        for block in self.layers:
            x = block(x)
        return self.head(self.norm(x[:, 0]))

    @property
    def macs(self) -> int:
        """Multiplications of one input."""
        seen, width = self.config.seen, self.config.width
        block = macs_of_block(1 + seen.n_entries, width, self.config.ratio)
        return self.config.layers * block + seen.n_entries * seen.entry_size * width + width * self.config.classes
