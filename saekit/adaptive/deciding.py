"""A target whose decisions have Sites: what decides, what it reads, and what else reads the same.

A model that decides reads its residual stream twice: once to decide (the *decision path*) and once to compute (the
*content path*). Where these are different submodules they are different Sites, and a feature can be taken away from
the one without the other noticing. `DecidingTarget` says which Sites these are; it is all that traces, interventions
and attributions of this room ask of a model.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from saekit.adaptive import a_vit, adatape, duo_llm
from saekit.adaptive.a_vit import AViT
from saekit.adaptive.adatape import AdaTape
from saekit.adaptive.duo_llm import BIG, DuoLLM
from saekit.adaptive.trace import DecisionTrace
from saekit.errors import SaekitError
from saekit.targets import Site, Target
from saekit.targets.taps import evaluating

Readout = tuple[Float[Tensor, " d_model"], float]
"""A decision's score as a linear function of what is read: `x @ direction + constant`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """One decision in turn: a layer, a reading step.

    Attributes:
        reads: what the decider reads; an edit here changes the decision and nothing else.
        content: what is computed with: the same tensor as everything else reads it, or, where the decider has one
            of its own (AdaTape's query), the tensor that it leaves alone.
        score: the scores `(batch, places)`, or `(batch, places, options)`, before they are compared.
        decision: what was decided, `(batch, places)` by options' numbers; an edit here overrules. Both None where a
            model weighs and nothing is decided once and for all (RIN's reading).
        readout: the score of option 1, where it is linear in `reads`; None where it is not.
        margin_of: the index of option 1 in the last dimension of `score`; None where there is no such dimension.
    """

    reads: Site
    content: Site
    score: Site | None
    decision: Site | None
    readout: Readout | None = None
    margin_of: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class DecidingTarget:
    """A `Target` and its decisions.

    Attributes:
        steps: the decisions that are free, in turn; one that is forced anyway (the last layer's halt) is not here.
        options: their names, by number.
        trace_batch: runs the model on a batch and gives its decisions; hooks that are in place act on it.
    """

    target: Target
    steps: tuple[Step, ...]
    options: tuple[str, ...]
    trace_batch: Callable[[Tensor], DecisionTrace] = field(repr=False)

    def trace(self, batch: Tensor) -> DecisionTrace:
        """The decisions on a batch, in eval mode and without gradients."""
        with torch.no_grad(), evaluating(self.target.model):
            return self.trace_batch(batch)

    def step(self, number: int) -> Step:
        """One of the steps.

        Raises:
            SaekitError: a step that is not there, or whose decision is not free.
        """
        if not 0 <= number < len(self.steps):
            raise SaekitError(
                f"step {number} of {self.target.name} has no free decision; they are 0 to {len(self.steps) - 1}"
            )
        return self.steps[number]

    def overruled(self, number: int, what: Literal["score", "decision"]) -> Site:
        """Where a step's score is shifted, or its decision overruled.

        Raises:
            SaekitError: a step that is not there, or that only weighs.
        """
        site = getattr(self.step(number), what)
        if site is None:
            raise SaekitError(
                f"step {number} of {self.target.name} weighs, and takes no decision that could be overruled; "
                "patch its Sites, or take features from what it reads"
            )
        return site

    def option(self, name: str) -> int:
        """The number of an option.

        Raises:
            SaekitError: no such option.
        """
        if name not in self.options:
            raise SaekitError(f"{self.target.name} has no option {name!r}; it has {', '.join(self.options)}")
        return self.options.index(name)


def a_vit_target(model: AViT) -> DecidingTarget:
    """Images in, class logits out; every layer but the last decides which tokens halt."""
    config = model.config
    example = torch.zeros(1, config.channels, config.image, config.image)
    target = Target.wrap(model, name="a-vit", forward=lambda m, images: m(images).logits, example=example)
    steps = tuple(
        Step(
            reads=Site.parse(f"layers.{number}.halt:in"),
            content=Site.parse(f"layers.{number}.content:in"),
            score=Site.parse(f"layers.{number}.halt.logit:out"),
            decision=Site.parse(f"layers.{number}.halt.decision:out"),
            readout=layer.halt.readout(config.width),
        )
        for number, layer in enumerate(model.stack[:-1])
    )
    return DecidingTarget(
        target=target, steps=steps, options=a_vit.OPTIONS, trace_batch=lambda batch: a_vit.trace_of(model, model(batch))
    )


def duo_target(model: DuoLLM, tokenizer: object = None) -> DecidingTarget:
    """Token ids in, next-token logits out; every layer routes every token, by its router."""
    target = Target.wrap(
        model,
        tokenizer,
        name="duo-llm",
        forward=lambda m, ids: m(ids).logits,
        example=torch.zeros(1, 2, dtype=torch.int64),
    )
    steps = tuple(
        Step(
            reads=Site.parse(f"layers.{number}.router:in"),
            content=Site.parse(f"layers.{number}.feed:in"),
            score=Site.parse(f"layers.{number}.router.logits:out"),
            decision=Site.parse(f"layers.{number}.choice:out"),
            readout=_less(layer.router.readout(), float(model.threshold)),
            margin_of=BIG,
        )
        for number, layer in enumerate(model.stack)
    )
    return DecidingTarget(
        target=target,
        steps=steps,
        options=duo_llm.OPTIONS,
        trace_batch=lambda ids: duo_llm.trace_of(model, model(ids), ids, texts=token_texts(tokenizer, ids)),
    )


def adatape_target(model: AdaTape) -> DecidingTarget:
    """Symbols or pictures in, class logits out; every reading step but the last may end the tape."""
    target = Target.wrap(model, name="adatape", forward=lambda m, inputs: m(inputs).logits, example=model.seen.example)
    steps = tuple(
        Step(
            reads=Site.parse(f"reader.query:out@{number}"),
            content=Site.parse(f"reader.token:out@{number}"),
            score=Site.parse(f"reader.total:out@{number}"),
            decision=Site.parse(f"reader.halt:out@{number}"),
        )
        for number in range(model.config.rule.longest - 1)
    )
    return DecidingTarget(
        target=target,
        steps=steps,
        options=adatape.OPTIONS,
        trace_batch=lambda batch: adatape.trace_of(model, model(batch)),
    )


def _less(readout: Readout, threshold: float) -> Readout:
    return readout[0], readout[1] - threshold


def token_texts(tokenizer: object, ids: Tensor) -> tuple[tuple[str, ...], ...] | None:
    """Every token as text; None without a tokenizer."""
    decode = getattr(tokenizer, "decode", None)
    if decode is None:
        return None
    return tuple(tuple(decode([token]) for token in row) for row in ids.tolist())
