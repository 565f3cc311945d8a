"""The concepts of Python source: what they are, and which characters of a text carry them.

Everything comes from the spans of `python_syntax`. Concepts of whole tokens are bits of a word, set
token by token; concepts of stretches (bodies, brackets, comparisons) are spans, which may nest.
"""

import builtins
import keyword
import re
import sys
import tokenize
from dataclasses import dataclass
from functools import lru_cache
from itertools import repeat

import numpy as np

from saekit.analysis.python_syntax import CodeTokens, Spans, read_tokens, read_tree
from saekit.errors import DataError


@dataclass(frozen=True, slots=True)
class Concept:
    """Something that is true of some characters of a text and false of the others."""

    name: str
    description: str


# at most 63: one bit of an int64 each
CONCEPTS: tuple[Concept, ...] = tuple(
    Concept(name, description)
    for name, description in {
        "keyword": "a keyword, among them True, False, None and the match, case and type that open a statement",
        "keyword_operator": "and, or, not, in, is",
        "constant": "True, False or None",
        "name": "an identifier that is not a keyword",
        "operator": "an operator sign: arithmetic, comparison, assignment, ->, *, @ (no bracket, comma, colon or dot)",
        "comparison_operator": "==, !=, <, >, <=, >=",
        "assignment_operator": "=, := or an augmented assignment; the = of defaults and arguments too",
        "opening_bracket": "( [ {",
        "closing_bracket": ") ] }",
        "comma": "a comma",
        "colon": "a colon",
        "number": "a number of any kind",
        "float": "a number with a point, an exponent or an imaginary part",
        "hexadecimal": "a number written 0x...",
        "octal_or_binary": "a number written 0o... or 0b...",
        "string": "a string literal, quotes and prefix included",
        "docstring": "the docstring of a module, class or function",
        "string_open": "the prefix and quotes that open a string",
        "string_close": "the quotes that close a string",
        "fstring": "an f-string, its replacement fields included",
        "bytes": "a bytes literal",
        "comment": "a comment, from # to the end of the line",
        "newline": "the line break that ends a statement",
        "line_break": "a line break that ends no statement: in brackets, after a comment, on an empty line",
        "indentation": "white space before the first token of a statement's line",
        "line_start": "the first character of a logical line, behind its indentation",
        "attribute": "a name after a dot, outside imports",
        "self": "self",
        "after_self": "the attribute in self.attribute",
        "call_name": "the last name of what is called: g in f.g(x)",
        "parameter": "a parameter's name in a def or lambda",
        "argument_keyword": "the name in name=value, in a call or class header",
        "import_statement": "inside an import statement",
        "imported_name": "a module or name that is imported, under its own name",
        "decorator": "a decorator, from @ to the end of its line",
        "class_name": "the name that a class statement defines",
        "function_name": "the name that a def statement defines",
        "builtin": "a name of Python's builtins where a plain name stands (shadowing is not looked at)",
        "exception_name": "the name of a builtin exception where a plain name stands",
        "dunder": "a name like __init__",
        "private_name": "a name that begins with a single underscore",
        "constant_name": "a name in CAPITALS, of two characters or more",
        "camel_case": "a name in CamelCase",
        "indent_1": "a block at indentation depth 1 or more",
        "indent_2": "a block at indentation depth 2 or more",
        "indent_3": "a block at indentation depth 3 or more",
        "indent_4": "a block at indentation depth 4 or more",
        "brackets_1": "inside brackets of any kind",
        "brackets_2": "inside brackets inside brackets",
        "brackets_3": "inside three or more brackets",
        "call_arguments": "between the parentheses of a call",
        "loop_body": "the body of a for or while",
        "try_body": "what a try statement tries",
        "class_body": "the body of a class",
        "function_body": "the body of a def",
        "return_statement": "a return statement",
        "raise_statement": "a raise statement",
        "comparison": "a comparison, both sides included",
        "condition": "what an if or while tests",
        "comprehension": "a comprehension or generator expression, its brackets included",
        "annotation": "a type annotation of a parameter, variable or result",
        "parameter_default": "the default value of a parameter",
    }.items()
)
WHITE_SPACE_CONCEPTS = ("newline", "line_break", "indentation")

BIT = {concept.name: np.uint64(1 << place) for place, concept in enumerate(CONCEPTS)}
NOTHING = np.uint64(0)

