"""An SAE as a repository of the Hub: its folder, and a model card that says what it is and how to load it."""

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from saekit import hub
from saekit.crosscoder import joined_sites
from saekit.errors import FileError, SaekitError
from saekit.hub import HubPlace
from saekit.sae import SAE
from saekit.selection import Threshold

CARD_FILE = "README.md"

_METRICS = {
    "l0": "active features per token",
    "fvu": "fraction of variance unexplained",
    "dead_fraction": "features that never fired",
    "ce_recovered": "loss recovered, against a Site set to zero",
    "ce_recovered_mean": "loss recovered, against a Site at its mean",
    "kl": "nats from the model's prediction to the one with the SAE spliced in",
}


@dataclass(frozen=True, slots=True)
class Upload:
    """What is, or would be, in the repository.

    Attributes:
        files: name in the repository -> bytes.
        card: the model card.
        url: of the commit; None if nothing was sent.
    """

    place: HubPlace
    files: Mapping[str, int]
    card: str
    url: str | None


def upload(
    sae: SAE, place: HubPlace, *, public: bool = False, licence: str | None = None, dry_run: bool = False
) -> Upload:
    """Write the SAE's folder and card to a repository of the Hub, which is made if it is not there.

    Args:
        place: repository and folder in it; its revision must not be given.
        public: False makes a private repository, and refuses one that exists and is public.
        licence: SPDX identifier of the weights, for the card.
        dry_run: sends nothing and asks nothing.

    Raises:
        SaekitError: a place that cannot be written to.
        FileError: no token, no right to write there, or the Hub cannot be reached.
    """
    if place.revision is not None:
        raise SaekitError(f"{place} names a revision; uploads go to the main branch: give {place.repo} alone")
    with tempfile.TemporaryDirectory() as beside:
        folder = Path(beside) / "sae"
        sae.save(folder)
        text = card(sae, place, licence=licence)
        (folder / CARD_FILE).write_text(text, encoding="utf-8")
        start = f"{place.path}/" if place.path else ""
        files = {f"{start}{path.name}": path.stat().st_size for path in sorted(folder.iterdir())}
        url = None if dry_run else _send(folder, place, public=public)
    return Upload(place, files, text, url)


def _send(folder: Path, place: HubPlace, *, public: bool) -> str:
    from huggingface_hub import HfApi, get_token

    if get_token() is None:
        raise FileError("uploading needs a token that may write: log in with `hf auth login`, or set HF_TOKEN")
    api = HfApi()
    hub.patiently(place, lambda: api.create_repo(place.repo, private=not public, exist_ok=True), writes=True)
    if not public and not hub.patiently(place, lambda: api.model_info(place.repo), writes=True).private:
        raise SaekitError(f"{place.repo} exists and is public; pass --public if the SAE may be seen by everybody")
    message = f"SAE by saekit {version('saekit')}"
    sent = hub.patiently(
        place,
        lambda: api.upload_folder(
            repo_id=place.repo, folder_path=folder, path_in_repo=place.path or None, commit_message=message
        ),
        writes=True,
    )
    return str(sent.commit_url)


def card(sae: SAE, place: HubPlace, *, licence: str | None = None) -> str:
    """The model card, in Markdown with the front matter that the Hub reads.

    Says nothing that the SAE does not: metrics, recipe, model and text are what its metadata records.
    """
    cfg = sae.cfg
    front = {
        "library_name": "saekit",
        "tags": ["sparse-autoencoder", "interpretability"],
        **({"license": licence.lower()} if licence else {}),
        **({"base_model": cfg.model_name} if _is_of_the_hub(cfg.model_name) else {}),
    }
    sites = joined_sites(cfg.metadata) or ((cfg.hook_name,) if cfg.hook_name else ())
    is_joint = len(sites) > 1
    kind = "Crosscoder" if is_joint else "Transcoder" if sae.is_transcoder else "Sparse autoencoder"
    facts = {
        "model": cfg.model_name or "not recorded",
        "Sites" if is_joint else "Site": ", ".join(f"`{site}`" for site in sites) or "not recorded",
        **({"writes": f"`{cfg.hook_name_out}`"} if cfg.hook_name_out else {}),
        "shape": f"{sae.d_model:,} → {sae.n_features:,} features → {sae.d_out:,}",
        "rule": "JumpReLU (a threshold for each feature)"
        if isinstance(sae.rule, Threshold) and sae.rule.relu
        else f"`{sae.rule!r}`",
        "normalisation": f"`{cfg.normalisation!r}`",
        **({"text": f"`{cfg.metadata['text']}`"} if "text" in cfg.metadata else {}),
    }
    name = cfg.model_name or place.repo
    sections = [
        "---\n" + yaml.safe_dump(front, sort_keys=False) + "---",
        f"# {kind} on {', '.join((name, *sites))}",
        _table(("", ""), facts.items()),
        f"## How to load it\n\n```python\n{_loading(place, is_joint=is_joint)}\n```",
        *_metrics_section(cfg.metadata),
        *_recipe_section(cfg.metadata),
    ]
    return "\n\n".join(sections) + "\n"


def _loading(place: HubPlace, *, is_joint: bool) -> str:
    loaded = f"saekit.load({str(place)!r})"
    if is_joint:
        return f"import saekit\nfrom saekit.crosscoder import Crosscoder\n\ncrosscoder = Crosscoder.of({loaded})"
    return f"import saekit\n\nsae = {loaded}"


def _is_of_the_hub(model: str) -> bool:
    """Whether a model's name is OWNER/NAME and no path on this machine, which the Hub would refuse."""
    place = HubPlace.parse(model)
    return place is not None and place.repo == model and not Path(model).exists()


def _metrics_section(metadata: Mapping[str, Any]) -> list[str]:
    measured = metadata.get("evaluation")
    if not isinstance(measured, Mapping):
        return ["## Metrics\n\nNot recorded; `saekit eval` measures them."]
    known = [
        (f"`{name}`", f"{measured[name]:.4g} ({meaning})") for name, meaning in _METRICS.items() if name in measured
    ]
    over = f" over {measured['tokens']:,} activations" if "tokens" in measured else ""
    for site, numbers in measured.get("by_site", {}).items():
        known += [
            (f"`{name}` at `{site}`", f"{numbers[name]:.4g}") for name in _METRICS if numbers.get(name) is not None
        ]
    return [f"## Metrics\n\nOn held-out text{over}.\n\n" + _table(("metric", "value"), known)]


def _recipe_section(metadata: Mapping[str, Any]) -> list[str]:
    recipe = metadata.get("training")
    if not isinstance(recipe, Mapping):
        return []
    rows = [(f"`{name}`", f"`{value}`") for name, value in recipe.items() if value is not None]
    return ["## How it was trained\n\n" + _table(("setting", "value"), rows)]


def _table(heads: tuple[str, str], rows: Any) -> str:
    lines = [f"| {left} | {str(right).replace('|', chr(92) + '|')} |" for left, right in rows]
    return "\n".join([f"| {heads[0]} | {heads[1]} |", "| --- | --- |", *lines])
