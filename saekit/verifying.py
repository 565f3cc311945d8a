"""Entries of the index beside what is on the Hub: does each SAE exist, and is it what the index says?

No weights are fetched: a hash is what the Hub says of the file, shapes are from its header.
"""

import datetime
from dataclasses import dataclass, replace
from pathlib import Path

import yaml

from saekit import hub, pretrained
from saekit.errors import FileError, SaekitError
from saekit.formats.tensor_files import HEADERS
from saekit.hub import HubPlace
from saekit.index import IndexEntry
from saekit.loading import describe_located


@dataclass(frozen=True, slots=True)
class Finding:
    """One entry, as it is and as it should be.

    Attributes:
        problems: what is not as the index says, a line each; empty if all is.
        found: the entry with what was found in the place of what it says; None if there is no such SAE.
    """

    entry: IndexEntry
    problems: tuple[str, ...]
    found: IndexEntry | None


def verify(entry: IndexEntry) -> Finding:
    """Compare an entry with the files that it names.

    Raises:
        UnreachableError: if the Hub cannot be asked; every other trouble is a finding.
    """
    try:
        found = measured(entry)
    except hub.UnreachableError:
        raise
    except SaekitError as error:
        return Finding(entry, (str(error),), None)
    names = ("revision", "sha256", "format", "d_in", "d_sae")
    said = {name: (getattr(entry, name), getattr(found, name)) for name in names}
    problems = [f"{name} is {new}, the index says {old}" for name, (old, new) in said.items() if old not in (None, new)]
    own, sites = found.hook_name, [site for site in (entry.hook_name, entry.hf_hook_name) if site]
    # some files leave out what stands before `layers`
    if own and sites and not any(site == own or site.endswith(f".{own}") for site in sites):
        problems.append(f"its files say that it reads {own}, the index says {sites[0]}")
    return Finding(entry, tuple(problems), found)


def measured(entry: IndexEntry) -> IndexEntry:
    """The entry with revision, hash, format, sizes and Site as its files have them, verified today.

    Raises:
        FileError: no such SAE, or one that saekit cannot read.
    """
    found = pretrained.located(entry)
    values: dict[str, object] = {"verified": datetime.datetime.now(datetime.UTC).date().isoformat()}
    weights = None
    if found.place is not None:
        listing, weights = pretrained.choose(hub.ask(found.place))
        values |= {"revision": listing.commit, "sha256": listing.sha256.get(weights)}
        found = replace(found, place=HubPlace(found.place.repo, listing.commit, found.place.path))
    if weights is None or Path(weights).suffix in HEADERS:
        # of what the index knows nothing may stand in for what the files do not say
        described = describe_located(replace(found, entry=None))
        if found.place is None:
            values["sha256"] = hub.sha256_of(described.file)
        values |= {"format": described.format, "d_in": described.weights.d_in, "d_sae": described.weights.n_features}
        values |= {"hook_name": described.weights.hook_name}
    return replace(entry, **values)


def new_entry(place: HubPlace, *, release: str, sae_id: str, model: str) -> IndexEntry:
    """An entry for an SAE on the Hub, filled from its files.

    Args:
        model: what was interpreted; what its files say if empty.

    Raises:
        FileError: no such SAE, or nothing that says which model it belongs to.
    """
    described = describe_located(pretrained.Located(None, place))
    weights = described.weights
    model = model or weights.model_name
    if not model:
        raise FileError(f"the files of {place} do not say which model they belong to; pass --model")
    entry = IndexEntry(
        release=release, sae_id=sae_id, model=model, repo_id=place.repo, revision=place.revision, path=place.path
    )
    kind = type(weights.rule).__name__
    rule = f"{kind}({weights.rule.k})" if hasattr(weights.rule, "k") else kind  # pyright: ignore[reportAttributeAccessIssue]
    return replace(measured(entry), hook_name=weights.hook_name, hook_name_out=weights.hook_name_out, rule=rule)


def as_yaml(entry: IndexEntry) -> str:
    """The entry as a release of one SAE, to be added at the end of an index."""
    shared = {name: getattr(entry, name) for name in ("about", "licence", "model", "repo_id", "revision")}
    own_names = ("path", "format", "hook_name", "hf_hook_name", "hook_name_out", "d_in", "d_sae", "rule", "l0")
    own = {name: getattr(entry, name) for name in (*own_names, "sha256", "verified")}
    release = {name: value for name, value in shared.items() if value}
    release["saes"] = [{"id": entry.sae_id, **{name: value for name, value in own.items() if value}}]
    text = yaml.safe_dump({entry.release: release}, sort_keys=False, width=118)
    return "".join(f"  {line}\n" for line in text.splitlines())
