"""Reading and replacing what passes through submodules, by plain PyTorch hooks that never stay behind."""

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from saekit.errors import SaekitError
from saekit.targets.names import Place, Side

Tap = Callable[[int, Tensor], Tensor | None]
"""Sees the number of the call and the tensor that passes; what it returns takes the tensor's place, None leaves it."""

# what libraries call the tensor that a block works on, where they pass it by keyword
_STREAM_KEYWORDS = ("hidden_states", "input", "x")


class StopForward(BaseException):
    """Ends a forward pass whose remainder nobody needs.

    Not an `Exception`, so that a model which catches those cannot carry on regardless.
    """


@contextmanager
def tapped(model: nn.Module, taps: Mapping[Place, Tap]) -> Iterator[dict[Place, int]]:
    """Taps on the submodules of `model` while the context lasts, and how often each was passed so far."""
    calls = dict.fromkeys(taps, 0)
    handles: list[RemovableHandle] = []
    try:
        for place, tap in taps.items():
            handles.append(_attach(model, place, tap, calls))
        yield calls
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Every submodule in eval mode while the context lasts, and then in the mode that it was in.

    The flags are set one by one: `model.eval()` may be overridden, and `model.train()` would also wake
    the submodules that the user had frozen.
    """
    # TransformerLens 4 keeps the model that it wraps beside its own submodules, not among them
    wholes = (model, getattr(model, "original_model", None))
    training = [module for whole in wholes if whole is not None for module in whole.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def first_tensor(value: Any) -> Tensor | None:
    """The first tensor in a tensor, tuple, list or mapping, however deep."""
    if isinstance(value, Tensor):
        return value
    return next((found for _, part in _parts(value) if (found := first_tensor(part)) is not None), None)


def with_first_tensor(value: Any, tensor: Tensor) -> Any:
    """The same structure with another first tensor; the original is left alone."""
    if isinstance(value, Tensor):
        return tensor
    key, part = next((key, part) for key, part in _parts(value) if first_tensor(part) is not None)
    part = with_first_tensor(part, tensor)
    if isinstance(value, tuple):
        parts = (*value[:key], part, *value[key + 1 :])
        return type(value)(*parts) if hasattr(value, "_fields") else parts
    changed = copy.copy(value)
    changed[key] = part
    return changed


def _parts(value: Any) -> list[tuple[Any, Any]]:
    if isinstance(value, Mapping):
        return list(value.items())
    return list(enumerate(value)) if isinstance(value, tuple | list) else []


def _attach(model: nn.Module, place: Place, tap: Tap, calls: dict[Place, int]) -> RemovableHandle:
    name, side = place

    def pass_through(value: Any) -> Any:
        tensor = first_tensor(value)
        if tensor is None:
            raise SaekitError(
                f"{name}:{side} carries {type(value).__name__} without a tensor in it; "
                "choose a submodule that takes and gives tensors"
            )
        call, calls[place] = calls[place], calls[place] + 1
        changed = tap(call, tensor)
        return None if changed is None else with_first_tensor(value, changed)

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if first_tensor(args) is not None:
            changed = pass_through(args)
            return None if changed is None else (changed, kwargs)
        named = {key: kwargs[key] for key in _STREAM_KEYWORDS if isinstance(kwargs.get(key), Tensor)}
        changed = pass_through(named or kwargs)
        return None if changed is None else (args, {**kwargs, **changed})

    def after(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        return pass_through(output)

    module = model.get_submodule(name)
    if side is Side.INPUT:
        return module.register_forward_pre_hook(before, with_kwargs=True)
    return module.register_forward_hook(after, with_kwargs=True)
