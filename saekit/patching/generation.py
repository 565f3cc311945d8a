"""Text that a model goes on with, as it is and with interventions."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from saekit.activations.mask import MaskPolicy
from saekit.activations.tokens import bos_of
from saekit.errors import SaekitError
from saekit.patching.intervening import intervening
from saekit.patching.intervention import Intervention
from saekit.patching.splice import SAEs, place_saes
from saekit.patching.tokens import TokenMask
from saekit.selection import check_serves_prompts
from saekit.targets import Target
from saekit.targets.taps import evaluating

# what of a model's generation_config holds under any way to choose tokens
_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    """How new tokens are chosen.

    Attributes:
        new_tokens: at most this many; a text may end before.
        temperature: 0 takes the likeliest token each time; whatever else the model's own settings would do to the
            choice (penalties, beams, cuts of the distribution) is off.
        seed: of the draws; the same for every text, so that texts differ by the intervention alone.
    """

    new_tokens: int = 40
    temperature: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.new_tokens < 1 or self.temperature < 0:
            raise SaekitError(
                f"new_tokens={self.new_tokens}, temperature={self.temperature}; give at least 1 token and a "
                "temperature of 0 or more"
            )


@dataclass(frozen=True, slots=True)
class Steered:
    """Two continuations of one prompt.

    Attributes:
        prompt: `(context,)` token ids, BOS included.
        plain: `(n,)` new tokens of the untouched model.
        edited: `(m,)` new tokens with the interventions.
    """

    prompt: Int[Tensor, " context"]
    plain: Int[Tensor, " n"]
    edited: Int[Tensor, " m"]

    @property
    def first_difference(self) -> int | None:
        """The first new token that is another, from 0; None if the texts are the same."""
        plain, edited = self.plain.tolist(), self.edited.tolist()
        if plain == edited:
            return None
        pairs = enumerate(zip(plain, edited, strict=False))
        return next((i for i, (one, two) in pairs if one != two), min(len(plain), len(edited)))


def encode_prompt(target: Target, text: str, *, bos: bool = True) -> Int[Tensor, " context"]:
    """Token ids of a prompt, opened by BOS where the tokenizer has one.

    Raises:
        SaekitError: no tokenizer, or nothing to read.
    """
    if target.tokenizer is None:
        raise SaekitError(f"{target.name} has no tokenizer; pass one to Target.wrap, or give token ids")
    ids = target.tokenizer(text, add_special_tokens=False).input_ids
    opening = bos_of(target.tokenizer) if bos else None
    if not ids:
        raise SaekitError(f"the prompt {text!r} has no tokens; give some text to go on from")
    return torch.tensor(ids if opening is None else [opening, *ids])


def steer(
    target: Target,
    prompt: Int[Tensor, " context"],
    interventions: Sequence[Intervention],
    saes: SAEs = (),
    *,
    sampling: Sampling = Sampling(),
    mask: MaskPolicy | TokenMask = MaskPolicy(),
) -> Steered:
    """Let a model go on from a prompt without and with interventions, which act on prompt and new tokens alike.

    Raises:
        SaekitError: a model that cannot generate or read that many tokens, an SAE whose rule looks across tokens, and
            as for `intervening`.
    """
    for sae in place_saes(saes).values():
        check_serves_prompts(sae.rule)
    plain = generate(target, prompt, sampling)
    with intervening(target, interventions, saes, mask=mask):
        edited = generate(target, prompt, sampling)
    return Steered(prompt, plain, edited)


@torch.no_grad()
def generate(target: Target, prompt: Int[Tensor, " context"], sampling: Sampling) -> Int[Tensor, " n"]:
    """New tokens by the model's own `generate` of transformers."""
    length = len(prompt) + sampling.new_tokens
    if not hasattr(target.model, "generate"):
        raise SaekitError(f"{target.name} has no generate(); give a language model of transformers")
    if target.context is not None and length > target.context:
        raise SaekitError(
            f"{len(prompt)} tokens of prompt and {sampling.new_tokens} new ones are more than the {target.context} "
            f"that {target.name} reads; shorten the prompt or ask for fewer"
        )
    ids = prompt[None].to(target.device)
    chance: dict[str, Any] = {"do_sample": False}
    if sampling.temperature > 0:
        chance = {"do_sample": True, "top_k": 0, "top_p": 1.0, "temperature": sampling.temperature}
    model: Any = target.model
    pad = getattr(target.tokenizer, "pad_token_id", None)
    with evaluating(target.model), _without_settings(model), _drawing_from(sampling.seed, target.device):
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=sampling.new_tokens, pad_token_id=pad, **chance
        )
    return out[0, len(prompt) :].cpu()


@contextmanager
def _without_settings(model: Any) -> Iterator[None]:
    """None of the model's own wishes how to choose: transformers takes them wherever a call leaves something open."""
    holder = getattr(model, "original_model", model)  # TransformerLens' bridge holds the model of transformers
    own = getattr(holder, "generation_config", None)
    if own is None:
        yield
        return
    holder.generation_config = type(own)(**{name: getattr(own, name, None) for name in _TOKENS})
    try:
        yield
    finally:
        holder.generation_config = own


@contextmanager
def _drawing_from(seed: int, device: torch.device) -> Iterator[None]:
    """Draws of one device from a seed; then its generator goes on from where it was, and others never noticed."""
    generator = _default_generator(device)
    state = generator.get_state()
    generator.manual_seed(seed)
    try:
        yield
    finally:
        generator.set_state(state)


def _default_generator(device: torch.device) -> torch.Generator:
    match device.type:
        case "cpu":
            return torch.default_generator
        case "mps":
            return torch.mps._get_default_mps_generator()
        case kind:
            return getattr(torch, kind).default_generators[device.index or 0]
