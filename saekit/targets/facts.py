"""What can be known of a model without importing the library it comes from."""

from typing import Any

from torch import nn


def comes_from(model: nn.Module, library: str) -> bool:
    """Whether the model's class, or one it inherits from, is defined in that library."""
    return any(cls.__module__.split(".")[0] == library for cls in type(model).__mro__)


def config_number(model: nn.Module, *names: str) -> int | None:
    """The first of these names that the model's config (`config` or `cfg`) holds a positive number under."""
    for config in _configs(model):
        for name in names:
            value = getattr(config, name, None)
            if isinstance(value, int) and value > 0:
                return value
    return None


def _configs(model: nn.Module) -> list[Any]:
    found = [config for config in (getattr(model, "cfg", None), getattr(model, "config", None)) if config is not None]
    # a model of text and images keeps what concerns the text one floor down
    texts = [config.get_text_config() for config in found if hasattr(config, "get_text_config")]
    return [*texts, *found]
