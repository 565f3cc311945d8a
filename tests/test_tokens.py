"""Rows of token ids and the way back to the characters."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

from saekit.activations.text import Document
from saekit.activations.tokens import NO_SOURCE, TokenRows, tokenize_documents
from saekit.errors import DataError
from saekit.training.pretrain import train_tokenizer

TEXTS = ["def add(a, b):\n    return a + b\n" * 3, "the three words return the words", "x"]
CORPUS = [Document(f"text {number}", text) for number, text in enumerate(TEXTS)]
ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(CORPUS, 300, context=16)


@pytest.fixture(scope="module")
def without_bos() -> PreTrainedTokenizerFast:
    """One token per letter, and no special tokens at all."""
    letters = Tokenizer(models.BPE({letter: i for i, letter in enumerate("abcdefgh")}, []))
    letters.normalizer, letters.decoder = normalizers.Lowercase(), decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=letters)


def plain_stream(tokenizer, documents: list[Document]) -> list[int]:
    """BOS and document, one after the other."""
    ids = []
    for document in documents:
        ids += [tokenizer.bos_token_id, *tokenizer(document.text, add_special_tokens=False)["input_ids"]]
    return ids


@pytest.mark.parametrize("context", [2, 7, 16])
def test_every_row_opens_with_bos_and_holds_the_stream_between(tokenizer, context):
    rows = tokenize_documents(CORPUS, tokenizer, context=context)
    bos = tokenizer.bos_token_id
    stream = plain_stream(tokenizer, CORPUS)[1:]  # the first row's BOS is the first document's
    n_rows = len(stream) // (context - 1)
    assert (rows.bos, rows.pad, rows.context, len(rows)) == (bos, None, context, n_rows)
    assert (rows.ids[:, 0] == bos).all()
    assert rows.ids[:, 1:].flatten().tolist() == stream[: n_rows * (context - 1)]


@pytest.mark.parametrize("context", [1, 7, 16])
def test_without_row_bos_the_stream_is_cut_as_it_is(tokenizer, context):
    rows = tokenize_documents(CORPUS, tokenizer, context=context, row_bos=False)
    stream = plain_stream(tokenizer, CORPUS)
    assert rows.ids.flatten().tolist() == stream[: len(stream) // context * context]


def test_a_tokenizer_without_bos_gives_the_plain_stream(without_bos):
    documents = [Document("one", "abc"), Document("two", "dEf")]
    for row_bos in (True, False):
        rows = tokenize_documents(documents, without_bos, context=2, row_bos=row_bos)
        assert rows.ids.tolist() == [[0, 1], [2, 3], [4, 5]]
        assert rows.source.tolist() == [[0, 0], [0, 1], [1, 1]]
        assert rows.bos is None


@pytest.mark.parametrize("row_bos", [True, False])
@settings(max_examples=60, deadline=None)
@given(texts=st.lists(ANY_TEXT, min_size=1, max_size=5))
def test_spans_address_the_characters_that_each_token_stands_for(tokenizer, row_bos, texts):
    documents = [Document(f"d{i}", text) for i, text in enumerate([*texts, "x" * 8])]
    rows = tokenize_documents(documents, tokenizer, context=4, row_bos=row_bos)
    assert rows.names == tuple(document.name for document in documents)
    is_bos = rows.ids == rows.bos
    for place in (rows.source, rows.offset, rows.end):
        assert ((place == NO_SOURCE) == is_bos).all()
    columns = (t[~is_bos].tolist() for t in (rows.ids, rows.source, rows.offset, rows.end))
    for token, source, offset, end in zip(*columns, strict=True):
        spanned = documents[source].text[offset:end]
        assert tokenizer.backend_tokenizer.id_to_token(token) in byte_level(spanned)


def byte_level(text: str) -> str:
    """How a byte-level BPE writes `text`: one printable character per byte of UTF-8."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    table = {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}
    return "".join(table[byte] for byte in text.encode())


def test_spans_of_plain_text_are_exactly_the_tokens(tokenizer):
    rows = tokenize_documents(CORPUS, tokenizer, context=8)
    for row in range(len(rows)):
        for place in range(1, 8):
            if rows.ids[row, place] != rows.bos:
                source, offset, end = (int(t[row, place]) for t in (rows.source, rows.offset, rows.end))
                assert CORPUS[source].text[offset:end] == tokenizer.decode([int(rows.ids[row, place])])


def test_neighbouring_tokens_of_one_character_all_span_it(tokenizer):
    rows = tokenize_documents([Document("k", "a猫")], tokenizer, context=5, row_bos=False)
    assert rows.offset.tolist() == [[NO_SOURCE, 0, 1, 1, 1]]
    assert rows.end.tolist() == [[NO_SOURCE, 1, 2, 2, 2]]


def test_bos_between_documents_belongs_to_none(tokenizer):
    rows = tokenize_documents([Document("a", "ab"), Document("b", "cd")], tokenizer, context=6, row_bos=False)
    assert rows.ids[0].tolist() == plain_stream(tokenizer, [Document("a", "ab"), Document("b", "cd")])
    assert rows.source[0].tolist() == [-1, 0, 0, -1, 1, 1]


def test_a_text_shorter_than_a_row_is_refused_with_both_numbers(tokenizer):
    with pytest.raises(DataError, match="the text has 5 tokens, which is less than one context of 16; give more"):
        tokenize_documents([Document("a", "é12;")], tokenizer, context=16)


def test_no_document_and_no_room_are_refused(tokenizer):
    with pytest.raises(DataError, match="there are no documents to tokenise; give a text"):
        tokenize_documents([], tokenizer, context=4)
    with pytest.raises(DataError, match="a context of 1 has no room for text; give at least 2"):
        tokenize_documents(CORPUS, tokenizer, context=1)


def test_select_takes_rows_with_everything_they_know(tokenizer):
    rows = tokenize_documents(CORPUS, tokenizer, context=4)
    chosen = rows.select(torch.tensor([3, 0]))
    for name in ("ids", "source", "offset", "end"):
        assert torch.equal(getattr(chosen, name), getattr(rows, name)[[3, 0]])
    assert (len(rows.select(slice(2))), chosen.names, chosen.bos) == (2, rows.names, rows.bos)


def test_ids_that_somebody_else_made_have_no_source():
    ids = torch.arange(6).view(2, 3)
    rows = TokenRows.from_ids(ids, bos=5, pad=0)
    assert torch.equal(rows.ids, ids)
    assert (rows.source == NO_SOURCE).all() and (rows.offset == NO_SOURCE).all() and (rows.end == NO_SOURCE).all()
    assert (rows.names, rows.bos, rows.pad, rows.context) == ((), 5, 0, 3)
