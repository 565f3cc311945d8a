"""What the study runs: the table of all rules in every cell, and what was looked into beside it."""

from collections.abc import Iterator, Sequence
from itertools import product
from typing import Any

from benchmarks.allocation.runs import BY_PEER, RULES, Run

DATASETS = ("pystd", "stories260K", "synthetic", "synthetic_outliers", "synthetic_outliers_uncentred")
IN_TABLE = ("pystd", "stories260K", "synthetic_outliers")
FULL_TOKENS = 1_024_000
QUICK_TOKENS = 131_072

TOPK_LOSSES = ("topk+aux_k", "topk+aux_zipf", "topk+aux_zipf_by_feature")
BY_FEATURE_RULES = (
    "topk+aux_zipf_by_feature",
    "mutual+aux_zipf_by_feature",
    "mutual+aux_zipf_by_feature+equal_norms",
)
VARIANTS = (
    *BY_FEATURE_RULES,
    "matryoshka_mutual",
    "topk+aux_zipf+equal_norms",
    "feature_zipf+aux_zipf+no_relu",
    "feature_fitted+aux_zipf",
)
TABLE_RULES = tuple(rule for rule in RULES if rule not in VARIANTS)
# rules whose learning rate is looked into: not the peer's own trainer, nor a rule that begins as one of these
RATED = tuple(rule for rule in TABLE_RULES if rule not in (*BY_PEER, "mutual_then_feature"))
AT_TWICE = (
    *TOPK_LOSSES,
    "mutual+aux_zipf",
    "mutual+aux_zipf+equal_norms",
    "mutual+aux_zipf_by_feature+equal_norms",
    "feature_zipf+aux_zipf",
    "jumprelu",
)

MILD = {"datasets": ("stories260K",), "expansions": (16,), "ks": (32,)}
TIGHT = {"datasets": ("stories260K",), "expansions": (64,), "ks": (8,)}
PYSTD = {"datasets": ("pystd",), "expansions": (16,), "ks": (32,)}
ONE = {"seeds": (0,)}

BESIDE: tuple[dict[str, Any], ...] = (
    # variants: three seeds where much is known, one elsewhere
    MILD | {"rules": VARIANTS},
    TIGHT | {"rules": VARIANTS},
    PYSTD | {"rules": (*BY_FEATURE_RULES, "topk+aux_zipf+equal_norms")},
    {"datasets": ("stories260K",), "expansions": (16,), "ks": (8,), "rules": ("topk+aux_zipf_by_feature",)},
    {"datasets": ("synthetic_outliers",), "ks": (8,), "rules": ("matryoshka_mutual",)},
    ONE | {"expansions": (16,), "rules": (*BY_FEATURE_RULES, "matryoshka_mutual")},
    ONE
    | {"datasets": ("stories260K",), "expansions": (64,), "ks": (32,), "rules": ("matryoshka_mutual", *TOPK_LOSSES)},
    ONE | {"datasets": ("pystd",), "expansions": (64,), "ks": (8,), "rules": BY_FEATURE_RULES},
    # learning rates
    MILD | ONE | {"rules": tuple(rule for rule in RATED if rule != "topk+aux_zipf"), "lr_scales": (0.5,)},
    MILD | ONE | {"rules": (*RATED, *BY_FEATURE_RULES), "lr_scales": (2.0, 4.0)},
    MILD | ONE | {"rules": ("matryoshka_mutual",), "lr_scales": (2.0,)},
    TIGHT | ONE | {"rules": (*RATED, *BY_FEATURE_RULES), "lr_scales": (2.0, 4.0)},
    MILD | ONE | {"rules": ("topk+aux_k", "mutual+aux_zipf"), "lr_scales": (8.0,)},
    TIGHT | ONE | {"rules": ("topk+aux_k", "mutual+aux_k", "mutual+aux_zipf+equal_norms"), "lr_scales": (8.0,)},
    MILD | {"rules": AT_TWICE, "lr_scales": (2.0,)},
    TIGHT | {"rules": AT_TWICE, "lr_scales": (2.0,)},
    PYSTD | {"rules": AT_TWICE, "lr_scales": (2.0,)},
    PYSTD | ONE | {"rules": ("mutual+aux_k", "mutual+aux_zipf_by_feature"), "lr_scales": (2.0,)},
    PYSTD
    | ONE
    | {
        "rules": ("topk+aux_k", "mutual+aux_k", "mutual+aux_zipf", "feature_zipf+aux_zipf", "jumprelu"),
        "lr_scales": (4.0,),
    },
    {"datasets": ("stories260K",), "expansions": (16,), "ks": (8,), "rules": TOPK_LOSSES, "lr_scales": (2.0,)},
    ONE | {"datasets": ("stories260K",), "expansions": (64,), "ks": (32,), "rules": TOPK_LOSSES, "lr_scales": (2.0,)},
    ONE | {"datasets": ("pystd",), "expansions": (16,), "ks": (8,), "rules": TOPK_LOSSES, "lr_scales": (2.0,)},
    # longer runs
    MILD
    | ONE
    | {
        "rules": (*TOPK_LOSSES, "mutual+aux_zipf", "mutual+aux_zipf_by_feature+equal_norms"),
        "lr_scales": (1.0, 2.0),
        "tokens": 4_096_000,
    },
    MILD
    | ONE
    | {
        "rules": ("topk+aux_zipf", "topk+aux_zipf_by_feature"),
        "lr_scales": (1.0, 2.0),
        "tokens": 16_384_000,
    },
    # the inputs that kill features
    {
        "datasets": ("synthetic_outliers_uncentred",),
        "expansions": (64,),
        "ks": (8,),
        "rules": ("topk", "topk+aux_k", "mutual+aux_zipf", "feature_zipf+aux_zipf"),
    },
)


def full(
    *,
    datasets: Sequence[str] = IN_TABLE,
    rules: Sequence[str] = TABLE_RULES,
    expansions: Sequence[int] = (16, 64),
    ks: Sequence[int] = (8, 32),
    seeds: Sequence[int] = (0, 1, 2),
    tokens: int = FULL_TOKENS,
    lr_scales: Sequence[float] = (1.0,),
) -> Iterator[Run]:
    """Everything with everything. Seeds are outermost: after a third of the time there is a whole table.

    Data sets come next, so that one at a time has its activations on disk.
    """
    for seed, dataset, expansion, k, rule, lr_scale in product(seeds, datasets, expansions, ks, rules, lr_scales):
        yield Run(dataset=dataset, rule=rule, expansion=expansion, k=k, seed=seed, tokens=tokens, lr_scale=lr_scale)


def everything() -> list[Run]:
    """The table, then what is beside it; each run once."""
    return list(dict.fromkeys([*full(), *(run for grid in BESIDE for run in full(**grid))]))


def quick() -> Iterator[Run]:
    """Ten minutes: does every rule run, and is every column filled? Too short to compare rules by."""
    grids = {
        "synthetic_outliers_uncentred": tuple(rule for rule in RULES if rule != "feature_fitted+aux_zipf"),
        "stories260K": ("topk+aux_k", "mutual+aux_zipf", "feature_fitted+aux_zipf"),
        "pystd": ("mutual+aux_zipf",),
    }
    for dataset, rules in grids.items():
        yield from full(datasets=(dataset,), rules=rules, expansions=(16,), ks=(8,), seeds=(0,), tokens=QUICK_TOKENS)
