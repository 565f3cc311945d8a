"""What the flags of `saekit train` say, as configs of a training."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from saekit.losses import AuxK, AuxZipf
    from saekit.sae import SAE
    from saekit.selection import SelectionRule
    from saekit.targets import Target
    from saekit.training.config import TrainConfig
    from saekit.training.objectives import Objective

    from .train import Train


def train_configs(command: "Train", target: "Target", starts: Sequence["SAE"] = ()) -> list["TrainConfig"]:
    """What the flags say, and what follows from the SAEs to go on from, as one config per Site."""
    from saekit.errors import SaekitError
    from saekit.targets import Site
    from saekit.training.config import TrainConfig
    from saekit.training.schedule import ThenFeatureChoice

    named = command.site or [start.cfg.hook_name for start in starts]
    sites = [Site.parse(site) for site in named] or [target.middle_site()]
    if starts and len(starts) != len(sites):
        raise SaekitError(f"{len(starts)} SAEs to start from for {len(sites)} Sites; give one --start for each --site")
    sites_out = [Site.parse(site) for site in command.site_out] or [None] * len(sites)
    if len(sites_out) != len(sites):
        raise SaekitError(
            f"{len(sites_out)} Sites to reconstruct for {len(sites)} to read; give one --site-out for each --site"
        )
    for site in filter(None, [*sites, *sites_out]):
        site.resolve(target.model)
    pairs = list(zip(sites, sites_out, strict=True))
    if len(set(pairs)) < len(pairs):
        raise SaekitError("one Site is named twice, and its SAE would be the same twice; name each once")
    if command.exponent and command.rule != "feature":
        raise SaekitError(f"--exponent shapes the budgets of --rule feature, not of {command.rule}; leave it away")
    if command.offset and not command.exponent:
        raise SaekitError(
            f"--offset {command.offset} flattens a curve, and equal budgets have none; pass --exponent too"
        )
    if command.features is not None and command.features < 1:
        raise SaekitError(f"features={command.features}: give at least 1, or leave it out")
    n_features = command.features or (starts[0].n_features if starts else 4096)
    rule, objective = rule_and_objective(command)
    return [
        TrainConfig(
            site=site,
            site_out=site_out,
            skip=command.skip,
            rule=rule,
            objective=objective,
            then=None if command.then_feature is None else ThenFeatureChoice(at=command.then_feature),
            n_features=n_features,
            tokens=command.tokens,
            batch_tokens=command.batch_tokens,
            seed=command.seed,
            learning_rate=command.learning_rate,
            auxiliary=auxiliary_of(command),
            equal_norms=command.equal_norms,
            bf16_screening=command.bf16_screening,
        )
        for site, site_out in pairs
    ]


def auxiliary_of(command: "Train") -> "AuxZipf | AuxK | None":
    """Who is asked to explain what is left over."""
    from saekit.errors import SaekitError
    from saekit.losses import AuxK, AuxZipf

    bf16, sample = command.bf16_auxiliary, command.auxiliary_sample
    if command.auxiliary == "none":
        given = [
            ("--bf16-auxiliary", bf16),
            ("--auxiliary-sample", sample != 1),
            ("--auxiliary-claim", command.auxiliary_claim != "token"),
        ]
        for flag in (flag for flag, is_given in given if is_given):
            raise SaekitError(f"{flag} is about a loss that --auxiliary none leaves out; leave one of them away")
        return None
    if bf16 and command.auxiliary_claim == "feature":
        raise SaekitError("--auxiliary-claim feature has nothing for --bf16-auxiliary to round; leave one of them away")
    if command.auxiliary == "zipf":
        return AuxZipf(bf16=bf16, sample=sample, claim=command.auxiliary_claim)
    if command.auxiliary_claim != "token":
        raise SaekitError(
            f"--auxiliary-claim {command.auxiliary_claim} is about --auxiliary zipf; leave one of them away"
        )
    return AuxK(bf16=bf16, sample=sample)


def rule_and_objective(command: "Train") -> tuple["SelectionRule", "Objective"]:
    """Which matches are kept, and what is asked beside that."""
    from saekit.errors import SaekitError
    from saekit.selection import FeatureChoice, MutualChoice, Threshold, TopK
    from saekit.training.objectives import Gated, JumpReLU, Matryoshka, Reconstruction, ReLUL1

    penalised = {"relu": ReLUL1, "gated": Gated, "jumprelu": JumpReLU}
    if command.rule in penalised:
        if command.then_feature is not None:
            raise SaekitError(f"--then-feature goes on from a rule that has a budget, not {command.rule}; try mutual")
        if command.matryoshka or command.no_relu:
            flag = "--matryoshka" if command.matryoshka else "--no-relu"
            raise SaekitError(f"{flag} goes with a rule that has a budget, not with {command.rule}; try mutual")
        return Threshold(0.0), penalised[command.rule](command.k)
    relu = not command.no_relu
    rules = {
        "topk": lambda: TopK(command.k, relu=relu),
        "mutual": lambda: MutualChoice(command.k, relu=relu),
        "feature": lambda: FeatureChoice(command.k, exponent=command.exponent, offset=command.offset, relu=relu),
    }
    return rules[command.rule](), Matryoshka() if command.matryoshka else Reconstruction()


def described(config: "TrainConfig") -> str:
    """The rule, or what takes its place, in a few words."""
    from saekit.selection import Threshold
    from saekit.training.objectives import Reconstruction

    if isinstance(config.objective, Reconstruction):
        return repr(config.rule)
    return repr(config.objective) if isinstance(config.rule, Threshold) else f"{config.rule}, {config.objective}"
