"""A prompt, the one to compare it with, and the tokens that ought to follow: what circuits and patching start from."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from saekit.activations.mask import MaskPolicy
from saekit.errors import SaekitError
from saekit.patching.generation import encode_prompt
from saekit.patching.metric import LogitDifference
from saekit.sae import SAE
from saekit.targets import Site, Target

from .opened import place_on_model


@dataclass(frozen=True, slots=True)
class Contrast:
    """What is asked, ready to be run.

    Attributes:
        ids: `(1, context)` of the prompt.
        other_ids: `(1, context)` of the other prompt; None without one.
        answer: the token that ought to follow the prompt.
        metric: its logit minus that of the wrong one.
    """

    target: Target
    saes: dict[Site, SAE]
    mask: MaskPolicy
    ids: Int[Tensor, "1 context"]
    other_ids: Int[Tensor, "1 context"] | None
    answer: int
    metric: LogitDifference

    @torch.no_grad()
    def chance(self) -> float:
        """The model's probability of the answer."""
        return float(self.target.run(self.ids)[0, -1].float().softmax(-1)[self.answer])

    def tokens(self, ids: Int[Tensor, " n"]) -> list[str]:
        """What each token reads."""
        return [self.target.tokenizer.decode([token]) for token in ids.tolist()]


def open_contrast(
    prompt: str,
    other: str | None,
    answer: str,
    wrong: str,
    *,
    saes: Sequence[str],
    model: str | None,
    sites: Sequence[str],
    device: str,
) -> Contrast:
    """Load what is named and turn the texts into tokens.

    Raises:
        SaekitError: prompts of different lengths in tokens or that are the same, answers that are not one token or
            the same one, and as for `place_on_model`.
    """
    placed = place_on_model(saes, model=model, sites=sites, device=device)
    target = placed.target
    ids = encode_prompt(target, prompt, bos=placed.bos)
    other_ids = None if other is None else encode_prompt(target, other, bos=placed.bos)
    right, not_right = (_one_token(target, name, text) for name, text in (("answer", answer), ("wrong", wrong)))
    if right == not_right:
        raise SaekitError(f"--answer and --wrong are both {answer!r}; name two tokens to tell apart")
    metric = LogitDifference(torch.tensor([right]), torch.tensor([not_right]), torch.tensor([len(ids) - 1]))
    both = None if other_ids is None else other_ids[None]
    contrast = Contrast(target, placed.saes, placed.mask, ids[None], both, right, metric)
    if other_ids is not None and len(other_ids) != len(ids):
        raise SaekitError(
            f"the prompt has {len(ids)} tokens, --other {len(other_ids)}: {contrast.tokens(ids)} and "
            f"{contrast.tokens(other_ids)}; they are compared place by place, so give two of one length"
        )
    if other_ids is not None and torch.equal(other_ids, ids):
        raise SaekitError(f"--other is the prompt itself, {prompt!r}; give one that differs")
    return contrast


def _one_token(target: Target, name: str, text: str) -> int:
    ids = target.tokenizer(text, add_special_tokens=False).input_ids
    if len(ids) != 1:
        read = [target.tokenizer.decode([token]) for token in ids]
        raise SaekitError(
            f"--{name} {text!r} is {len(ids)} tokens of {target.name}, {read}; give one, spaces before it included"
        )
    return ids[0]
