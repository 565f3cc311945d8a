"""Concepts: exact labels for the tokens of Python source, against which features are scored.

Python can be asked what every character of its source is, so features of a model of Python need no
guess, by people or by a language model, about what they mean. The labels come from `tokenize` and
`ast` alone; what they cannot decide (the type of a variable, say) is not a concept here.

What a reader would get wrong:

* Text that does not parse has no labels at all. `ConceptLabels.known` is False there and scores leave it out.
* An f-string is one string: what is between its braces is `string` and `fstring`, never `name` or `call`.
* A token of a language model carries a concept if one of its characters does, white space aside: " self"
  is `self` although its space is not. A token of nothing but white space counts with all its characters,
  and so does every token for the concepts that are about white space.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from saekit.activations.text import Document
from saekit.activations.tokens import NO_SOURCE, TokenRows
from saekit.analysis.python_concepts import (
    BIT,
    CONCEPTS,
    NOTHING,
    WHITE_SPACE_CONCEPTS,
    Concept,
    bits_of_characters,
    codepoints,
)
from saekit.errors import DataError

_WHITE_SPACE_BITS = np.bitwise_or.reduce([BIT[name] for name in WHITE_SPACE_CONCEPTS])
_ASCII_SPACE = " \t\n\r\f\v"


@dataclass(frozen=True, slots=True)
class ConceptLabels:
    """Which concepts each token of some rows carries.

    Attributes:
        concepts: what the bits mean, lowest first.
        bits: `(rows, context)`, one bit a concept; 0 where not known.
        known: `(rows, context)` False for BOS, padding and tokens of text that does not parse.
        skipped: names of the documents in these rows that do not parse.
    """

    concepts: tuple[Concept, ...]
    bits: Int[Tensor, "rows context"]
    known: Bool[Tensor, "rows context"]
    skipped: tuple[str, ...]

    def at(self, rows: Int[Tensor, " n"], positions: Int[Tensor, " n"]) -> Bool[Tensor, "n n_concepts"]:
        """The labels of some tokens; all False where not known."""
        return self._unpack(self.bits[rows, positions])

    def dense(self) -> Bool[Tensor, "rows context n_concepts"]:
        """The labels of all tokens, a byte for each."""
        return self._unpack(self.bits)

    def _unpack(self, bits: Int[Tensor, "*shape"]) -> Bool[Tensor, "*shape n_concepts"]:
        return (bits.unsqueeze(-1) >> torch.arange(len(self.concepts), device=bits.device)).bitwise_and_(1).bool()


def label_tokens(rows: TokenRows, documents: Sequence[Document]) -> ConceptLabels:
    """The concepts of every token of `rows`, which `tokenize_documents` made from `documents`.

    Only documents that occur in `rows` are read. One that does not parse is named in `skipped`.

    Raises:
        DataError: if the documents are not those of `rows`, or the tokenizer gave no character offsets.
    """
    if rows.names != tuple(document.name for document in documents):
        raise DataError(
            f"rows come from {len(rows.names):,} documents; the {len(documents):,} given have other names or another "
            "order; pass the documents that tokenize_documents was given"
        )
    source = rows.source.flatten().numpy()
    starts, ends = rows.offset.flatten().numpy(), rows.end.flatten().numpy()
    if ((source != NO_SOURCE) & (ends < 0)).any():
        raise DataError("these tokens have no character offsets; use a fast tokenizer (tokenizer.json)")
    bits = np.zeros(source.shape, dtype=np.uint64)
    known = np.zeros(source.shape, dtype=bool)
    skipped = []
    order = np.lexsort((starts, source))
    present, first = np.unique(source[order], return_index=True)
    for number, members in zip(present, np.split(order, first[1:]), strict=True):
        if number == NO_SOURCE:
            continue
        document = documents[number]
        try:
            of_character = bits_of_characters(document.text)
        except DataError:
            skipped.append(document.name)
            continue
        bits[members] = bits_of_tokens(document.text, of_character, starts[members], ends[members])
        known[members] = True
    return ConceptLabels(
        concepts=CONCEPTS,
        bits=torch.from_numpy(bits.view(np.int64).reshape(rows.source.shape)),
        known=torch.from_numpy(known.reshape(rows.source.shape)),
        skipped=tuple(skipped),
    )


def label_characters(source: str) -> Bool[np.ndarray, "n_concepts n_chars"]:
    """The concepts of every character, in the order of `CONCEPTS`.

    Raises:
        DataError: if Python does not read `source` as a module.
    """
    bits = bits_of_characters(source)
    return np.stack([(bits & bit) != 0 for bit in BIT.values()])


def bits_of_tokens(source: str, of_character: np.ndarray, starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """One word of bits for each token `[start, end)`, from those of the characters.

    Fastest when starts ascend, since the gaps are read too.
    """
    is_content = ~np.isin(codepoints(source), [ord(space) for space in _ASCII_SPACE])
    borders = np.stack([starts, ends], axis=1).flatten()

    def union(values: np.ndarray) -> np.ndarray:
        padded = np.append(values, values.dtype.type(0))  # an end may be one past the last character
        return np.where(starts < ends, np.bitwise_or.reduceat(padded, borders)[::2], values.dtype.type(0))

    of_all = union(of_character)
    of_content = union(np.where(is_content, of_character, NOTHING))
    has_content = union(is_content.view(np.uint8)) > 0
    return np.where(has_content, of_content | (of_all & _WHITE_SPACE_BITS), of_all)
