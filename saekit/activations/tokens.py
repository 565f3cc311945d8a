"""Text as a model reads it: rows of token ids, each opened by BOS, with the way back to the characters.

`TokenRows` is one rectangle. Documents are encoded one by one, joined by BOS, and cut into rows that
(unless told otherwise) each open with BOS. `document` and `position` address a token for the rest of
saekit: the row the model saw, and the place in it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from saekit.activations.text import Document
from saekit.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NO_SOURCE = -1


@dataclass(frozen=True, slots=True)
class TokenRows:
    """Token ids ready for a model, and where each came from.

    Attributes:
        ids: `(rows, context)` token ids.
        source: `(rows, context)` index into `names`, or -1 for BOS and padding.
        offset: `(rows, context)` first character of the token in its source, or -1.
        end: `(rows, context)` the character after its last, or -1. A character of several bytes may be
            spread over several tokens; all of them span it, so neighbours can overlap by one character.
        names: what each source is called.
        bos: the id that opens rows and separates documents, or None if the tokenizer has none.
        pad: the id that fills rows up, or None if every row is full.
    """

    ids: Int[Tensor, "rows context"]
    source: Int[Tensor, "rows context"]
    offset: Int[Tensor, "rows context"]
    end: Int[Tensor, "rows context"]
    names: tuple[str, ...]
    bos: int | None
    pad: int | None = None

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def context(self) -> int:
        return self.ids.shape[1]

    def select(self, rows: Tensor | slice) -> "TokenRows":
        """The same rows, fewer or in another order."""
        return replace(self, ids=self.ids[rows], source=self.source[rows], offset=self.offset[rows], end=self.end[rows])

    def padded_at_end(self) -> "TokenRows":
        """Self.

        Raises:
            DataError: padding with a token behind it, which would attend to it: models run without attention masks.
        """
        if self.pad is None or self.pad == self.bos:  # BOS stands anywhere
            return self
        is_pad = self.ids == self.pad
        early = (is_pad[:, :-1] & ~is_pad[:, 1:]).nonzero()
        if len(early):
            row, position = early[0].tolist()
            raise DataError(
                f"row {row:,} has padding (id {self.pad}) at position {position:,} and a token behind it, which would "
                "attend to it; put the padding at the end of each row"
            )
        return self

    @classmethod
    def from_ids(
        cls, ids: Int[Tensor, "rows context"], *, bos: int | None = None, pad: int | None = None
    ) -> "TokenRows":
        """Rows that somebody else tokenised; they have no text behind them."""
        nowhere = torch.full_like(ids, NO_SOURCE)
        return cls(ids=ids, source=nowhere, offset=nowhere, end=nowhere, names=(), bos=bos, pad=pad)


def tokenize_documents(
    documents: Sequence[Document], tokenizer: "PreTrainedTokenizerBase", *, context: int, row_bos: bool = True
) -> TokenRows:
    """Encode, join by BOS, cut into rows of `context` tokens.

    What is left over at the end is shorter than a row and is dropped.

    Args:
        row_bos: open every row with BOS, so that models with an attention sink find it. False cuts the
            stream as it is, which suits models trained that way (llama2.c's stories, for example).

    Raises:
        DataError: if all documents together are shorter than one row, or a row holds nothing but BOS.
    """
    bos = bos_of(tokenizer)
    opens = row_bos and bos is not None
    body = context - opens
    if body < 1:
        raise DataError(f"a context of {context} has no room for text; give at least {1 + opens}")
    ids, source, offset, end = _encode(documents, tokenizer, lead_first=not opens)
    n_rows = len(ids) // body
    if n_rows == 0:
        raise DataError(
            f"the text has {len(ids):,} tokens, which is less than one context of {context}; "
            "give more text or a smaller context"
        )

    def as_rows(flat: np.ndarray, first: int) -> Tensor:
        rows = torch.from_numpy(flat[: n_rows * body].reshape(n_rows, body))
        if not opens:
            return rows
        return torch.cat([torch.full((n_rows, 1), first, dtype=rows.dtype), rows], dim=1)

    return TokenRows(
        ids=as_rows(ids, bos if bos is not None else 0),
        source=as_rows(source, NO_SOURCE),
        offset=as_rows(offset, NO_SOURCE),
        end=as_rows(end, NO_SOURCE),
        names=tuple(document.name for document in documents),
        bos=bos,
    )


def bos_of(tokenizer: "PreTrainedTokenizerBase") -> int | None:
    """The id that opens a text, or None if the tokenizer has none."""
    return None if tokenizer.bos_token_id is None else int(tokenizer.bos_token_id)  # pyright: ignore[reportArgumentType]


def pad_of(tokenizer: "PreTrainedTokenizerBase") -> int | None:
    """The id that fills rows up; None if the tokenizer has none, or texts use it too: as BOS, end or unknown word."""
    pad = tokenizer.pad_token_id
    if pad is None or pad in (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id):
        return None
    return int(pad)  # pyright: ignore[reportArgumentType]


def _encode(
    documents: Sequence[Document], tokenizer: "PreTrainedTokenizerBase", *, lead_first: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """One long stream of (id, source, offset, end), BOS between documents and, if asked, before the first."""
    bos = bos_of(tokenizer)
    separator = [] if bos is None else [bos]
    if not documents:
        raise DataError("there are no documents to tokenise; give a text with something in it")
    ids, sources, spans = [], [], []
    encodings = tokenizer(
        [document.text for document in documents],
        add_special_tokens=False,
        return_offsets_mapping=bool(tokenizer.is_fast),
        return_attention_mask=False,
        verbose=False,
    )
    for number, encoded in enumerate(encodings["input_ids"]):
        known = encodings["offset_mapping"][number] if tokenizer.is_fast else [(NO_SOURCE, NO_SOURCE)] * len(encoded)
        lead = separator if number or lead_first else []
        ids.append(np.array([*lead, *encoded], dtype=np.int64))
        sources.append(np.array([NO_SOURCE] * len(lead) + [number] * len(encoded), dtype=np.int64))
        spans.append(np.array([(NO_SOURCE, NO_SOURCE)] * len(lead) + known, dtype=np.int64).reshape(-1, 2))
    offset, end = np.concatenate(spans).T
    return np.concatenate(ids), np.concatenate(sources), offset.copy(), end.copy()
