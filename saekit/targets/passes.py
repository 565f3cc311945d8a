"""The forward passes that happen while edits are in place: how many, and which tokens each was given.

A model may be run by anyone: by a `Target`, by the user, by `generate`, which runs it once per new token.
A hook on the model itself marks where each pass begins.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn

_TOKEN_KEYWORDS = ("input_ids", "decoder_input_ids", "input", "tokens", "x")


@dataclass(frozen=True, slots=True)
class Given:
    """What one forward pass was given, as far as it concerns tokens.

    Attributes:
        ids: token ids; None where the model was given something else (vectors, embeddings).
        attended: False where an attention mask says padding; None without such a mask.
        past: positions of each row that a cache already holds, so that the first token of this pass is
            at position `past`.
    """

    ids: Int[Tensor, "batch context"] | None = None
    attended: Bool[Tensor, "batch context"] | None = None
    past: int = 0


@dataclass(slots=True)
class Passes:
    """A running account of the passes in one context; hooks write it, edits read it.

    Attributes:
        number: the pass that is under way, from 0; -1 before the first.
        given: what that pass was given.
        call: which call of the edited submodule is under way, from 0 in each pass.
        completed: passes that ran to their end; a `Target.read` stops where it has seen enough.
    """

    number: int = -1
    completed: int = 0
    given: Given = field(default_factory=Given)
    call: int = 0

    def begin(self, given: Given) -> None:
        self.number += 1
        self.given = given


@contextmanager
def watched(model: nn.Module, passes: Passes, calls: dict[Any, int], most: dict[Any, int]) -> Iterator[None]:
    """Begins a pass in `passes` whenever the model is run; `calls` starts again from 0, `most` keeps the record."""

    def begin(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        settle(calls, most)
        passes.begin(read_given(args, kwargs))

    def complete(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        passes.completed += 1

    # TransformerLens 4 runs the model that it wraps, at times without passing through its own call
    whole: nn.Module = getattr(model, "original_model", None) or model
    handles = (whole.register_forward_pre_hook(begin, with_kwargs=True), whole.register_forward_hook(complete))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        settle(calls, most)


def settle(calls: dict[Any, int], most: dict[Any, int]) -> None:
    """Carry the counts of a finished pass over into the record, and start again."""
    for place, count in calls.items():
        most[place] = max(most.get(place, 0), count)
        calls[place] = 0


def read_given(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Given:
    """Tokens, padding and length of the cache, from whatever a model was called with."""
    named = (kwargs[key] for key in _TOKEN_KEYWORDS if isinstance(kwargs.get(key), Tensor))
    first = args[0] if args and isinstance(args[0], Tensor) else next(named, None)
    if first is None or first.ndim != 2 or first.is_floating_point() or first.dtype is torch.bool:
        return Given()
    n_tokens = first.shape[1]
    mask = kwargs.get("attention_mask")
    mask = mask if isinstance(mask, Tensor) and mask.ndim == 2 and mask.shape[1] >= n_tokens else None
    cache = kwargs.get("past_key_values")
    if cache is not None and hasattr(cache, "get_seq_length"):
        past = int(cache.get_seq_length())
    else:
        past = 0 if mask is None else mask.shape[1] - n_tokens
    attended = None if mask is None else mask[:, -n_tokens:].bool()
    return Given(ids=first, attended=attended, past=past)
