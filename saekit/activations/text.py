"""Where text comes from: the standard library's source, files and folders, JSONL, `datasets` names.

A `Document` is one named piece of text. `read_documents` turns what a user types into documents:

    stdlib                       the source of Python's standard library on this machine
    ./notes.txt, ./folder        text files (a folder is read recursively)
    ./stories.jsonl              one JSON object a line, its "text" field
    owner/name                   a data set of the Hugging Face Hub, streamed

A file of token ids (./tokens.npy) is not text any more; `saekit.activations.corpus` takes both.
"""

import json
import sysconfig
import tokenize
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from zlib import crc32

from saekit.errors import DataError, FileError
from saekit.targets.quiet import quiet_hub

TEXT_SUFFIXES = (".txt", ".md", ".rst", ".py", ".tex", ".csv", ".html")
# TinyStories and its relatives keep many documents in one file, split by this line
DOCUMENT_SEPARATOR = "<|endoftext|>"

_TEST_FOLDERS = {"test", "tests", "idle_test"}
# tables written by programs, not by people: character maps and the text of the manual
_GENERATED = {"encodings", "pydoc_data"}
_NOT_STDLIB = {"site-packages", "dist-packages", "__pycache__"}


@dataclass(frozen=True, slots=True)
class Document:
    """One piece of text and where it came from."""

    name: str
    text: str


def read_documents(
    text: str, *, limit: int | None = None, is_enough: Callable[[Document], bool] = lambda document: False
) -> list[Document]:
    """The documents that a user named on the command line or in a config.

    Args:
        text: "stdlib", a path, or the name of a data set on the Hub.
        limit: stop after this many documents; a data set on the Hub has no end otherwise.
        is_enough: asked of each, in order; stop after the first where it says so.

    Raises:
        FileError: a path that looks local and does not exist, or a file that is not text.
        DataError: nothing to read there, or a limit that leaves nothing.
    """
    if limit is not None and limit < 1:
        raise DataError(f"max_documents={limit} leaves nothing to read; give at least 1, or leave it out")
    documents = []
    for document in islice(_open(text), limit):
        documents.append(document)
        if is_enough(document):
            break
    if not documents:
        raise DataError(
            f"{text} holds no text; expected {', '.join(TEXT_SUFFIXES)} or .jsonl files with something in them"
        )
    return documents


def _open(text: str) -> Iterator[Document]:
    """One after the other, each read when it is asked for."""
    path = Path(text).expanduser() if text.startswith("~/") else Path(text)
    if text == "stdlib":
        return iter(stdlib_documents())
    if path.exists():
        return _read_path(path)
    if text.startswith((".", "/", "~")) or text.endswith((*TEXT_SUFFIXES, ".jsonl")):
        raise FileError(
            f"no text at {text}; give a file or folder that exists, 'stdlib', or the name of a data set on the Hub"
        )
    return _stream_dataset(text)


def stdlib_documents(*, tests: bool = False) -> list[Document]:
    """The modules of the standard library of the Python that runs this, ordered by name.

    Modules that programs wrote (character maps, the manual as a string) are left out, and so are the
    library's own tests unless asked for: many distributions do not ship them. A file that is not
    valid in its declared encoding is test material, not a module, and is left out too.
    """
    root = Path(sysconfig.get_path("stdlib"))
    documents = []
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        folders = set(relative.parts[:-1])
        if folders & (_NOT_STDLIB | _GENERATED) or (not tests and folders & _TEST_FOLDERS):
            continue
        try:
            with tokenize.open(path) as file:
                text = file.read()
        except (SyntaxError, UnicodeDecodeError):
            continue
        if text.strip():
            documents.append(Document(relative.as_posix(), text))
    return documents


def split_documents(documents: Sequence[Document], *, held_out: float = 0.05) -> tuple[list[Document], list[Document]]:
    """Documents for training and documents that training never sees.

    Everything under one top-level name (`json/decoder.py`, `test/test_json/...`) falls on the same
    side, decided by a checksum of that name, so that a split never depends on what else is there.
    """
    parts: tuple[list[Document], list[Document]] = ([], [])
    for document in documents:
        is_held_out = crc32(_top_name(document.name).encode()) % 10_000 < held_out * 10_000
        parts[is_held_out].append(document)
    return parts


def _top_name(name: str) -> str:
    parts = name.removesuffix(".py").split("/")
    top = parts[1] if parts[0] in _TEST_FOLDERS and len(parts) > 1 else parts[0]
    return top.removeprefix("test_").removeprefix("_py").strip("_")


def _read_path(path: Path) -> Iterator[Document]:
    if path.is_dir():
        for file in sorted(path.rglob("*")):
            if file.is_file() and file.suffix in (*TEXT_SUFFIXES, ".jsonl"):
                yield from _read_path(file)
    elif path.suffix == ".jsonl":
        yield from _read_jsonl(path)
    else:
        pieces = [piece.strip("\n") for piece in _read_utf8(path).split(DOCUMENT_SEPARATOR)]
        pieces = [piece for piece in pieces if piece.strip()]
        for number, piece in enumerate(pieces):
            yield Document(path.name if len(pieces) == 1 else f"{path.name}#{number}", piece)


def _read_utf8(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise FileError(f"{path} is not UTF-8 text (byte {error.start}); convert it, or leave it out") from error
    except OSError as error:
        raise FileError(f"cannot read {path}: {error.strerror}; check that it is a readable text file") from error


def _read_jsonl(path: Path) -> Iterator[Document]:
    # not splitlines, which also splits at characters that JSON allows inside a string
    for number, line in enumerate(_read_utf8(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            text = json.loads(line)["text"]
        except (json.JSONDecodeError, KeyError, TypeError):
            text = None
        if not isinstance(text, str):
            raise FileError(
                f'{path}, line {number}: expected a JSON object with a "text" field, got {line[:60]!r}; '
                "correct the line or take it out"
            )
        yield Document(f"{path.name}:{number}", text)


def _stream_dataset(name: str) -> Iterator[Document]:
    from datasets import load_dataset  # heavy, and only for text that is not on this machine

    try:
        with quiet_hub():
            stream = load_dataset(name, split="train", streaming=True)
        for number, row in enumerate(stream):
            if not isinstance(row["text"], str):
                raise DataError(
                    f"row {number:,} of data set {name} has {row['text']!r:.60} for a text; save the texts as JSONL"
                )
            yield Document(f"{name}#{number}", row["text"])
    except DataError:
        raise
    except KeyError as error:
        raise DataError(f"data set {name} has no 'text' column; save the column you want as JSONL") from error
    except Exception as error:  # the loader raises whatever its transport raises
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DataError(
            f"cannot read data set {name!r}: {reason[:160]}; check the name and the network, or give a local file"
        ) from error
