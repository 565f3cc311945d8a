"""Labels against `tokenize`, `ast` and the tokenizer on every module of the standard library, and scores by hand."""

import ast
import gc
import io
import keyword
import sysconfig
import tokenize
import unicodedata
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from saekit.activations.text import Document
from saekit.activations.tokens import TokenRows, tokenize_documents
from saekit.analysis.concept_scores import count_concepts
from saekit.analysis.concepts import CONCEPTS, ConceptLabels, bits_of_tokens, label_characters, label_tokens
from saekit.analysis.python_concepts import BIT, WHITE_SPACE_CONCEPTS, bits_of_characters
from saekit.codes import SparseCodes
from saekit.errors import DataError, ShapeError
from saekit.training.pretrain import train_tokenizer

ALL_BITS = np.bitwise_or.reduce(list(BIT.values()))
WHITE_SPACE_BITS = np.bitwise_or.reduce([BIT[name] for name in WHITE_SPACE_CONCEPTS])


def texts_of_library() -> Iterator[Document]:
    """Every file that Python can decode, the library's own tests, tables and broken examples included."""
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        if "site-packages" in path.relative_to(root).parts:
            continue
        try:
            with tokenize.open(path) as file:
                yield Document(path.relative_to(root).as_posix(), file.read())
        except (SyntaxError, UnicodeDecodeError):
            continue


class Library(list[tuple[Document, np.ndarray]]):
    """Texts and the bits of their characters; too long for the report of a failed test."""

    def __repr__(self) -> str:
        return f"<{len(self)} labelled texts>"


@pytest.fixture(scope="module")
def library() -> Iterator[Library]:
    """Every text that labels exist for, with them."""
    gc.freeze()  # parsing makes millions of objects, and each collection would walk all of torch
    labelled = Library()
    for document in texts_of_library():
        try:
            labelled.append((document, bits_of_characters(document.text)))
        except DataError:
            assert not is_readable(document.text), document.name
    assert len(labelled) > 500
    yield labelled
    gc.unfreeze()


@pytest.fixture(scope="module")
def tokenizer(library):
    return train_tokenizer([document for document, _ in library[::20]], 1000, 64)


def is_readable(text: str) -> bool:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            ast.parse(text)
            tokens = list(tokenize.generate_tokens(io.StringIO(text).readline))
        except (SyntaxError, ValueError, tokenize.TokenError):
            return False
    return all(token.type != tokenize.ERRORTOKEN for token in tokens)


def texts_of(source: str, bits: np.ndarray, name: str) -> list[str]:
    """The stretches of `source` that carry a concept."""
    carries = np.concatenate([[False], (bits & BIT[name]) != 0, [False]])
    starts, ends = (carries[1:] & ~carries[:-1]).nonzero()[0], (carries[:-1] & ~carries[1:]).nonzero()[0]
    return [source[start:end] for start, end in zip(starts, ends, strict=True)]


def labelled(source: str) -> dict[str, list[str]]:
    bits = bits_of_characters(source)
    return {concept.name: texts_of(source, bits, concept.name) for concept in CONCEPTS}


# --- every module -----------------------------------------------------------------------------------------------------


def test_tokens_cover_every_module_and_carry_exactly_the_concepts_of_their_characters(library, tokenizer):
    for document, bits in library:
        text = document.text
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        spans = np.array(encoded["offset_mapping"], dtype=np.int64).reshape(-1, 2)
        starts, ends = spans.T
        if len(spans) == 0:
            assert text == ""
            continue
        assert (starts[0], ends[-1]) == (0, len(text)), document.name
        shared = starts[1:] != ends[:-1]  # bytes of one character in several tokens
        assert (starts[1:][shared] == ends[:-1][shared] - 1).all(), document.name
        assert all(not text[place].isascii() for place in starts[1:][shared]), document.name

        words = bits_of_tokens(text, bits, starts, ends)
        content = ~np.isin(np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32), list(map(ord, " \t\n\r\f\v")))
        of_tokens, of_text, of_content = np.zeros_like(bits), np.zeros_like(words), np.zeros_like(words)
        token, at = np.arange(len(words)), starts  # tokens that reach this far, and their character there
        while len(token):
            np.bitwise_or.at(of_tokens, at, words[token])
            of_text[token] |= bits[at]
            of_content[token] |= np.where(content[at], bits[at], np.uint64(0))
            reaches = at + 1 < ends[token]
            token, at = token[reaches], at[reaches] + 1
        uncovered = bits & ~of_tokens
        assert not uncovered[content].any(), document.name
        assert not (uncovered & WHITE_SPACE_BITS).any(), document.name
        assert not (words & ~of_text).any(), document.name
        has_content = np.bitwise_or.reduceat(np.append(content, False), spans.flatten())[::2]
        assert not (words & ~of_content & ~WHITE_SPACE_BITS)[has_content].any(), document.name


