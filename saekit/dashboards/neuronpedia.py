"""Features in the JSON that Neuronpedia imports: the batches that SAEDashboard (0.8) writes for it.

What a page of saekit does not measure is left empty rather than made up: alignment with neurons, correlations, and the
histogram of all logits. The strongest examples are the group that Neuronpedia calls top activations (`bin_min` -1,
`bin_contains` -1); the other groups are parts of a uniform sample, and each says between which activations its shown
examples lie and what share of all activations it stands for.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from saekit.dashboards.page_data import ExampleGroup, FeaturePage, PageData, ShownExample
from saekit.dashboards.static_page import write_text

_NOT_MEASURED = (
    "neuron_alignment_indices", "neuron_alignment_values", "neuron_alignment_l1",
    "correlated_neurons_indices", "correlated_neurons_l1", "correlated_neurons_pearson",
    "correlated_features_indices", "correlated_features_l1", "correlated_features_pearson",
    "logits_hist_data_bar_heights", "logits_hist_data_bar_values", "decoder_weights_dist", "vector",
)  # fmt: skip
_DIGITS = 5


def batch(
    page: PageData, *, layer: int | None, sae_set: str, n_prompts: int, context: int, dataset: str
) -> dict[str, Any]:
    """One batch of features.

    Args:
        layer: of the Site; None where the Site is in no layer.
        sae_set: what Neuronpedia is to call the SAEs of this kind.
        n_prompts: rows that were read, of `context` tokens each.
    """
    common = {"n_prompts_total": n_prompts, "n_tokens_in_prompt": context, "dataset": dataset}
    features = [{**_feature(feature, page.token_text), **common} for feature in page.features]
    return {"model_id": page.model, "layer": layer, "sae_set": sae_set, "sae_id_suffix": None, "features": features}


def write_batch(folder: Path, contents: Mapping[str, Any], *, number: int = 0) -> Path:
    """Write `batch-NUMBER.json` into the folder.

    Raises:
        FileError: if it cannot be written.
    """
    return write_text(folder / f"batch-{number}.json", json.dumps(contents, ensure_ascii=False))


def _feature(feature: FeaturePage, token_text: Mapping[int, str]) -> dict[str, Any]:
    used = [place for place, count in enumerate(feature.histogram) if count]
    return {
        "feature_index": feature.feature,
        **{name: [] for name in _NOT_MEASURED},
        "neg_str": [token_text[token] for token, _ in feature.suppressed],
        "neg_values": [_rounded(by) for _, by in feature.suppressed],
        "pos_str": [token_text[token] for token, _ in feature.promoted],
        "pos_values": [_rounded(by) for _, by in feature.promoted],
        "frac_nonzero": feature.density,
        "freq_hist_data_bar_values": [_rounded((place + 0.5) * feature.bin_width) for place in used],
        "freq_hist_data_bar_heights": [feature.histogram[place] for place in used],
        "activations": [
            _activation(example, group, len(feature.groups), token_text)
            for group in feature.groups
            for example in group.examples
        ],
    }


def _activation(
    example: ShownExample, group: ExampleGroup, n_groups: int, token_text: Mapping[int, str]
) -> dict[str, Any]:
    peaks = [shown.window.values[shown.window.position - shown.window.start] for shown in group.examples]
    is_top = group.title == "Strongest"
    return {
        "bin_min": -1 if is_top else _rounded(min(peaks)),
        "bin_max": _rounded(max(peaks)),
        "bin_contains": -1 if is_top else 1 / (n_groups - 1),
        "tokens": [token_text[token] for token in example.window.tokens],
        "values": [_rounded(value) for value in example.window.values],
        "qualifying_token_index": example.window.position - example.window.start,
    }


def _rounded(value: float) -> float:
    return round(float(value), _DIGITS)
