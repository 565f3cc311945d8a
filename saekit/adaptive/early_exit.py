"""Early exit and left-out layers for any language model with a list of blocks: decisions for models that have none.

A token exits behind the block at which the model, read out there, is sure enough of the next token (softmax response,
Schuster et al., arXiv 2207.07061); from then on its residual vector is handed on unchanged, so that later tokens
still find keys and values of it. No weights are trained. The blocks compute it nevertheless, and what they give is
thrown away: the multiplications that a trace reports are those that would be needed, not those that were done.

Sites of the wrapper, for block l: `gates.l:in` (what the gate reads), `contents.l:in` (the same, as the next block
reads it), `gates.l.score:out`, `gates.l.decision:out`.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from saekit.adaptive.deciding import DecidingTarget, Step, token_texts
from saekit.adaptive.trace import DecisionTrace
from saekit.errors import SaekitError, ShapeError
from saekit.targets import Side, Site, Target
from saekit.targets.names import Place, find_blocks
from saekit.targets.readout import find_final_norm, find_head
from saekit.targets.taps import Tap, first_tensor, tapped

OPTIONS = ("go on", "exit")
Lens = Callable[[Float[Tensor, "batch tokens d_model"]], Float[Tensor, "batch tokens vocabulary"]]


class ExitGate(nn.Module):
    """How sure the model would be if it were read out here, and whether that is enough."""

    def __init__(self, lens: Lens, threshold: float):
        super().__init__()
        self.threshold = threshold
        self.score, self.decision = nn.Identity(), nn.Identity()
        self._lens = (lens,)  # in a tuple, so that the model's own modules are not registered a second time

    def forward(
        self, x: Float[Tensor, "batch tokens d_model"], live: Bool[Tensor, "batch tokens"]
    ) -> tuple[Float[Tensor, "batch tokens"], Bool[Tensor, "batch tokens"]]:
        score = self.score(self._lens[0](x).softmax(-1).max(-1).values)
        return score, self.decision((score >= self.threshold) & live)


class EarlyExit(nn.Module):
    """A language model whose tokens leave it as soon as it is sure; every block but the last may be left.

    Attributes:
        scores, live, exits: of the last forward pass, `(batch, layers - 1, tokens)`.
    """

    def __init__(self, target: Target, *, threshold: float = 0.9, lens: Lens | None = None):
        """Args:
            lens: logits from the residual stream behind any block; found by the usual names if None.

        Raises:
            SaekitError: no list of blocks, or one block alone; no lens to be found; or a threshold that is no chance.
        """
        super().__init__()
        blocks = find_blocks(target.model)
        if blocks is None:
            raise SaekitError(f"{target.name} has no list of blocks to exit from; give a model that has one")
        if not 0 < threshold <= 1:
            raise SaekitError(f"threshold={threshold} is no chance; give more than 0 and at most 1")
        self.model = target.model
        self.blocks = blocks
        self._forward = target.forward
        n_gates = len(list(target.model.get_submodule(blocks).children())) - 1
        if n_gates < 1:
            raise SaekitError(f"{target.name} has one block, and the last may not be left; give a model of more")
        lens = lens or _find_lens(target)
        self.gates = nn.ModuleList(ExitGate(lens, threshold) for _ in range(n_gates))
        self.contents = nn.ModuleList(nn.Identity() for _ in range(n_gates))
        self.scores, self.live, self.exits = (torch.zeros(0, n_gates, 0) for _ in range(3))

    def forward(self, ids: Int[Tensor, "batch tokens"]) -> Float[Tensor, "batch tokens vocabulary"]:
        live = torch.ones_like(ids, dtype=torch.bool)
        entered: dict[int, Tensor] = {}
        seen: list[tuple[Tensor, Tensor, Tensor]] = []

        def remember(number: int) -> Tap:
            def tap(call: int, x: Tensor) -> None:
                entered[number] = x

            return tap

        def leave(number: int) -> Tap:
            def tap(call: int, x: Tensor) -> Tensor:
                nonlocal live
                x = torch.where(live[..., None], x, entered[number])
                if number == len(self.gates):
                    return x
                score, exits = self.gates[number](x, live)
                seen.append((score, live, exits & live))
                live = live & ~exits
                return self.contents[number](x)

            return tap

        taps: dict[Place, Tap] = {}
        for number in range(len(self.gates) + 1):
            taps[f"{self.blocks}.{number}", Side.INPUT] = remember(number)
            taps[f"{self.blocks}.{number}", Side.OUTPUT] = leave(number)
        with tapped(self.model, taps):
            logits = first_tensor(self._forward(self.model, ids))
        self.scores, self.live, self.exits = (torch.stack(parts, 1) for parts in zip(*seen, strict=True))
        assert logits is not None
        return logits


def early_exit_target(target: Target, *, threshold: float = 0.9, lens: Lens | None = None) -> DecidingTarget:
    """The same model with a decision behind every block but the last; the original is left as it is."""
    model = EarlyExit(target, threshold=threshold, lens=lens)
    wrapped = Target.wrap(model, target.tokenizer, name=f"{target.name}, early exit", forward=lambda m, ids: m(ids))
    steps = tuple(
        Step(
            reads=Site.parse(f"gates.{number}:in"),
            content=Site.parse(f"contents.{number}:in"),
            score=Site.parse(f"gates.{number}.score:out"),
            decision=Site.parse(f"gates.{number}.decision:out"),
        )
        for number in range(len(model.gates))
    )
    macs = _macs_per_block(model)

    def trace(ids: Tensor) -> DecisionTrace:
        logits = model(ids)
        # whoever has left neither enters the last block
        entering = torch.cat([model.live, (model.live[:, -1:] & ~model.exits[:, -1:])], 1)
        return DecisionTrace(
            model=wrapped.name,
            options=OPTIONS,
            decision=model.exits.long(),
            margin=model.scores - threshold,
            score=model.scores,
            live=model.live,
            macs=(entering.sum(2) * macs).sum(1).float(),
            full_macs=float(macs.sum()) * ids.shape[1],
            counted="the multiplications with weights of blocks",
            texts=token_texts(target.tokenizer, ids),
            more={"logits": logits},
        )

    return DecidingTarget(target=wrapped, steps=steps, options=OPTIONS, trace_batch=trace)


@contextmanager
def skipping(
    target: Target, layers: Sequence[int], *, tokens: Bool[Tensor, "batch tokens"] | None = None
) -> Iterator[None]:
    """Some blocks left out of every forward pass while the context lasts: what goes in comes out.

    Args:
        tokens: True where they are left out; everywhere if None.

    Raises:
        SaekitError: no list of blocks, or a block that is not there.
        ShapeError: `tokens` of another shape than the batch.
    """
    blocks = find_blocks(target.model)
    if blocks is None:
        raise SaekitError(f"{target.name} has no list of blocks to leave out; give a model that has one")
    n_blocks = len(list(target.model.get_submodule(blocks).children()))
    if not layers or not set(layers) <= set(range(n_blocks)):
        raise SaekitError(f"cannot leave out blocks {list(layers)} of {n_blocks}; name some of 0 to {n_blocks - 1}")
    entered: dict[int, Tensor] = {}

    def remember(number: int) -> Callable[[Tensor], Tensor]:
        def edit(x: Tensor) -> Tensor:
            entered[number] = x
            return x

        return edit

    def pass_by(number: int) -> Callable[[Tensor], Tensor]:
        def edit(x: Tensor) -> Tensor:
            if tokens is None:
                return entered[number]
            if tokens.shape != x.shape[:-1]:
                raise ShapeError(
                    f"tokens is {tuple(tokens.shape)} for a batch of {tuple(x.shape[:-1])}; give one per token"
                )
            return torch.where(tokens[..., None], entered[number], x)

        return edit

    edits: dict[Site, Callable[[Tensor], Tensor]] = {}
    for number in layers:
        edits[Site(f"{blocks}.{number}", Side.INPUT)] = remember(number)
        edits[Site(f"{blocks}.{number}", Side.OUTPUT)] = pass_by(number)
    with target.editing(edits):
        yield


def _find_lens(target: Target) -> Lens:
    head, norm = find_head(target.model), find_final_norm(target.model)
    if head is None or norm is None:
        raise SaekitError(
            f"cannot tell how {target.name} reads out its residual stream; pass lens=, from vectors to logits"
        )
    return lambda x: head(norm(x))


def _macs_per_block(model: EarlyExit) -> Float[Tensor, " blocks"]:
    """Multiplications of one token in the linear maps of each block; those of attention patterns are left out."""
    blocks = model.model.get_submodule(model.blocks).children()
    return torch.tensor([float(sum(p.numel() for p in block.parameters() if p.ndim >= 2)) for block in blocks])
