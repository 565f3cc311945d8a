"""What saekit raises when a user can do something about it.

    SaekitError
    ├── UnknownNameError   a name that is not in a known set (Site, rule, file key)
    ├── ShapeError         tensors that do not fit together
    ├── FileError          a file that is missing, truncated, of a newer version, or not writable
    └── DataError          text or activations that cannot be used as they are

Every message says in one line what was given, what was expected and what to do next. The command
line prints that line and exits with code 1; anything else is a bug and keeps its traceback.
"""

import difflib
from collections.abc import Iterable


class SaekitError(Exception):
    """The root of everything saekit raises on purpose."""


class ShapeError(SaekitError, ValueError):
    """Tensors whose shapes or layouts do not fit together."""


class FileError(SaekitError, OSError):
    """A file or folder that cannot be read or written as asked."""

    def __str__(self) -> str:  # OSError would reformat a single argument
        return str(self.args[0])


class DataError(SaekitError, ValueError):
    """Text or activations that cannot be used as they are."""


class UnknownNameError(SaekitError, KeyError):
    """A name that is not in a known, finite set."""

    def __init__(self, kind: str, name: str, known: Iterable[str]):
        known = sorted(known)
        close = difflib.get_close_matches(name, known, n=3, cutoff=0.5) or known[:3]
        super().__init__(f"no {kind} named {name!r}; closest of {len(known)}: {', '.join(close)}")

    def __str__(self) -> str:  # KeyError would print the repr
        return str(self.args[0])
