"""What an effect is an effect on: one number per prompt, from the model's logits."""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import cross_entropy

from saekit.errors import ShapeError

Logits = Float[Tensor, "batch context vocabulary"]


@runtime_checkable
class Metric(Protocol):
    """A number per row. Differentiable, and of each row alone: rows of a batch are edited differently."""

    def __call__(self, logits: Logits, prompt: Int[Tensor, " batch"]) -> Float[Tensor, " batch"]:
        """`prompt` says which prompt each row is; one prompt may stand in several rows."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class LogitDifference:
    """Logit of the right token minus that of the wrong one, at one position of each prompt.

    Attributes:
        right: `(prompts,)` token ids.
        wrong: `(prompts,)` token ids.
        position: `(prompts,)` where the prediction is made: the last token of each prompt.
    """

    right: Int[Tensor, " _"]
    wrong: Int[Tensor, " _"]
    position: Int[Tensor, " _"]

    def __post_init__(self) -> None:
        if not len(self.right) == len(self.wrong) == len(self.position):
            raise ShapeError(
                f"there are {len(self.right)} right tokens, {len(self.wrong)} wrong ones and {len(self.position)} "
                "positions; give one of each per prompt"
            )

    def __call__(self, logits: Logits, prompt: Int[Tensor, " batch"]) -> Float[Tensor, " batch"]:
        self._check(logits, prompt)
        place = prompt.to(self.right.device)
        right, wrong, position = (part[place].to(logits.device) for part in (self.right, self.wrong, self.position))
        here = logits[torch.arange(len(logits), device=logits.device), position]  # (batch, vocabulary)
        return (here.gather(1, right[:, None]) - here.gather(1, wrong[:, None]))[:, 0]

    def _check(self, logits: Tensor, prompt: Tensor) -> None:
        """What indexing would say of it is another's business."""
        _, context, vocabulary = logits.shape
        for what, values, low, high in (
            ("prompt", prompt, 0, len(self.right)),
            ("position", self.position, -context, context),
            ("token", torch.cat([self.right, self.wrong]), 0, vocabulary),
        ):
            if len(values) and not low <= int(values.min()) <= int(values.max()) < high:
                raise ShapeError(
                    f"the metric is asked of {what}s from {int(values.min())} to {int(values.max())}, but there are "
                    f"{high}; give one position and two tokens for each prompt, counted from 0"
                )


@dataclass(frozen=True, slots=True, eq=False)
class NextTokenLoss:
    """Nats of all next-token predictions of a row together.

    Attributes:
        ids: `(prompts, context)` the rows.
        pad: the id that no prediction of counts; None if every row is full.
    """

    ids: Int[Tensor, "prompts context"]
    pad: int | None = None

    def __call__(self, logits: Logits, prompt: Int[Tensor, " batch"]) -> Float[Tensor, " batch"]:
        following = self.ids[prompt.to(self.ids.device), 1:].to(logits.device)
        lost = nats(logits[:, :-1], following)
        return (lost if self.pad is None else lost.masked_fill(following == self.pad, 0.0)).sum(1)


def nats(
    logits: Float[Tensor, "batch places vocabulary"], following: Int[Tensor, "batch places"]
) -> Float[Tensor, "batch places"]:
    """Loss of each prediction, in float32."""
    return cross_entropy(logits.float().transpose(1, 2), following, reduction="none")
