"""What a model decided, how clearly, and what it cost: one type for all models that decide how much to compute."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saekit.adaptive.picture import picture_of
from saekit.errors import SaekitError, ShapeError


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class DecisionTrace:
    """The decisions of one forward pass.

    A *step* is whatever the model decides in turn: a layer, a reading step, a sampling step. A *place* is
    what it decides about: a token, a patch, a tape slot.

    Attributes:
        model: what the model is called.
        options: the names of the values that `decision` takes, `("go on", "halt")` say.
        decision: `(examples, steps, places)` index into `options`.
        margin: `(examples, steps, places)` how clear it was, in the units of `score`: above 0 for the last
            option, below 0 against it, and how far `score` would have to move to change it.
        score: `(examples, steps, places)` the number that was compared with a threshold.
        live: `(examples, steps, places)` False where there was nothing left to decide.
        macs: `(examples,)` multiplications that the decisions led to.
        full_macs: multiplications per example if nothing were saved.
        counted: what of the model the two count, where it is not all of it.
        grid: rows and columns, where the places (but the first `extra` ones) are patches of a picture.
        extra: places before the patches (a class token).
        counts: the option whose steps a map over the patches counts; None counts those that a patch was live in.
        texts: of the places of each example, where they are tokens of a text.
        more: other tensors of the model's own, first dimension examples.
    """

    model: str
    options: tuple[str, ...]
    decision: Int[Tensor, "examples steps places"]
    margin: Float[Tensor, "examples steps places"]
    score: Float[Tensor, "examples steps places"]
    live: Bool[Tensor, "examples steps places"]
    macs: Float[Tensor, " examples"]
    full_macs: float
    counted: str = "the multiplications"
    grid: tuple[int, int] | None = None
    extra: int = 0
    counts: str | None = None
    texts: tuple[tuple[str, ...], ...] | None = None
    more: Mapping[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        places = self.decision.shape[2]
        if self.grid is not None and self.grid[0] * self.grid[1] + self.extra != places:
            raise ShapeError(
                f"a grid of {self.grid} and {self.extra} more is not {places} places; give the grid of the patches"
            )

    def __len__(self) -> int:
        return len(self.decision)

    @property
    def depth(self) -> Int[Tensor, "examples places"]:
        """How many steps each place went through."""
        return self.live.sum(1)

    @property
    def mac_ratio(self) -> Float[Tensor, " examples"]:
        """Executed multiplications over those that there would be if nothing were saved, of what is `counted`."""
        return self.macs / self.full_macs

    def share(self, option: str) -> Float[Tensor, " steps"]:
        """Of the decisions of each step, the share that fell on an option.

        Raises:
            SaekitError: no such option.
        """
        if option not in self.options:
            raise SaekitError(f"no option {option!r} in this trace; there are: {', '.join(self.options)}")
        taken = (self.decision == self.options.index(option)) & self.live
        return taken.sum((0, 2)) / self.live.sum((0, 2)).clamp(min=1)

    def changed(self, other: "DecisionTrace") -> Bool[Tensor, "examples places"]:
        """The places of which any decision differs from another run's on the same batch.

        Raises:
            ShapeError: runs of other sizes.
        """
        if self.decision.shape != other.decision.shape:
            raise ShapeError(
                f"decisions {tuple(self.decision.shape)} and {tuple(other.decision.shape)} do not compare; "
                "trace the same batch twice"
            )
        return ((self.decision != other.decision) | (self.live != other.live)).any(1)

    def select(self, examples: Int[Tensor, " chosen"] | slice) -> "DecisionTrace":
        """Some of the examples."""
        tensors = {f.name: value[examples] for f in fields(self) if isinstance(value := getattr(self, f.name), Tensor)}
        texts = self.texts
        if texts is not None:
            chosen = torch.arange(len(self))[examples].tolist()
            texts = tuple(texts[index] for index in chosen)
        return replace(self, **tensors, texts=texts, more={name: value[examples] for name, value in self.more.items()})

    @classmethod
    def concatenate(cls, traces: list["DecisionTrace"]) -> "DecisionTrace":
        """Traces of several batches as one."""
        first = traces[0]
        tensors = {
            f.name: torch.cat([getattr(trace, f.name) for trace in traces])
            for f in fields(cls)
            if isinstance(getattr(first, f.name), Tensor)
        }
        texts = None if first.texts is None else tuple(text for trace in traces for text in trace.texts or ())
        more = {name: torch.cat([trace.more[name] for trace in traces]) for name in first.more}
        return replace(first, **tensors, texts=texts, more=more)

    def picture(self, example: int = 0, *, image: Float[Tensor, "height width"] | None = None) -> str:
        """One example as a piece of HTML without any script.

        How many steps each patch went through, laid over the image if one is given; or the text with one row
        of squares per step, coloured by the option taken.
        """
        if not 0 <= example < len(self):
            raise SaekitError(f"example {example} is outside a trace of {len(self)}; count from 0")
        live = self.live[example]
        if self.counts is not None:
            live = live & (self.decision[example] == self.options.index(self.counts))
        return picture_of(
            options=self.options,
            decision=self.decision[example],
            margin=self.margin[example],
            live=live,
            texts=None if self.texts is None else self.texts[example],
            grid=self.grid,
            extra=self.extra,
            image=image,
            caption=f"{self.model}: {float(self.mac_ratio[example]):.0%} of {self.counted}",
        )

    def _repr_html_(self) -> str:
        """The first few examples, for notebooks."""
        return "".join(self.picture(example) for example in range(min(len(self), 4)))
