"""`saekit index`: compare the index of published SAEs with the Hub, or make an entry for it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from .list import matches
from .output import Progress, columns, write_facts


@dataclass(frozen=True, kw_only=True, slots=True)
class Index:
    """Compare entries of the index with the Hub, or write an entry for an SAE that is there.

    `verify` asks the Hub about every SAE whose name or model has the text in it: whether it is there, with
    which commit and hash, and whether its header has the sizes of the index. `add` reads the files of an SAE
    and prints the entry that belongs at the end of an index. Neither fetches weights, and neither changes a
    file: what it prints is yours to add.

    Example:
      saekit index verify gpt2-small-res-jb
      saekit index add owner/name:layers.5 --release mine --id layers.5 >> my_index.yaml
    """

    action: Annotated[Literal["verify", "add"], tyro.conf.Positional]
    what: Annotated[str, tyro.conf.Positional] = ""
    """For verify: text of names or models, all if empty. For add: OWNER/NAME[@REVISION][:PATH]."""
    release: str | None = None
    """For add: the name of the release; the repository's name if not given."""
    id: str | None = None
    """For add: the name of the SAE in it; its path if not given."""
    model: str | None = None
    """For add: the model it belongs to, if its files do not say it."""
    index: Path | None = None
    """For verify: another index than saekit's own."""
    json: bool = False
    """Print the facts as JSON."""
    config: Path | None = None
    """YAML file with any of these settings; flags win over it."""

    def run(self) -> int:
        return self._add() if self.action == "add" else self._verify()

    def _add(self) -> int:
        import dataclasses

        from saekit.errors import SaekitError
        from saekit.hub import HubPlace
        from saekit.verifying import as_yaml, new_entry

        place = HubPlace.parse(self.what)
        if place is None:
            raise SaekitError(f"{self.what or 'nothing'} is no place on the Hub; give OWNER/NAME[@REVISION][:PATH]")
        name = place.repo.partition("/")[2]
        entry = new_entry(
            place, release=self.release or name, sae_id=self.id or place.path or name, model=self.model or ""
        )
        write_facts(dataclasses.asdict(entry), as_json=self.json, text=lambda: as_yaml(entry).rstrip("\n"))
        return 0

    def _verify(self) -> int:
        from saekit.errors import UnknownNameError
        from saekit.index import read_index
        from saekit.verifying import verify

        entries = [entry for entry in read_index(self.index).values() if matches(entry, self.what, self.model)]
        if not entries:
            raise UnknownNameError("published SAE", self.what, {name for name, _ in read_index(self.index)})
        with Progress("verifying", len(entries), unit="SAEs") as progress:
            findings = []
            for entry in entries:
                findings.append(verify(entry))
                progress.to(len(findings))
        wrong = [finding for finding in findings if finding.problems]
        facts = {
            "verified": len(findings) - len(wrong),
            "wrong": len(wrong),
            "saes": [{"name": f.entry.name, "problems": f.problems, "found": f.found} for f in findings],
        }
        rows = [(f.entry.name, "; ".join(f.problems) or _pins(f.found)) for f in findings]
        write_facts(facts, as_json=self.json, text=lambda: columns(rows))
        return 1 if wrong else 0


def _pins(found: object) -> str:
    """What an entry that is right may say from now on."""
    said = {name: getattr(found, name) for name in ("revision", "sha256", "verified")}
    return "as described; " + ", ".join(f"{name}: {value}" for name, value in said.items() if value)
