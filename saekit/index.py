"""The index of published SAEs: releases and SAEs by name, and where each one is.

An index is a YAML file in the form of SAELens' list of SAEs (`pretrained_saes.yaml`), which is read as it is. To that
form saekit adds fields, a `version` above `releases`, and patterns: an entry under `saes` with `each` stands for as
many SAEs as the lists in it are long. `pretrained_index.yaml` documents the fields in its first lines.
"""

import functools
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import yaml

from saekit.errors import FileError, UnknownNameError
from saekit.hub import HubPlace, check_inside

PACKAGE = Path(__file__).parent
INDEX_FILE = "pretrained_index.yaml"
INDEX_VERSION = 2

_RANGE = re.compile(r"([0-9]+)-([0-9]+)")
_LARGEST = 32 * 2**20
_MOST_SAES = 100_000
# libyaml where there is one: SAELens' own list is 1.5 MB
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


@dataclass(frozen=True, kw_only=True, slots=True)
class IndexEntry:
    """One SAE of the index.

    Attributes:
        repo_id: repository on the Hub; empty for SAEs that come with saekit.
        package: folder inside the installed saekit, for those that do.
        revision: commit or branch of the repository; None is its main branch.
        path: folder or file of the SAE, below that.
        sha256: of the file of weights; None where it was never verified.
        verified: when `saekit index verify` last found the SAE as described; None if never.
        format: as `saekit.formats.known` calls it.
        hook_name: the Site it reads, as TransformerLens calls it; `hf_hook_name` as Hugging Face's modules do.
        hook_name_out: the Site it writes, if that is another.
        rule: what decides which features are active, in words.
        l0: active features per token, as its authors say.
        variance_explained: the same, as a fraction.
        norm_scaling_factor: what inputs must be multiplied with, where the files do not say it.
        neuronpedia: where its dashboards are on neuronpedia.org.
        licence: SPDX identifier; None where it is not known.
        links: publication, dashboards, and so on.
        config_overrides: settings that its own config lacks or has wrong, as SAELens' list has them.
    """

    release: str
    sae_id: str
    model: str
    repo_id: str = ""
    package: str = ""
    revision: str | None = None
    path: str = ""
    sha256: str | None = None
    verified: str | None = None
    format: str | None = None
    hook_name: str = ""
    hf_hook_name: str = ""
    hook_name_out: str = ""
    d_in: int | None = None
    d_sae: int | None = None
    rule: str | None = None
    l0: float | None = None
    variance_explained: float | None = None
    norm_scaling_factor: float | None = None
    neuronpedia: str | None = None
    licence: str | None = None
    about: str = ""
    links: Mapping[str, str] = field(default_factory=dict)
    config_overrides: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """What `saekit.load` takes."""
        return f"{self.release}/{self.sae_id}"

    @property
    def site(self) -> str:
        """The Site it reads, in Hugging Face's spelling where it is known."""
        return self.hf_hook_name or self.hook_name

    @property
    def place(self) -> HubPlace | None:
        """Where it is on the Hub; None for those that come with saekit."""
        return HubPlace(self.repo_id, self.revision, self.path) if self.repo_id else None


Index = Mapping[tuple[str, str], IndexEntry]


def index_path() -> Path:
    """The index of published SAEs: inside the package in a wheel, beside it in a checkout."""
    inside = PACKAGE / INDEX_FILE
    return inside if inside.exists() else PACKAGE.parent / INDEX_FILE


def read_index(path: Path | None = None) -> Index:
    """All entries by (release, sae_id); saekit's own index if no path is given.

    Raises:
        FileError: if the file is missing, no YAML, of a newer version, or an entry is not of the form.
    """
    path = path or index_path()
    return _read(path, path.stat().st_mtime_ns if path.is_file() else 0)


@functools.lru_cache(maxsize=4)
def _read(path: Path, changed: int) -> Index:
    releases = releases_of(path)
    entries: dict[tuple[str, str], IndexEntry] = {}
    for release, shared in releases.items():
        for entry in _entries(path, str(release), shared):
            if (entry.release, entry.sae_id) in entries:
                raise FileError(f"{path}: {entry.name} is there twice; give one of them another id")
            entries[entry.release, entry.sae_id] = entry
            if len(entries) > _MOST_SAES:
                raise FileError(f"{path} stands for more than {_MOST_SAES:,} SAEs; is it an index?")
    return entries


def releases_of(path: Path) -> Mapping[str, Any]:
    """The releases of an index as they are written.

    Raises:
        FileError: as `read_index`.
    """
    try:
        if path.stat().st_size > _LARGEST:
            raise FileError(f"{path} is {path.stat().st_size:,} bytes, too long for an index; give another")
        index = yaml.load(path.read_text(encoding="utf-8"), Loader=_LOADER)
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        if isinstance(error, FileError):
            raise
        raise FileError(f"cannot read the index {path}: {str(error).splitlines()[0]}; copy it again") from error
    if not isinstance(index, Mapping):
        raise FileError(f"{path} holds a {type(index).__name__}; expected releases by name")
    if "releases" not in index:
        return index
    version = index.get("version")
    if not isinstance(version, int) or version > INDEX_VERSION or not isinstance(index["releases"], Mapping):
        raise FileError(f"{path} is of a version that this saekit does not read; upgrade with `pip install -U saekit`")
    return index["releases"]