def test_concepts_are_those_that_tokenize_sees_in_every_module(library):
    for document, bits in library:
        seen: dict[str, list[str]] = {"keyword": [], "number": [], "comment": []}
        characters = Counter()
        depth = 0  # of f-strings, which are tokens of their own before Python 3.12 and many tokens since
        for token in tokenize.generate_tokens(io.StringIO(document.text).readline):
            kind = tokenize.tok_name[token.type]
            depth += (kind == "FSTRING_START") - (kind == "FSTRING_END")
            if depth or kind == "FSTRING_END":
                characters["fstring"] += 1
            elif token.type == tokenize.NAME and keyword.iskeyword(token.string):
                seen["keyword"].append(token.string)
            elif token.type == tokenize.NAME:
                characters["name"] += len(token.string)
            elif token.type == tokenize.NUMBER:
                seen["number"].append(token.string)
            elif token.type == tokenize.COMMENT:
                seen["comment"].append(token.string)
            elif token.type == tokenize.STRING:
                characters["string"] += len(token.string)
            elif token.type == tokenize.NEWLINE:
                characters["newline"] += len(token.string)
            elif token.type == tokenize.NL:
                characters["line_break"] += len(token.string)
        soft = [text for text in texts_of(document.text, bits, "keyword") if not keyword.iskeyword(text)]
        characters["name"] -= sum(map(len, soft))
        assert set(soft) <= {"match", "case", "type"}, document.name
        for name, strings in seen.items():
            found = texts_of(document.text, bits, name)
            assert [text for text in found if name != "keyword" or text not in soft] == strings, (document.name, name)
        if characters["fstring"]:
            del characters["string"], characters["fstring"]
        for name in characters:
            assert np.count_nonzero(bits & BIT[name]) == characters[name], (document.name, name)


def names_in_tree(tree: ast.AST) -> dict[str, list[str]]:
    """What the syntax tree calls callee, attribute and so on, outside f-strings."""
    found: dict[str, list[str]] = {name: [] for name in ("call_name", "attribute", "after_self", "parameter")}
    found |= {name: [] for name in ("argument_keyword", "function_name", "class_name", "docstring")}
    found |= {name: [] for name in ("return_statement", "raise_statement")}
    stack = [tree]
    while stack:
        node = stack.pop()
        if isinstance(node, ast.JoinedStr):
            continue
        stack.extend(ast.iter_child_nodes(node))
        match node:
            case ast.Call(func=ast.Name(id=name) | ast.Attribute(attr=name)):
                found["call_name"].append(name)
            case ast.arg():
                found["parameter"].append(node.arg)
            case ast.keyword(arg=str(name)):
                found["argument_keyword"].append(name)
            case ast.Attribute():
                found["attribute"].append(node.attr)
                if isinstance(node.value, ast.Name) and node.value.id == "self":
                    found["after_self"].append(node.attr)
            case ast.FunctionDef() | ast.AsyncFunctionDef():
                found["function_name"].append(node.name)
            case ast.ClassDef():
                found["class_name"].append(node.name)
            case ast.Return():
                found["return_statement"].append("")
            case ast.Raise():
                found["raise_statement"].append("")
        has_body = isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        if has_body and (text := ast.get_docstring(node, clean=False)) is not None:
            found["docstring"].append(text)
    return found


def test_concepts_are_those_that_the_syntax_tree_has_in_every_module(library):
    for document, bits in library:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            expected = names_in_tree(ast.parse(document.text))
            for name, strings in expected.items():
                found = texts_of(document.text, bits, name)
                if name == "docstring":
                    found = [ast.literal_eval(text) for text in found]
                elif name.endswith("statement"):
                    assert {text.split()[0].split("(")[0] for text in found} <= {name.removesuffix("_statement")}
                    found = [""] * len(found)
                else:
                    found = [unicodedata.normalize("NFKC", text) for text in found]
                assert Counter(found) == Counter(strings), (document.name, name)


