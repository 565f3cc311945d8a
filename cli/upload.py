"""`saekit upload`: an SAE and its model card to the Hub."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from .output import columns, write_facts


@dataclass(frozen=True, kw_only=True, slots=True)
class Upload:
    """Put an SAE on the Hub, with a model card that says what it is, how good it is, and how to load it.

    The repository is private unless told otherwise, and is made if it is not there. What the card says is what
    the SAE's own metadata records. An SAE of another format is written in saekit's, which SAELens reads too.

    Example:
      saekit upload sae me/my-saes --dry-run
      saekit upload sae me/my-saes --path layers.2 --licence MIT
    """

    sae: Annotated[Path, tyro.conf.Positional]
    """Folder or file of the SAE, or any other name that `saekit info` takes."""
    repo: Annotated[str, tyro.conf.Positional]
    """OWNER/NAME on the Hub."""
    path: str = ""
    """Folder in the repository, for one of several SAEs."""
    public: bool = False
    """Let everybody see it."""
    licence: str | None = None
    """SPDX identifier of the weights, such as MIT."""
    dry_run: bool = False
    """Show the files and the card, and send nothing."""
    json: bool = False
    """Print the facts as JSON."""
    config: Path | None = None
    """YAML file with any of these settings; flags win over it."""

    def run(self) -> int:
        from saekit.errors import SaekitError
        from saekit.hub import HubPlace
        from saekit.loading import load
        from saekit.publishing import upload

        place = HubPlace.parse(f"{self.repo}:{self.path}" if self.path else self.repo)
        if place is None:
            raise SaekitError(f"{self.repo} is no repository; give OWNER/NAME")
        sent = upload(load(self.sae), place, public=self.public, licence=self.licence, dry_run=self.dry_run)
        facts = {
            "repo": place.repo,
            "path": place.path,
            "private": not self.public,
            "sent": sent.url is not None,
            "url": sent.url,
            "files": sent.files,
            "card": sent.card,
        }
        files = columns((name, f"{size:,} bytes") for name, size in sent.files.items())
        heading = f"to {place}: {sent.url}" if sent.url else f"to {place}, if this were no dry run:"
        write_facts(
            facts, as_json=self.json, text=lambda: f"{heading}\n{files}" + ("" if sent.url else f"\n\n{sent.card}")
        )
        return 0
