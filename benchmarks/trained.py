"""SAEs that a study needs and that are not bundled."""

from pathlib import Path

import saekit


def trained(folder: Path, *arguments: str) -> saekit.SAE:
    """The SAE in a folder; if it is not there, `saekit train` makes it, with these arguments."""
    if not folder.exists():
        from saekit_cli.main import main  # pyright: ignore[reportMissingImports]

        if main(["train", *arguments, "--out", str(folder)]):
            raise SystemExit(f"training {folder} did not work; see above")
    return saekit.load(folder)