# --- single cases -----------------------------------------------------------------------------------------------------

EXAMPLE = '''
"""Doc."""
import os.path as p
from . import x

@dec(1)
class Foo(Bar, metaclass=M):
    """D."""
    @property
    def f(self, a: int = 0x1F, *args) -> str:
        for i in range(10):
            self.y[i] = g(a.b(1.5), k=[n for n in x if n < 3])
        try:
            return f"a{self.y!r}" + b'e'  # tail
        except ValueError:
            raise
    # after

match x:
    case (1): pass
'''


def test_an_example_is_labelled_as_a_reader_would():
    found = labelled(EXAMPLE)
    keywords = "import as from import class def for in for in if try return except raise match case pass"
    assert " ".join(found["keyword"]) == keywords
    assert found["string"] == ['"""Doc."""', '"""D."""', 'f"a{self.y!r}"', "b'e'"]
    assert found["docstring"] == ['"""Doc."""', '"""D."""']
    assert found["fstring"] == ['f"a{self.y!r}"'] and found["bytes"] == ["b'e'"]
    assert found["string_open"] == ['"""', '"""', 'f"', "b'"] and found["string_close"] == ['"""', '"""', '"', "'"]
    assert found["number"] == ["1", "0x1F", "10", "1.5", "3", "1"]
    assert found["hexadecimal"] == ["0x1F"] and found["float"] == ["1.5"]
    assert found["imported_name"] == ["os", "path", "x"]
    assert found["import_statement"] == ["import os.path as p", "from . import x"]
    assert found["decorator"] == ["@dec(1)", "@property"]
    assert found["class_name"] == ["Foo"] and found["function_name"] == ["f"]
    assert found["parameter"] == ["self", "a", "args"] and found["argument_keyword"] == ["metaclass", "k"]
    assert found["annotation"] == ["int", "str"] and found["parameter_default"] == ["0x1F"]
    assert found["call_name"] == ["dec", "range", "g", "b"]
    assert found["call_arguments"] == ["1", "10", "a.b(1.5), k=[n for n in x if n < 3]"]
    assert found["self"] == ["self", "self"] and found["after_self"] == ["y"] and found["attribute"] == ["y", "b"]
    assert found["builtin"] == ["property", "int", "str", "range", "ValueError"]
    assert found["exception_name"] == ["ValueError"] and found["camel_case"] == ["Foo", "Bar", "ValueError"]
    assert found["comparison"] == ["n < 3"] and found["comprehension"] == ["[n for n in x if n < 3]"]
    assert found["brackets_2"] == ["1.5", "n for n in x if n < 3"]
    assert found["loop_body"] == ["self.y[i] = g(a.b(1.5), k=[n for n in x if n < 3])"]
    assert found["try_body"] == ["return f\"a{self.y!r}\" + b'e'"]
    assert [text.split()[0] for text in found["indent_3"]] == ["self.y[i]", "return", "raise"]
    assert found["indentation"] == [" " * n for n in (4, 4, 4, 8, 12, 8, 12, 8, 12, 4)]
    assert "# after" not in found["indent_1"][0] and found["comment"] == ["# tail", "# after"]
    assert found["class_body"][0].startswith('"""D."""') and found["class_body"][0].endswith("raise")
    assert found["line_break"] == ["\n", "\n", "\n\n"]


def test_names_are_told_apart_by_their_form():
    found = labelled("__init__, _a, __b, MAX_1, X, fooBar, FooBar, _Foo = 0o17, 0b1, 1e3, 2j, 1_0, -1, True, None\n")
    assert found["dunder"] == ["__init__"] and found["private_name"] == ["_a", "_Foo"]
    assert found["constant_name"] == ["MAX_1"] and found["camel_case"] == ["FooBar", "_Foo"]
    assert found["octal_or_binary"] == ["0o17", "0b1"] and found["float"] == ["1e3", "2j"]
    assert found["constant"] == ["True", "None"] and found["name"][-1] == "_Foo"


def test_only_an_attribute_of_self_itself_is_behind_self():
    assert labelled("self.a.b = x.self.c = self.\\\n d(myself.e)\n")["after_self"] == ["a", "d"]


def test_a_builtin_is_one_only_where_a_plain_name_stands():
    found = labelled("def list(dict): x.print(input=len, y=print)\nfrom a import open\n")
    assert found["builtin"] == ["len", "print"]


