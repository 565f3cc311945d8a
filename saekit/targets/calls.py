"""How each library's models want to be called on a batch; the library itself is not needed to tell."""

import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from saekit.targets.facts import comes_from


def call_for(model: nn.Module) -> Callable[[nn.Module, Tensor], Any]:
    """The right one of the functions below."""
    if comes_from(model, "transformer_lens"):
        return call_transformer_lens
    # models whose code came with their weights still inherit from a class of the library
    if comes_from(model, "transformers") and hasattr(model, "main_input_name"):
        return call_transformers
    return call_module


def call_transformers(model: nn.Module, batch: Tensor) -> Any:
    """By keyword, and without the cache that generation needs, which costs memory and time."""
    has_cache = "use_cache" in inspect.signature(model.forward).parameters
    inputs: dict[str, Any] = {str(model.main_input_name): batch}
    return model(**inputs, use_cache=False) if has_cache else model(**inputs)


def call_transformer_lens(model: nn.Module, batch: Tensor) -> Any:
    """Both `HookedTransformer` and `TransformerBridge`; without the request they may give a loss."""
    return model(batch, return_type="logits")


def call_module(model: nn.Module, batch: Tensor) -> Any:
    return model(batch)
