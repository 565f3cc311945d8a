"""`--config run.yaml`: a file whose keys are the flags of a command; flags on the command line win over it."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import tyro

# what a YAML value may be for a field of each type; YAML reads 1e-4, which has no point, as a string
SCALARS = {bool: (bool,), int: (int,), float: (int, float, str), str: (str,), Path: (str,)}
REFUSED = object()


def config_defaults(command: type, argv: Sequence[str]) -> Any:
    """`command` with the values of the file that `--config` names, or tyro's MISSING_NONPROP without one.

    Fields that neither the file nor the dataclass sets stay required on the command line.

    Raises:
        FileError: if the file cannot be read, is not a mapping, or has a value of the wrong type.
        UnknownNameError: for a key that is no flag of the command, with the closest.
    """
    fields = {field.name: field for field in dataclasses.fields(command)}
    path = _config_argument(argv)
    if path is None or "config" not in fields:
        return tyro.MISSING_NONPROP
    values = _converted(path, _read(path), command, fields.keys() - {"config"})
    required = {
        name: tyro.MISSING
        for name, field in fields.items()
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    }
    return command(**required | values)


def _config_argument(argv: Sequence[str]) -> Path | None:
    for i, argument in enumerate(argv):
        if argument == "--config" and i + 1 < len(argv):
            return Path(argv[i + 1])
        if argument.startswith("--config="):
            return Path(argument.removeprefix("--config="))
    return None


def _read(path: Path) -> Mapping[str, Any]:
    import yaml

    from saekit.errors import FileError

    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise FileError(f"cannot read {path}: {error.strerror}; --config expects a YAML file") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise FileError(f"{path} is not YAML ({reason}); expected lines such as `k: 32`") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise FileError(f"{path} holds a {type(values).__name__}; expected flags and values, such as `k: 32`")
    return values


def _converted(path: Path, values: Mapping[str, Any], command: type, known: set[str]) -> dict[str, Any]:
    from saekit.errors import FileError, UnknownNameError

    hints = get_type_hints(command)
    converted = {}
    for key, value in values.items():
        name = str(key).replace("-", "_")
        if name not in known:
            raise UnknownNameError(f"flag in {path}", str(key), [flag.replace("_", "-") for flag in known])
        converted[name] = _as_type(value, hints[name])
        if converted[name] is REFUSED:
            expected = hints[name].__name__ if hints[name] in SCALARS else hints[name]
            raise FileError(f"{path}: {key} is {value!r}, expected {expected}; correct it, or leave it out")
    return converted


def _as_type(value: Any, hint: Any) -> Any:
    """`value` as the type a field declares, or REFUSED."""
    arguments = get_args(hint)
    if hint is Any:
        return value
    if hint in SCALARS:
        is_fit = isinstance(value, SCALARS[hint]) and (hint is bool or not isinstance(value, bool))
        try:
            return hint(value) if is_fit else REFUSED
        except ValueError:
            return REFUSED
    if hint is NoneType:
        return None if value is None else REFUSED
    if get_origin(hint) is Literal:
        if isinstance(value, bool):  # what YAML takes an unquoted yes or no for
            value = "yes" if value else "no"
        return value if value in arguments else REFUSED
    if get_origin(hint) in (Union, UnionType):
        fits = (_as_type(value, option) for option in arguments)
        return next((fit for fit in fits if fit is not REFUSED), REFUSED)
    if get_origin(hint) is tuple and isinstance(value, list):
        items = tuple(_as_type(item, arguments[0]) for item in value)
        return REFUSED if REFUSED in items else items
    return REFUSED
