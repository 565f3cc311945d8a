"""A saved SAE together with the model and the text that it belongs to."""

from dataclasses import dataclass, replace
from pathlib import Path

from saekit.activations.corpus import Corpus, load_corpus, load_rows
from saekit.activations.mask import MaskPolicy
from saekit.errors import SaekitError
from saekit.loading import load
from saekit.sae import SAE
from saekit.targets import Site, Target


@dataclass(frozen=True, slots=True)
class OpenedSAE:
    """An SAE ready to be looked at.

    Attributes:
        text: what the corpus was read from.
        corpus: divided as in training; a text that the SAE was not trained on is held out as a whole.
    """

    sae: SAE
    target: Target
    site: Site
    mask: MaskPolicy
    text: str
    corpus: Corpus


def open_sae(
    folder: Path, *, model: str | None, text: str | None, site: str | None, rows: int | None, device: str
) -> OpenedSAE:
    """Load an SAE, its model and its text.

    Args:
        rows: how many held-out rows to keep, the first ones; all that training set aside, or all of another
            text, if None.

    Raises:
        SaekitError: if the folder does not say what the SAE belongs to and the caller does not either.
    """
    sae = load(folder, device=device)
    recorded = sae.cfg.metadata
    own_text = recorded.get("text")
    settled = {"model": model or sae.cfg.model_name, "text": text or own_text, "site": site or sae.cfg.hook_name}
    for what, value in settled.items():
        if not value:
            raise SaekitError(f"{folder} does not record its {what}; pass --{what}")
    target = Target.load(settled["model"], device=device)
    context = sae.cfg.context_size or min(target.context or 256, 256)
    row_bos = recorded.get("row_bos", True)
    reading = {"context": context, "row_bos": row_bos, "longest": target.context, "vocabulary": target.vocabulary}
    if settled["text"] == own_text:
        held_out_rows = recorded.get("held_out_rows", 160)
        corpus = load_corpus(settled["text"], target.tokenizer, held_out_rows=held_out_rows, **reading)
    else:
        unseen, documents = load_rows(settled["text"], target.tokenizer, **reading)
        corpus = Corpus(train=unseen, held_out=unseen, train_documents=documents, held_out_documents=documents)
    corpus = replace(corpus, held_out=corpus.held_out.select(slice(rows)))
    mask = MaskPolicy(**recorded.get("mask", {}))
    return OpenedSAE(sae, target, Site.parse(settled["site"]), mask, settled["text"], corpus)
