"""From the name of a text to the rows that training reads and the rows that it never sees."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from saekit.activations.text import Document, read_documents, split_documents
from saekit.activations.token_file import SUFFIX, read_token_file
from saekit.activations.tokens import TokenRows, tokenize_documents
from saekit.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class Corpus:
    """A text, tokenised and divided.

    Attributes:
        train: rows for training.
        held_out: rows for evaluation.
        train_documents: what `train.source` counts.
        held_out_documents: what `held_out.source` counts.
    """

    train: TokenRows
    held_out: TokenRows
    train_documents: tuple[Document, ...]
    held_out_documents: tuple[Document, ...]


def load_rows(
    text: str,
    tokenizer: "PreTrainedTokenizerBase",
    *,
    context: int,
    row_bos: bool = True,
    max_documents: int | None = None,
    longest: int | None = None,
    vocabulary: int | None = None,
    most_rows: int | None = None,
) -> tuple[TokenRows, tuple[Document, ...]]:
    """All of a text as rows, and what their `source` counts.

    A text may also be a file of token ids (`saekit.activations.token_file`), which has no documents.

    Args:
        longest, vocabulary: what the model can read, against which a file of token ids is checked.
        most_rows: stop reading once documents fill as many; there may be some more.

    Raises:
        SaekitError: if it cannot be read, or does not fill one row.
    """
    if not text.endswith(SUFFIX):
        reading = {} if most_rows is None else {"is_enough": _until(tokenizer, tokens=most_rows * context)}
        documents = tuple(read_documents(text, limit=max_documents, **reading))
        return tokenize_documents(documents, tokenizer, context=context, row_bos=row_bos), documents
    if max_documents is not None:
        raise DataError(f"max_documents={max_documents}, but {text} has rows of ids, not documents; leave it out")
    path = Path(text).expanduser()
    rows = read_token_file(path, tokenizer, context=context, row_bos=row_bos, longest=longest, vocabulary=vocabulary)
    return rows, ()


def _until(tokenizer: "PreTrainedTokenizerBase", *, tokens: int) -> Callable[[Document], bool]:
    """Whether the documents shown so far have that many tokens."""
    left = tokens

    def is_enough(document: Document) -> bool:
        nonlocal left
        left -= len(tokenizer(document.text, add_special_tokens=False, verbose=False).input_ids)
        return left <= 0

    return is_enough


def load_corpus(
    text: str,
    tokenizer: "PreTrainedTokenizerBase",
    *,
    context: int,
    held_out_rows: int = 160,
    row_bos: bool = True,
    max_documents: int | None = None,
    longest: int | None = None,
    vocabulary: int | None = None,
) -> Corpus:
    """Read, tokenise and divide a text.

    The standard library is divided by whole modules, as it was for training the bundled model; the rows
    of the modules set aside come in an order drawn once and for all, so that the first few are a fair
    sample. Any other text gives up its last `held_out_rows` rows.

    Args:
        longest, vocabulary: what the model can read, against which a file of token ids is checked.

    Raises:
        DataError: if nothing is left to train on.
    """
    if text == "stdlib":
        train_documents, held_out_documents = split_documents(read_documents(text, limit=max_documents))
        if max_documents is not None and not (train_documents and held_out_documents):
            raise DataError(
                f"max_documents={max_documents}: whole modules of the standard library are held out, and of the first "
                f"{max_documents:,} {'none is' if train_documents else 'all are'}; give more"
            )
        train = tokenize_documents(train_documents, tokenizer, context=context, row_bos=row_bos)
        held_out = tokenize_documents(held_out_documents, tokenizer, context=context, row_bos=row_bos)
        drawn = torch.randperm(len(held_out), generator=torch.Generator().manual_seed(0))
        return Corpus(train, held_out.select(drawn), tuple(train_documents), tuple(held_out_documents))
    rows, documents = load_rows(
        text,
        tokenizer,
        context=context,
        row_bos=row_bos,
        max_documents=max_documents,
        longest=longest,
        vocabulary=vocabulary,
    )
    n_train = len(rows) - held_out_rows
    if n_train < 1:
        raise DataError(
            f"{text} has {len(rows):,} rows of {rows.context} tokens, and {held_out_rows:,} are to be held out; "
            "give more text, a smaller context or fewer held-out rows"
        )
    return Corpus(rows.select(slice(n_train)), rows.select(slice(n_train, None)), documents, documents)
