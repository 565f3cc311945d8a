"""From what a user calls an SAE to files on this machine: a path, a name in the index, or a place on the Hub."""

import contextlib
from dataclasses import dataclass
from pathlib import Path

from saekit import hub
from saekit.errors import FileError
from saekit.formats.choosing import companions, weights_among
from saekit.formats.files import Files, open_elsewhere, open_files
from saekit.formats.tensor_files import HEADERS
from saekit.hub import HubPlace, Listing
from saekit.index import PACKAGE, IndexEntry, find_name

HOW_TO_NAME = "a local folder or file, an SAE of the index (`saekit list`), or OWNER/NAME[@REVISION][:PATH] on the Hub"


@dataclass(frozen=True, slots=True)
class Located:
    """Where an SAE was found.

    Attributes:
        local: its folder or file on this machine; None if it is on the Hub.
        place: where it is on the Hub.
        entry: what the index says of it; None if it is not from there.
    """

    local: Path | None
    place: HubPlace | None = None
    entry: IndexEntry | None = None


def bundled_model_path() -> Path:
    """The folder of `pystd`, the bundled language model, in Hugging Face format."""
    return PACKAGE / "assets" / "pystd"


def locate(name: Path | str) -> Located:
    """What a name means: what is on the disk wins over the index, and the index over the Hub.

    Raises:
        UnknownNameError: a release of the index, but no SAE of it.
        FileError: a name of no known form.
    """
    path, text = Path(name), str(name)
    # a home that nobody has, or more letters than a name of a file may have
    with contextlib.suppress(RuntimeError, OSError):
        path = path.expanduser()
        if path.exists():
            return Located(path)
    entry = None if path.is_absolute() else find_name(text)
    if entry is not None:
        return located(entry)
    place = HubPlace.parse(text)
    if place is None:
        raise FileError(f"no file or folder {text}; give {HOW_TO_NAME}")
    return Located(None, place)


def located(entry: IndexEntry) -> Located:
    """Where an SAE of the index is."""
    local = PACKAGE / entry.package / entry.path if entry.package else None
    return Located(local, entry.place, entry)


def fetch(found: Located) -> Path:
    """The folder or file on this machine, downloaded if need be; its weights are the ones of the index.

    Raises:
        FileError: it cannot be downloaded, is not one SAE, or its weights differ from the index.
    """
    path = found.local if found.place is None else _download(found.place)
    assert path is not None, "what is not local is on the Hub"
    if found.entry is not None and found.entry.sha256 is not None:
        weights = path if path.is_file() else _weights_of(path)
        hub.verify(weights, found.entry.sha256, source="the index")
    return path


def open_headers(found: Located) -> Files:
    """The SAE opened for its shapes: of files on the Hub only configs and headers are fetched, where that is possible.

    Raises:
        FileError: as `fetch`.
    """
    if found.place is None:
        return open_files(fetch(found), contents=False)
    listing, weights = choose(hub.look_up(found.place))
    if listing.folder is not None or Path(weights).suffix not in HEADERS:
        return open_files(fetch(found), contents=False)
    folder = _fetch_configs(listing, weights)
    with hub.open_remote(listing, weights) as file:
        return open_elsewhere(folder / weights, file)


def _download(place: HubPlace) -> Path:
    """The file of weights, with its configs beside it."""
    if place.is_pinned and place.path:
        # a commit is always the same: with its weights here, there is nothing to ask
        kept = hub.recall(place)
        with contextlib.suppress(FileError):
            if kept is not None:
                return hub.fetch(kept, ()) / choose(kept)[1]
    listing, weights = choose(hub.look_up(place))
    _fetch_configs(listing, weights)
    return hub.fetch(listing, (weights,)) / weights


def choose(listing: Listing) -> tuple[Listing, str]:
    """The listing, and which of its files holds the weights of the SAE at its place.

    Raises:
        FileError: no SAE there, or more than one.
    """
    place = listing.place
    if place.path in listing.names:
        return listing, place.path
    below = listing.below()
    if not below:
        some = ", ".join(listing.names[:3]) or "nothing"
        kept = " on this machine" if listing.folder is not None else ""
        raise FileError(f"{place.at('')} has no {place.path}{kept}, but {some}, ...; check the path")
    start = f"{place.path}/" if place.path else ""
    return listing, start + weights_among(below, place=str(place), example=str(place.at(f"{start}{{}}")))


def _fetch_configs(listing: Listing, weights: str) -> Path:
    """Before the weights, so that weights that are here have their configs."""
    names = companions(weights, listing.names)
    return hub.fetch(listing, names) if names else hub.snapshot_folder(listing.place, listing.commit)


def _weights_of(folder: Path) -> Path:
    names = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    return folder / weights_among(names, place=str(folder), example=f"{folder}/{{}}")
