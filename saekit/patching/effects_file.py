"""Effects of features, kept beside the SAE that they are of: `effects.safetensors`.

effect, low, high, random, active   `(n_features,)` as in `CorpusEffects`
checked, attributed, exact          `(m,)` as in `ExactCheck`; effects are not kept without their check
metadata                            `of` the SAE they were measured with, and `facts` as JSON
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from saekit.errors import FileError
from saekit.patching.corpus_effects import CorpusEffects, ExactCheck
from saekit.sae import SAE
from saekit.sae_config import describe_rule
from saekit.training.state_file import read_state, write_state
from saekit.training.warm_start import checksum_of_weights

FILE = "effects.safetensors"


@dataclass(frozen=True, slots=True)
class KeptEffects:
    """What the file holds.

    Attributes:
        facts: how it was measured: model, text, Site, settings.
    """

    effects: CorpusEffects
    check: ExactCheck
    facts: Mapping[str, Any]


def keep_effects(folder: Path, sae: SAE, kept: KeptEffects) -> Path:
    """Write the file, whole or not at all, and return where it is.

    Raises:
        FileError: if it cannot be written.
    """
    effects, check = kept.effects, kept.check
    tensors = {name: getattr(effects, name) for name in ("effect", "low", "high", "random", "active")}
    tensors |= {"checked": check.feature, "attributed": check.attributed, "exact": check.exact}
    numbers = {"rows": effects.rows, "rank_correlation": check.rank_correlation, "slope": check.slope}
    metadata = {"of": fingerprint(sae), "numbers": json.dumps(numbers), "facts": json.dumps(dict(kept.facts))}
    write_state(folder / FILE, {name: tensor.contiguous() for name, tensor in tensors.items()}, metadata)
    return folder / FILE


def kept_effects(folder: Path, sae: SAE) -> KeptEffects | None:
    """What was measured of this SAE; None if nothing was.

    Raises:
        FileError: a damaged file, or one about another SAE.
    """
    path = folder / FILE
    if not path.is_file():
        return None
    try:
        tensors, metadata = read_state(path)
        numbers, facts = json.loads(metadata["numbers"]), json.loads(metadata["facts"])
        effects = CorpusEffects(
            *(tensors[name] for name in ("effect", "low", "high", "random", "active")), rows=numbers["rows"]
        )
        check = ExactCheck(
            *(tensors[name] for name in ("checked", "attributed", "exact")),
            rank_correlation=numbers["rank_correlation"],
            slope=numbers["slope"],
        )
        of = metadata["of"]
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise FileError(f"{path} cannot be read ({error}); delete it and run `saekit effects {folder}`") from error
    if of != fingerprint(sae):
        raise FileError(f"{path} is about another SAE than {folder} holds; delete it and run `saekit effects {folder}`")
    return KeptEffects(effects, check, facts)


def fingerprint(sae: SAE) -> str:
    """Of all that decides what an SAE reads and writes: weights, rule and normalisation."""
    settings = describe_rule(sae.rule), sae.cfg.normalisation, sae.cfg.apply_b_dec_to_input
    return hashlib.sha256(repr((settings, checksum_of_weights(sae))).encode()).hexdigest()
