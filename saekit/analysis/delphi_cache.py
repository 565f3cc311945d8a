"""Codes on disk as EleutherAI's delphi keeps them, so that it can explain and score saekit's features.

For each range of features one `FIRST_LAST.safetensors` in a folder that is named after the Site:

    locations    (n, 3) row, position, feature less FIRST; uint16 if all of them fit, else uint32
    activations  (n,) float16
    tokens       (rows, context) ids of all rows, the same in every file

and `config.json` with what delphi's CacheConfig records. Masked tokens have no entries.
"""

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import save_file

from saekit.activations.harvest import Harvest
from saekit.checkpoint import check_place, written_whole
from saekit.errors import DataError, FileError
from saekit.sae import SAE

_LARGEST_HALF = 65504.0
_PART = re.compile(r"[0-9]+_[0-9]+\.safetensors")


def write_delphi_cache(
    folder: Path,
    sae: SAE,
    harvest: Harvest,
    *,
    text: str,
    n_splits: int = 5,
    on_progress: Callable[[int], None] = lambda rows_done: None,
) -> int:
    """Encode all rows of the harvest and write the cache; the number of entries in it.

    Args:
        folder: gets a folder for the Site, which replaces what was there.
        harvest: of the SAE's one Site.
        text: what the rows were read from, for the config.
        n_splits: files, each with as many features.

    Raises:
        DataError: if no feature fired, or an activation is too large for the format.
        FileError: if it cannot be written.
    """
    (site,) = harvest.sites
    # delphi knows outputs of modules, by the modules' names
    place = folder / str(site).removesuffix(":out").replace(":", "_")
    check_place(place)
    if place.exists() and not _is_cache(place):
        raise FileError(f"{place} is there and is no cache of delphi's; give another folder")
    entries = _entries(sae, harvest, on_progress)
    row, position, feature, value = (np.concatenate(part) for part in zip(*entries, strict=True))
    if not len(value):
        raise DataError("no feature fired on any token, so there is nothing for delphi to explain; give more text")
    largest = np.abs(value).max()
    if largest > _LARGEST_HALF:
        raise DataError(
            f"an activation is {largest:.4g}, and delphi keeps none above {_LARGEST_HALF:g}; scale the SAE "
            "(SAE.rescaled) first"
        )
    bounds = np.linspace(0, sae.n_features, n_splits + 1).astype(np.int64)
    tokens = harvest.rows.ids.numpy()
    with written_whole(place) as beside:
        for first, end in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
            kept = (feature >= first) & (feature < end)
            locations = np.stack([row[kept], position[kept], feature[kept] - first], axis=1)
            small = max(locations.max(initial=0), len(tokens), tokens.shape[1]) < 2**16
            contents = {
                "locations": locations.astype(np.uint16 if small else np.uint32),
                "activations": value[kept].astype(np.float16),
                "tokens": tokens,
            }
            save_file(contents, beside / f"{first}_{end - 1}.safetensors")
        (beside / "config.json").write_text(json.dumps(_config(harvest, text, n_splits), indent=2) + "\n")
    return len(value)


def _is_cache(place: Path) -> bool:
    """Whether a folder holds a cache and nothing else, so that no SAE is ever replaced by its own codes."""
    try:
        config = json.loads((place / "config.json").read_text())
    except (OSError, ValueError):
        return False
    others = (path.name for path in place.iterdir() if path.name != "config.json")
    return isinstance(config, dict) and "cache_ctx_len" in config and all(_PART.fullmatch(name) for name in others)


def _entries(
    sae: SAE, harvest: Harvest, on_progress: Callable[[int], None]
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]]:
    (site,) = harvest.sites
    for batches in harvest.in_order():
        batch = batches[site]
        with torch.no_grad():
            codes = sae.encode(batch.vectors.to(sae.b_dec.device)).to("cpu")
        active = (codes.values != 0).nonzero()[:, 0]
        token = codes.token_of_entry()[active]
        on_progress(harvest.batch_rows)
        parts = (batch.document[token], batch.position[token], codes.features[active], codes.values[active])
        yield tuple(part.numpy() for part in parts)  # pyright: ignore[reportReturnType]


def _config(harvest: Harvest, text: str, n_splits: int) -> dict[str, Any]:
    rows = harvest.rows
    return {
        "dataset_repo": text,
        "dataset_split": "train",
        "dataset_name": "",
        "dataset_column": "text",
        "batch_size": harvest.batch_rows,
        "cache_ctx_len": rows.context,
        "n_tokens": rows.ids.numel(),
        "n_splits": n_splits,
        "model_name": harvest.target.name,
    }
