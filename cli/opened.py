"""A saved SAE together with the model and the text that it belongs to."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from saekit.activations.corpus import Corpus, load_corpus, load_rows
from saekit.activations.harvest import checksum
from saekit.activations.mask import MaskPolicy
from saekit.activations.text import Document
from saekit.activations.tokens import TokenRows
from saekit.crosscoder import Crosscoder, joined_sites
from saekit.errors import SaekitError
from saekit.loading import describe, load
from saekit.pretrained import locate
from saekit.sae import SAE
from saekit.selection import check_serves_prompts
from saekit.targets import Site, Target

BUNDLED_SAE = "pystd/layers.2"


@dataclass(frozen=True, slots=True)
class OpenedSAE:
    """An SAE ready to be looked at.

    Attributes:
        text: what the corpus was read from.
        corpus: divided as in training; a text that the SAE was not trained on is held out as a whole.
        is_own_text: whether that is what the SAE was trained on, by name or by content.
        is_as_trained: whether model and Site are those of training too, so that what was measured then is of these.
    """

    sae: SAE
    target: Target
    site: Site
    mask: MaskPolicy
    text: str
    corpus: Corpus
    is_own_text: bool = True
    is_as_trained: bool = True


def open_sae(
    folder: Path,
    *,
    model: str | None,
    text: str | None,
    site: str | None,
    rows: int | None,
    device: str,
    input_scale: float | None = None,
) -> OpenedSAE:
    """Load an SAE, its model and its text.

    Args:
        input_scale: as of `saekit.load`.
        rows: how many held-out rows to keep, the first ones; all that training set aside, or all of another
            text, if None.

    Raises:
        SaekitError: if the folder does not say what the SAE belongs to and the caller does not either, or `rows`
            is less than 1.
    """
    _check_rows(rows)
    sae = load_of_one_site(folder, device, input_scale=input_scale)
    settled = _settled(sae, model=model, text=text) | {"site": site or sae.cfg.hook_name}
    _check_settled(folder, settled)
    target, mask, corpus, is_own_text = _open_text(sae, settled, rows=rows, device=device)
    is_as_trained = is_own_text and _is_placed_as_trained(sae, settled)
    at = Site.parse(settled["site"])
    return OpenedSAE(sae, target, at, mask, settled["text"], corpus, is_own_text, is_as_trained)


@dataclass(frozen=True, slots=True)
class OpenedCrosscoder:
    """A crosscoder ready to be measured; attributes as of `OpenedSAE`."""

    crosscoder: Crosscoder
    target: Target
    mask: MaskPolicy
    corpus: Corpus
    is_as_trained: bool = True


def open_crosscoder(
    folder: Path, *, model: str | None, text: str | None, rows: int | None, device: str
) -> OpenedCrosscoder:
    """Load a crosscoder, its model and its text; arguments and errors as for `open_sae`."""
    _check_rows(rows)
    crosscoder = load_crosscoder(folder, device)
    settled = _settled(crosscoder.sae, model=model, text=text)
    _check_settled(folder, settled)
    target, mask, corpus, is_own_text = _open_text(crosscoder.sae, settled, rows=rows, device=device)
    is_as_trained = is_own_text and _is_placed_as_trained(crosscoder.sae, settled)
    return OpenedCrosscoder(crosscoder, target, mask, corpus, is_as_trained)


def check_own_sites(folder: Path, site: str | None) -> None:
    """Refuse another Site for a crosscoder."""
    if site is not None:
        raise SaekitError(f"{folder} is a crosscoder, which reads the Sites of its training; leave --site out")


def is_crosscoder(name: Path) -> bool:
    """Whether its config says so, wherever it is; what has none, or is nowhere, is for its loader to look at."""
    try:
        local = locate(name).local
    except SaekitError:
        return False
    if local is not None and not ((local if local.is_dir() else local.parent) / "cfg.json").is_file():
        return False
    return bool(joined_sites(describe(name).weights.metadata))


def load_crosscoder(name: Path | str, device: str = "cpu") -> Crosscoder:
    """A crosscoder, wherever it is.

    Raises:
        FileError: as `saekit.load`, or an SAE of one Site.
    """
    return Crosscoder.of(load(name, device=device), name=name)


def _check_rows(rows: int | None) -> None:
    if rows is not None:
        check_some("--rows", rows)


def check_some(flag: str, number: int) -> None:
    """Raises: SaekitError for a flag that asks for nothing."""
    if number < 1:
        raise SaekitError(f"{flag} {number} leaves nothing to read; give 1 or more, or leave it out")


def _settled(sae: SAE, *, model: str | None, text: str | None) -> dict[str, Any]:
    return {"model": model or sae.cfg.model_name, "text": text or sae.cfg.metadata.get("text")}


def _is_placed_as_trained(sae: SAE, settled: Mapping[str, Any]) -> bool:
    """Whether model and, where one was to be settled, Site are those of training."""
    own = sae.cfg.hook_name
    is_own_site = bool(own) and Site.parse(settled.get("site", own)) == Site.parse(own)
    return is_own_site and settled["model"] == sae.cfg.model_name


def _open_text(
    sae: SAE, settled: Mapping[str, Any], *, rows: int | None, device: str
) -> tuple[Target, MaskPolicy, Corpus, bool]:
    """The model, the mask, the text divided as in training, and whether it is the text of training."""
    recorded = sae.cfg.metadata
    target = Target.load(settled["model"], device=device)
    context = sae.cfg.context_size or min(target.context or 256, 256)
    if target.context is not None and context > target.context:
        raise SaekitError(
            f"the SAE was trained on rows of {context} tokens, and {settled['model']} reads at most {target.context}; "
            "pass a --model that reads as many"
        )
    row_bos = recorded.get("row_bos", True)
    reading = {"context": context, "row_bos": row_bos, "longest": target.context, "vocabulary": target.vocabulary}
    is_own_text = settled["text"] == recorded.get("text")
    if is_own_text:
        held_out_rows = recorded.get("held_out_rows", 160)
        corpus = load_corpus(
            settled["text"],
            target.tokenizer,
            held_out_rows=held_out_rows,
            max_documents=recorded.get("max_documents"),
            **reading,
        )
        if settled["model"] == sae.cfg.model_name:
            _check_unchanged(settled["text"], corpus, recorded)
    else:
        # as many as tell whether it opens with the text of training
        least = recorded.get("train_rows", 0) + recorded.get("held_out_rows", 0)
        most = None if rows is None else max(rows, least)
        read, documents = load_rows(settled["text"], target.tokenizer, most_rows=most, **reading)
        corpus = _divided(read, documents, recorded)
        is_own_text = corpus.train is not corpus.held_out
    corpus = replace(corpus, held_out=corpus.held_out.select(slice(rows)))
    return target, MaskPolicy(**recorded.get("mask", {})), corpus, is_own_text


def _check_unchanged(text: str, corpus: Corpus, recorded: Mapping[str, Any]) -> None:
    """Refuse a text of the name of the one trained on, whose held-out rows would be others than then.

    The standard library is divided by its modules, so that nothing that was trained on is ever held out.
    """
    kept = recorded.get("text_checksum")
    if text != "stdlib" and kept is not None and checksum(corpus.train.ids) != kept:
        raise SaekitError(
            f"{text} is not what it was when the SAE was trained on it, so that its held-out rows cannot be told; "
            "restore it, or pass --text with this one under another name or path"
        )


def load_of_one_site(name: Path | str, device: str = "cpu", *, input_scale: float | None = None) -> SAE:
    """An SAE of any format.

    Raises:
        SaekitError: a crosscoder, which few commands can place.
    """
    sae = load(name, device=device, input_scale=input_scale)
    if sites := joined_sites(sae.cfg.metadata):
        raise SaekitError(
            f"{name} is a crosscoder of {', '.join(sites)}, and this needs an SAE of one Site; `saekit eval` "
            "measures and `export` shows it, `saekit train --crosscoder --start` goes on from it"
        )
    return sae


def _divided(rows: TokenRows, documents: tuple[Document, ...], recorded: Mapping[str, Any]) -> Corpus:
    """All of a text; or, if it opens with the rows of training, divided as there, whatever its name."""
    n_train = recorded.get("train_rows", 0)
    if not n_train or checksum(rows.ids[:n_train]) != recorded["text_checksum"]:
        return Corpus(rows, rows, documents, documents)
    held_out = rows.select(slice(n_train, n_train + recorded["held_out_rows"]))
    return Corpus(rows.select(slice(n_train)), held_out, documents, documents)


@dataclass(frozen=True, slots=True)
class PlacedSAEs:
    """SAEs at their Sites of one model, for prompts.

    Attributes:
        bos: whether the SAEs saw rows that open with BOS, so that prompts should.
    """

    target: Target
    saes: dict[Site, SAE]
    mask: MaskPolicy
    bos: bool


def place_on_model(names: Sequence[str], *, model: str | None, sites: Sequence[str], device: str) -> PlacedSAEs:
    """Load SAEs and the model that they belong to; the bundled SAE if none is named.

    Args:
        sites: one for each SAE, where others are meant than those that they were trained at, else none.

    Raises:
        SaekitError: two SAEs for one Site, or SAEs of several models or that saw different tokens; an SAE that does
            not say what it belongs to, if the caller does not either.
    """
    names = names or (BUNDLED_SAE,)
    if sites and len(sites) != len(names):
        raise SaekitError(f"--site names {len(sites)} Sites for {len(names)} SAEs; give one for each, in their order")
    saes: dict[Site, SAE] = {}
    common: dict[str, Any] = {}
    for name, given in zip(names, sites or [None] * len(names), strict=True):
        sae = load_of_one_site(name, device)
        settled = {"model": model or sae.cfg.model_name, "site": given or sae.cfg.hook_name}
        _check_settled(name, settled)
        site, recorded = Site.parse(settled["site"]), sae.cfg.metadata
        if site in saes:
            raise SaekitError(f"{name} is a second SAE for {site}; give one for each Site, or say where with --site")
        check_serves_prompts(sae.rule)
        saes[site] = sae
        mask, row_bos = MaskPolicy(**recorded.get("mask", {})), recorded.get("row_bos", True)
        own = {"model": settled["model"], "mask": mask, "row_bos": row_bos}
        common = common or own
        different = next((what for what in own if own[what] != common[what]), None)
        if different:
            raise SaekitError(
                f"{name} was trained with {different} {own[different]!r}, {names[0]} with {common[different]!r}; "
                f"give SAEs that were trained alike{', or pass --model' if different == 'model' else ''}"
            )
    target = Target.load(common["model"], device=device)
    return PlacedSAEs(target, saes, common["mask"], common["row_bos"])


def _check_settled(name: Path | str, settled: Mapping[str, str | None]) -> None:
    for what, value in settled.items():
        if not value:
            raise SaekitError(f"{name} does not record its {what}; pass --{what}")
