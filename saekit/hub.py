"""Files of repositories on the Hugging Face Hub: which there are, and copies of them on this machine.

Everything goes through `huggingface_hub` and its cache, so `HF_HOME`, `HF_TOKEN`, `HF_ENDPOINT` and `HF_HUB_OFFLINE`
mean what they mean elsewhere. What is the library's own doing: partial downloads go on where they stopped, bars on
stderr. What is ours: errors of one line, more than one try, names that would leave the cache are refused, and what
arrived is compared with the hash that the Hub or the index gives.
"""

import hashlib
import io
import re
import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from saekit.errors import FileError

Answer = TypeVar("Answer")

# between one try and the next where the Hub itself is at fault
WAITS_S = (1.0, 3.0)

_PLACE = re.compile(r"(?P<repo>\w[\w.-]*/\w[\w.-]*)(?:@(?P<revision>[^:@]+))?(?::(?P<path>.+))?")
# how the Hub's client opens what it says before the reason
_SAYS_NOTHING = re.compile(r"\(Request ID|Bad request\b.*:$")
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True, slots=True)
class HubPlace:
    """A place in a repository, as text `owner/name[@revision][:path]`.

    Attributes:
        revision: branch, tag or commit; None is the repository's main branch.
        path: a folder or a file; the whole repository if empty.
    """

    repo: str
    revision: str | None = None
    path: str = ""

    @classmethod
    def parse(cls, text: str) -> "HubPlace | None":
        """The place, or None if the text has not that form.

        Raises:
            FileError: it has, but its path leaves the repository.
        """
        found = _PLACE.fullmatch(text)
        if found is None:
            return None
        path = (found["path"] or "").strip("/")
        check_inside(path, of=text)
        return cls(found["repo"], found["revision"], path)

    @property
    def is_pinned(self) -> bool:
        """Whether it will always mean the same files."""
        return self.revision is not None and bool(_COMMIT.fullmatch(self.revision))

    def at(self, path: str) -> "HubPlace":
        """Another place in the same repository."""
        return HubPlace(self.repo, self.revision, path)

    def __str__(self) -> str:
        revision = f"@{self.revision}" if self.revision else ""
        return f"{self.repo}{revision}{f':{self.path}' if self.path else ''}"


@dataclass(frozen=True, slots=True)
class Listing:
    """The files of a repository at one commit.

    Attributes:
        names: relative to the repository.
        folder: the copy of these files in the cache, if that is where the list comes from; it may lack some.
        sha256: of those files of which the Hub says it.
    """

    place: HubPlace
    commit: str
    names: tuple[str, ...]
    folder: Path | None = None
    sha256: Mapping[str, str] = field(default_factory=dict)

    def below(self) -> list[str]:
        """The names of the files at the place, relative to it."""
        start = f"{self.place.path}/" if self.place.path else ""
        return [name.removeprefix(start) for name in self.names if name.startswith(start)]


class UnreachableError(FileError):
    """The Hub did not answer, or may not be asked."""


def ask(place: HubPlace) -> Listing:
    """The files of the repository, as the Hub lists them now.

    Raises:
        UnreachableError: no connection, or offline mode.
        FileError: no such repository or revision, no right to read it, or a list that no Hub would give.
    """
    from huggingface_hub import HfApi

    info = patiently(place, lambda: HfApi().model_info(place.repo, revision=place.revision, files_metadata=True))
    commit, files = str(info.sha), info.siblings or []
    if not _COMMIT.fullmatch(commit):
        raise FileError(f"what answers for {place.repo} gives {commit[:60]!r} as a commit; is HF_ENDPOINT a Hub?")
    for file in files:
        check_inside(file.rfilename, of=place.repo)
    hashes = {file.rfilename: _of_lfs(file.lfs) for file in files if file.lfs is not None}
    return Listing(place, commit, tuple(file.rfilename for file in files), sha256=hashes)


