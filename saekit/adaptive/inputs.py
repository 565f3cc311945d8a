"""What a user types after `saekit adaptive trace`: an image or a text, as the model wants it."""

from functools import cache
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from saekit.adaptive.a_vit import AViT
from saekit.adaptive.digits import MEAN, SPREAD, load_digits
from saekit.adaptive.duo_llm import DuoLLM
from saekit.adaptive.saved import Saved
from saekit.errors import DataError, FileError
from saekit.targets import Target


def read_input(saved: Saved, text: str) -> Tensor:
    """A batch of one.

    For A-ViT the number of a digit of the test set ("17"), or an image file, bright on dark; for Duo-LLM a text, or
    the path of a file that holds one; for AdaTape symbols, as in "1-0110"; for RIN the digit to make.

    Raises:
        DataError: nothing to read in it.
        FileError: a file that is not there or cannot be read.
    """
    if saved.kind == "a-vit":
        model = cast(AViT, saved.model)
        return read_image(text, model.config.image, seed=int(saved.recipe.get("seed", 0)))
    if saved.kind == "rin":
        return read_label(text)
    if saved.kind == "adatape":
        return read_symbols(text)
    return read_text(text, cast(DuoLLM, saved.model).config.context)


def read_image(text: str, side: int, *, seed: int = 0) -> Float[Tensor, "1 1 side side"]:
    """One image, square, grey, resized and normalised; or a test digit as it is."""
    if text.isdecimal():
        digits = load_digits(seed)
        if int(text) >= len(digits.test):
            raise DataError(f"there is no test digit {text}; give 0 to {len(digits.test) - 1}, or an image file")
        return digits.test_images(side)[int(text)][None]
    grey = _pixels(Path(text).expanduser())
    if grey.ndim != 2 or min(grey.shape) < 2 or not bool(grey.isfinite().all()):
        raise DataError(
            f"{text} has shape {tuple(grey.shape)}; give one grey picture (height, width) of finite numbers"
        )
    if grey.shape[0] != grey.shape[1]:
        raise DataError(f"{text} is {grey.shape[0]} x {grey.shape[1]} pixels; crop or pad it to a square")
    low, high = grey.min(), grey.max()
    if low == high:
        raise DataError(f"{text} is of one colour; give a picture with something on it")
    resized = torch.nn.functional.interpolate(
        ((grey - low) / (high - low))[None, None], size=(side, side), mode="bilinear", antialias=True
    )
    return (resized - MEAN) / SPREAD


def read_text(text: str, context: int) -> Int[Tensor, "1 tokens"]:
    """The first tokens of a text, in pystd's tokens, behind BOS."""
    return torch.tensor([encode_text(text)[:context]])


def encode_text(text: str) -> list[int]:
    """All of them."""
    path = Path(text)
    if _is_file(path):
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise FileError(
                f"cannot read {path} as UTF-8 text ({error}); convert it, or give the text itself"
            ) from error
    if not text.strip():
        raise DataError("the text is empty; give at least a word")
    return pystd_tokenizer()(text)["input_ids"]


@cache
def pystd_tokenizer() -> Any:
    """What Duo-LLM reads with; loaded once."""
    return Target.load("pystd").tokenizer


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # a text that no file could be called
        return False


def read_symbols(text: str) -> Float[Tensor, "1 length"]:
    """A sequence as "10-1", one character each, or as "1 0 -1 1", divided by spaces or commas."""
    parts = text.replace(",", " ").split()
    symbols = parts if len(parts) > 1 else ["-1" if sign == "-" else sign for sign in text.strip()]
    if not symbols or set(symbols) - {"1", "0", "-1"}:
        raise DataError(f"{text!r} is no sequence of symbols; give 1, 0 and -, as in 1-0110")
    return torch.tensor([[float(symbol) for symbol in symbols]])


def read_label(text: str) -> Int[Tensor, "1"]:
    """A digit to make."""
    if not text.isdecimal() or int(text) > 9:
        raise DataError(f"{text!r} is no digit to make; give 0 to 9")
    return torch.tensor([int(text)])


def _pixels(path: Path) -> Float[Tensor, "..."]:
    if not path.is_file():
        raise FileError(f"no image at {path}; give a file, or the number of a test digit")
    try:
        if path.suffix == ".npy":
            return torch.from_numpy(np.load(path, allow_pickle=False)).float()
        from PIL import Image  # pyright: ignore[reportMissingImports]  optional, for pictures of one's own

        return torch.from_numpy(np.asarray(Image.open(path).convert("L"), dtype=np.float32))
    except ImportError as error:
        raise FileError(
            f"reading {path.suffix} takes Pillow, which is not installed; pip install pillow, or give a .npy array"
        ) from error
    except (OSError, ValueError, TypeError) as error:
        raise FileError(f"cannot read {path} as an image ({error}); give a PNG, JPEG or .npy file") from error