def test_a_body_that_begins_with_a_decorator_begins_at_its_sign():
    found = labelled("class A:\n    @ (d)\n    def f(self): return 1\n")
    assert found["class_body"] == ["@ (d)\n    def f(self): return 1"] and found["decorator"] == ["@ (d)"]


def test_arguments_are_found_behind_brackets_comments_and_line_breaks():
    found = labelled("((f)  # (no\n )(a(1), (2)) if (x)[0](y) else g\\\n(z)\n")
    assert found["call_name"] == ["f", "a", "g"]
    assert found["call_arguments"] == ["a(1), (2)", "y", "z"]


def test_keywords_of_match_statements_only_open_them():
    found = labelled("match = case = 1\nmatch case:\n    case case if (match): case\n    case (\n  [case, _]): case\n")
    assert found["keyword"] == ["match", "case", "if", "case"]


def test_columns_are_right_behind_characters_of_several_bytes():
    source = "é = 'ü𝔘'; f(é, ключ='x').метод(β=1 < 2)\nclass Ω: return_ = ñ(1)\n"
    found = labelled(source)
    assert found["call_name"] == ["f", "метод", "ñ"] and found["argument_keyword"] == ["ключ", "β"]
    assert found["comparison"] == ["1 < 2"] and found["class_name"] == ["Ω"]
    assert found["call_arguments"] == ["é, ключ='x'", "β=1 < 2", "1"]


def test_tabs_form_feeds_and_continued_lines_are_labelled():
    found = labelled("if x:\n\ty = 1 + \\\n\t\t2\n\x0c\nif z:\n\tif a:\n\t\tb\n")
    assert found["indentation"] == ["\t", "\t", "\t\t"]
    assert found["indent_1"] == ["\ty = 1 + \\\n\t\t2\n", "\tif a:\n\t\tb\n"] and found["indent_2"] == ["\t\tb\n"]
    assert found["number"] == ["1", "2"] and found["name"] == ["x", "y", "z", "a", "b"]


@pytest.mark.parametrize("line_break", ["\r\n", "\r"])
def test_other_line_breaks_give_the_same_labels(line_break):
    plain, other = labelled(EXAMPLE), labelled(EXAMPLE.replace("\n", line_break))
    for name, texts in plain.items():
        assert other[name] == [text.replace("\n", line_break) for text in texts], name


def test_a_byte_order_mark_carries_nothing_and_moves_nothing():
    labels = label_characters("\ufeff" + EXAMPLE)
    assert not labels[:, 0].any()
    assert np.array_equal(labels[:, 1:], label_characters(EXAMPLE))


def test_an_fstring_is_one_string_however_deep_it_nests():
    found = labelled('f(f\'{a:{b(1)}} {{x}} {f"{c}"}\', rf"""{d}\né""" \'z\')\n')
    assert found["string"] == ["f'{a:{b(1)}} {{x}} {f\"{c}\"}'", 'rf"""{d}\né"""', "'z'"]
    assert found["fstring"] == found["string"][:2]
    assert found["name"] == ["f"] and found["call_name"] == ["f"] and found["number"] == []
    assert found["brackets_2"] == []


@pytest.mark.parametrize("source", ["", "\n", "# only\n", "x", "x = 1  # no line break", "if x:\n    y", "  # a\n\n"])
def test_short_texts_are_labelled(source):
    labels = label_characters(source)
    assert labels.shape == (len(CONCEPTS), len(source))
    assert labels[[c.name for c in CONCEPTS].index("comment")].sum() == len(source[source.find("#") :].rstrip()) * (
        "#" in source
    )


@pytest.mark.parametrize("source", ["print 'x'", "def f(:", "x = '", "a\0b", "'\ud800'", "if x:\n  y\n z", "€ = 2"])
def test_text_that_is_not_python_is_refused(source):
    with pytest.raises(DataError, match="is not Python source"):
        label_characters(source)


def test_an_identifier_that_tokenize_cannot_read_is_refused_rather_than_mislabelled():
    source = "℘ = 1\n"  # a letter to Python's parser, not to the tokenize module of Python 3.11
    if is_readable(source):
        assert labelled(source)["name"] == ["℘"]
    else:
        with pytest.raises(DataError, match="tokenize cannot read '℘'"):
            label_characters(source)


