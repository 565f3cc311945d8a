"""Text that somebody else has tokenised: a NumPy file of token ids, `(rows, context)` or one flat stream.

A rectangle is read as it is, row by row. A flat array is cut into rows like text, each opened by BOS unless
told otherwise.
"""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from saekit.activations.tokens import TokenRows, bos_of, pad_of
from saekit.errors import DataError, FileError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SUFFIX = ".npy"


def read_token_file(
    path: Path,
    tokenizer: "PreTrainedTokenizerBase",
    *,
    context: int,
    row_bos: bool = True,
    longest: int | None = None,
    vocabulary: int | None = None,
) -> TokenRows:
    """The rows of an array of token ids.

    BOS and padding are masked, as everywhere; padding stands at the end of a row, and counts as such if the
    tokenizer has a token for it alone.

    Args:
        context: tokens per row of a flat array; a rectangle has its own.
        row_bos: open every row of a flat array with BOS.
        longest: tokens that the model reads at most.
        vocabulary: how many ids the model knows.

    Raises:
        FileError: no such file, or not an array of integers of one or two dimensions.
        DataError: ids that the model does not know, rows longer than it reads, less than one row, or padding
            before the end of a row.
    """
    ids = _load(path)
    if ids.size == 0:
        raise DataError(f"{path} is empty (shape {ids.shape}); save at least one row of token ids")
    lowest, highest = int(ids.min()), int(ids.max())
    known = vocabulary if vocabulary is not None else len(tokenizer)
    if lowest < 0 or highest >= known:
        raise DataError(
            f"{path} holds ids from {lowest:,} to {highest:,}, but the model knows 0 to {known - 1:,}; "
            "tokenise the text with the model's own tokenizer"
        )
    bos = bos_of(tokenizer)
    rows = torch.from_numpy(ids.astype(np.int64))
    if rows.ndim == 1:
        rows = _cut(path, rows, context, opening=bos if row_bos else None)
    if longest is not None and rows.shape[1] > longest:
        raise DataError(
            f"{path} has rows of {rows.shape[1]:,} ids, but the model reads at most {longest:,}; "
            "save shorter rows, or one flat array"
        )
    return TokenRows.from_ids(rows, bos=bos, pad=pad_of(tokenizer)).padded_at_end()


def _load(path: Path) -> np.ndarray:
    if not path.is_file():
        raise FileError(f"no token ids at {path}; give a {SUFFIX} file that exists")
    try:
        with path.open("rb") as file:
            ids = np.lib.format.read_array(file, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise FileError(
            f"cannot read {path} ({' '.join(str(error).split())}); "
            "expected integers saved by numpy.save, all rows of one length"
        ) from error
    if ids.dtype.kind not in "iu" or ids.ndim not in (1, 2):
        raise FileError(
            f"{path} holds {ids.dtype} of shape {ids.shape}; expected integers, (rows, context) or one flat array"
        )
    return ids


def _cut(path: Path, flat: torch.Tensor, context: int, *, opening: int | None) -> torch.Tensor:
    """Rows of `context`; what is left over at the end is dropped."""
    body = context - (opening is not None)
    n_rows = len(flat) // body if body > 0 else 0
    if n_rows == 0:
        raise DataError(
            f"{path} has {len(flat):,} token ids, which is less than one context of {context:,}; "
            "give more text or a smaller context"
        )
    rows = flat[: n_rows * body].view(n_rows, body)
    return rows if opening is None else torch.cat([rows.new_full((n_rows, 1), opening), rows], dim=1)