# names that `site` adds to builtins are not there in every program
_BUILTINS = {name for name in dir(builtins) if name.isidentifier() and not name.startswith("_")} - {
    *keyword.kwlist, "copyright", "credits", "exit", "help", "license", "quit"
}  # fmt: skip
_EXCEPTIONS = {
    name
    for name in _BUILTINS
    if isinstance(getattr(builtins, name), type) and issubclass(getattr(builtins, name), BaseException)
}
# tokens that decide what their neighbours are
_ROLES = {role: number for number, role in enumerate((".", "def", "class", "as", "(", "@", "self"), start=1)}
_QUOTES = re.compile(r"([a-zA-Z]*)('''|\"\"\"|'|\")")


def bits_of_characters(source: str) -> np.ndarray:
    """The concepts of every character as one word of bits, `(n_chars,)`, lowest bit first.

    Raises:
        DataError: if Python does not read `source` as a module.
    """
    lead = source.startswith("\ufeff")  # Python skips a byte order mark; so do labels
    text = source[lead:]
    points = codepoints(text)
    # Python reads \r\n and a lone \r as one line break
    is_second = np.zeros(len(text), dtype=bool)
    is_second[1:] = (points[1:] == ord("\n")) & (points[:-1] == ord("\r"))
    normal = text.replace("\r\n", "\n").replace("\r", "\n")
    try:
        spans = read_tree(normal)
        tokens = read_tokens(normal)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise DataError(
            f"a text of {len(source):,} characters is not Python source ({error}); labels exist only for text that "
            f"Python {sys.version_info.major}.{sys.version_info.minor} can parse"
        ) from error
    bits = _of_written_tokens(tokens, spans, len(normal))
    for name, found in _ranges(tokens, spans).items():
        if len(found):
            bits |= np.where(_covered(found, len(normal)), BIT[name], NOTHING)
    bits = bits[np.arange(len(text)) - np.cumsum(is_second)]
    return np.concatenate([np.zeros(int(lead), dtype=np.uint64), bits])


def codepoints(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)


def _covered(spans: Spans, n_chars: int) -> np.ndarray:
    """Which characters lie in at least one span; spans may nest."""
    opened = np.bincount(spans[:, 0], minlength=n_chars + 1)
    closed = np.bincount(spans[:, 1], minlength=n_chars + 1)
    return np.cumsum(opened - closed)[:n_chars] > 0


def _of_written_tokens(tokens: CodeTokens, spans: dict[str, Spans], n_chars: int) -> np.ndarray:
    """What whole tokens are, spread over their characters."""
    words = np.zeros(len(tokens.kinds), dtype=np.uint64)
    for kind, name in ((tokenize.COMMENT, "comment"), (tokenize.NEWLINE, "newline"), (tokenize.NL, "line_break")):
        words[tokens.kinds == kind] = BIT[name]
    is_code = tokens.is_code
    words[is_code] = _of_code(tokens.keep(is_code), spans)
    written = tokens.is_written
    starts, ends = tokens.starts[written], tokens.ends[written]
    gaps = starts - np.concatenate([[0], ends[:-1]])
    lengths = np.append(np.stack([gaps, ends - starts], axis=1).flatten(), n_chars - ends[-1:].sum())
    pieces = np.append(np.stack([np.zeros(len(starts), dtype=np.uint64), words[written]], axis=1).flatten(), NOTHING)
    return np.repeat(pieces, lengths)


def _of_code(code: CodeTokens, spans: dict[str, Spans]) -> np.ndarray:
    """Words of the tokens that are neither white space nor comments."""
    is_string = code.kinds == tokenize.STRING
    words = np.array(
        [_of_string_literal(s) if literal else _of_word(s) for s, literal in zip(code.strings, is_string, strict=True)],
        dtype=np.uint64,
    )
    soft_keywords = _soft_keywords(code, spans)
    words[soft_keywords] = BIT["keyword"]
    is_name = (words & BIT["name"]) != 0
    roles = np.fromiter(map(_ROLES.get, code.strings, repeat(0)), dtype=np.int8, count=len(code.strings))
    one_back, two_back, three_back = (np.concatenate([np.zeros(n, np.int8), roles])[: len(roles)] for n in (1, 2, 3))
    in_import = _tokens_within(code, spans["import_statement"])

    is_attribute = is_name & (one_back == _ROLES["."]) & ~in_import
    is_own_self = (two_back == _ROLES["self"]) & (three_back != _ROLES["."])
    found = {
        "attribute": is_attribute,
        "after_self": is_attribute & is_own_self,
        "function_name": is_name & (one_back == _ROLES["def"]),
        "class_name": is_name & (one_back == _ROLES["class"]),
        "imported_name": is_name & in_import & (one_back != _ROLES["as"]),
        "call_name": _ending_at(code, spans["named_callee"][:, 1]),
        "parameter": _starting_at(code, spans["parameter"][:, 0]),
        "argument_keyword": _starting_at(code, spans["argument_keyword"][:, 0]),
        "docstring": is_string & _tokens_within(code, spans["docstring"]),
    }
    not_plain = in_import | np.logical_or.reduce(
        [found[name] for name in ("attribute", "function_name", "class_name", "parameter", "argument_keyword")]
    )
    words[not_plain] &= ~(BIT["builtin"] | BIT["exception_name"])
    for name, which in found.items():
        words[which] |= BIT[name]
    return words


