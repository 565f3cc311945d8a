"""The command line: a table of commands, and what happens to their errors.

A command is a frozen dataclass in its own file, listed in `COMMANDS`. Its fields are the flags, its docstring is
the help and has an "Example:", and `run` does the work. `saekit --help` imports every command, so whatever
loads torch or transformers is imported inside `run`; that is also why `main` imports its own errors late.

    exit code 0    it worked
              1    something the user can change: one line on stderr says what
              2    the command line itself is wrong
              130  interrupted (143: by SIGTERM; 141: whoever read the output left, as `head` does)
    a bug keeps its traceback
"""

import inspect
import os
import signal
import sys
from collections.abc import Sequence
from importlib.metadata import version
from typing import Annotated, Any, Protocol, Union, get_origin, get_type_hints

import tyro

from .adaptive import Adaptive
from .check import Check
from .circuit import Circuit
from .config_file import config_defaults
from .convert import Convert
from .demo import Demo
from .doctor import Doctor
from .effects import Effects
from .evaluate import Eval
from .export import Export
from .index import Index
from .info import Info
from .list import List
from .patch import Patch
from .pretrain import Pretrain
from .stability import Stability
from .steer import Steer
from .train import Train
from .upload import Upload


class Command(Protocol):
    """What the values of `COMMANDS` make."""

    def run(self) -> int | None:
        """Do it, and return an exit code; None means 0."""
        ...


COMMANDS: dict[str, type[Command]] = {
    "demo": Demo,
    "train": Train,
    "eval": Eval,
    "stability": Stability,
    "export": Export,
    "list": List,
    "info": Info,
    "check": Check,
    "convert": Convert,
    "upload": Upload,
    "index": Index,
    "steer": Steer,
    "effects": Effects,
    "patch": Patch,
    "circuit": Circuit,
    "adaptive": Adaptive,
    "pretrain": Pretrain,
    "doctor": Doctor,
}

DESCRIPTION = "Train, inspect and patch sparse autoencoders. `saekit COMMAND --help` says more about one command."
MARKERS = (
    tyro.conf.FlagCreatePairsOff,
    tyro.conf.OmitArgPrefixes,
    tyro.conf.PositionalMetavarFromFieldName,
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; `argv` is everything after the program's name."""
    argv = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    # OpenMP's threads spin for milliseconds when their work is done, on the cores that `saekit.kernels.threads` needs
    # by then: a tenth of a training step. It is read when torch is loaded.
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    if argv == ["--version"]:
        print(f"saekit {version('saekit')}")
        return 0
    try:
        command = parse(argv)
        check_device(getattr(command, "device", "cpu"))
        code = command.run() or 0
        sys.stdout.flush()
        return code
    except KeyboardInterrupt as stop:
        print(str(stop) or "interrupted", file=sys.stderr)
        # a run that was told to stop says by which signal
        return 128 + getattr(stop, "signal", signal.SIGINT)
    except BrokenPipeError:
        # what is still buffered would raise once more when the interpreter ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + getattr(signal, "SIGPIPE", 13)
    except Exception as error:
        from saekit.errors import SaekitError

        if not isinstance(error, SaekitError):
            raise
        print(f"Error: {error}", file=sys.stderr)
        return 1


def parse(argv: Sequence[str]) -> Command:
    """The command that `argv` asks for, filled from `--config` first and from the flags last.

    Raises:
        SystemExit: with code 2 for a wrong command line, which tyro explains, and 0 for `--help`.
        SaekitError: for a config file that cannot be used, or a flag for several values that is there twice.
    """
    _check_given_once(argv)
    choices: list[Any] = [Annotated[None, tyro.conf.Suppress]]
    for name, command in COMMANDS.items():
        is_chosen = name == argv[0]
        text = inspect.getdoc(command) or ""
        details = tyro.conf.subcommand(
            name,
            description=text if is_chosen else text.partition("\n\n")[0],
            default=config_defaults(command, argv[1:]) if is_chosen else tyro.MISSING_NONPROP,
        )
        choices.append(Annotated[command, details])
    any_command: Any = Union[tuple(choices)]  # noqa: UP007
    return tyro.cli(any_command, prog="saekit", description=DESCRIPTION, args=argv, config=MARKERS)


def _check_given_once(argv: Sequence[str]) -> None:
    """Of a flag that takes several values, the parser would take the last and drop the others without a word."""
    from saekit.errors import SaekitError

    command = COMMANDS.get(argv[0])
    kinds = {} if command is None else get_type_hints(command)
    several = {f"--{name.replace('_', '-')}" for name, kind in kinds.items() if get_origin(kind) is tuple}
    flags = [part.partition("=")[0].replace("_", "-") for part in argv if part.startswith("--") and part != "--"]
    repeated = next((flag for flag in flags if flag in several and flags.count(flag) > 1), None)
    if repeated is not None:
        raise SaekitError(
            f"{repeated} is there {flags.count(repeated)} times and takes several values; give it once, with all of "
            "them after it"
        )


def check_device(name: str) -> None:
    """Find out before any work that torch cannot compute there.

    Raises:
        SaekitError: no such device, or not on this machine.
    """
    if name == "cpu":  # which needs no import to tell
        return
    import torch

    from saekit.errors import SaekitError
    from saekit.targets.load import first_line

    try:
        torch.zeros(1, dtype=torch.float64, device=name)  # in which statistics are kept, and MPS has none
    except (RuntimeError, AssertionError, TypeError) as error:  # builds without CUDA assert that there is none
        raise SaekitError(
            f"--device {name} cannot be used ({first_line(error)}); `saekit doctor` lists the devices of this machine"
        ) from error


if __name__ == "__main__":
    sys.exit(main())