def test_names_and_bits_are_unique_and_fit_an_int64():
    assert len({concept.name for concept in CONCEPTS}) == len(CONCEPTS) <= 63
    assert int(ALL_BITS) == 2 ** len(CONCEPTS) - 1


# --- rows of tokens ---------------------------------------------------------------------------------------------------


def rows_of(documents: list[Document], tokenizer, context: int = 8) -> TokenRows:
    return tokenize_documents(documents, tokenizer, context=context)


DOCUMENTS = [
    Document("a.py", "class Foo:\n    def bar(self, x='é𝔘'):\n        return self.bar(x + 0x10)\n" * 3),
    Document("b.txt", "This is not Python, whatever you say.\n" * 3),
    Document("c.py", EXAMPLE * 2),
]


def carried(labels: ConceptLabels, name: str) -> torch.Tensor:
    return labels.dense()[:, :, [concept.name for concept in labels.concepts].index(name)]


def test_tokens_of_rows_carry_the_concepts_of_their_text(tokenizer):
    rows = rows_of(DOCUMENTS, tokenizer)
    labels = label_tokens(rows, DOCUMENTS)
    assert labels.skipped == ("b.txt",)
    assert torch.equal(labels.known, (rows.source == 0) | (rows.source == 2))
    assert not labels.bits[~labels.known].any()
    expected = {"function_name": {"bar", "f"}, "class_name": {"Foo"}, "hexadecimal": {"0x10", "0x1F"}}
    for name, texts in expected.items():
        places = carried(labels, name).nonzero()
        assert len(places) >= 3
        for row, position in places.tolist():
            source, start, end = (int(field[row, position]) for field in (rows.source, rows.offset, rows.end))
            token = DOCUMENTS[source].text[start:end].strip()
            assert any(token in text for text in texts), (name, token)


