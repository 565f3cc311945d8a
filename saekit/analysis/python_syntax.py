"""What `tokenize` and `ast` know about Python source, as spans of characters in one coordinate system.

The two modules count differently: `tokenize` by row and character, `ast` by row and byte of UTF-8.
Here both become `[start, end)` in characters of the text. An f-string is one string token: Python 3.11
does not look inside, later versions do, and labels must not depend on who runs them.
"""

import ast
import io
import tokenize
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from jaxtyping import Int

# a token's string is not in these kinds' source text, or is only white space
_EMPTY_KINDS = (tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
_LAYOUT_KINDS = (*_EMPTY_KINDS, tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE)
# f-strings since Python 3.12, t-strings since 3.14
_STRING_START = [getattr(tokenize, name) for name in ("FSTRING_START", "TSTRING_START") if hasattr(tokenize, name)]
_STRING_END = [getattr(tokenize, name) for name in ("FSTRING_END", "TSTRING_END") if hasattr(tokenize, name)]

Spans = Int[np.ndarray, "_ 2"]


@dataclass(frozen=True, slots=True)
class CodeTokens:
    """The tokens of one text, in order.

    Attributes:
        kinds: the numbers of the `tokenize` module (`tokenize.OP` for every operator).
        starts, ends: characters; INDENT and DEDENT are where `tokenize` puts them, the rest never overlap.
        strings: what each token says.
        line_starts: first character of every line.
    """

    kinds: Int[np.ndarray, " n"]
    starts: Int[np.ndarray, " n"]
    ends: Int[np.ndarray, " n"]
    strings: list[str]
    line_starts: Int[np.ndarray, " lines"]

    @property
    def is_code(self) -> np.ndarray:
        """`(n,)` neither white space nor comment."""
        return ~np.isin(self.kinds, _LAYOUT_KINDS)

    @property
    def is_written(self) -> np.ndarray:
        """`(n,)` stands for characters of its own; INDENT, DEDENT and the end do not."""
        return ~np.isin(self.kinds, _EMPTY_KINDS)

    def keep(self, which: np.ndarray) -> "CodeTokens":
        """Fewer tokens; `which` is a mask."""
        strings = [self.strings[i] for i in which.nonzero()[0]]
        return CodeTokens(self.kinds[which], self.starts[which], self.ends[which], strings, self.line_starts)


def read_tokens(source: str) -> CodeTokens:
    """The tokens of `source`, whose lines must end in "\\n" alone.

    Raises:
        SyntaxError: text that `tokenize` cannot read, or reads only in part.
    """
    try:
        found = list(tokenize.generate_tokens(io.StringIO(source).readline))
    except tokenize.TokenError as error:
        raise SyntaxError(str(error.args[0])) from error
    kinds, strings, begins, ends, _ = zip(*found, strict=True)
    if tokenize.ERRORTOKEN in kinds:
        raise SyntaxError(f"tokenize cannot read {strings[kinds.index(tokenize.ERRORTOKEN)]!r}")
    line_starts = np.concatenate([[0], _places(source, "\n") + 1])
    # the end marker and an empty NEWLINE stand one line or one column behind the text
    line_of_row = np.append(line_starts, [len(source), len(source)])

    def characters(positions: tuple[tuple[int, int], ...]) -> np.ndarray:
        rows, columns = np.array(positions, dtype=np.int64).T
        return np.minimum(line_of_row[rows - 1] + columns, len(source))

    tokens = CodeTokens(
        np.array(kinds, dtype=np.int64), characters(begins), characters(ends), list(strings), line_starts
    )
    return _join_fstrings(tokens, source)


def _join_fstrings(tokens: CodeTokens, source: str) -> CodeTokens:
    """Every f-string as one STRING token, as Python 3.11 has it."""
    opens, closes = np.isin(tokens.kinds, _STRING_START), np.isin(tokens.kinds, _STRING_END)
    if not opens.any():
        return tokens
    depth = np.cumsum(opens) - np.cumsum(closes)
    first, last = opens & (depth == 1), closes & (depth == 0)
    kinds, ends, strings = tokens.kinds.copy(), tokens.ends.copy(), list(tokens.strings)
    kinds[first] = tokenize.STRING
    ends[first] = tokens.ends[last]
    for i in np.flatnonzero(first).tolist():
        strings[i] = source[tokens.starts[i] : ends[i]]
    whole = CodeTokens(kinds, tokens.starts, ends, strings, tokens.line_starts)
    return whole.keep(first | ((depth == 0) & ~closes))


def read_tree(source: str) -> dict[str, Spans]:
    """Spans of the parts of `source` that only the syntax tree tells apart, by the names in `TREE_SPANS`.

    Nothing inside an f-string is reported: before Python 3.12 its positions are not reliable.

    Raises:
        SyntaxError: text that is not Python.
        ValueError: text with null characters or lone surrogates.
        RecursionError, MemoryError: text nested too deeply for Python's own parser.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes are the business of whoever runs that text
        tree = ast.parse(source)
    found: dict[str, list[tuple[int, int, int, int]]] = {name: [] for name in TREE_SPANS}
    for node in _iter_nodes(tree):
        if (collect := _COLLECTORS.get(node.__class__)) is not None:
            for name, first, last in collect(node):
                found[name].append((first.lineno, first.col_offset, last.end_lineno, last.end_col_offset))  # pyright: ignore
    encoded = source.encode()
    bytes_ = np.frombuffer(encoded, dtype=np.uint8)
    line_starts = np.concatenate([[0], (bytes_ == ord("\n")).nonzero()[0] + 1])
    # continuation bytes of UTF-8 are 0b10xxxxxx; every other byte begins a character
    begins = (bytes_ & 0xC0) != 0x80
    character_of_byte = None if source.isascii() else np.append(np.cumsum(begins) - 1, len(source))
    return {name: _in_characters(positions, line_starts, character_of_byte) for name, positions in found.items()}


def _in_characters(
    positions: list[tuple[int, int, int, int]], line_starts: np.ndarray, character_of_byte: np.ndarray | None
) -> Spans:
    rows = np.array(positions, dtype=np.int64).reshape(-1, 2, 2)
    spans = line_starts[rows[:, :, 0] - 1] + rows[:, :, 1]
    return spans if character_of_byte is None else character_of_byte[spans]


def _places(source: str, character: str) -> np.ndarray:
    codepoints = np.frombuffer(source.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
    return (codepoints == ord(character)).nonzero()[0]


@cache
def _child_fields(kind: type[ast.AST]) -> tuple[str, ...]:
    """Fields that can hold nodes we want; leaves have none, which is most of the speed of the walk."""
    if kind in (ast.Constant, ast.Name, ast.JoinedStr, ast.alias) or kind.__name__ == "TemplateStr":
        return ()
    return tuple(field for field in kind._fields if field not in ("ctx", "op", "ops", "attr", "arg", "id"))


def _iter_nodes(tree: ast.AST) -> Iterator[ast.AST]:
    stack = [tree]
    while stack:
        node = stack.pop()
        yield node
        for field in _child_fields(node.__class__):
            child: Any = getattr(node, field, None)
            if child.__class__ is list:
                stack.extend(item for item in child if isinstance(item, ast.AST))
            elif isinstance(child, ast.AST):
                stack.append(child)


Found = Iterator[tuple[str, ast.AST, ast.AST]]


def _body(statements: list[ast.stmt], name: str) -> tuple[str, ast.AST, ast.AST]:
    first = statements[0]
    # a decorated definition begins at its decorators, although its own position is that of `def`
    decorators = getattr(first, "decorator_list", None)
    return name, decorators[0] if decorators else first, statements[-1]


def _docstring(node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) -> Found:
    match node.body:
        case [ast.Expr(value=ast.Constant(value=str()) as text), *_]:
            yield "docstring", text, text


def _function(node: ast.FunctionDef | ast.AsyncFunctionDef) -> Found:
    yield from _docstring(node)
    yield _body(node.body, "function_body")
    if node.returns is not None:
        yield "annotation", node.returns, node.returns


def _class(node: ast.ClassDef) -> Found:
    yield from _docstring(node)
    yield _body(node.body, "class_body")


def _arguments(node: ast.arguments) -> Found:
    for default in (*node.defaults, *node.kw_defaults):
        if default is not None:
            yield "parameter_default", default, default


def _parameter(node: ast.arg) -> Found:
    yield "parameter", node, node
    if node.annotation is not None:
        yield "annotation", node.annotation, node.annotation


def _call(node: ast.Call) -> Found:
    yield "call", node, node
    yield "callee", node.func, node.func
    if isinstance(node.func, ast.Name | ast.Attribute):
        yield "named_callee", node.func, node.func


def _keyword(node: ast.keyword) -> Found:
    if node.arg is not None:
        yield "argument_keyword", node, node


def _whole(name: str) -> Callable[[ast.AST], Found]:
    return lambda node: iter([(name, node, node)])


def _condition(node: ast.If | ast.IfExp) -> Found:
    yield "condition", node.test, node.test


def _while(node: ast.While) -> Found:
    yield "condition", node.test, node.test
    yield _body(node.body, "loop_body")


def _match(node: ast.Match) -> Found:
    yield "match_statement", node, node
    for case in node.cases:
        yield "case_pattern", case.pattern, case.pattern


_COLLECTORS: dict[type[ast.AST], Callable[..., Found]] = {
    ast.Module: _docstring,
    ast.ClassDef: _class,
    ast.FunctionDef: _function,
    ast.AsyncFunctionDef: _function,
    ast.arguments: _arguments,
    ast.arg: _parameter,
    ast.AnnAssign: lambda node: iter([("annotation", node.annotation, node.annotation)]),
    ast.Call: _call,
    ast.keyword: _keyword,
    ast.Import: _whole("import_statement"),
    ast.ImportFrom: _whole("import_statement"),
    ast.Return: _whole("return_statement"),
    ast.Raise: _whole("raise_statement"),
    ast.Compare: _whole("comparison"),
    ast.ListComp: _whole("comprehension"),
    ast.SetComp: _whole("comprehension"),
    ast.DictComp: _whole("comprehension"),
    ast.GeneratorExp: _whole("comprehension"),
    ast.If: _condition,
    ast.IfExp: _condition,
    ast.While: _while,
    ast.For: lambda node: iter([_body(node.body, "loop_body")]),
    ast.AsyncFor: lambda node: iter([_body(node.body, "loop_body")]),
    ast.Try: lambda node: iter([_body(node.body, "try_body")]),
    ast.TryStar: lambda node: iter([_body(node.body, "try_body")]),
    ast.Match: _match,
}
if hasattr(ast, "TypeAlias"):  # Python 3.12
    _COLLECTORS[ast.TypeAlias] = _whole("type_statement")  # pyright: ignore[reportAttributeAccessIssue]

TREE_SPANS = (
    "annotation",
    "argument_keyword",
    "call",
    "callee",
    "case_pattern",
    "class_body",
    "comparison",
    "comprehension",
    "condition",
    "docstring",
    "function_body",
    "import_statement",
    "loop_body",
    "match_statement",
    "named_callee",
    "parameter",
    "parameter_default",
    "raise_statement",
    "return_statement",
    "try_body",
    "type_statement",
)