def recall(place: HubPlace) -> Listing | None:
    """The files of the repository that are on this machine already; None if there are none of that revision."""
    reference = _cache_of(place) / "refs" / (place.revision or "main")
    commit = reference.read_text().strip() if reference.is_file() else str(place.revision)
    folder = snapshot_folder(place, commit)
    if not _COMMIT.fullmatch(commit) or not folder.is_dir():
        return None
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return Listing(place, commit, tuple(names), folder)


def snapshot_folder(place: HubPlace, commit: str) -> Path:
    """Where the repository's files of that commit are on this machine, if any are."""
    return _cache_of(place) / "snapshots" / commit


def _cache_of(place: HubPlace) -> Path:
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    return Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=place.repo, repo_type="model")


def look_up(place: HubPlace) -> Listing:
    """What the Hub lists, or else what of it is on this machine.

    Warns:
        UserWarning: where the Hub cannot be asked and what is here may be out of date.

    Raises:
        FileError: as `ask`.
    """
    try:
        return ask(place)
    except UnreachableError as error:
        kept = recall(place)
        if kept is None:
            raise
        if not place.is_pinned:
            warnings.warn(f"{error}; using what is on this machine, commit {kept.commit[:8]}", stacklevel=2)
        return kept


def fetch(listing: Listing, names: Iterable[str]) -> Path:
    """A folder that holds these files of the repository under their names; what is here already is not sent again.

    Raises:
        FileError: a file that cannot be had, or is not what the Hub says it is (it is removed then).
    """
    folders = {_fetch_one(listing, name) for name in names} if listing.folder is None else {listing.folder}
    if len(folders) != 1 or next(iter(folders)).name != listing.commit:
        raise FileError(f"{listing.place.repo} changed while it was read; run it again")
    return folders.pop()


def _fetch_one(listing: Listing, name: str) -> Path:
    from huggingface_hub import hf_hub_download, try_to_load_from_cache

    place = listing.place
    is_here = isinstance(try_to_load_from_cache(place.repo, name, revision=listing.commit), str)
    path = Path(patiently(place.at(name), lambda: hf_hub_download(place.repo, name, revision=place.revision)))
    if name in listing.sha256 and not is_here:
        verify(path, listing.sha256[name], source="the Hub")
    return path.parents[len(PurePosixPath(name).parents) - 1]


def open_remote(listing: Listing, name: str) -> io.BufferedReader:
    """A file of the repository for reading a few parts of it.

    Raises:
        FileError: if it cannot be had.
    """
    from huggingface_hub import HfFileSystem

    def open_it() -> Any:
        files = HfFileSystem(skip_instance_cache=True)
        return files.open(f"{listing.place.repo}@{listing.commit}/{name}", "rb", block_size=_BLOCK)

    here = listing.place.at(name)
    return io.BufferedReader(_Remote(here, patiently(here, open_it)))


# most headers are shorter; the directory of a zip archive is at its end and takes another
_BLOCK = 2**16


class _Remote(io.RawIOBase):
    """A file of the Hub whose errors are saekit's."""

    def __init__(self, place: HubPlace, file: Any):
        self.place, self.file = place, file

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return self.file.seek(offset, whence)

    def tell(self) -> int:
        return self.file.tell()

    def readinto(self, buffer: Any) -> int:
        part = patiently(self.place, lambda: self.file.read(len(buffer)))
        buffer[: len(part)] = part
        return len(part)

    def close(self) -> None:
        if not self.closed:
            self.file.close()
        super().close()