def find(release: str, sae_id: str, *, index: Index | None = None) -> IndexEntry:
    """The entry of a published SAE.

    Raises:
        UnknownNameError: listing the closest names there are.
    """
    index = read_index() if index is None else index
    if (release, sae_id) not in index:
        releases = {name for name, _ in index}
        if release in releases:
            raise UnknownNameError(f"SAE in {release}", sae_id, {own for name, own in index if name == release})
        raise UnknownNameError("pretrained SAE", f"{release}/{sae_id}", {entry.name for entry in index.values()})
    return index[release, sae_id]


def find_name(name: str) -> IndexEntry | None:
    """The entry that `release/sae_id` names, or a release alone that has one SAE; None if it names no release.

    Raises:
        UnknownNameError: a release of the index, but no SAE of it.
    """
    index = read_index()
    release, _, sae_id = name.partition("/")
    own = [entry for entry in index.values() if entry.release == release]
    if not own:
        return None
    return own[0] if not sae_id and len(own) == 1 else find(release, sae_id, index=index)


def _entries(path: Path, release: str, shared: Any) -> Iterator[IndexEntry]:
    if not isinstance(shared, Mapping) or not isinstance(shared.get("saes"), list):
        raise FileError(
            f"{path}: release {release[:60]!r} has no list of saes; see the comment at the top of the index"
        )
    overrides = shared.get("config_overrides")
    common = {**shared, **(overrides if isinstance(overrides, Mapping) else {}), "model": shared.get("model")}
    for own in shared["saes"]:
        if not isinstance(own, Mapping) or "id" not in own:
            raise FileError(f"{path}: an SAE of {release} has no id; see the comment at the top of the index")
        for filled in _expanded(f"{path}: {release}/{str(own['id'])[:60]}", {**common, **own}):
            yield _entry(f"{path}: entry {release}/{str(filled['id'])[:80]}", release, filled)


def _expanded(where: str, written: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """The SAEs that one entry stands for: with `each` {layer: 0-11}, twelve in which `{layer}` is 0, 1, ..."""
    if "each" not in written:
        yield written
        return
    each = written["each"]
    if not isinstance(each, Mapping) or not each:
        raise FileError(f"{where}: each is a {type(each).__name__}; expected names, and a list or a range such as 0-11")
    columns = {str(name): _values(where, str(name), values) for name, values in each.items()}
    if len({len(values) for values in columns.values()}) != 1:
        lengths = ", ".join(f"{name} {len(values)}" for name, values in columns.items())
        raise FileError(f"{where}: the lists under each differ in length ({lengths}); expected one value for each SAE")
    for row in zip(*columns.values(), strict=True):
        values = dict(zip(columns, row, strict=True))
        yield {name: _filled(value, values) for name, value in written.items() if name != "each"}


def _values(where: str, name: str, values: Any) -> list[Any]:
    found = _RANGE.fullmatch(values) if isinstance(values, str) else None
    if found is not None and int(found[2]) - int(found[1]) < _MOST_SAES:
        return list(range(int(found[1]), int(found[2]) + 1))
    if not isinstance(values, list):
        raise FileError(f"{where}: each {name} is {str(values)[:40]!r}; expected a list, or a range such as 0-11")
    return values


def _filled(value: Any, values: Mapping[str, Any]) -> Any:
    """`{layer}` in text becomes the layer; a text that is nothing else becomes the value itself, a number say."""
    if not isinstance(value, str):
        return value
    for name, one in values.items():
        if value == f"{{{name}}}":
            return one
        value = value.replace(f"{{{name}}}", str(one))
    return value


_TYPES: dict[str, type | tuple[type, ...]] = {
    "d_in": int,
    "d_sae": int,
    "l0": (int, float),
    "variance_explained": (int, float),
    "norm_scaling_factor": (int, float),
    "links": Mapping,
    "config_overrides": Mapping,
}
_KEPT = [known.name for known in fields(IndexEntry) if known.name not in ("release", "sae_id")]


def _entry(where: str, release: str, written: Mapping[str, Any]) -> IndexEntry:
    values = {name: written[name] for name in _KEPT if written.get(name) is not None}
    if isinstance(values.get("path"), int):  # a folder called 0, unquoted
        values["path"] = str(values["path"])
    if values.get("path") == ".":  # the repository itself
        values["path"] = ""
    for name, value in values.items():
        kind = _TYPES.get(name, str)
        if not isinstance(value, kind) or isinstance(value, bool):
            expected = {int: "a whole number", str: "text", Mapping: "names and values"}.get(kind, "a number")  # pyright: ignore[reportArgumentType]
            raise FileError(f"{where}: {name} is a {type(value).__name__}, expected {expected}; correct the index")
        values[name] = float(value) if isinstance(kind, tuple) else value
    entry = IndexEntry(release=release, sae_id=str(written["id"]), **{"model": "", **values})
    if not entry.model or not (entry.repo_id or entry.package):
        raise FileError(f"{where} lacks its {'repo_id' if entry.model else 'model'}; see the comment at its top")
    check_inside(entry.path, of=where)
    check_inside(entry.package, of=where)
    if entry.repo_id and HubPlace.parse(entry.repo_id) != HubPlace(entry.repo_id):
        raise FileError(f"{where}: repo_id is {entry.repo_id[:60]!r}, expected OWNER/NAME; correct the index")
    # in SAELens' list the id is the Site wherever nothing else says it
    is_site = not entry.hook_name and re.fullmatch(r"blocks\.[0-9]+(\.\w+)*\.hook_\w+", entry.sae_id)
    return replace(entry, hook_name=entry.sae_id) if is_site else entry