def _soft_keywords(code: CodeTokens, spans: dict[str, Spans]) -> np.ndarray:
    """Places of the `match`, `case` and `type` that open a statement."""
    openings = np.concatenate([spans["match_statement"][:, 0], spans["type_statement"][:, 0]])
    # a case has no position of its own; it is the nearest word `case` before its pattern, brackets aside
    cases = np.array([place for place, string in enumerate(code.strings) if string == "case"], dtype=np.int64)
    before = np.searchsorted(code.starts[cases], spans["case_pattern"][:, 0]) - 1
    return np.concatenate([np.searchsorted(code.starts, openings), cases[before]])


@lru_cache(maxsize=2**16)
def _of_word(string: str) -> int:
    """The bits that a name, number or operator has wherever it stands."""
    if string[0].isdigit() or (string[0] == "." and string[1:2].isdigit()):
        names = _number_concepts(string.lower())
    elif string[0].isalpha() or string[0] == "_" or string.isidentifier():
        names = _word_concepts(string)
    elif string in "([{":
        names = ["opening_bracket"]
    elif string in ")]}":
        names = ["closing_bracket"]
    elif string in (",", ":"):
        names = ["comma" if string == "," else "colon"]
    elif string in (".", "...", ";"):
        names = []
    elif string in ("==", "!=", "<>", "<", ">", "<=", ">="):
        names = ["operator", "comparison_operator"]
    else:
        names = ["operator"] + ["assignment_operator"] * string.endswith("=")
    return sum(int(BIT[name]) for name in names)


def _number_concepts(number: str) -> list[str]:
    if number.startswith("0x"):
        return ["number", "hexadecimal"]
    if number.startswith(("0o", "0b")):
        return ["number", "octal_or_binary"]
    return ["number"] + ["float"] * any(sign in number for sign in ".ej")


def _word_concepts(word: str) -> list[str]:
    if keyword.iskeyword(word):
        kinds = {"keyword_operator": ("and", "or", "not", "in", "is"), "constant": ("True", "False", "None")}
        return ["keyword", *(kind for kind, words in kinds.items() if word in words)]
    is_dunder = len(word) > 4 and word.startswith("__") and word.endswith("__")
    tests = {
        "self": word == "self",
        "builtin": word in _BUILTINS,
        "exception_name": word in _EXCEPTIONS,
        "dunder": is_dunder,
        "private_name": word.startswith("_") and not word.startswith("__"),
        "constant_name": len(word) > 1 and word.isupper(),
        "camel_case": word.lstrip("_")[:1].isupper() and not word.isupper() and "_" not in word.strip("_"),
    }
    return ["name", *(name for name, holds in tests.items() if holds)]


def _of_string_literal(string: str) -> np.uint64:
    prefix = string[: string.index(string[-1])].lower()
    word = BIT["string"]
    if "f" in prefix:
        word |= BIT["fstring"]
    return word | BIT["bytes"] if "b" in prefix else word


def _ranges(tokens: CodeTokens, spans: dict[str, Spans]) -> dict[str, Spans]:
    """What is not made of whole tokens with white space left out: spans, white space within them included."""
    taken = ("loop_body", "try_body", "class_body", "function_body", "return_statement", "raise_statement")
    taken += ("comparison", "condition", "comprehension", "annotation", "parameter_default", "import_statement")
    first_code, last_code = _logical_lines(tokens)
    opens_line = tokens.starts[first_code]
    decorators = np.array([tokens.strings[i] == "@" for i in first_code], dtype=bool)
    ranges = {name: spans[name] for name in taken}
    for name in ("loop_body", "try_body", "class_body", "function_body"):
        ranges[name] = _from_decorator(spans[name], opens_line, decorators)
    line_of_first = tokens.line_starts[np.searchsorted(tokens.line_starts, opens_line, side="right") - 1]
    return {
        **ranges,
        **_string_ends(tokens),
        **_blocks(tokens),
        **_brackets(tokens),
        "line_start": np.stack([opens_line, opens_line + 1], axis=1),
        "indentation": np.stack([line_of_first, opens_line], axis=1),
        "decorator": np.stack([opens_line, tokens.ends[last_code]], axis=1)[decorators],
        "call_arguments": _call_arguments(tokens, spans),
    }


