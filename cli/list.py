"""`saekit list`: the published SAEs that saekit knows by name."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from .output import columns, write_facts

if TYPE_CHECKING:
    from saekit.index import IndexEntry

SHOWN = 60


@dataclass(frozen=True, kw_only=True, slots=True)
class List:
    """List published SAEs: the releases, or the SAEs whose name or model has a text in it.

    What is listed loads by its name: `saekit info gpt2-small-res-jb/blocks.8.hook_resid_pre`. Entries that
    nobody has compared with the Hub say so.

    Example:
      saekit list
      saekit list gpt2
      saekit list layer_20 --model gemma-2-2b --json
    """

    text: Annotated[str, tyro.conf.Positional] = ""
    """Only SAEs with this in their name or their model; every word of it."""
    model: str | None = None
    """Only SAEs of models with this in their name."""
    index: Path | None = None
    """Another index: a file in the form of saekit's or of SAELens' pretrained_saes.yaml."""
    json: bool = False
    """Print all that the index says of them as JSON."""
    config: Path | None = None
    """YAML file with any of these settings; flags win over it."""

    def run(self) -> int:
        from saekit.errors import UnknownNameError
        from saekit.index import read_index

        entries = list(read_index(self.index).values())
        chosen = [entry for entry in entries if matches(entry, self.text, self.model)]
        if not chosen:
            wanted = " of ".join(part for part in (self.text, self.model) if part)
            raise UnknownNameError("published SAE", wanted, {entry.release for entry in entries})
        facts = {"saes": [{"name": entry.name, **_said(entry)} for entry in chosen]}
        by_release = not self.text
        write_facts(
            facts, as_json=self.json, text=lambda: _releases_as_text(chosen) if by_release else _saes_as_text(chosen)
        )
        return 0


def matches(entry: "IndexEntry", text: str, model: str | None) -> bool:
    """Whether every word of the text is in the SAE's name or model, and `model` in the model."""
    everything = f"{entry.name} {entry.model} {entry.repo_id}".lower()
    return all(word in everything for word in text.lower().split()) and (model or "").lower() in entry.model.lower()


def _said(entry: "IndexEntry") -> dict[str, object]:
    import dataclasses

    return {known.name: getattr(entry, known.name) for known in dataclasses.fields(entry)}


def _releases_as_text(entries: Sequence["IndexEntry"]) -> str:
    rows: list[tuple[str, str]] = []
    releases = {entry.release: [other for other in entries if other.release == entry.release] for entry in entries}
    for release, own in releases.items():
        verified = sum(entry.verified is not None or bool(entry.package) for entry in own)
        checked = "" if verified == len(own) else " (not verified)" if not verified else f" ({verified} verified)"
        models = ", ".join(dict.fromkeys(entry.model for entry in own))
        rows.append((release, f"{len(own):>3} of {models}{checked}"))
    return columns(rows) + "\n\n`saekit list TEXT` shows the SAEs of those that match."


def _saes_as_text(entries: Sequence["IndexEntry"]) -> str:
    rows = [(entry.name, _in_a_line(entry)) for entry in entries[:SHOWN]]
    more = f"\n  ... and {len(entries) - SHOWN:,} more: give more text, or --json" if len(entries) > SHOWN else ""
    return columns(rows) + more


def _in_a_line(entry: "IndexEntry") -> str:
    size = f"{entry.d_in:,} -> {entry.d_sae:,}" if entry.d_in and entry.d_sae else ""
    l0 = f"L0 {entry.l0:g}" if entry.l0 is not None else ""
    checked = "" if entry.verified or entry.package else "not verified"
    return ", ".join(part for part in (entry.model, entry.site, size, l0, checked) if part)
