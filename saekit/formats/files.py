"""The files of one SAE: which file holds the weights, and values out of them by name.

No file is opened because another one names it: the names that are looked for are the ones in this room.
"""

import io
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic, TypeVar

import yaml
from torch import Tensor

from saekit.errors import FileError
from saekit.formats.choosing import CONFIGS, folder_of, weights_among
from saekit.formats.tensor_files import Read, read_header, read_tensors

Value = TypeVar("Value")

_LARGEST_CONFIG = 16 * 2**20


class Named(Mapping[str, Value], Generic[Value]):
    """Values by name that say which file lacks one."""

    def __init__(self, path: Path, kind: str, values: Mapping[str, Value]):
        self.path, self.kind, self.values_by_name = path, kind, values

    def __getitem__(self, name: str) -> Value:
        if name not in self.values_by_name:
            held = ", ".join(list(self.values_by_name)[:12]) or "nothing"
            raise FileError(
                f"{self.path} has no {self.kind} {name}, only {held}; is it whole, and all of one kind of SAE?"
            )
        return self.values_by_name[name]

    # Mapping asks __getitem__ and expects a KeyError
    def __contains__(self, name: object) -> bool:
        return name in self.values_by_name

    def get(self, name: str, default: Any = None) -> Any:
        return self.values_by_name.get(name, default)

    def __iter__(self) -> Iterator[str]:
        return iter(self.values_by_name)

    def __len__(self) -> int:
        return len(self.values_by_name)


class Config(Named[Any]):
    """What a JSON or YAML file says, with types checked where a value is used."""

    def number(self, name: str) -> int:
        return self._typed(name, int, "a whole number")

    def count(self, name: str) -> int | None:
        """None where there is none."""
        return None if self.get(name) is None else self.number(name)

    def real(self, name: str) -> float:
        return float(self._typed(name, (int, float), "a number"))

    def text(self, name: str, default: str = "") -> str:
        """Empty text is what stands for null."""
        return default if self.get(name) is None else self._typed(name, str, "text")

    def flag(self, name: str, default: bool = False) -> bool:
        return default if self.get(name) is None else self._typed(name, bool, "true or false")

    def part(self, name: str) -> "Config":
        """A mapping inside this one; an empty one if there is none."""
        value = {} if self.get(name) is None else self._typed(name, Mapping, "a mapping")
        return Config(self.path, f"{name} key", value)

    def _typed(self, name: str, kind: Any, expected: str) -> Any:
        value = self[name]
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            # never the repr of a collection: aliases of YAML can make a short file's billions of lines long
            shown = repr(value)[:60] if isinstance(value, str | int | float) else f"a {type(value).__name__}"
            raise FileError(f"{self.path}: {name} is {shown}, expected {expected}; correct it, or copy it again")
        return value


@dataclass(frozen=True, slots=True)
class Files:
    """One SAE on disk, opened.

    Attributes:
        folder: where its files are, as an absolute path.
        weights: the file that holds its tensors.
        tensors: by name; on the meta device if only their shapes were asked for.
        rest: what the weights file holds that is no tensor.
        config: its JSON config; empty where there is none.
    """

    folder: Path
    weights: Path
    tensors: Named[Tensor]
    rest: Config
    config: Config

    def sibling(self, *names: str) -> Config:
        """The first of these YAML or JSON files beside the weights that is there; empty where none is."""
        return _read_first(self.folder, names)

    def with_settings(self, settings: Mapping[str, Any]) -> "Files":
        """The same files, as if the config said this too."""
        config = Config(self.config.path, self.config.kind, {**self.config.values_by_name, **settings})
        return replace(self, config=config)

    def sibling_tensors(self, name: str) -> Named[Tensor]:
        """The tensors of a safetensors file beside the weights; none where it is not there."""
        path = self.folder / name
        if not path.is_file():
            return Named(path, "tensor", {})
        tensors, _ = read_tensors(path, contents=not any(tensor.is_meta for tensor in self.tensors.values()))
        return Named(path, "tensor", tensors)

    def above(self, *names: str) -> Config:
        """The same in the folder above."""
        return _read_first(self.folder.parent, names)

    @property
    def place(self) -> str:
        """The whole path as text: some formats say nowhere else which model and layer they belong to."""
        return self.weights.as_posix()


def open_files(path: Path, *, contents: bool = True) -> Files:
    """The SAE in a folder, or in a file that holds its weights.

    Args:
        contents: False reads shapes and single numbers alone.

    Raises:
        FileError: nothing there, several files that could be meant, or one that is damaged.
    """
    path = path.expanduser().absolute()
    weights = path if path.is_file() else _weights_in(path)
    return _files(weights, read_tensors(weights, contents=contents))


def open_elsewhere(weights: Path, file: io.BufferedReader) -> Files:
    """An SAE whose weights are read through `file`, of which only shapes and single numbers are asked for.

    Args:
        weights: where they would lie; the configs that belong to them are there already.

    Raises:
        FileError: as `open_files`, and for a kind of file that cannot be read in parts (`.pt`).
    """
    return _files(weights, read_header(weights, file))


def _files(weights: Path, read: Read) -> Files:
    folder = Path(folder_of(weights))
    tensors, rest = read
    return Files(
        folder=folder,
        weights=weights,
        tensors=Named(weights, "tensor", tensors),
        rest=Config(weights, "entry", rest),
        config=_read_first(folder, CONFIGS),
    )


def _weights_in(folder: Path) -> Path:
    if not folder.is_dir():
        raise FileError(
            f"no file or folder {folder}; give a local one, an SAE of the index (`saekit list`), or one on the Hub as "
            "OWNER/NAME:PATH"
        )
    found = [*folder.glob("*"), *folder.glob("*/*"), *folder.glob("*/checkpoints/*")]
    names = sorted(path.relative_to(folder).as_posix() for path in found if path.is_file())
    return folder / weights_among(names, place=str(folder), example=f"{folder}/{{}}")


def _read_first(folder: Path, names: tuple[str, ...]) -> Config:
    path = next((folder / name for name in names if (folder / name).is_file()), None)
    if path is None:
        return Config(folder / names[0], "key", {})
    try:
        if path.stat().st_size > _LARGEST_CONFIG:
            raise FileError(f"{path} is {path.stat().st_size:,} bytes, too long for a config; copy it again")
        text = path.read_text(encoding="utf-8")
        value = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except FileError:
        raise
    except (ValueError, RecursionError, OSError, yaml.YAMLError) as error:
        kind = "JSON" if path.suffix == ".json" else "YAML"
        raise FileError(
            f"{path} is not readable {kind} ({str(error).splitlines()[0]}); copy or download it again"
        ) from error
    if not isinstance(value, dict):
        raise FileError(f"{path} holds a {type(value).__name__}; expected names and values")
    return Config(path, "key", value)
