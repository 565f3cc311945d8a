"""`saekit info`: what the files of an SAE say, without reading its numbers."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from .output import columns, write_facts

if TYPE_CHECKING:
    from saekit.loading import Description
    from saekit.selection import SelectionRule

UNKNOWN = "not in its files"


@dataclass(frozen=True, kw_only=True, slots=True)
class Info:
    """Say what an SAE is: format, shapes, rule, Site, normalisation.

    Reads headers and configs alone, so it is as quick for a large SAE as for a small one; of one on the Hub
    no more is fetched, unless it is a `.pt` file. Any format that saekit loads will do: SAELens, sparsify,
    dictionary_learning, Gemma Scope, OpenAI and others.

    Example:
      saekit info sae
      saekit info google/gemma-scope-2b-pt-res:layer_20/width_16k/average_l0_71 --json
    """

    sae: Annotated[Path, tyro.conf.Positional]
    """Folder or file of the SAE, its name in `saekit list`, or OWNER/NAME[@REVISION][:PATH] on the Hub."""
    json: bool = False
    """Print the facts as JSON, with everything else that the files record."""
    config: Path | None = None
    """YAML file with any of these settings; flags win over it."""

    def run(self) -> int:
        from saekit.loading import describe

        described = describe(self.sae)
        write_facts(facts_of(described), as_json=self.json, text=lambda: _as_text(described))
        return 0


def facts_of(described: "Description") -> dict[str, Any]:
    """Everything the command knows, by the names that saekit uses elsewhere."""
    from saekit.crosscoder import joined_sites

    weights = described.weights
    tensors = [weights.encoder, weights.decoder, weights.b_enc, weights.b_dec, weights.skip]
    return {
        "format": described.format,
        "file": described.file,
        "bytes": described.size,
        "dtype": described.dtype,
        "d_in": weights.d_in,
        "n_features": weights.n_features,
        "d_out": weights.d_out,
        "parameters": sum(tensor.numel() for tensor in tensors if tensor is not None),
        "rule": {"name": type(weights.rule).__name__, **_numbers_of(weights.rule)},
        "apply_b_dec_to_input": weights.apply_b_dec_to_input,
        "normalisation": type(weights.normalisation).__name__,
        "input_scale": weights.input_scale,
        "skip": weights.skip is not None,
        "hook_name": weights.hook_name,
        "crosscoder_of": list(joined_sites(weights.metadata)),
        "hook_name_out": weights.hook_name_out,
        "model_name": weights.model_name,
        "context_size": weights.context_size,
        "metadata": weights.metadata,
    }


def _numbers_of(rule: "SelectionRule") -> dict[str, Any]:
    """A rule's arguments that are single numbers; cuts and ranks of every feature stay in the file."""
    arguments = {field.name: getattr(rule, field.name) for field in dataclasses.fields(rule)}  # pyright: ignore[reportArgumentType]
    return {name: value for name, value in arguments.items() if value is None or isinstance(value, bool | int | float)}


def _as_text(described: "Description") -> str:
    from saekit.crosscoder import joined_sites

    weights = described.weights
    sites = joined_sites(weights.metadata)
    subtracted = ", b_dec subtracted from the input" if weights.apply_b_dec_to_input else ""
    in_kb = described.size / 1e3
    size = f"{in_kb:.1f} kB" if in_kb < 1e3 else f"{in_kb / 1e3:,.1f} MB"
    rows = [
        ("format", f"{described.format}, {described.dtype}, {size}"),
        ("file", str(described.file)),
        ("shape", f"{weights.d_in:,} -> {weights.n_features:,} features -> {weights.d_out:,}"),
        ("rule", rule_as_text(weights.rule)),
        ("input", f"{_normalisation_as_text(weights.normalisation)}{subtracted}"),
        ("sites", ", ".join(sites)) if sites else ("site", weights.hook_name or UNKNOWN),
        ("model", weights.model_name or UNKNOWN),
    ]
    if weights.hook_name_out:
        rows.insert(6, ("writes", weights.hook_name_out))
    if weights.skip is not None:
        rows.append(("skip", "the raw input reaches the output through a matrix of its own"))
    if weights.input_scale != 1:
        scale = "an unknown number: load it with input_scale" if weights.input_scale is None else weights.input_scale
        rows.append(("scale", f"inputs are multiplied with {scale}"))
    return columns(rows)


def rule_as_text(rule: "SelectionRule") -> str:
    """The rule in one line, whatever number of cuts it has."""
    import torch

    from saekit.selection import Threshold

    if not isinstance(rule, Threshold):
        return repr(rule)
    without = "" if rule.relu else ", without ReLU"
    if isinstance(rule.theta, torch.Tensor) and rule.theta.numel() > 1:
        return f"Threshold, one cut for each feature{without or ' (JumpReLU)'}"
    if float(rule.theta) == 0 and rule.relu:
        return "Threshold(0): ReLU"
    return f"Threshold({float(rule.theta):.6g}), one cut for all{without}"


def _normalisation_as_text(normalisation: Any) -> str:
    return {"Plain": "as it is"}.get(type(normalisation).__name__, repr(normalisation))
