"""Names of published SAEs to folders on disk: look up in the index, fetch, verify.

The index is `pretrained_index.yaml`; its first lines document its fields.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from saekit.checkpoint import CONFIG_FILE, WEIGHTS_FILE
from saekit.errors import FileError, UnknownNameError

PACKAGE = Path(__file__).parent
INDEX_FILE = "pretrained_index.yaml"
INDEX_VERSION = 1


@dataclass(frozen=True, slots=True)
class IndexEntry:
    """One SAE of the index.

    Attributes:
        source: `hub:OWNER/REPO@REVISION`, or `package:PATH` for a folder that comes with saekit.
        path: folder below the source.
        sha256: of the weights file.
    """

    release: str
    sae_id: str
    model: str
    site: str
    d_model: int
    n_features: int
    licence: str
    source: str
    path: str
    sha256: str


def index_path() -> Path:
    """The index of published SAEs: inside the package in a wheel, beside it in a checkout."""
    inside = PACKAGE / INDEX_FILE
    return inside if inside.exists() else PACKAGE.parent / INDEX_FILE


def bundled_model_path() -> Path:
    """The folder of `pystd`, the bundled language model, in Hugging Face format."""
    return PACKAGE / "assets" / "pystd"


def read_index(path: Path | None = None) -> dict[tuple[str, str], IndexEntry]:
    """All entries by (release, sae_id).

    Raises:
        FileError: if the file is missing, no YAML, of a newer version, or an entry lacks a field.
    """
    path = path or index_path()
    try:
        index = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError) as error:
        raise FileError(f"cannot read the index {path}: {str(error).splitlines()[0]}; install saekit again") from error
    if not isinstance(index, Mapping) or index.get("version", 0) > INDEX_VERSION:
        raise FileError(f"{path} is of a version that this saekit does not read; upgrade with `pip install -U saekit`")
    return {
        (release, sae_id): _entry(path, release, sae_id, shared, own)
        for release, shared in index["releases"].items()
        for sae_id, own in shared["saes"].items()
    }


def find(release: str, sae_id: str) -> IndexEntry:
    """The entry of a published SAE.

    Raises:
        UnknownNameError: listing the closest names there are.
    """
    index = read_index()
    if (release, sae_id) not in index:
        raise UnknownNameError("pretrained SAE", f"{release}/{sae_id}", {"/".join(key) for key in index})
    return index[release, sae_id]


def fetch(release: str, sae_id: str) -> Path:
    """The folder of a published SAE, downloaded if it is not on this machine yet, with its weights verified.

    Raises:
        UnknownNameError: no such SAE.
        FileError: it cannot be downloaded, or the weights are not the ones of the index.
    """
    entry = find(release, sae_id)
    kind, _, place = entry.source.partition(":")
    folder = PACKAGE / place / entry.path if kind == "package" else _download(entry, place)
    weights = folder / WEIGHTS_FILE
    found = hashlib.sha256(weights.read_bytes()).hexdigest() if weights.exists() else "no such file"
    if found != entry.sha256:
        raise FileError(
            f"{weights} is not what the index describes (sha256 {found[:12]}, expected {entry.sha256[:12]}); "
            "delete it and fetch it again"
        )
    return folder


def _download(entry: IndexEntry, place: str) -> Path:
    from huggingface_hub import hf_hub_download  # only for SAEs that are not on this machine

    repo, _, revision = place.partition("@")
    try:
        files = [
            hf_hub_download(repo, f"{entry.path}/{name}", revision=revision) for name in (CONFIG_FILE, WEIGHTS_FILE)
        ]
    except Exception as error:  # the Hub's client raises whatever its transport raises
        raise FileError(
            f"cannot fetch {entry.release}/{entry.sae_id} from {repo}: {str(error).splitlines()[0]}; check the network"
        ) from error
    return Path(files[0]).parent


def _entry(path: Path, release: str, sae_id: str, shared: Mapping[str, Any], own: Mapping[str, Any]) -> IndexEntry:
    try:
        return IndexEntry(
            release=release,
            sae_id=sae_id,
            model=shared["model"],
            site=own["site"],
            d_model=own["d_model"],
            n_features=own["n_features"],
            licence=shared["licence"],
            source=shared["source"],
            path=own["path"],
            sha256=own["sha256"],
        )
    except (KeyError, TypeError) as error:
        raise FileError(f"{path}: entry {release}/{sae_id} lacks {error}; see the comment at its top") from error
