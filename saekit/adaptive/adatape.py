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

from saekit.adaptive.block import Block, FeedForward, initialise
from saekit.adaptive.tape_reader import ReadingRule, Tape, TapeReader
from saekit.adaptive.trace import DecisionTrace
from saekit.errors import SaekitError, ShapeError

OPTIONS = ("go on", "halt")
Bank = Literal["input", "learnt"]


@dataclass(frozen=True, kw_only=True, slots=True)
class AdaTapeConfig:
    """Sizes of the model for sequences of symbols 1, 0 and -1.

    Attributes:
        length: of a sequence, which is also the number of entries of an input-driven bank.
        split: a key is this part of an entry (`width // split` channels).
        insert: the tape comes in before this block.
        bank: "input", made of the input's own symbols, or "learnt", the same `entries` for all.
        reads_input: False hides the sequence from the model's own token, so that only the tape carries it;
            a deviation from the paper, to see what the tape alone can do.
        longest, tau, keeps_query, moves_query: see `ReadingRule`.
    """

    length: int = 16
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

    def __post_init__(self) -> None:
        if not 0 <= self.insert < self.layers:
            raise SaekitError(f"insert={self.insert} is outside {self.layers} blocks; give 0 to {self.layers - 1}")
        self.rule  # noqa: B018  refuses now what it could not be then

    @property
    def rule(self) -> ReadingRule:
        """How the tape is read."""
        return ReadingRule(
            longest=self.longest, tau=self.tau, keeps_query=self.keeps_query, moves_query=self.moves_query
        )


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
        self.embed = nn.Linear(3 * config.length, width)
        self.class_token = nn.Parameter(torch.zeros(1, 1, width))
        self.to_bank = nn.Linear(3, width)
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

    def forward(self, symbols: Float[Tensor, "batch length"]) -> AdaTapeRun:
        """`symbols` are numbers, not token ids, and so may be shown to hooks that look for those."""
        one_hot = self.check(symbols)
        own = one_hot.flatten(1) if self.config.reads_input else torch.zeros_like(one_hot).flatten(1)
        x = torch.cat([self.class_token.expand(len(symbols), -1, -1), self.embed(own)[:, None]], 1)
        for block in self.stack[: self.config.insert]:
            x = block(x)
        tape = self.reader(x.mean(1), self.bank_of(one_hot))
        n_own = x.shape[1]
        valid = self.valid(tape.running)
        x = torch.cat([x, self.tape_map(tape.tokens)], 1)
        may_see = torch.cat([torch.ones_like(valid[:, :1]).expand(-1, n_own), valid], 1)[:, None, None, :]
        for block in self.stack[self.config.insert :]:
            x = block.with_tape(x, n_own, may_see=may_see)
        return AdaTapeRun(self.head(self.norm(x[:, 0])), tape)

    def bank_of(self, one_hot: Float[Tensor, "batch length 3"]) -> Float[Tensor, "batch entries width"]:
        """The candidates: of the input, without positions, or the learnt ones."""
        if self.learnt_bank is not None:
            return self.learnt_bank.expand(len(one_hot), -1, -1)
        return self.to_bank(one_hot)

    def check(self, symbols: Float[Tensor, "batch length"]) -> Float[Tensor, "batch length 3"]:
        """The symbols as one-hot vectors.

        Raises:
            ShapeError: sequences of another length.
            SaekitError: a symbol other than 1, 0 and -1.
        """
        if symbols.shape[1] != self.config.length:
            raise ShapeError(
                f"sequences have {symbols.shape[1]} symbols, but this model reads {self.config.length}; give as many"
            )
        return one_hot_of(symbols)

    def macs(self, lengths: Int[Tensor, " batch"]) -> Float[Tensor, " batch"]:
        """Multiplications of inputs whose tapes are this long; what is masked counts as not computed."""
        config, width = self.config, self.config.width
        feed, gated = 2 * config.ratio * width**2, 3 * config.ratio * width**2
        n_entries = config.length if self.learnt_bank is None else config.entries
        n, own = lengths.float(), 2.0
        reading = n * (n_entries * (width // config.split) + config.rule.at_once * width) + n * gated
        with_tape = (own + n) * 4 * width**2 + 2 * width * (own + n).square() + own * feed + n * gated
        without = own * (4 * width**2 + feed) + 2 * width * own**2
        ends = 3 * config.length * width + (config.length * 3 * width if self.learnt_bank is None else 0)
        blocks = (config.layers - config.insert) * with_tape + config.insert * without
        return blocks + reading + ends + width * config.classes


def one_hot_of(symbols: Float[Tensor, "batch length"]) -> Float[Tensor, "batch length 3"]:
    """Raises: SaekitError: a symbol other than 1, 0 and -1."""
    known = torch.tensor([-1.0, 0.0, 1.0], device=symbols.device)
    one_hot = symbols[..., None] == known
    if not bool(one_hot.any(-1).all()):
        raise SaekitError(f"there is a symbol {float(symbols[~one_hot.any(-1)][0]):g}; give 1, 0 and -1")
    return one_hot.float()


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
    """The control on sequences: a token per symbol with learnt positions, as many blocks, no tape."""

    def __init__(self, config: AdaTapeConfig, *, seed: int = 0):
        super().__init__()
        self.config = config
        self.embed = nn.Linear(3, config.width)
        self.class_token = nn.Parameter(torch.zeros(1, 1, config.width))
        self.position = nn.Parameter(torch.zeros(1, config.length, config.width))
        inner = config.ratio * config.width
        self.layers = nn.ModuleList(Block(config.width, config.heads, inner) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width, eps=1e-6)
        self.head = nn.Linear(config.width, config.classes)
        initialise(self, seed=seed)

    def forward(self, symbols: Float[Tensor, "batch length"]) -> Float[Tensor, "batch classes"]:
        tokens = self.embed(one_hot_of(symbols)) + self.position
        x = torch.cat([self.class_token.expand(len(symbols), -1, -1), tokens], 1)
        for block in self.layers:
            x = block(x)
        return self.head(self.norm(x[:, 0]))
