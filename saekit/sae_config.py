"""What an SAE reads and how it was made, and how that and its rule are written in the native folder's config."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor

from saekit import checkpoint, normalisation
from saekit.errors import FileError
from saekit.normalisation import Normalisation, Plain
from saekit.selection import AbsTopK, FeatureChoice, GroupMax, MutualChoice, SelectionRule, Threshold, TopK

# rules that are their arguments; a Threshold's cuts are a tensor of their own
_RULES: tuple[type[SelectionRule], ...] = (TopK, AbsTopK, GroupMax, MutualChoice, FeatureChoice)


@dataclass(frozen=True, kw_only=True, slots=True)
class SAEConfig:
    """What an SAE reads and how it was made, under the names that other tools look for.

    Attributes:
        d_in: width of the activations, `d_model`.
        d_sae: number of features.
        d_out: width of what it writes; None is `d_in`.
        hook_name: the Site it was trained on, as text.
        hook_name_out: the Site it writes, if that is another: then it is a transcoder.
        model_name: the model it was trained on.
        context_size: tokens per row in training.
        apply_b_dec_to_input: whether the encoder reads `x - b_dec`; never where input and output are different Sites.
        normalisation: what happens to each token before encoding.
        metadata: anything else: training recipe, metrics, versions.
    """

    d_in: int
    d_sae: int
    d_out: int | None = None
    hook_name: str = ""
    hook_name_out: str = ""
    model_name: str = ""
    context_size: int | None = None
    apply_b_dec_to_input: bool = True
    normalisation: Normalisation = Plain()
    metadata: Mapping[str, Any] = field(default_factory=dict)

    @property
    def is_transcoder(self) -> bool:
        """Whether it writes another Site than it reads."""
        return bool(self.hook_name_out) or self.d_out not in (None, self.d_in)


def with_metadata(cfg: SAEConfig, **metadata: Any) -> SAEConfig:
    """The same cfg with more metadata."""
    return replace(cfg, metadata={**cfg.metadata, **metadata})


def write(cfg: SAEConfig, rule: SelectionRule, *, skip: bool, dtype: str) -> dict[str, Any]:
    """The contents of `cfg.json`."""
    return checkpoint.describe(
        rule=describe_rule(rule),
        d_in=cfg.d_in,
        d_sae=cfg.d_sae,
        d_out=(cfg.d_out or cfg.d_in) if cfg.is_transcoder else None,
        skip=skip,
        dtype=dtype,
        apply_b_dec_to_input=cfg.apply_b_dec_to_input,
        normalisation={"name": type(cfg.normalisation).__name__, **_as_dict(cfg.normalisation)},
        metadata={
            "hook_name": cfg.hook_name,
            **({"hook_name_out": cfg.hook_name_out} if cfg.hook_name_out else {}),
            "model_name": cfg.model_name,
            "context_size": cfg.context_size,
            **cfg.metadata,
            # SAELens' word for it
            **({"prepend_bos": cfg.metadata["row_bos"]} if "row_bos" in cfg.metadata else {}),
        },
    )


def _as_dict(value: Any) -> dict[str, Any]:
    return {field.name: getattr(value, field.name) for field in fields(value)}


def read_cfg(config: Mapping[str, Any]) -> SAEConfig:
    """The inverse of `write`, but for the rule.

    Raises:
        FileError: a normalisation that this version does not know.
    """
    metadata = dict(config["metadata"])
    if "row_bos" in metadata:
        metadata.pop("prepend_bos", None)
    kind = dict(config["saekit"]["normalisation"])
    name = kind.pop("name", None)
    if name not in normalisation.BY_NAME:
        raise FileError(
            f"this SAE's normalisation is {name!r}, which is none of {', '.join(normalisation.BY_NAME)}; upgrade saekit"
        )
    return SAEConfig(
        d_in=config["d_in"],
        d_sae=config["d_sae"],
        d_out=config.get("d_out"),
        hook_name=metadata.pop("hook_name", ""),
        hook_name_out=metadata.pop("hook_name_out", ""),
        model_name=metadata.pop("model_name", ""),
        context_size=metadata.pop("context_size", None),
        apply_b_dec_to_input=config["apply_b_dec_to_input"],
        normalisation=normalisation.BY_NAME[name](**kind),
        metadata=metadata,
    )


def describe_rule(rule: SelectionRule) -> dict[str, Any]:
    """Name and arguments of a rule, but for its tensors."""
    arguments = {name: value for name, value in _as_dict(rule).items() if name not in ("theta", "ranks")}
    return {"name": type(rule).__name__, **arguments}


def rule_tensors(rule: SelectionRule, n_features: int) -> dict[str, Tensor]:
    """A Threshold's cuts, a FeatureChoice's ranks."""
    if isinstance(rule, Threshold):
        return {"threshold": rule.per_feature(n_features, torch.empty(0))}
    if isinstance(rule, FeatureChoice) and rule.ranks is not None:
        return {"ranks": rule.ranks}
    return {}


def read_rule(described: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> SelectionRule:
    """The inverse of `describe_rule` and `rule_tensors`.

    Raises:
        FileError: a rule, or an argument of one, that this version does not know.
    """
    arguments = dict(described)
    name = arguments.pop("name", None)
    if name == "Threshold":
        return Threshold(tensors["threshold"].float(), relu=bool(arguments.get("relu", True)))
    if name == "FeatureChoice" and "ranks" in tensors:
        arguments["ranks"] = tensors["ranks"]
    try:
        return next(rule for rule in _RULES if rule.__name__ == name)(**arguments)
    except (StopIteration, TypeError) as error:
        known = ", ".join([*(rule.__name__ for rule in _RULES), "Threshold"])
        raise FileError(
            f"this SAE's rule is {dict(described)}, which is none of {known} with their arguments; "
            "upgrade saekit, or copy the folder again"
        ) from error