def sha256_of(path: Path) -> str:
    """The hash of a file's contents, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def verify(path: Path, sha256: str, *, source: str) -> None:
    """Compare a file with its hash; a copy in the Hub's cache that differs is removed.

    Raises:
        FileError: if it differs.
    """
    found = sha256_of(path)
    if found == sha256:
        return
    is_copy = path.is_symlink()
    if is_copy:
        path.resolve().unlink(missing_ok=True)
        path.unlink(missing_ok=True)
    raise FileError(
        f"{path} is not what {source} describes (sha256 {found[:12]}, expected {sha256[:12]}); "
        + ("it was removed: fetch it again" if is_copy else "install or copy it again")
    )


def check_inside(name: str, *, of: str) -> None:
    """Refuse a path that does not stay in its folder, on any system.

    Raises:
        FileError: naming it.
    """
    parts = re.split(r"[/\\]", name)
    if name and (".." in parts or "" in parts or re.match("[A-Za-z]:", name) or "\0" in name):
        raise FileError(f"{of} names a file {name[:80]!r}, which would lie outside its folder; nothing was fetched")


def patiently(place: HubPlace, call: Callable[[], Answer], *, writes: bool = False) -> Answer:
    """What `call` answers, tried again where the Hub is at fault.

    Args:
        writes: whether it sends something there, for the error.

    Raises:
        FileError: in one line, whatever the Hub's client raised.
    """
    for wait_s in (*WAITS_S, None):
        try:
            return call()
        except FileError:
            raise
        except Exception as error:  # the Hub's client raises whatever its transport raises
            if wait_s is None or _status(error) < 500:
                raise _refusal(place, error, writes=writes) from error
            time.sleep(wait_s)
    raise AssertionError("the last try returns or raises")


def _causes(error: BaseException | None) -> Iterable[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def _status(error: BaseException) -> int:
    """The HTTP status behind an error; 0 if it has none."""
    responses = (getattr(cause, "response", None) for cause in _causes(error))
    return next((int(getattr(response, "status_code", 0)) for response in responses if response is not None), 0)


def _refusal(place: HubPlace, error: Exception, *, writes: bool) -> FileError:
    from huggingface_hub import constants, errors

    causes, status = tuple(_causes(error)), _status(error)

    def is_a(*kinds: type[BaseException]) -> bool:
        return any(isinstance(cause, kinds) for cause in causes)

    if is_a(errors.OfflineModeIsEnabled):
        return UnreachableError(f"{place} is not on this machine, and HF_HUB_OFFLINE is set; unset it to fetch")
    if is_a(errors.GatedRepoError):
        page = f"{constants.ENDPOINT}/{place.repo}"
        return FileError(f"{place.repo} is gated: accept its terms on {page}, then log in with `hf auth login`")
    if is_a(errors.RevisionNotFoundError):
        return FileError(f"{place.repo} has no revision {place.revision}; give a branch, a tag or a full commit")
    if is_a(errors.RepositoryNotFoundError) or status == 401:
        return FileError(
            f"no repository {place.repo} on the Hub (nor a local {place}), or a private one; check the name, or set "
            f"HF_TOKEN to a token that may {'write' if writes else 'read'} it"
        )
    if is_a(errors.EntryNotFoundError) and status == 404:
        return FileError(f"{place.repo} has no {place.path} at {place.revision or 'main'}; check the path")
    if status >= 500:
        return UnreachableError(f"the Hub answers {status} for {place}, {len(WAITS_S) + 1} times now; try again later")
    reason = _reason(causes[0] if status else causes[-1])
    if status or (is_a(OSError) and not is_a(errors.LocalEntryNotFoundError, ConnectionError)):
        if writes:
            return FileError(f"cannot write to {place}: {reason}; mend that, and send it again")
        return FileError(f"cannot fetch {place}: {reason}; run it again, what has arrived is kept")
    return UnreachableError(f"cannot reach the Hub for {place}: {reason}; check the network")


def _reason(error: BaseException) -> str:
    """What an error says, in one line."""
    lines = (line.strip() for line in str(error).splitlines())
    said = " ".join(line for line in lines if line and not _SAYS_NOTHING.match(line))
    return said[:240] or type(error).__name__


def _of_lfs(lfs: Any) -> str:
    """The hash in what the Hub says of a large file, which older clients give as a mapping."""
    return str(lfs["sha256"] if isinstance(lfs, Mapping) else lfs.sha256)
