"""What `saekit train` reads: the text, the stream of activations, and what is kept of them in the SAE's folder."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from saekit.activations.corpus import Corpus
    from saekit.activations.harvest import Harvest
    from saekit.activations.tokens import TokenRows
    from saekit.targets import Site, Target
    from saekit.training.config import TrainConfig

    from .train import Train


def read_corpus(command: "Train", target: "Target") -> "Corpus":
    """The text of the command, tokenised for the target."""
    from saekit.activations.corpus import load_corpus
    from saekit.errors import SaekitError

    if command.context is not None and command.context < 1:
        raise SaekitError(f"context={command.context}: give at least 1 token for each row, or leave it out")
    if command.context and target.context and command.context > target.context:
        raise SaekitError(
            f"context={command.context:,}, but {target.name} reads at most {target.context:,} tokens; "
            "choose a context up to that"
        )
    if command.held_out_rows < 1:
        raise SaekitError(
            f"held_out_rows={command.held_out_rows}: the SAE is evaluated on text that it was not trained on; "
            "hold out at least 1 row"
        )
    context = command.context or min(target.context or 256, 256)
    corpus = load_corpus(
        command.text,
        target.tokenizer,
        context=context,
        held_out_rows=command.held_out_rows,
        row_bos=command.row_bos == "yes",
        max_documents=command.max_documents,
        longest=target.context,
        vocabulary=target.vocabulary,
    )
    if command.context and corpus.train.context != command.context:
        raise SaekitError(
            f"context={command.context:,}, but {command.text} has rows of {corpus.train.context:,}; "
            "leave --context out, or give the ids as one flat array"
        )
    if command.row_bos == "no" and opens_with_bos(command, corpus.train):
        raise SaekitError(
            f"--row-bos no, but the rows of {command.text} open with BOS; leave it out, or give the ids as one flat "
            "array"
        )
    return corpus


def opens_with_bos(command: "Train", rows: "TokenRows") -> bool:
    """Whether rows do, so that prompts should: as the command says, but where somebody else has cut them."""
    from saekit.activations.token_file import SUFFIX

    if not command.text.endswith(SUFFIX):
        return command.row_bos == "yes"
    return rows.bos is not None and bool((rows.ids[:, 0] == rows.bos).all())


def sites_of(configs: Sequence["TrainConfig"]) -> list["Site"]:
    """All that are read or reconstructed, each once."""
    both = ((config.site, config.site_out) for config in configs)
    return list(dict.fromkeys(site for pair in both for site in pair if site is not None))


def harvest_of(command: "Train", target: "Target", corpus: "Corpus", sites: Sequence["Site"]) -> "Harvest":
    """The stream of activations that training reads."""
    from saekit.activations.harvest import Harvest

    # a buffer longer than the run would be filled for nothing
    buffer_tokens = max(command.batch_tokens, min(1 << 18, command.tokens))
    return Harvest(
        target=target, rows=corpus.train, sites=tuple(sites), buffer_tokens=buffer_tokens, prefetch=command.prefetch
    )


def recorded(command: "Train", corpus: "Corpus", source: "Harvest") -> dict[str, Any]:
    """What is kept in the folder of how it was made, beside the recipe."""
    from saekit.activations.harvest import checksum

    return {
        "text": command.text,
        "train_rows": len(corpus.train),
        "text_checksum": checksum(corpus.train.ids),
        "row_bos": opens_with_bos(command, corpus.train),
        "held_out_rows": command.held_out_rows,
        **({} if command.max_documents is None else {"max_documents": command.max_documents}),
        **({"started_from": list(command.start)} if command.start else {}),
        "mask": source.mask.as_dict(),
        **versions(),
    }


def versions() -> dict[str, str]:
    """What made the weights, for the record."""
    from importlib.metadata import version

    return {f"{package}_version": version(package) for package in ("saekit", "torch", "transformers")}
