"""Causal language models from the bundled folder, from any local folder, or from the Hub."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from saekit.errors import FileError
from saekit.targets.quiet import quiet_hub

ASSETS = Path(__file__).resolve().parent.parent / "assets"
BUNDLED = ("pystd",)


def load_language_model(name: str, *, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, Any]:
    """The model, in eval mode on the CPU, and its tokenizer.

    Raises:
        FileError: no such folder or name, or files that are missing, truncated or do not fit together.
    """
    source = _source(name)
    from transformers import AutoModelForCausalLM, AutoTokenizer  # heavy, and only for models from disk

    try:
        with _no_bars(), quiet_hub():
            loaded: Any = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, output_loading_info=True)
            model, report = loaded
            tokenizer = AutoTokenizer.from_pretrained(source)
    except SafetensorError as error:
        raise FileError(
            f"the weights of {name} are truncated or corrupt ({error}); fetch or save them again"
        ) from error
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, ImportError) as error:
        raise FileError(
            f"cannot load {name!r} as a language model: {first_line(error)}; give 'pystd', a folder that "
            "save_pretrained wrote (model and tokenizer), or a model's name on the Hub with a network to fetch it"
        ) from error
    # the library would fill what is missing with random numbers and go on
    for problem in ("missing_keys", "mismatched_keys"):
        if report[problem]:
            several = ", ".join(sorted(map(str, report[problem]))[:3])
            raise FileError(
                f"the weights of {name} do not fit its config.json ({problem.replace('_', ' ')}: {several}); "
                "save model and config together again"
            )
    return model.eval(), tokenizer


@contextmanager
def _no_bars() -> Iterator[None]:
    """No bar for reading weights from disk, which takes no time; the user's own setting comes back afterwards."""
    from transformers.utils import logging

    was_enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_enabled:
            logging.enable_progress_bar()


def _source(name: str) -> str:
    folder = ASSETS / name if name in BUNDLED else Path(name).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise FileError(f"{folder} has no config.json; give a folder that save_pretrained wrote")
        return str(folder)
    if folder.exists() or name in BUNDLED or name.startswith((".", "/", "~")):
        raise FileError(f"no model folder at {folder}; give one that holds config.json, or a model's name on the Hub")
    return name


def first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200].rstrip(".") if lines else type(error).__name__