def _from_decorator(bodies: Spans, opens_line: np.ndarray, decorators: np.ndarray) -> Spans:
    """Bodies that begin with a decorator, moved from its expression back to its @."""
    if not decorators.any():
        return bodies
    line = np.searchsorted(opens_line, bodies[:, 0], side="right") - 1
    return np.stack([np.where(decorators[line], opens_line[line], bodies[:, 0]), bodies[:, 1]], axis=1)


def _logical_lines(tokens: CodeTokens) -> tuple[np.ndarray, np.ndarray]:
    """Places of the first and the last code token of every logical line."""
    code = tokens.is_code.nonzero()[0]
    line = np.cumsum(tokens.kinds == tokenize.NEWLINE)[code]
    changes = line[1:] != line[:-1]
    return code[np.concatenate([[True], changes])[: len(code)]], code[np.concatenate([changes, [True]])[: len(code)]]


def _string_ends(tokens: CodeTokens) -> dict[str, Spans]:
    places = (tokens.kinds == tokenize.STRING).nonzero()[0]
    opening = [match for i in places if (match := _QUOTES.match(tokens.strings[i]))]
    starts, ends = tokens.starts[places], tokens.ends[places]
    lengths = np.array([(match.end(), len(match[2])) for match in opening], dtype=np.int64).reshape(-1, 2)
    return {
        "string_open": np.stack([starts, starts + lengths[:, 0]], axis=1),
        "string_close": np.stack([ends - lengths[:, 1], ends], axis=1),
    }


def _blocks(tokens: CodeTokens) -> dict[str, Spans]:
    """From the line of an INDENT to the end of the last logical line before its DEDENT.

    Comments that follow that line belong to no block: `tokenize` does not say whose they are.
    """
    opens, closes = tokens.kinds == tokenize.INDENT, tokens.kinds == tokenize.DEDENT
    depth = np.cumsum(opens) - np.cumsum(closes)
    newlines = np.where(tokens.kinds == tokenize.NEWLINE, np.arange(len(depth)), 0)
    end_of_last_line = tokens.ends[np.maximum.accumulate(newlines)]
    return {
        f"indent_{n}": np.stack(
            [tokens.starts[opens & (depth == n)], end_of_last_line[closes & (depth == n - 1)]], axis=1
        )
        for n in (1, 2, 3, 4)
    }


def _brackets(tokens: CodeTokens) -> dict[str, Spans]:
    """What is between brackets, without the outermost pair."""
    is_op = tokens.kinds == tokenize.OP
    opens = is_op & np.fromiter((s in ("(", "[", "{") for s in tokens.strings), dtype=bool, count=len(is_op))
    closes = is_op & np.fromiter((s in (")", "]", "}") for s in tokens.strings), dtype=bool, count=len(is_op))
    depth = np.cumsum(opens) - np.cumsum(closes)
    return {
        f"brackets_{n}": np.stack([tokens.ends[opens & (depth == n)], tokens.starts[closes & (depth == n - 1)]], axis=1)
        for n in (1, 2, 3)
    }


def _call_arguments(tokens: CodeTokens, spans: dict[str, Spans]) -> Spans:
    """From the first opening parenthesis behind what is called to the call's last character."""
    is_op = tokens.kinds == tokenize.OP
    parentheses = tokens.ends[is_op & np.array([s == "(" for s in tokens.strings], dtype=bool)]
    callee_ends = spans["callee"][:, 1]
    # an opening parenthesis that ends behind the callee is behind it: the two cannot overlap
    opened = parentheses[np.searchsorted(parentheses, callee_ends, side="right")]
    return np.stack([opened, spans["call"][:, 1] - 1], axis=1)


def _tokens_within(code: CodeTokens, spans: Spans) -> np.ndarray:
    first, last = (np.searchsorted(code.starts, spans[:, side]) for side in (0, 1))
    return _covered(np.stack([first, last], axis=1), len(code.starts))


def _starting_at(code: CodeTokens, positions: np.ndarray) -> np.ndarray:
    which = np.zeros(len(code.starts), dtype=bool)
    which[np.searchsorted(code.starts, positions)] = True
    return which


def _ending_at(code: CodeTokens, positions: np.ndarray) -> np.ndarray:
    which = np.zeros(len(code.ends), dtype=bool)
    which[np.searchsorted(code.ends, positions)] = True
    return which
