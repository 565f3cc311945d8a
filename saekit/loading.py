"""Load an SAE whoever made it, say what is in its files, and write it for other tools.

What each format means is in `saekit.formats`; here its values become an `SAE`, or an `SAE` becomes values again.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from saekit import checkpoint, pretrained, sae_config
from saekit.crosscoder import joined_sites
from saekit.errors import SaekitError, UnknownNameError
from saekit.formats import known, saelens, sparsify
from saekit.formats.files import Files, open_files
from saekit.formats.weights import Weights
from saekit.index import IndexEntry
from saekit.pretrained import Located
from saekit.sae import SAE
from saekit.sae_config import SAEConfig

TARGETS = ("saekit", "saelens", "sparsify")
"""What `convert` can write."""


@dataclass(frozen=True, slots=True)
class Description:
    """What the files of an SAE say of it, its numbers left unread.

    Attributes:
        format: `saekit`, or the name of another library or release.
        file: the one that holds the weights; if it is on the Hub, where it would lie.
        size: of its tensors, in bytes.
        dtype: of the weights on disk.
        weights: with tensors of the right shapes on the meta device.
    """

    format: str
    file: Path
    size: int
    dtype: str
    weights: Weights


def load(name: Path | str, *, input_scale: float | None = None, device: torch.device | str = "cpu") -> SAE:
    """An SAE of any format that `saekit.formats.known` lists, from wherever it is.

    Args:
        name: a local folder or file; an SAE of the index, `gpt2-small-res-jb/blocks.8.hook_resid_pre`; or a place on
            the Hub, `owner/name[@revision][:path]`. The first of these that there is.
        input_scale: what inputs are multiplied with before encoding, for an SAE whose files need that and do not say
            it; it is folded into the weights, so that the SAE takes raw activations. Wins over what the files say.

    Raises:
        FileError: nothing there, no format saekit knows, or files that are damaged, do not fit together, are not what
            the index describes, or could run code.
        UnknownNameError: a release of the index, but no SAE of it.
    """
    return load_located(pretrained.locate(name), input_scale=input_scale, device=device)


def load_located(found: Located, *, input_scale: float | None = None, device: torch.device | str = "cpu") -> SAE:
    """The SAE at a place that is known already; what its files do not say, the index does."""
    files = _corrected(open_files(pretrained.fetch(found)), found.entry)
    weights = with_entry(_read(files), found.entry)
    return build(known.for_raw_inputs(weights, files.weights, input_scale=input_scale), device=device)


def with_entry(weights: Weights, entry: IndexEntry | None) -> Weights:
    """The same weights, with what the index says in place of what their files leave open."""
    if entry is None:
        return weights
    metadata = dict(weights.metadata)
    claims = {"l0": entry.l0, "variance_explained": entry.variance_explained, "neuronpedia_id": entry.neuronpedia}
    metadata |= {name: claim for name, claim in claims.items() if claim is not None and metadata.get(name) is None}
    scale = entry.norm_scaling_factor if weights.input_scale is None else weights.input_scale
    return replace(
        weights,
        hook_name=weights.hook_name or entry.site,
        hook_name_out=weights.hook_name_out or entry.hook_name_out,
        model_name=weights.model_name or entry.model,
        input_scale=scale,
        metadata=metadata,
    )


def describe(name: Path | str) -> Description:
    """What `load` would load, from headers and configs alone; of files on the Hub no more than these is fetched.

    A `.pt` file is fetched as a whole, since it says its shapes nowhere else.

    Raises:
        FileError: as `load` does, but for damage to the numbers themselves.
        UnknownNameError: as `load` does.
    """
    return describe_located(pretrained.locate(name))


def describe_located(found: Located) -> Description:
    """The same of a place that is known already."""
    files = _corrected(pretrained.open_headers(found), found.entry)
    largest = max(files.tensors.values(), key=torch.numel)
    kind = "saekit" if _is_native(files) else known.identify(files).name
    size = sum(tensor.nbytes for tensor in files.tensors.values())
    dtype = str(largest.dtype).removeprefix("torch.")
    return Description(kind, files.weights, size, dtype, with_entry(_read(files), found.entry))


def build(weights: Weights, *, device: torch.device | str = "cpu") -> SAE:
    """The SAE that has these weights, in float32."""
    is_transcoder = bool(weights.hook_name_out) or weights.d_out != weights.d_in
    cfg = SAEConfig(
        d_in=weights.d_in,
        d_sae=weights.n_features,
        d_out=weights.d_out if is_transcoder else None,
        hook_name=weights.hook_name,
        hook_name_out=weights.hook_name_out,
        model_name=weights.model_name,
        context_size=weights.context_size,
        apply_b_dec_to_input=weights.apply_b_dec_to_input,
        normalisation=weights.normalisation,
        metadata=weights.metadata,
    )
    return SAE.of(
        weights.rule,
        cfg,
        encoder=weights.encoder.float(),
        decoder=weights.decoder.float(),
        b_enc=weights.b_enc.float(),
        b_dec=weights.b_dec.float(),
        skip=None if weights.skip is None else weights.skip.float(),
    ).to(device)


def weights_of(sae: SAE) -> Weights:
    """The inverse of `build`."""
    return Weights(
        encoder=sae.encoder.detach(),
        decoder=sae.decoder.detach(),
        b_enc=sae.b_enc.detach(),
        b_dec=sae.b_dec.detach(),
        rule=sae.rule,
        normalisation=sae.cfg.normalisation,
        skip=sae.W_skip,
        apply_b_dec_to_input=sae.cfg.apply_b_dec_to_input,
        hook_name=sae.cfg.hook_name,
        hook_name_out=sae.cfg.hook_name_out,
        model_name=sae.cfg.model_name,
        context_size=sae.cfg.context_size,
        metadata=sae.cfg.metadata,
    )


def convert(sae: SAE, folder: Path | str, *, to: str) -> None:
    """Write an SAE for saekit, SAELens or sparsify, where it behaves exactly as here.

    A calibrated Mutual- or Feature-Choice SAE is a JumpReLU SAE with its thresholds. A Site of the residual stream
    gets TransformerLens' name in a folder for SAELens, and keeps its own as `hf_hook_name`.

    Args:
        to: one of `TARGETS`.

    Raises:
        SaekitError: if the other tool has no such SAE, or the folder cannot be written.
    """
    if to != "saekit" and (sites := joined_sites(sae.cfg.metadata)):
        raise SaekitError(
            f"a crosscoder of {', '.join(sites)} cannot be written for {to}, whose SAEs have one Site; choose saekit"
        )
    match to:
        case "saekit":
            sae.save(folder)
        case "saelens":
            saelens.check_lossless(weights_of(sae))
            named = build(replace(weights_of(sae), **_lens_names(sae.cfg)))
            named.save(folder)
        case "sparsify":
            config, tensors = sparsify.write(weights_of(sae))
            checkpoint.save(Path(folder), config=config, tensors=tensors, weights_file=sparsify.WEIGHTS_FILE)
        case _:
            raise UnknownNameError("format to write", to, TARGETS)


def _lens_names(cfg: SAEConfig) -> dict[str, Any]:
    sites = {"hook_name": cfg.hook_name, "hook_name_out": cfg.hook_name_out}
    renamed = {name: saelens.hook_name(site) for name, site in sites.items()}
    kept = {f"hf_{name}": site for name, site in sites.items() if renamed[name] != site}
    return {**renamed, "metadata": {**cfg.metadata, **kept}}


def _corrected(files: Files, entry: IndexEntry | None) -> Files:
    return files.with_settings(entry.config_overrides) if entry and entry.config_overrides else files


def _is_native(files: Files) -> bool:
    return "saekit" in files.config


def _read(files: Files) -> Weights:
    if not _is_native(files):
        return known.read(files)
    # sae_config knows rules and normalisations by name, and lives above `formats`
    config, tensors = checkpoint.read_config(files.folder), files.tensors
    checkpoint.check_tensors(files.weights, config, tensors)
    cfg = sae_config.read_cfg(config)
    return Weights(
        encoder=tensors["W_enc"].T,
        decoder=tensors["W_dec"],
        b_enc=tensors["b_enc"],
        b_dec=tensors["b_dec"],
        rule=sae_config.read_rule(config["saekit"]["rule"], tensors),
        normalisation=cfg.normalisation,
        skip=tensors.get("W_skip"),
        apply_b_dec_to_input=cfg.apply_b_dec_to_input,
        hook_name=cfg.hook_name,
        hook_name_out=cfg.hook_name_out,
        model_name=cfg.model_name,
        context_size=cfg.context_size,
        metadata=cfg.metadata,
    )