def test_labels_belong_to_the_tokens_whatever_the_order_of_rows(tokenizer):
    rows = rows_of(DOCUMENTS, tokenizer)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))[: len(rows) // 2]
    labels, some = label_tokens(rows, DOCUMENTS), label_tokens(rows.select(order), DOCUMENTS)
    assert torch.equal(some.bits, labels.bits[order]) and torch.equal(some.known, labels.known[order])
    at = labels.known.nonzero()[::7].T
    assert torch.equal(labels.at(at[0], at[1]), labels.dense()[at[0], at[1]])


def test_every_token_of_a_character_of_several_bytes_carries_its_concepts(tokenizer):
    documents = [Document("x.py", "'𝔘𝔘𝔘𝔘'\n")]
    rows = rows_of(documents, tokenizer, context=4)
    assert ((rows.end - rows.offset == 1) & (rows.offset == 1)).sum() > 1  # the tokenizer does split it
    assert torch.equal(carried(label_tokens(rows, documents), "string"), rows.source == 0)


def test_white_space_counts_where_there_is_nothing_else_and_for_what_is_about_it():
    source = "if f( a ):\n  '''b\n\n'''\n"
    pieces = ["if", " f", "(", " a", " )", ":", "\n  ''", "'", "b", "\n\n", "'''", "\n"]
    ends = np.cumsum([len(piece) for piece in pieces])
    words = bits_of_tokens(source, bits_of_characters(source), ends - [len(piece) for piece in pieces], ends)
    expected = {
        "brackets_1": [" a"],  # the space of " )" is inside
        "closing_bracket": [" )"],
        "string": ["\n  ''", "'", "b", "\n\n", "'''"],
        "newline": ["\n  ''", "\n"],
        "indentation": ["\n  ''"],
        "line_start": ["if", "\n  ''"],
    }
    for name, tokens in expected.items():
        assert [piece for piece, word in zip(pieces, words, strict=True) if word & BIT[name]] == tokens, name


def test_documents_that_the_rows_do_not_come_from_are_refused(tokenizer):
    with pytest.raises(DataError, match="pass the documents that tokenize_documents was given"):
        label_tokens(rows_of(DOCUMENTS, tokenizer), DOCUMENTS[::-1])


def test_tokens_without_offsets_are_refused(tokenizer):
    rows = rows_of(DOCUMENTS, tokenizer)
    with pytest.raises(DataError, match="use a fast tokenizer"):
        label_tokens(replace(rows, end=torch.full_like(rows.end, -1)), DOCUMENTS)


# --- scores -----------------------------------------------------------------------------------------------------------


def random_batch(seed: int, n_tokens: int = 200) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    dense = torch.rand(n_tokens, 12, generator=generator)
    dense = dense * (dense > torch.linspace(0.3, 1.0, 12))  # the last feature never fires
    labels = torch.rand(n_tokens, 5, generator=generator) < torch.tensor([0.0, 0.1, 0.3, 0.6, 1.0])
    return dense, labels, torch.rand(n_tokens, generator=generator) < 0.8


def test_counts_are_those_of_the_dense_matrices_and_add_up_over_batches():
    dense, labels, known = random_batch(0)
    parts = [slice(0, 70), slice(70, 200)]
    counts = [count_concepts(SparseCodes.from_dense(dense[p]), labels[p], known=known[p]) for p in parts]
    total = counts[0] + counts[1]
    active = (dense > 0) & known[:, None]
    assert torch.equal(total.both, active.long().T @ labels.long())
    assert torch.equal(total.active, active.sum(0)) and total.n_tokens == int(known.sum())
    assert torch.equal(total.labelled, labels[known].sum(0))


def test_an_entry_of_zero_and_one_below_its_level_are_not_active():
    codes = SparseCodes.from_pairs(
        torch.tensor([0, 1, 2]), torch.tensor([0, 0, 0]), torch.tensor([0.0, 1.0, 4.0]), n_tokens=3, n_features=1
    )
    labels = torch.ones(3, 1, dtype=torch.bool)
    assert count_concepts(codes, labels).active.tolist() == [2]
    assert count_concepts(codes, labels, above=torch.tensor([2.0])).both.tolist() == [[1]]


def test_a_feature_that_fires_below_zero_is_active():
    codes = SparseCodes.from_dense(torch.tensor([[-3.0], [0.0], [-2.0]]))
    counts = count_concepts(codes, torch.tensor([[True], [False], [True]]))
    assert counts.active.tolist() == [2] and counts.both.tolist() == [[2]]
    assert counts.scores().f1.tolist() == [[1.0]]


def test_no_entry_at_all_counts_nothing():
    codes = SparseCodes.from_dense(torch.zeros(4, 3))
    scores = count_concepts(codes, torch.ones(4, 2, dtype=torch.bool)).scores()
    assert scores.f1.count_nonzero() == 0 and scores.precision.isfinite().all()


def test_scores_by_hand():
    # 10 tokens; the concept holds on 0..3; the feature fires on 2..5; another fires always
    dense = torch.zeros(10, 2)
    dense[2:6, 0], dense[:, 1] = 1.0, 1.0
    labels = torch.zeros(10, 1, dtype=torch.bool)
    labels[:4] = True
    scores = count_concepts(SparseCodes.from_dense(dense), labels).scores()
    torch.testing.assert_close(scores.precision[:, 0], torch.tensor([0.5, 0.4]))
    torch.testing.assert_close(scores.recall[:, 0], torch.tensor([0.5, 1.0]))
    torch.testing.assert_close(scores.f1[:, 0], torch.tensor([0.5, 8 / 14]))
    torch.testing.assert_close(scores.lift[:, 0], torch.tensor([1.25, 1.0]))
    torch.testing.assert_close(scores.skill[:, 0], torch.tensor([(0.5 - 8 / 14) / (1 - 8 / 14), 0.0]))


def test_the_best_concept_is_not_merely_the_most_common_one():
    generator = torch.Generator().manual_seed(0)
    labels = torch.rand(1000, 2, generator=generator) < torch.tensor([0.1, 0.8])
    fires = labels[:, 0] | (torch.rand(1000, generator=generator) < 0.3)
    scores = count_concepts(SparseCodes.from_dense(fires[:, None].float()), labels).scores()
    assert scores.f1[0].argmax() == 1
    concept, f1 = scores.best()
    assert concept.tolist() == [0] and torch.equal(f1, scores.f1[:, 0])


def test_codes_and_labels_of_different_tokens_are_refused():
    with pytest.raises(ShapeError, match="codes of 4 tokens and labels of 3"):
        count_concepts(SparseCodes.from_dense(torch.ones(4, 2)), torch.ones(3, 2, dtype=torch.bool))
    two, three = (
        count_concepts(SparseCodes.from_dense(torch.ones(3, n)), torch.ones(3, 2, dtype=torch.bool)) for n in (2, 3)
    )
    with pytest.raises(ShapeError, match="one SAE and one list"):
        two + three
